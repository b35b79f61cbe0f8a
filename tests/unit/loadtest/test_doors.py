"""Bodies and answers of the five doors; that real servers understand them is shown end to end."""

import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.doors import DOORS, HEADER_LENGTH, Answers, malformed, read, write

TEXTS = ["a", "bé"]
CONTROLS = {"speedup": 2.0, "truncate": True}


def test_single_texts() -> None:
    bodies = {
        door: json.loads(write(door, ["é"], "clf", {}, single=True).content)
        for door in ("vllm", "tei", "v1")
    }
    assert bodies == {
        "vllm": {"input": "é", "model": "clf"},
        "tei": {"inputs": "é"},
        "v1": {"instances": ["é"]},
    }
    assert json.loads(write("vllm", ["é"], "", {}, single=True).content) == {"input": "é"}


def test_lists_and_controls() -> None:
    vllm = json.loads(write("vllm", TEXTS, "clf", CONTROLS, single=False).content)
    assert vllm == {
        "input": TEXTS,
        "speedup": 2.0,
        "truncate_prompt_tokens": -1,
        "model": "clf",
    }
    tei = json.loads(write("tei", TEXTS, "clf", CONTROLS, single=False).content)
    assert tei == {"inputs": [["a"], ["bé"]], "truncate": True, "parameters": {"speedup": 2.0}}
    v1 = write("v1", TEXTS, "clf", CONTROLS, single=False)
    assert v1.path == "/v1/models/clf:predict"
    assert json.loads(v1.content) == {"instances": TEXTS, "parameters": CONTROLS}
    v2 = json.loads(write("v2", TEXTS, "clf", CONTROLS, single=False).content)
    assert v2["parameters"] == CONTROLS
    assert v2["inputs"] == [{"name": "text", "datatype": "BYTES", "shape": [2], "data": TEXTS}]


@given(st.lists(st.text(), min_size=1, max_size=5))
def test_binary_tensors_hold_the_texts(texts: list[str]) -> None:
    body = write("v2-binary", texts, "clf", {}, single=False)
    (header,) = body.headers
    size = int(header.removeprefix(f"{HEADER_LENGTH}: "))
    head, raw = json.loads(body.content[:size]), body.content[size:]
    assert head["inputs"][0]["parameters"]["binary_data_size"] == len(raw)
    place, found = 0, []
    for _ in texts:
        (length,) = struct.unpack_from("<I", raw, place)
        found.append(raw[place + 4 : place + 4 + length].decode())
        place += 4 + length
    assert found == texts
    assert place == len(raw)


def scored(label: str) -> list[dict[str, object]]:
    return [{"score": 0.9, "label": label}, {"score": 0.1, "label": "other"}]


@pytest.mark.parametrize(
    ("door", "answer", "labels", "layers"),
    [
        ("vllm", {"data": [{"label": "x"}, {"label": "y"}]}, ["x", "y"], []),
        ("vllm", {"data": [{"label": "x", "details": {"exit_layer": 3}}]}, ["x"], [3]),
        ("tei", scored("x"), ["x"], []),
        ("tei", [scored("x"), scored("y")], ["x", "y"], []),
        ("tei", {"scores": scored("x"), "details": {}}, ["x"], []),
        ("tei", [{"scores": scored("x"), "details": {}}], ["x"], []),
        ("v1", {"predictions": [{"label": "x"}]}, ["x"], []),
        (
            "v2",
            {
                "outputs": [
                    {"name": "exit_layer", "datatype": "INT32", "data": [2]},
                    {"name": "label", "datatype": "BYTES", "data": ["x"]},
                ]
            },
            ["x"],
            [2],
        ),
    ],
)
def test_answers(door: str, answer: object, labels: list[str], layers: list[int]) -> None:
    found = read(door, json.dumps(answer).encode())
    assert list(found.labels) == labels
    assert list(found.exit_layers) == layers


def test_a_binary_answer() -> None:
    labels = b"".join(struct.pack("<I", len(one)) + one for one in (b"x", "yé".encode()))
    layers = struct.pack("<2i", 3, 12)
    outputs = [
        {"name": name, "datatype": kind, "parameters": {"binary_data_size": len(raw)}}
        for name, kind, raw in (("label", "BYTES", labels), ("exit_layer", "INT32", layers))
    ]
    head = json.dumps({"outputs": outputs}).encode()
    found = read("v2-binary", head + labels + layers, str(len(head)))
    assert found == Answers(["x", "yé"], [3, 12])


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("body", [b"", b"{}", b"[]", b"[3]", b'{"data": 3}', b"\xff"])
def test_what_is_no_answer(door: str, body: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - of json or ours
        read(door, body)


@pytest.mark.parametrize("door", DOORS)
def test_malformed_requests_say_what_is_right(door: str) -> None:
    kinds = malformed(door, "clf")
    assert len({one.name for one in kinds}) == len(kinds) >= 4
    for one in kinds:
        assert one.body.path.startswith("/")
        assert one.statuses
        assert one.statuses <= {400, 404, 422}
        if one.name == "not JSON":
            with pytest.raises(json.JSONDecodeError):
                json.loads(one.body.content)


def test_an_unknown_door() -> None:
    with pytest.raises(ValueError, match="door is 'grpc', allowed are vllm, tei"):
        write("grpc", ["a"], "", {}, single=True)
