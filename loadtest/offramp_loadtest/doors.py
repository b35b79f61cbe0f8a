"""What a question looks like at each door of a server, and where its answer has the labels.

Five doors: TEI's `/predict`, vLLM's `/classify`, the Open Inference Protocol as JSON (`v2`) and
with binary tensors (`v2-binary`), KServe's V1. Only the standard library, so that other load tools
can borrow it. It knows nothing of connections.
"""

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Controls = Mapping[str, Any]

DOORS = ("vllm", "tei", "v2", "v2-binary", "v1")
OUTPUTS = ("label", "probabilities", "exit_layer")

HEADER_LENGTH = "inference-header-content-length"
_BYTES_LENGTH = struct.Struct("<I")


@dataclass(frozen=True, slots=True)
class Body:
    """What is posted, and where to."""

    path: str
    content: bytes
    content_type: str = "application/json"
    headers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Answers:
    """Of one request, text by text; exit layers where the answer has them."""

    labels: Sequence[str]
    exit_layers: Sequence[int] = ()


def needs_model(door: str) -> bool:
    """The path names the model."""
    return door in ("v2", "v2-binary", "v1")


def write(door: str, texts: Sequence[str], model: str, controls: Controls, *, single: bool) -> Body:
    """A question with one text as such, or with a list of texts.

    Raises:
        ValueError: there is no such door.
    """
    given = texts[0] if single else list(texts)
    match door:
        case "vllm":
            content = {"input": given, **_at_top_level(controls)}
            if model:
                content["model"] = model
            return Body("/classify", _json(content))
        case "tei":
            # A list of strings would be one pair.
            inputs = given if single else [[one] for one in texts]
            return Body("/predict", _json({"inputs": inputs, **_in_parameters(controls)}))
        case "v2":
            tensor = {"name": "text", "datatype": "BYTES", "shape": [len(texts)]}
            content = _v2(tensor | {"data": list(texts)}, controls, binary=False)
            return Body(f"/v2/models/{model}/infer", _json(content))
        case "v2-binary":
            return _binary(texts, model, controls)
        case "v1":
            content = {"instances": list(texts), **_parameters(controls)}
            return Body(f"/v1/models/{model}:predict", _json(content))
    raise ValueError(f"door is {door!r}, allowed are {', '.join(DOORS)}")


def _at_top_level(controls: Controls) -> dict[str, Any]:
    """vLLM's own word for truncation: to the model's limit."""
    found = {name: value for name, value in controls.items() if name != "truncate"}
    return found | ({"truncate_prompt_tokens": -1} if controls.get("truncate") else {})


def _in_parameters(controls: Controls) -> dict[str, Any]:
    """TEI has truncation at top level."""
    rest = {name: value for name, value in controls.items() if name != "truncate"}
    top = {"truncate": controls["truncate"]} if "truncate" in controls else {}
    return top | _parameters(rest)


def _parameters(controls: Controls) -> dict[str, Any]:
    return {"parameters": dict(controls)} if controls else {}


def _v2(tensor: dict[str, Any], controls: Controls, *, binary: bool) -> dict[str, Any]:
    outputs: list[dict[str, Any]] = [{"name": name} for name in OUTPUTS]
    if binary:
        outputs = [one | {"parameters": {"binary_data": True}} for one in outputs]
    return {"inputs": [tensor], "outputs": outputs, **_parameters(controls)}


def _binary(texts: Sequence[str], model: str, controls: Controls) -> Body:
    packed = [text.encode() for text in texts]
    raw = b"".join(_BYTES_LENGTH.pack(len(one)) + one for one in packed)
    tensor = {
        "name": "text",
        "datatype": "BYTES",
        "shape": [len(texts)],
        "parameters": {"binary_data_size": len(raw)},
    }
    head = _json(_v2(tensor, controls, binary=True))
    return Body(
        f"/v2/models/{model}/infer",
        head + raw,
        "application/octet-stream",
        (f"{HEADER_LENGTH}: {len(head)}",),
    )


def _json(content: object) -> bytes:
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


# -- what no server can answer -------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Malformed:
    """A request that is wrong on purpose, and the statuses that say so."""

    name: str
    body: Body
    statuses: frozenset[int]


REFUSED = frozenset((400, 413, 422))


def malformed(door: str, model: str) -> list[Malformed]:
    """One of each kind, in the form of a door."""
    fine = write(door, ["a text"], model, {}, single=True)
    path, field = fine.path, {"vllm": "input", "tei": "inputs", "v1": "instances"}
    name = field.get(door, "inputs")
    wrong = write(door, ["a text"], model, {"speedup": -1.0}, single=True)
    kinds = [
        Malformed("not JSON", Body(path, b'{"' + name.encode() + b'": '), frozenset((400,))),
        Malformed("no text", Body(path, b"{}"), frozenset((400, 422))),
        Malformed("a number for a text", Body(path, _json({name: 3})), frozenset((400, 422))),
        Malformed("speed-up below 0", wrong, frozenset((422,))),
    ]
    if door == "vllm" or needs_model(door):
        other = write(door, ["a text"], "no-such-model", {}, single=True)
        kinds.append(Malformed("unknown model", other, frozenset((404,))))
    return kinds


# -- answers -------------------------------------------------------------------------------------


def read(door: str, body: bytes, header_length: str | None = None) -> Answers:
    """The labels, text by text; `header_length` is that header of the answer.

    Raises:
        ValueError: the answer is not what the door's answers are.
    """
    try:
        match door:
            case "vllm":
                return _read_vllm(json.loads(body))
            case "tei":
                return Answers(_read_tei(json.loads(body)))
            case "v1":
                return Answers([one["label"] for one in json.loads(body)["predictions"]])
            case _:
                return _read_v2(body, header_length)
    except (KeyError, IndexError, TypeError, AttributeError, struct.error) as error:
        raise ValueError(f"not an answer of {door}: {body[:80]!r}") from error


def _read_vllm(content: Any) -> Answers:
    items = content["data"]
    layers = [one["details"]["exit_layer"] for one in items if "details" in one]
    return Answers([one["label"] for one in items], layers)


def _read_tei(content: Any) -> list[str]:
    """Labels best first: of one text, of a list of texts; with details an object around them."""
    items = content if isinstance(content, list) else [content]
    if "label" in items[0]:
        return [items[0]["label"]]
    lists = [one["scores"] if isinstance(one, dict) else one for one in items]
    return [scores[0]["label"] for scores in lists]


def _read_v2(body: bytes, header_length: str | None) -> Answers:
    size = len(body) if header_length is None else int(header_length)
    outputs, place = json.loads(body[:size])["outputs"], size
    found: dict[str, Any] = {}
    for one in outputs:
        raw_size = one.get("parameters", {}).get("binary_data_size")
        if raw_size is None:
            found[one["name"]] = one["data"]
            continue
        raw = body[place : place + raw_size]
        place += raw_size
        if one["datatype"] == "BYTES":
            found[one["name"]] = _strings(raw)
        elif one["datatype"] == "INT32":
            found[one["name"]] = list(struct.unpack(f"<{len(raw) // 4}i", raw))
    return Answers(found["label"], found.get("exit_layer", ()))


def _strings(raw: bytes) -> list[str]:
    found, place = [], 0
    while place < len(raw):
        start = place + _BYTES_LENGTH.size
        stop = start + _BYTES_LENGTH.unpack_from(raw, place)[0]
        found.append(raw[start:stop].decode())
        place = stop
    return found
