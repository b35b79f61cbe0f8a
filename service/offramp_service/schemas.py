"""The bodies of `/classify`: vLLM's, field by field, plus our controls at top level.

msgspec reads and writes them: strict (`true` is not a number, `"2"` neither) and several times
faster than a validating framework. Their JSON schemas go into `/openapi.json`. What values mean
is checked elsewhere; here are types only.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from offramp_service.errors import InvalidInput, ServiceError

# One text, several texts, the token ids of one text, or of several. A JSON type per element is
# all that msgspec can tell apart; that a list is of one kind is checked by the route.
Input = str | list[str | int | list[int]]


class ClassifyRequest(Struct, forbid_unknown_fields=True, kw_only=True):
    """A request. Unknown fields are ignored and named in the response header x-ignored-fields."""

    input: Annotated[
        Input, Meta(description="a text, texts, token ids of a text, or token ids of texts")
    ]
    text_pair: Annotated[
        str | list[str] | None, Meta(description="second text of each pair, aligned with input")
    ] = None
    model: str | None = None
    # Early exit
    speedup: Annotated[
        float | None, Meta(description="target compute ratio in layers; 1 = never leave early")
    ] = None
    threshold: Annotated[
        float | None, Meta(description="raw threshold of the exit policy; overrides speedup")
    ] = None
    min_layer: Annotated[int | None, Meta(description="earliest exit, 1-based")] = None
    max_layer: Annotated[int | None, Meta(description="latest exit, 1-based")] = None
    deadline_ms: Annotated[
        float | None, Meta(description="504 for answers that would take longer")
    ] = None
    return_details: Annotated[bool, Meta(description="add details to each item")] = False
    # vLLM's extras
    use_activation: Annotated[
        bool | None, Meta(description="false: logits instead of probabilities")
    ] = None
    truncate_prompt_tokens: Annotated[
        int | None, Meta(description="cut texts to so many tokens; -1 = the model's limit")
    ] = None
    truncation_side: Literal["left", "right"] | None = None
    add_special_tokens: bool = True
    request_id: str | None = None
    # Accepted for vLLM's clients, without effect here
    user: str | None = None
    priority: int = 0
    padding: Any = None
    cache_salt: str | None = None


class Timings(Struct):
    """Milliseconds."""

    tokenization: float
    queue: float
    inference: float
    total: float


class Details(Struct):
    """How a text left. `threshold` is null where it could not leave early."""

    exit_layer: int
    num_layers: int
    exit_signal: float | None
    threshold: float | None
    timings_ms: Timings


class Item(Struct):
    """The answer to one text. `probs` are in label-id order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int
    details: Details | UnsetType = UNSET


class Usage(Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: None = None


class ClassifyResponse(Struct, kw_only=True):
    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Item]
    usage: Usage


class ErrorDetail(Struct):
    message: str
    type: str
    param: str | None
    code: int


class ErrorResponse(Struct):
    error: ErrorDetail


class _TolerantRequest(ClassifyRequest, forbid_unknown_fields=False, kw_only=True):
    """The same, where unknown fields are passed over."""


encode_json = msgspec.json.Encoder().encode
_decode_request = msgspec.json.Decoder(ClassifyRequest).decode
_decode_tolerantly = msgspec.json.Decoder(_TolerantRequest).decode
# Cut up, not read: values stay bytes.
_decode_fields = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_decode_items = msgspec.json.Decoder(list[msgspec.Raw]).decode
_decode_anything = msgspec.json.Decoder(msgspec.Raw).decode
_FIELDS = frozenset(ClassifyRequest.__struct_fields__)
_SPOKEN = {
    "float": "number",
    "int": "integer",
    "str": "string",
    "bool": "true or false",
    "array": "list",
}
_SHOWN = 60  # characters of an offending value that an error repeats


def error_body(error: ServiceError) -> bytes:
    """The error format of vLLM, for this door and for paths that belong to no door."""
    detail = ErrorDetail(error.message, error.kind, error.param, error.status)
    return encode_json(ErrorResponse(detail))


def read_request(body: bytes) -> tuple[ClassifyRequest, list[str]]:
    """The request, and the names of fields in it that nobody knows.

    Raises:
        InvalidInput: 400 if it is not JSON, 422 if it is not a request; names the field, what
            was given and what is allowed.
    """
    try:
        try:
            return _decode_request(body), []
        except msgspec.ValidationError:
            return _read_carefully(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput(f"the body is not JSON: {error}", status=400) from None
    except RecursionError:
        raise InvalidInput("the body is nested too deeply", status=400) from None


def _read_carefully(body: bytes) -> tuple[ClassifyRequest, list[str]]:
    """For bodies with unknown fields or with mistakes to explain. It stays cheap: what nobody
    knows can be large, and is never made into objects."""
    try:
        fields = _decode_fields(body)
    except msgspec.ValidationError:
        content = _decode_anything(body)
        raise InvalidInput(f"the body is {_show(content)}, allowed is a JSON object") from None
    if "messages" in fields:
        raise InvalidInput(
            "chat messages are not supported; send the text as input", param="messages"
        )
    if "input" not in fields:
        raise InvalidInput("input is missing; allowed is a text or a list", param="input")
    try:
        request = _decode_tolerantly(body)
    except msgspec.ValidationError as error:
        raise _explain(str(error), fields) from None
    return request, [name for name in fields if name not in _FIELDS]


def _explain(message: str, fields: dict[str, msgspec.Raw]) -> InvalidInput:
    """msgspec's "Expected …, got … - at `$.field`", with the field first and the value given."""
    expected, _, path = message.partition(" - at `$.")
    path = path.rstrip("`")
    field = path.partition("[")[0]
    given = fields[field]
    if path != field:
        given = _decode_items(given)[int(path[len(field) + 1 :].partition("]")[0])]
    if expected.endswith("out of range"):
        return InvalidInput(f"{path} is {_show(given)}, too large a number", param=path)
    types = expected.partition(", got")[0].removeprefix("Expected ").replace("`", "")
    allowed = " or ".join(_SPOKEN.get(one, one) for one in types.split(" | "))
    if field == "truncation_side":
        allowed = "left or right"
    return InvalidInput(f"{path} is {_show(given)}, allowed is {allowed}", param=path)


def _show(value: msgspec.Raw) -> str:
    """The JSON as the client wrote it, or its beginning."""
    start = memoryview(value)[: 4 * (_SHOWN + 1)]  # a character has at most 4 bytes
    text = bytes(start).decode(errors="replace")
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def openapi(request: type, response: type) -> dict[str, Any]:
    """What FastAPI cannot see of a route that reads and writes its own bodies."""
    (asked, answered, failed), components = msgspec.json.schema_components(
        [request, response, ErrorResponse], ref_template="#/components/schemas/{name}"
    )

    def inline(schema: dict[str, Any]) -> dict[str, Any]:
        """References resolved in place: FastAPI has no room for foreign components."""
        reference = schema.get("$ref")
        if isinstance(reference, str):
            return inline(components[reference.rpartition("/")[2]])
        return {key: _walk(value) for key, value in schema.items()}

    def _walk(value: Any) -> Any:
        if isinstance(value, dict):
            return inline(value)
        return [_walk(one) for one in value] if isinstance(value, list) else value

    # Unknown fields are ignored, not refused (see `read_request`).
    body = inline(asked) | {"additionalProperties": True}
    failure = {"content": {"application/json": {"schema": inline(failed)}}}
    meanings = {
        "400": "Malformed or empty",
        "404": "Unknown model",
        "413": "Body too large or too many texts",
        "422": "A value or a length is not allowed",
        "429": "Queue full; see Retry-After",
        "500": "The model failed",
        "503": "Starting or shutting down; see Retry-After",
        "504": "No answer in time",
    }
    return {
        "requestBody": {"required": True, "content": {"application/json": {"schema": body}}},
        "responses": {
            "200": {
                "description": "Answers in the order of the texts",
                "content": {"application/json": {"schema": inline(answered)}},
            },
            **{code: {"description": text, **failure} for code, text in meanings.items()},
        },
    }
