"""Reading a JSON body as a request, and explaining what is wrong with one that cannot be.

It knows no door: a reader is made of the door's request types.
"""

import re
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

import msgspec

from offramp_service.errors import InvalidInput

R = TypeVar("R", bound=msgspec.Struct)

encode_json = msgspec.json.Encoder().encode
# Cut up, not read: values stay bytes.
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_anything = msgspec.json.Decoder(msgspec.Raw).decode
_SPOKEN = {
    "float": "number",
    "int": "integer",
    "str": "string",
    "bool": "true or false",
    "array": "list",
}
_STEP = re.compile(r"\.(\w+)|\[(\d+)\]")
_MISSING = re.compile(r"Object missing required field `(\w+)`")
_SHOWN = 60  # characters of an offending value that an error repeats


class Reader(Generic[R]):
    """Reads one kind of request.

    Args:
        strict: the request; unknown fields are forbidden.
        tolerant: the same, where they are passed over.
        required: the field that holds what is asked about.
        choices: field → what it may be, where the type does not say it.
        refused: field → why nobody can have it.
    """

    def __init__(
        self,
        strict: type[R],
        tolerant: type[R],
        *,
        required: str,
        choices: Mapping[str, str] | None = None,
        refused: Mapping[str, str] | None = None,
    ) -> None:
        self._strict = msgspec.json.Decoder(strict).decode
        self._tolerant = msgspec.json.Decoder(tolerant).decode
        self._kind, self._required = strict, required
        self._choices, self._refused = choices or {}, refused or {}

    def __call__(self, body: bytes) -> tuple[R, list[str]]:
        """The request, and the names of fields in it that nobody knows.

        Raises:
            InvalidInput: 400 if it is not JSON, 422 if it is not a request; names the field, what
                was given and what is allowed.
        """
        try:
            try:
                return self._strict(body), []
            except msgspec.ValidationError:
                return self._read_carefully(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(f"the body is not JSON: {error}", status=400) from None
        except RecursionError:
            raise InvalidInput("the body is nested too deeply", status=400) from None

    def _read_carefully(self, body: bytes) -> tuple[R, list[str]]:
        """For bodies with unknown fields or with mistakes to explain. It stays cheap: what nobody
        knows can be large, and is never made into objects."""
        try:
            fields = _decode_fields(body)
        except msgspec.ValidationError:
            content = _decode_anything(body)
            raise InvalidInput(f"the body is {_show(content)}, allowed is a JSON object") from None
        for field, reason in self._refused.items():
            if field in fields:
                raise InvalidInput(reason, param=field)
        if self._required not in fields:
            raise InvalidInput(f"{self._required} is missing", param=self._required)
        try:
            request = self._tolerant(body)
        except msgspec.ValidationError as error:
            raise self._explain(str(error), fields) from None
        return request, list(_unknown(fields, self._kind))

    def _explain(self, message: str, fields: dict[str, msgspec.Raw]) -> InvalidInput:
        """msgspec's "Expected …, got … - at `$.field`", with the field first and the value
        given."""
        expected, _, path = message.partition(" - at `$")
        path = path.rstrip("`")
        steps = list(_STEP.finditer(path))
        where = path.removeprefix(".")
        try:
            given = _follow(fields, [step[1] or int(step[2]) for step in steps])
        except (LookupError, msgspec.ValidationError):  # a field that is there twice
            message = f"{where} is not what it may be; is a field there twice?"
            return InvalidInput(message, param=where)
        if missing := _MISSING.match(expected):
            param = f"{where}.{missing[1]}"
            return InvalidInput(f"{param} is missing", param=param)
        if expected.endswith("out of range"):
            return InvalidInput(f"{where} is {_show(given)}, too large a number", param=where)
        types = expected.partition(", got")[0].removeprefix("Expected ").replace("`", "")
        allowed = " or ".join(_SPOKEN.get(one, one) for one in types.split(" | "))
        field = next((step[1] for step in reversed(steps) if step[1]), "")
        allowed = self._choices.get(field, allowed)
        return InvalidInput(f"{where} is {_show(given)}, allowed is {allowed}", param=where)


def _unknown(fields: Mapping[str, msgspec.Raw], kind: type[msgspec.Struct]) -> list[str]:
    """Names of fields that a request does not have, those of the objects in it included."""
    types = {field.name: field.type for field in msgspec.structs.fields(kind)}
    found = []
    for name, value in fields.items():
        if name not in types:
            found.append(name)
        elif (inner := _struct_in(types[name])) and bytes(memoryview(value)[:1]) == b"{":
            found += [f"{name}.{one}" for one in _unknown(_decode_fields(value), inner)]
    return found


def _struct_in(kind: Any) -> type[msgspec.Struct] | None:
    """The object that a field may hold, if it may."""
    for one in getattr(kind, "__args__", (kind,)):
        if isinstance(one, type) and issubclass(one, msgspec.Struct):
            return one
    return None


def _follow(fields: dict[str, msgspec.Raw], steps: list[str | int]) -> msgspec.Raw:
    given = fields[str(steps[0])]
    for step in steps[1:]:
        if isinstance(step, int):  # noqa: SIM108 - their types differ
            given = _decode_items(given)[step]
        else:
            given = _decode_fields(given)[step]
    return given


def _show(value: msgspec.Raw) -> str:
    """The JSON as the client wrote it, or its beginning."""
    start = memoryview(value)[: 4 * (_SHOWN + 1)]  # a character has at most 4 bytes
    text = bytes(start).decode(errors="replace")
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"
