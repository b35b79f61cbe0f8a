"""The three doors: the same texts through each give the same answers in each one's own words."""

import json
import struct
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from types import ModuleType
from typing import Any

import httpx
import numpy as np
import pytest

Running = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]

INFER = "/v2/models/tiny/infer"


async def predict(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/predict", json=body)


def text_input(*texts: str, **more: Any) -> dict[str, Any]:
    return {"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts, **more}


async def infer(client: httpx.AsyncClient, *inputs: Any, **body: Any) -> httpx.Response:
    return await client.post(INFER, json={"inputs": inputs, **body})


def outputs(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    return {one["name"]: one["data"] for one in response.json()["outputs"]}


# -- the same answers ------------------------------------------------------------------------


@pytest.mark.parametrize("controls", [{}, {"speedup": 2.0}, {"threshold": 0.6}, {"max_layer": 2}])
async def test_every_door_gives_the_same_answers(
    client: httpx.AsyncClient, support: ModuleType, controls: dict[str, Any]
) -> None:
    texts = support.random_texts(16, seed=5)
    vllm = (
        await client.post("/classify", json={"input": texts, "return_details": True, **controls})
    ).json()["data"]
    tei = (
        await predict(
            client, inputs=[[text] for text in texts], parameters=controls, return_details=True
        )
    ).json()
    v2 = outputs(await infer(client, text_input(*texts), parameters=controls))
    v1 = (
        await client.post(
            "/v1/models/tiny:predict", json={"instances": texts, "parameters": controls}
        )
    ).json()["predictions"]
    probabilities = np.array(v2["probabilities"]).reshape(len(texts), 3)
    for index, item in enumerate(vllm):
        layer = item["details"]["exit_layer"]
        assert tei[index]["details"]["exit_layer"] == layer == v2["exit_layer"][index]
        assert tei[index]["scores"][0]["label"] == item["label"] == v2["label"][index]
        assert v1[index]["label"] == item["label"]
        assert probabilities[index] == pytest.approx(item["probs"], abs=1e-6)
        assert v1[index]["probabilities"] == pytest.approx(item["probs"], abs=1e-6)
        scores = [one["score"] for one in tei[index]["scores"]]
        assert scores == pytest.approx(sorted(item["probs"], reverse=True), abs=1e-6)


async def test_headers_are_controls_on_every_door(client: httpx.AsyncClient) -> None:
    headers = {"X-Speedup": "4", "X-Deadline-Ms": "20000"}
    bodies: dict[str, Any] = {
        "/classify": {"input": ["w1", "w2 w3"]},
        "/predict": {"inputs": [["w1"], ["w2 w3"]]},
        INFER: {"inputs": [text_input("w1", "w2 w3")]},
        "/v1/models/tiny:predict": {"instances": ["w1", "w2 w3"]},
    }
    for path, body in bodies.items():
        response = await client.post(path, json=body, headers=headers)
        assert response.headers["x-exit-layer-mean"] == "1.00", path
        assert response.headers["x-speedup-achieved"] == "4.00"
        refused = await client.post(path, json=body, headers={"X-Deadline-Ms": "0"})
        assert (refused.status_code, "X-Deadline-Ms" in refused.text) == (422, True)


async def test_a_drop_in_accuracy_instead_of_a_speedup(client: httpx.AsyncClient) -> None:
    calibration = (await client.get("/info")).json()["calibration"]
    everything = await client.post("/classify", json={"input": "w1 w2", "max_accuracy_drop": 1.0})
    fastest = calibration["points"][-1]["threshold"]
    assert float(everything.headers["x-exit-threshold"]) == pytest.approx(fastest, rel=1e-5)
    both = await client.post(
        "/classify", json={"input": "w1", "max_accuracy_drop": 0.1, "speedup": 2}
    )
    assert both.status_code == 422
    beyond = await client.post("/classify", json={"input": "w1", "max_accuracy_drop": 1.5})
    assert beyond.json()["error"]["message"] == "max_accuracy_drop is 1.5, allowed is 0 to 1"


# -- TEI -------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/predict", "/", "/invocations"])
async def test_the_plain_answer_is_teis(client: httpx.AsyncClient, path: str) -> None:
    single = await client.post(path, json={"inputs": "w1 w2 w3"})
    assert single.status_code == 200
    assert [one.keys() for one in single.json()] == [{"score", "label"}] * 3
    assert list(single.json()[0]) == ["score", "label"]
    scores = [one["score"] for one in single.json()]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1.0)
    assert {"x-compute-tokens", "x-total-time", "x-exit-layer"} <= single.headers.keys()


@pytest.mark.parametrize(
    ("inputs", "read_as", "tokens"),
    [
        ("w1 w2", "text", 4),
        (["w1 w2"], "text", 4),
        (["w1 w2", "w3"], "pair", 6),
        ([["w1"], ["w2"]], "2 texts", 6),
        ([["w1", "w2"]], "1 pairs", 5),
        ([["w1"], ["w2", "w3"]], "2 texts and pairs", 8),
    ],
)
async def test_how_inputs_are_read_is_said(
    client: httpx.AsyncClient, inputs: Any, read_as: str, tokens: int
) -> None:
    response = await predict(client, inputs=inputs)
    assert response.headers["x-input-read"] == read_as
    assert response.headers["x-compute-tokens"] == str(tokens)
    is_list = isinstance(inputs, list) and isinstance(inputs[0], list)
    assert isinstance(response.json()[0], list if is_list else dict)


async def test_scores_as_asked(client: httpx.AsyncClient) -> None:
    def by_label(response: httpx.Response) -> dict[str, float]:
        return {one["label"]: one["score"] for one in response.json()}

    text = "w1 w2 w3"
    raw = by_label(await predict(client, inputs=text, raw_scores=True))
    none = by_label(await predict(client, inputs=text, parameters={"function_to_apply": "none"}))
    sigmoid = await predict(client, inputs=text, parameters={"function_to_apply": "sigmoid"})
    assert raw == none
    for label, score in by_label(sigmoid).items():
        assert score == pytest.approx(1 / (1 + np.exp(-raw[label])))
    best = await predict(client, inputs=text, parameters={"top_k": 1})
    assert len(best.json()) == 1
    assert (await predict(client, inputs=text, parameters={"top_k": 9})).json() == (
        await predict(client, inputs=text)
    ).json()


@pytest.mark.parametrize(
    ("body", "status", "error_type", "message"),
    [
        (b"{", 400, "Validation", "not JSON"),
        (b"{}", 422, "Validation", "inputs is missing"),
        (b'{"inputs": ""}', 400, "Empty", "inputs is empty"),
        (b'{"inputs": []}', 400, "Empty", "inputs is empty"),
        (b'{"inputs": [["a"], []]}', 400, "Empty", "inputs[1] is empty"),
        (b'{"inputs": ["a", "b", "c"]}', 422, "Validation", "inputs has 3 strings"),
        (b'{"inputs": ["a", ["b"]]}', 422, "Validation", "mixes texts and lists"),
        (b'{"inputs": [["a", 1]]}', 422, "Validation", "inputs[0][1] is 1"),
        (b'{"inputs": "a", "truncate": 1}', 422, "Validation", "truncate is 1"),
        (b'{"inputs": "a", "truncation_direction": "up"}', 422, "Validation", "left or right"),
        (
            b'{"inputs": "a", "parameters": {"speedup": "2"}}',
            422,
            "Validation",
            'parameters.speedup is "2", allowed is number',
        ),
        (b'{"inputs": "a", "parameters": {"speedup": 99}}', 422, "Validation", "speedup is 99"),
        (b'{"inputs": "a", "parameters": {"top_k": 0}}', 422, "Validation", "top_k is 0"),
        (b'{"inputs": "a", "parameters": 3}', 422, "Validation", "parameters is 3"),
    ],
)
async def test_errors_in_teis_words(
    client: httpx.AsyncClient, body: bytes, status: int, error_type: str, message: str
) -> None:
    response = await client.post("/predict", content=body)
    assert response.status_code == status
    assert response.json().keys() == {"error", "error_type"}
    assert response.json()["error_type"] == error_type
    assert message in response.json()["error"]


async def test_what_is_too_long_is_cut_only_when_asked(client: httpx.AsyncClient) -> None:
    text = "w1 " * 40 + "w2"
    refused = await predict(client, inputs=text)
    assert (refused.status_code, refused.json()["error_type"]) == (422, "Tokenizer")
    left, right = [
        (await predict(client, inputs=text, truncate=True, truncation_direction=side)).json()
        for side in ("Left", "right")
    ]
    assert left == (await predict(client, inputs="w1 " * 29 + "w2")).json()
    assert right == (await predict(client, inputs="w1 " * 30)).json()


async def test_strict_teis_codes(running: Running) -> None:
    many = [["w1"]] * 33
    async with running() as client:
        assert (await predict(client, inputs=many)).status_code == 413
    async with running(tei_strict=True) as client:
        assert (await predict(client, inputs=many)).status_code == 422

        def broken(_: Any) -> Any:
            raise RuntimeError("broken")

        client.app.state.models.default.batcher._engine = broken  # type: ignore[attr-defined]
        failed = await predict(client, inputs="w1")
        assert (failed.status_code, failed.json()["error_type"]) == (424, "Backend")
        assert (await client.post("/classify", json={"input": "w1"})).status_code == 500


async def test_unknown_parameters_are_named(client: httpx.AsyncClient) -> None:
    response = await predict(client, inputs="w1", zz=1, parameters={"yy": {"a": 1}, "speedup": 2})
    assert response.headers["x-ignored-fields"] == "zz, parameters.yy"
    assert response.headers["x-exit-threshold"] != "inf"


# -- vLLM ------------------------------------------------------------------------------------


async def test_best_labels_beside_the_plain_answer(client: httpx.AsyncClient) -> None:
    response = await client.post("/classify", json={"input": "w1 w2", "top_k": 2})
    (item,) = response.json()["data"]
    assert len(item["probs"]) == 3
    assert item["top"][0]["label"] == item["label"]
    assert [one["score"] for one in item["top"]] == sorted(item["probs"], reverse=True)[:2]


# -- V2 --------------------------------------------------------------------------------------


async def test_the_plain_answer_is_v2s(client: httpx.AsyncClient) -> None:
    response = await infer(client, text_input("w1", "w2 w3"), id="r-1")
    content = response.json()
    assert content.keys() == {"model_name", "model_version", "id", "parameters", "outputs"}
    assert (content["model_name"], content["model_version"], content["id"]) == ("tiny", "1", "r-1")
    shapes = {one["name"]: (one["datatype"], one["shape"]) for one in content["outputs"]}
    assert shapes == {
        "logits": ("FP32", [2, 3]),
        "probabilities": ("FP32", [2, 3]),
        "label": ("BYTES", [2]),
        "exit_layer": ("INT32", [2]),
    }
    assert "id" not in (await infer(client, text_input("w1"))).json()
    versioned = await client.post(
        "/v2/models/tiny/versions/1/infer", json={"inputs": [text_input("w1")]}
    )
    assert versioned.status_code == 200


async def test_each_text_has_its_own_speedup(
    client: httpx.AsyncClient, support: ModuleType
) -> None:
    texts = support.random_texts(12, seed=7)
    asked = [1.0, 2.0, 4.0] * 4
    speedups = {"name": "speedup", "datatype": "FP32", "shape": [12], "data": asked}
    mixed = outputs(await infer(client, text_input(*texts), speedups))["exit_layer"]
    for speedup in (1.0, 2.0, 4.0):
        alone = outputs(await infer(client, text_input(*texts), parameters={"speedup": speedup}))[
            "exit_layer"
        ]
        for index, one in enumerate(asked):
            if one == speedup:
                assert mixed[index] == alone[index]


async def test_token_ids_and_their_mask(client: httpx.AsyncClient) -> None:
    words = outputs(await infer(client, text_input("w1 w2", "w3")))
    ids = {"name": "input_ids", "datatype": "INT64", "shape": [2, 4]}
    mask = {"name": "attention_mask", "datatype": "INT64", "shape": [2, 4]}
    as_ids = await infer(
        client,
        {**ids, "data": [[2, 5, 6, 3], [2, 7, 3, 0]]},
        {**mask, "data": [[1, 1, 1, 1], [1, 1, 1, 0]]},
    )
    assert outputs(as_ids) == words
    pairs = await infer(
        client,
        text_input("w1"),
        {"name": "text_pair", "datatype": "BYTES", "shape": [1], "data": ["w2"]},
    )
    assert pairs.headers["x-compute-tokens"] == "5"


async def test_outputs_as_asked(client: httpx.AsyncClient) -> None:
    wanted = [
        {"name": "probabilities", "parameters": {"classification": 2}},
        {"name": "exit_signal"},
        {"name": "threshold"},
    ]
    found = outputs(await infer(client, text_input("w1 w2"), outputs=wanted))
    assert list(found) == ["probabilities", "exit_signal", "threshold"]
    value, index, label = found["probabilities"][0].split(":")
    labels = ["negative", "positive", "neutral"]
    assert label == labels[int(index)]
    assert 1 / 3 < float(value) <= 1
    assert found["threshold"] == [None]


async def test_bytes_after_the_json(client: httpx.AsyncClient) -> None:
    texts = [b"w1 w2", b"w3"]
    raw = b"".join(struct.pack("<I", len(one)) + one for one in texts)
    header = json.dumps(
        {
            "inputs": [
                {
                    "name": "text",
                    "datatype": "BYTES",
                    "shape": [2],
                    "parameters": {"binary_data_size": len(raw)},
                }
            ],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    response = await client.post(
        INFER,
        content=header + raw,
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    length = int(response.headers["inference-header-content-length"])
    content, tail = json.loads(response.content[:length]), response.content[length:]
    sizes = [one["parameters"]["binary_data_size"] for one in content["outputs"]]
    assert sum(sizes) == len(tail)
    logits = np.frombuffer(tail[: sizes[0]], "<f4")
    plain = outputs(await infer(client, text_input("w1 w2", "w3")))
    assert logits == pytest.approx(plain["logits"], rel=1e-5)
    for wrong in ("0", "x", str(len(header + raw) + 1), "-1"):
        broken = await client.post(
            INFER, content=header + raw, headers={"Inference-Header-Content-Length": wrong}
        )
        assert broken.status_code == 400


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 422, "inputs is missing"),
        ({"inputs": []}, 422, "neither text"),
        ({"inputs": [{"name": "text"}]}, 422, "inputs[0].datatype is missing"),
        ({"inputs": [text_input()]}, 400, "text is empty"),
        ({"inputs": [text_input("")]}, 400, "text[0] is empty"),
        ({"inputs": [text_input("a"), text_input("b")]}, 422, "the same name"),
        ({"inputs": [text_input("a", shape=[2])]}, 422, "has shape 2 and 1 values"),
        ({"inputs": [text_input("a", datatype="FP32")]}, 422, "datatype 'FP32'"),
        ({"inputs": [text_input("a")], "outputs": [{"name": "z"}]}, 422, "output 'z'"),
        ({"inputs": [text_input("a")], "parameters": {"speedup": "x"}}, 422, "speedup is 'x'"),
        ({"inputs": [text_input("a")], "parameters": {"speedup": 0.5}}, 422, "speedup is 0.5"),
        ({"inputs": [text_input("a")], "parameters": {"timeout": -1}}, 422, "timeout is -1"),
        (
            {"inputs": [text_input("a")], "parameters": {"timeout": 10**400}},
            422,
            "deadline_ms is 1000",
        ),
        ({"inputs": [text_input("a")], "parameters": {"timeout": 10**18}}, 422, "deadline_ms is"),
        ({"inputs": [text_input("a")], "outputs": [{"name": "label"}] * 2}, 422, "asked for twice"),
        ({"inputs": [text_input(*["a"] * 33)]}, 413, "text has 33 texts"),
        (
            {
                "inputs": [
                    {"name": "input_ids", "datatype": "INT64", "shape": [10**9, 0], "data": []}
                ]
            },
            422,
            "rows of nothing",
        ),
        (
            {
                "inputs": [
                    text_input("a"),
                    {"name": "speedup", "datatype": "FP32", "shape": [2], "data": [1, 2]},
                ]
            },
            422,
            "2 values for 1 texts",
        ),
    ],
)
async def test_errors_in_v2s_words(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, message: str
) -> None:
    response = await client.post(INFER, json=body)
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert message in response.json()["error"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/predict", b'{"inputs": [["a"], ["b"], [5]], "inputs": [["a"]]}'),
        ("/predict", b'{"inputs": "a", "parameters": {"speedup": "x"}, "parameters": {}}'),
        ("/classify", b'{"input": ["a", 1.5], "input": []}'),
        (INFER, b'{"inputs": [{"name": 1}], "inputs": []}'),
    ],
)
async def test_a_field_that_is_there_twice(
    client: httpx.AsyncClient, path: str, body: bytes
) -> None:
    assert (await client.post(path, content=body)).status_code in (400, 422)


async def test_a_length_that_no_body_has(client: httpx.AsyncClient) -> None:
    headers = {"Inference-Header-Content-Length": "1" * 5000}
    response = await client.post(INFER, content=b"{}", headers=headers)
    assert response.status_code == 400


async def test_v1_has_the_controls_too(client: httpx.AsyncClient) -> None:
    path = "/v1/models/tiny:predict"
    text = "w1 " * 40
    for truncate, status in ((True, 200), (False, 422), ("yes", 422)):
        body = {"instances": [text], "parameters": {"truncate": truncate}}
        assert (await client.post(path, json=body)).status_code == status
    body = {"instances": [{"text": "w1", "text_pair": "w2"}], "parameters": {"top_k": 2}}
    (found,) = (await client.post(path, json=body)).json()["predictions"]
    assert found["top"][0]["label"] == found["label"]
    assert len(found["top"]) == 2


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/other/infer",
        "/v2/models/tiny/versions/2/infer",
        "/v1/models/other:predict",
    ],
)
async def test_another_model_is_not_here(client: httpx.AsyncClient, path: str) -> None:
    response = await client.post(path, json={"inputs": [text_input("a")], "instances": ["a"]})
    assert response.status_code == 404
    assert response.json().keys() == {"error"}


async def test_what_v2_clients_ask_first(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v2/health/live")).json() == {"live": True}
    assert (await client.get("/v2/health/ready")).json() == {"ready": True}
    server = (await client.get("/v2")).json()
    assert server["name"] == "offramp"
    assert {"binary_tensor_data", "classification", "statistics"} <= set(server["extensions"])
    assert (await client.get("/v2/models")).json() == {"models": ["tiny"]}
    for path in ("/v2/models/tiny", "/v2/models/tiny/versions/1"):
        metadata = (await client.get(path)).json()
        assert metadata["versions"] == ["1"]
        assert metadata["outputs"][1] == {
            "name": "probabilities",
            "datatype": "FP32",
            "shape": [-1, 3],
        }
        assert (await client.get(f"{path}/ready")).status_code == 200
        assert (await client.get(f"{path}/config")).json()["max_batch_size"] == 0
    assert (await client.get("/v2/models/other")).json().keys() == {"error"}
    assert (await client.post("/v2/repository/index")).json()[0]["state"] == "READY"
    assert (await client.get("/v1/models/tiny")).json() == {"name": "tiny", "ready": True}


async def test_statistics_count_texts_and_batches(client: httpx.AsyncClient) -> None:
    before = (await client.get("/v2/models/tiny/stats")).json()["model_stats"][0]
    await infer(client, text_input("w1", "w2", "w3"))
    await infer(client, text_input(""))
    (after,) = (await client.get("/v2/models/tiny/stats")).json()["model_stats"]
    assert after["inference_count"] - before["inference_count"] == 3
    assert after["execution_count"] - before["execution_count"] == 1
    success, fail = after["inference_stats"]["success"], after["inference_stats"]["fail"]
    assert (success["count"], fail["count"]) == (1, 1)
    assert success["ns"] > 0
    assert after["last_inference"] > before["last_inference"]


# -- metrics ---------------------------------------------------------------------------------


async def series(client: httpx.AsyncClient) -> set[str]:
    lines = (await client.get("/metrics")).text.splitlines()
    return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}


async def test_no_request_makes_a_new_series(client: httpx.AsyncClient) -> None:
    """All that there will ever be is there before the first request."""
    before = await series(client)
    assert len(before) < 2500
    bodies: dict[str, list[Any]] = {
        "/classify": [{"input": "w1", "speedup": 1.37}, {"input": ""}, {"input": "w1 " * 99}, 3],
        "/predict": [{"inputs": "w1"}, {"inputs": "w1", "parameters": {"threshold": 0.123}}, []],
        INFER: [{"inputs": [text_input("w1", "w2")], "parameters": {"a" * 99: 1}}, {"inputs": []}],
        "/v1/models/tiny:predict": [{"instances": ["w1"]}, {"instances": []}],
        "/v2/models/nobody/infer": [{"inputs": [text_input("w1")]}],
        "/nowhere": [{}],
    }
    for path, some in bodies.items():
        for body in some:
            await client.post(path, json=body, headers={"X-Request-Id": f"r{id(body)}"})
    for path in ("/v2", "/v2/models/tiny/stats", "/info", "/nowhere", "/v2/models/nobody"):
        await client.get(path)
    assert await series(client) == before
