"""A tiny random checkpoint behind the whole application, over HTTP without sockets."""

import asyncio
import json
import logging
import shutil
import sys
import threading
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from offramp_model.checkpoint import load_checkpoint
from offramp_model.cost import StepTable
from offramp_model.recorded import record_exits
from offramp_service.__main__ import main
from offramp_service.app import create_app
from offramp_service.engine import Course, Engine
from offramp_service.settings import Settings

Running = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


class Gate:
    """Holds the engine before each batch until it is opened."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()

    def around(self, app: FastAPI) -> None:
        batcher = app.state.models.default.batcher
        engine = batcher._engine

        def gated(jobs: Any) -> Iterator[Any]:
            self.entered.set()
            assert self.opened.wait(20)
            yield from engine(jobs)

        batcher._engine = gated


class TokenizerGate:
    """Holds the tokenisation threads until it is opened, and counts what comes to them."""

    def __init__(self) -> None:
        self.opened, self.entered = threading.Event(), threading.Event()
        self.calls = 0

    def around(self, app: FastAPI) -> None:
        tokenizer = app.state.models.default.model.tokenizer
        encode = tokenizer.encode

        def gated(*arguments: Any, **options: Any) -> Any:
            self.calls += 1
            self.entered.set()
            assert self.opened.wait(20)
            return encode(*arguments, **options)

        tokenizer.encode = gated


LARGE = {"input": "w1 " * 1000, "truncate_prompt_tokens": -1}  # 3000 characters: for a worker


def hang_up_after(*bodies: bytes, entered: threading.Event) -> tuple[Any, Any, list[Any]]:
    """ASGI's receive and send of a client that leaves once its request is being worked on."""
    messages = [{"type": "http.request", "body": body} for body in bodies]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        if messages:
            return messages.pop()
        await asyncio.to_thread(entered.wait, 20)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    return receive, send, sent


CLASSIFY = {
    "type": "http",
    "method": "POST",
    "path": "/classify",
    "headers": [],
    "query_string": b"",
}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is awaited lies in a thread
            await asyncio.sleep(0.001)


async def post(client: httpx.AsyncClient, **body: Any) -> httpx.Response:
    return await client.post("/classify", json=body)


async def series(client: httpx.AsyncClient) -> dict[str, float]:
    lines = (await client.get("/metrics")).text.splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    return {name: float(value) for name, value in pairs}


def sample(values: dict[str, float], name: str, *labels: str) -> float:
    found = [
        value
        for key, value in values.items()
        if key.startswith(f"offramp_{name}{{") and all(label in key for label in labels)
    ]
    return sum(found)


# -- answers ---------------------------------------------------------------------------------


async def test_the_plain_answer_is_vllms(client: httpx.AsyncClient) -> None:
    response = await client.post("/v1/classify", json={"model": "tiny", "input": "w1 w2 w3"})
    assert response.status_code == 200
    content = response.json()
    assert content.keys() == {"id", "object", "created", "model", "data", "usage"}
    assert content["id"] == f"classify-{response.headers['x-request-id']}"
    assert (content["object"], content["model"]) == ("list", "tiny")
    (item,) = content["data"]
    assert item.keys() == {"index", "label", "probs", "num_classes"}
    assert item["num_classes"] == len(item["probs"]) == 3
    assert sum(item["probs"]) == pytest.approx(1.0)
    assert content["usage"] == {
        "prompt_tokens": 5,
        "total_tokens": 5,
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


async def test_a_speedup_of_one_is_the_full_model(
    client: httpx.AsyncClient, directory: Path, support: ModuleType
) -> None:
    texts = support.random_texts(20, seed=9)
    checkpoint = load_checkpoint(directory)
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    response = await post(client, input=texts, speedup=1.0, use_activation=False)
    items = response.json()["data"]
    logits = torch.tensor([item["probs"] for item in items])
    torch.testing.assert_close(logits, recorded.logits[-1], atol=1e-4, rtol=1e-4)
    names = [checkpoint.model.labels[index] for index in recorded.logits[-1].argmax(-1).tolist()]
    assert [item["label"] for item in items] == names


async def test_every_exit_answers_with_its_own_logits(
    client: httpx.AsyncClient, directory: Path, support: ModuleType
) -> None:
    texts = support.random_texts(30, seed=10)
    checkpoint = load_checkpoint(directory)
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    response = await post(
        client, input=texts, speedup=1.7, use_activation=False, return_details=True
    )
    items = response.json()["data"]
    layers = [item["details"]["exit_layer"] for item in items]
    assert len(set(layers)) > 1, "the test needs texts of different depth"
    for index, (item, layer) in enumerate(zip(items, layers, strict=True)):
        expected = recorded.logits[layer - 1, index]
        torch.testing.assert_close(torch.tensor(item["probs"]), expected, atol=1e-4, rtol=1e-4)
        threshold = item["details"]["threshold"]
        assert (item["details"]["exit_signal"] > threshold) or layer == 4


async def test_details_and_headers(client: httpx.AsyncClient) -> None:
    response = await post(client, input=["w1 w2", "w3"], speedup=2.0, return_details=True)
    items = response.json()["data"]
    for item in items:
        details = item["details"]
        assert details.keys() == {
            *("exit_layer", "num_layers", "exit_signal", "threshold", "timings_ms")
        }
        assert details["num_layers"] == 4
        timings = details["timings_ms"]
        parts = timings["tokenization"] + timings["queue"] + timings["inference"]
        assert timings["total"] == pytest.approx(parts, abs=0.01)
    mean = sum(item["details"]["exit_layer"] for item in items) / 2
    headers = response.headers
    assert float(headers["x-exit-layer-mean"]) == pytest.approx(mean, abs=0.01)
    assert float(headers["x-speedup-achieved"]) == pytest.approx(4 / mean, abs=0.01)
    assert float(headers["x-exit-threshold"]) == pytest.approx(
        items[0]["details"]["threshold"], rel=1e-5
    )
    assert headers["x-compute-tokens"] == "7"
    for name in ("total", "tokenization", "queue", "inference"):
        assert headers[f"x-{name}-time"].isdecimal()


async def test_who_asks_sees_the_signal_at_every_exit(client: httpx.AsyncClient) -> None:
    texts = [f"w{number} w{number + 1}" for number in range(12)]
    asked = {"input": texts, "speedup": 2.0}
    plain = (await post(client, **asked, return_details=True)).json()["data"]
    items = (await post(client, **asked, return_signals=True)).json()["data"]
    assert len({item["details"]["exit_layer"] for item in items}) > 1
    for item, usual in zip(items, plain, strict=True):
        details, signals = item["details"], item["details"].pop("signals")
        assert details.keys() == usual["details"].keys()
        layers = [one["exit_layer"] for one in signals]
        assert layers == [*range(1, usual["details"]["exit_layer"] + 1)]
        values = [one["exit_signal"] for one in signals]
        assert values[-1] == details["exit_signal"]
        assert all(value <= details["threshold"] for value in values[:-1])


async def test_one_text_names_its_layer_and_never_early_is_null(
    client: httpx.AsyncClient,
) -> None:
    response = await post(client, input="w1", return_details=True)
    assert response.headers["x-exit-layer"] == "4"
    assert response.headers["x-exit-threshold"] == "inf"
    assert response.json()["data"][0]["details"]["threshold"] is None


async def test_headers_control_and_the_body_wins(client: httpx.AsyncClient) -> None:
    async def layer(headers: dict[str, str], **body: Any) -> str:
        response = await client.post("/classify", json={"input": "w5 w6"} | body, headers=headers)
        return response.headers["x-exit-layer"]

    assert await layer({}) == "4"
    assert await layer({"X-Speedup": "4"}) == "1"
    assert await layer({"X-Exit-Threshold": "0"}) == "1"
    assert await layer({"X-Speedup": "4"}, speedup=1) == "4"
    assert await layer({"X-Speedup": "4"}, min_layer=3) == "3"
    assert await layer({}, max_layer=2) == "2"


async def test_token_ids_and_pairs(client: httpx.AsyncClient) -> None:
    async def probs(**body: Any) -> list[list[float]]:
        response = await post(client, **body)
        assert response.status_code == 200, response.text
        return [item["probs"] for item in response.json()["data"]]

    text = (await probs(input="w1 w2"))[0]
    assert await probs(input=[2, 5, 6, 3]) == [pytest.approx(text)]
    assert (await probs(input=[[2, 5, 6, 3], [2, 9, 3]]))[0] == pytest.approx(text)
    pair = (await probs(input="w1 w2", text_pair="w3"))[0]
    assert pair != pytest.approx(text)
    listed = await probs(input=["w1 w2", "w4"], text_pair=["w3", "w5"])
    assert listed[0] == pytest.approx(pair)


async def test_truncation(client: httpx.AsyncClient, running: Running) -> None:
    long = " ".join(f"w{number}" for number in range(40))
    refused = await post(client, input=["w1", long])
    assert refused.status_code == 422
    assert refused.json()["error"]["param"] == "input[1]"
    assert "42 tokens, at most 32" in refused.json()["error"]["message"]

    async def tokens(**body: Any) -> int:
        response = await post(client, input=long, **body)
        assert response.status_code == 200, response.text
        return response.json()["usage"]["prompt_tokens"]

    assert await tokens(truncate_prompt_tokens=-1) == 32
    assert await tokens(truncate_prompt_tokens=10) == 10
    assert await tokens(truncate_prompt_tokens=10, add_special_tokens=False) == 10
    kept = (await post(client, input=long, truncate_prompt_tokens=4, truncation_side="left")).json()
    tail = (await post(client, input="w38 w39")).json()
    assert kept["data"][0]["probs"] == pytest.approx(tail["data"][0]["probs"])
    for limit in (0, 2, 33, -2):
        response = await post(client, input=long, truncate_prompt_tokens=limit)
        assert response.json()["error"]["param"] == "truncate_prompt_tokens"
    async with running(auto_truncate=True) as generous:
        response = await post(generous, input=long)
        assert response.json()["usage"]["prompt_tokens"] == 32


async def test_mixed_speedups_share_a_batch_and_keep_their_meaning(
    running: Running, support: ModuleType
) -> None:
    texts = support.random_texts(24, seed=11)
    speedups = [1.0, 1.5, 2.0, 4.0]
    gate = Gate()
    async with running(gate.around) as client:

        async def ask(index: int) -> dict[str, Any]:
            response = await post(
                client, input=texts[index], speedup=speedups[index % 4], return_details=True
            )
            return response.json()["data"][0]

        gate.opened.set()
        alone = [await ask(index) for index in range(len(texts))]
        gate.opened.clear()
        together = [asyncio.create_task(ask(index)) for index in range(len(texts))]
        lifecycle = client.app.state.models.lifecycle  # type: ignore[attr-defined]
        await until(lambda: lifecycle.inflight == len(texts))
        gate.opened.set()
        mixed = await asyncio.gather(*together)
        values = await series(client)
    assert sample(values, "batch_size_count") < 2 * len(texts)
    for one, other in zip(alone, mixed, strict=True):
        assert other["probs"] == pytest.approx(one["probs"], abs=1e-4)
        assert other["details"]["exit_layer"] == one["details"]["exit_layer"]
        assert other["details"]["threshold"] == one["details"]["threshold"]


async def test_request_ids_are_echoed(client: httpx.AsyncClient) -> None:
    response = await post(client, input="w1", request_id="mine-1")
    assert response.headers["x-request-id"] == "mine-1"
    response = await client.post(
        "/classify", json={"input": ""}, headers={"X-Request-Id": "theirs"}
    )
    assert (response.status_code, response.headers["x-request-id"]) == (400, "theirs")
    assert (await post(client, input="w1", request_id="a b\n")).status_code == 422


async def test_unknown_fields_are_named(client: httpx.AsyncClient) -> None:
    response = await post(client, input="w1", thresholds=0.5, **{"ö\n": 1})
    assert response.status_code == 200
    assert response.headers["x-ignored-fields"] == "thresholds, ?"
    vllm = await post(
        client, input="w1", user="u", priority=3, cache_salt="s", padding=True, request_id="r"
    )
    assert vllm.status_code == 200
    assert "x-ignored-fields" not in vllm.headers


# -- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 422, "input"),
        ({"input": []}, 400, "input"),
        ({"input": ""}, 400, "input"),
        ({"input": ["w1", ""]}, 400, "input[1]"),
        ({"input": [[1], []]}, 400, "input[1]"),
        ({"input": ["w1"] * 33}, 413, "input"),
        ({"input": ["w1", 1]}, 422, "input[1]"),
        ({"input": [1, "w1"]}, 422, "input[1]"),
        ({"input": [1, 64]}, 422, "input"),
        ({"input": [[1], [-1]]}, 422, "input[1]"),
        ({"input": [10**30]}, 422, "input"),
        ({"input": [5] * 33}, 422, "input"),
        ({"input": "w1", "model": "other"}, 404, "model"),
        ({"input": "w1", "speedup": 4.5}, 422, "speedup"),
        ({"input": "w1", "speedup": True}, 422, "speedup"),
        ({"input": "w1", "threshold": 1.01}, 422, "threshold"),
        ({"input": "w1", "min_layer": 3, "max_layer": 2}, 422, "min_layer"),
        ({"input": "w1", "deadline_ms": 0}, 422, "deadline_ms"),
        ({"input": "w1", "deadline_ms": 30_001}, 422, "deadline_ms"),
        ({"input": "w1", "deadline_ms": 1.5}, 422, "deadline_ms"),
        ({"input": "w1", "text_pair": ["w2"]}, 422, "text_pair"),
        ({"input": ["w1"], "text_pair": "w2"}, 422, "text_pair"),
        ({"input": ["w1", "w2"], "text_pair": ["w2"]}, 422, "text_pair"),
        ({"input": [1, 2], "text_pair": "w2"}, 422, "text_pair"),
        ({"messages": [{"role": "user", "content": "w1"}]}, 422, "messages"),
    ],
)
async def test_bad_input_names_its_field_and_disturbs_nothing(
    client: httpx.AsyncClient, body: dict[str, Any], status: int, param: str
) -> None:
    good = asyncio.create_task(post(client, input="w1 w2"))
    response = await post(client, **body)
    error = response.json()["error"]
    assert response.status_code == error["code"] == status, error
    assert error.keys() == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert (await good).status_code == 200
    values = await series(client)
    assert sample(values, "requests_total", f'code="{status}"', 'route="/classify"') == 1
    assert sample(values, "request_failures_total") == 1


async def test_bodies_that_are_not_json_or_too_large(running: Running) -> None:
    async with running(payload_limit=1000) as client:
        assert (await client.post("/classify", content=b'{"input')).status_code == 400

        async def chunks() -> AsyncIterator[bytes]:
            for _ in range(20):
                yield b" " * 100

        for content in (b" " * 1001, chunks()):
            response = await client.post("/classify", content=content)
            assert response.status_code == 413
            assert "1000 bytes" in response.json()["error"]["message"]
        assert (await client.get("/nope")).json()["error"]["code"] == 404
        assert (await client.get("/classify")).json()["error"]["code"] == 405


async def test_a_full_queue_answers_429_and_recovers(running: Running) -> None:
    gate = Gate()
    limits = {"max_concurrent_requests": 4, "max_client_batch_size": 4, "max_batch_requests": 1}
    async with running(gate.around, **limits) as client:
        waiting = asyncio.create_task(post(client, input=["w1", "w2", "w3"]))
        await asyncio.to_thread(gate.entered.wait, 20)
        refused = await post(client, input=["w4", "w5"])
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"] == {
            "message": "queue is full (4 requests)",
            "type": "overloaded",
            "param": None,
            "code": 429,
        }
        values = await series(client)
        assert sample(values, "queue_requests") == 2
        assert sample(values, "inflight_requests") == 1
        assert (await client.get("/livez")).status_code == 200
        gate.opened.set()
        assert (await waiting).status_code == 200
        assert (await post(client, input=["w4", "w5"])).status_code == 200
        values = await series(client)
    assert sample(values, "queue_requests") == sample(values, "queue_tokens") == 0
    assert sample(values, "request_failures_total", "overloaded") == 1


async def test_429_says_when_to_come_back(running: Running) -> None:
    gate = Gate()
    limits = {"max_concurrent_requests": 4, "max_client_batch_size": 4, "max_batch_requests": 1}
    async with running(gate.around, warmup=True, **limits) as client:
        waiting = asyncio.create_task(post(client, input=["w1", "w2", "w3", "w4"]))
        await asyncio.to_thread(gate.entered.wait, 20)
        assert (await post(client, input="w5")).headers["retry-after"] == "1"
        batcher = client.app.state.models.default.batcher  # type: ignore[attr-defined]
        # Three texts of three tokens wait, which run four layers: a little less than 12 s each.
        batcher.scheduler.learn(StepTable((1, 1000), (0.99, 990.0)))
        for texts, retry_after in ((1, "12"), (2, "24"), (4, "36")):
            refused = await post(client, input=["w5"] * texts)
            assert (refused.status_code, refused.headers["retry-after"]) == (429, retry_after)
        gate.opened.set()
        assert (await waiting).status_code == 200


async def test_a_late_answer_is_504(running: Running) -> None:
    gate = Gate()
    async with running(gate.around, request_timeout_ms=50) as client:
        response = await post(client, input="w1")
        assert response.status_code == 504
        assert response.json()["error"]["type"] == "deadline_exceeded"
        gate.opened.set()


async def test_a_request_names_its_own_deadline(running: Running) -> None:
    gate = Gate()
    async with running(gate.around) as client:
        patient = asyncio.create_task(post(client, input="w1", deadline_ms=30_000))
        response = await post(client, input="w1", deadline_ms=50)
        assert response.status_code == 504
        assert response.json()["error"]["message"] == "no answer within 50 ms"
        gate.opened.set()
        assert (await patient).status_code == 200
        values = await series(client)
        assert sample(values, "request_failures_total", "deadline") == 1
        assert sample(values, "queue_requests") == 0


async def test_measured_costs_refuse_what_cannot_be_in_time(running: Running) -> None:
    async with running(warmup=True) as client:
        cost = (await client.get("/info")).json()["layer_cost"]
        assert cost["tokens"][0] == 16
        assert cost["milliseconds"] == sorted(cost["milliseconds"])
        assert cost["knee"] in cost["tokens"]
        batcher = client.app.state.models.default.batcher  # type: ignore[attr-defined]
        batcher.scheduler.learn(StepTable((16, 32), (10.0, 20.0)))  # a very slow machine
        response = await post(client, input="w1 w2", deadline_ms=5000)
        error = response.json()["error"]
        assert (response.status_code, error["param"]) == (504, "deadline_ms")
        assert error["message"].startswith("the answer would take ")
        assert (await post(client, input="w1 w2")).status_code == 200  # names no deadline


async def test_batches_that_join_between_layers_answer_as_texts_alone(
    running: Running, support: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backlog mode for real: this machine is told that a layer costs the same however full."""
    joined = []
    take_in = Course.take_in
    monkeypatch.setattr(
        Course, "take_in", lambda self, other: joined.append(1) or take_in(self, other)
    )
    how = {"warmup": True, "backlog_merging": True, "group_batches": True, "max_batch_tokens": 96}
    async with running(**how) as client:
        info = (await client.get("/info")).json()
        assert info["backlog_merging"].endswith("only lose time (a knee of 128 is needed)")
        assert info["group_batches"] is True
        scheduler = client.app.state.models.default.batcher.scheduler  # type: ignore[attr-defined]
        scheduler.learn(StepTable((16, 4096), (1e-3, 1e-3)))
        assert (await client.get("/info")).json()["backlog_merging"] == "on"
        questions = [
            {"input": text, "speedup": speedup, "return_details": True}
            for text in support.random_texts(80)
            for speedup in (1.0, 1.5, 2.0)
        ]
        alone = [await post(client, **one) for one in questions]
        assert not joined
        # The first batch waits until all are there: a backlog, however fast the engine is.
        batcher, all_there = client.app.state.models.default.batcher, threading.Event()  # type: ignore[attr-defined]
        engine = batcher._engine
        monkeypatch.setattr(batcher, "_engine", lambda jobs: all_there.wait(20) and engine(jobs))
        asked = asyncio.gather(*(post(client, **one) for one in questions))
        await until(lambda: len(batcher.scheduler.queue) >= len(questions) // 2)
        all_there.set()
        together = await asked
        assert joined
        for one, other in zip(alone, together, strict=True):
            assert one.status_code == other.status_code == 200
            ours, theirs = one.json()["data"][0], other.json()["data"][0]
            assert ours["label"] == theirs["label"]
            assert ours["details"]["exit_layer"] == theirs["details"]["exit_layer"]
            assert ours["probs"] == pytest.approx(theirs["probs"], abs=1e-5)
        values = await series(client)
        assert sample(values, "samples_total") == 2 * len(questions)


async def test_a_broken_model_answers_500_and_the_next_request_is_served(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    def break_on_w9(app: FastAPI) -> None:
        stack = app.state.models.default.model.stack
        embed = stack.embed

        def broken(batch: Any) -> Any:
            if 13 in batch.input_ids.tolist():
                raise RuntimeError("out of luck")
            return embed(batch)

        stack.embed = broken

    async with running(break_on_w9) as client:
        response = await post(client, input="w9 secret")
        assert response.status_code == 500
        assert response.json()["error"]["type"] == "engine_failed"
        assert (await post(client, input="w1")).status_code == 200
    assert "secret" not in caplog.text


async def test_a_client_that_leaves_costs_nothing_more(running: Running) -> None:
    gate = Gate()
    async with running(gate.around, max_batch_requests=1) as client:
        app: FastAPI = client.app  # type: ignore[attr-defined]
        pipeline = app.state.models.default
        body = json.dumps({"input": ["w1", "w2", "w3"]}).encode()
        receive, send, sent = hang_up_after(body, entered=gate.entered)
        await app(dict(CLASSIFY), receive, send)
        assert sent[0]["status"] == 499
        assert pipeline.batcher.unanswered == 0
        values = await series(client)
        assert sample(values, "queue_requests") == 0
        assert sample(values, "request_failures_total", "disconnected") == 1
        gate.opened.set()
        assert (await post(client, input="w5")).status_code == 200
        values = await series(client)
    assert sample(values, "samples_total") == 1


# -- quality watch ---------------------------------------------------------------------------


async def test_shadow_runs_count_how_often_early_answers_agree(
    running: Running, directory: Path, support: ModuleType
) -> None:
    texts = support.random_texts(64, seed=12)
    checkpoint = load_checkpoint(directory)
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    async with running(shadow_rate=1.0) as client:
        expected: dict[tuple[int, str], int] = {}
        for start in range(0, len(texts), 32):
            asked = {"input": texts[start : start + 32], "speedup": 1.8, "return_details": True}
            items = (await post(client, **asked)).json()["data"]
            for index, item in enumerate(items, start):
                layer, final = item["details"]["exit_layer"], recorded.logits[-1, index].argmax()
                if layer < 4:
                    agree = item["label"] == checkpoint.model.labels[final]
                    key = layer, str(agree).lower()
                    expected[key] = expected.get(key, 0) + 1
        assert {agree for _, agree in expected} == {"true", "false"}, "the test needs both"
        # Full depth by request or by bounds is nothing to run again.
        await post(client, input=texts[:20])
        await post(client, input=texts[:20], max_layer=2)
        batcher = client.app.state.models.default.batcher  # type: ignore[attr-defined]
        await until(lambda: not batcher.busy and not batcher.scheduler.shadows)
        values = await series(client)
    for layer in (1, 2, 3):
        for agree in ("true", "false"):
            seen = sample(values, "shadow_agreement_total", f'layer="{layer}"', f'agree="{agree}"')
            assert seen == expected.get((layer, agree), 0)
    assert sample(values, "shadow_layer_executions_total") == 4 * sum(expected.values())
    assert sample(values, "shadow_dropped_total") == 0
    assert sample(values, "samples_total") == 64 + 40
    assert sample(values, "exits_total") == 64 + 40
    layers = sample(values, "layer_executions_total") + sample(values, "layers_saved_total")
    assert layers == 4 * (64 + 40)
    assert sample(values, "queue_requests") == sample(values, "inflight_requests") == 0


async def test_drift_is_seen_and_the_thresholds_follow_if_they_may(
    running: Running, support: ModuleType
) -> None:
    """Nothing but the texts that go deepest: slower than calibration says for a speed-up of 1.5."""
    async with running() as client:
        values = await series(client)
        drift = [sample(values, f"{name}_drift") for name in ("exit_share", "speedup")]
        assert [*drift, sample(values, "drift_texts")] == [0, 1, 0]
        everything = support.random_texts(300, seed=3)[:200]  # what it was calibrated on
        layers = []
        for start in range(0, 200, 25):
            asked = {"input": everything[start : start + 25], "speedup": 1.5}
            items = (await post(client, **asked, return_details=True)).json()["data"]
            layers += [item["details"]["exit_layer"] for item in items]
        values = await series(client)
        assert sample(values, "drift_texts") == 200
        assert sample(values, "exit_share_drift") < 0.01
        assert sample(values, "speedup_drift") == pytest.approx(1.0, abs=0.01)
        assert sample(values, "speedup_correction") == 1
    deep = [text for text, layer in zip(everything, layers, strict=True) if layer == 4][:25]
    assert deep
    for corrects in (False, True):
        async with running(speedup_correction=corrects) as client:
            first, *_, last = [
                await post(client, input=deep, speedup=1.5) for _ in range(-(-1600 // len(deep)))
            ]
            values = await series(client)
            assert sample(values, "exit_share_drift") > 0.25
            assert sample(values, "speedup_drift") < 0.95
            factor = sample(values, "speedup_correction")
            threshold = [float(one.headers["x-exit-threshold"]) for one in (first, last)]
            if corrects:
                assert 1.0 < factor <= 1.25
                assert threshold[1] < threshold[0]
            else:
                assert (factor, threshold[1]) == (1.0, threshold[0])
            full = await post(client, input=deep, speedup=1)
            assert full.headers["x-exit-threshold"] == "inf"
            raw = await post(client, input=deep, threshold=0.7)
            assert raw.headers["x-exit-threshold"] == "0.7"


# -- limits before tokenising ----------------------------------------------------------------


async def test_the_deadline_covers_tokenising(running: Running) -> None:
    gate = TokenizerGate()
    async with running(gate.around, request_timeout_ms=100) as client:
        late = await asyncio.gather(*(post(client, **LARGE) for _ in range(3)))
        assert [one.status_code for one in late] == [504] * 3
        gate.opened.set()
        assert (await post(client, **LARGE)).status_code == 200
        # One was at work, two were given up before they were begun.
        assert gate.calls == 2
        assert client.app.state.models.default.batcher.unanswered == 0  # type: ignore[attr-defined]


async def test_room_for_texts_is_taken_before_tokenising(running: Running) -> None:
    gate = TokenizerGate()
    limits = {"max_concurrent_requests": 2, "max_client_batch_size": 2}
    async with running(gate.around, **limits) as client:
        waiting = [asyncio.create_task(post(client, **LARGE)) for _ in range(2)]
        await asyncio.to_thread(gate.entered.wait, 20)
        refused = await post(client, **LARGE)
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        gate.opened.set()
        assert [(await one).status_code for one in waiting] == [200, 200]
        assert gate.calls == 2


async def test_text_that_waits_for_tokenising_is_limited(running: Running) -> None:
    gate = TokenizerGate()
    async with running(gate.around, max_queued_characters=5000) as client:
        alone = asyncio.create_task(post(client, input="w1 " * 2000, truncate_prompt_tokens=-1))
        await asyncio.to_thread(gate.entered.wait, 20)
        refused = await post(client, **LARGE)
        assert refused.status_code == 429
        assert refused.json()["error"]["message"] == "queue is full (5000 characters)"
        gate.opened.set()
        assert (await alone).status_code == 200  # more than the limit, but nothing else waited
        assert (await post(client, **LARGE)).status_code == 200
        assert sample(await series(client), "samples_total") == 2


async def test_a_client_that_leaves_is_not_tokenised(running: Running) -> None:
    gate = TokenizerGate()
    async with running(gate.around) as client:
        app: FastAPI = client.app  # type: ignore[attr-defined]
        waiting = asyncio.create_task(post(client, **LARGE))
        await asyncio.to_thread(gate.entered.wait, 20)
        receive, send, sent = hang_up_after(json.dumps(LARGE).encode(), entered=gate.entered)
        await app(dict(CLASSIFY), receive, send)
        assert sent[0]["status"] == 499
        gate.opened.set()
        assert (await waiting).status_code == 200
        assert gate.calls == 1


async def test_who_waits_holds_neither_body_nor_texts(running: Running) -> None:
    gate = Gate()
    async with running(gate.around) as client:
        app: FastAPI = client.app  # type: ignore[attr-defined]
        body = json.dumps({"input": [5] * 200_000, "truncate_prompt_tokens": -1}).encode()
        receive, send, sent = hang_up_after(body, entered=gate.opened)
        tracemalloc.start()
        try:
            request = asyncio.create_task(app(dict(CLASSIFY), receive, send))
            await asyncio.to_thread(gate.entered.wait, 20)
            held, _ = tracemalloc.get_traced_memory()
            references = sys.getrefcount(body)
        finally:
            tracemalloc.stop()
            gate.opened.set()
        await request
        assert held < 500_000  # 200,000 ids alone take 1.6 MB
        assert references == 2  # ours, and the call's own
    assert sent[0]["status"] in (200, 499)


async def test_too_many_ids_are_refused_by_their_number(client: httpx.AsyncClient) -> None:
    """What they are is not looked at: text in the middle goes unnoticed."""
    ids = [5] * 33 + ["w1"]
    for given, param in ((ids, "input"), ([[5], [5] * 33 + [-1]], "input[1]")):
        refused = await post(client, input=given)
        assert refused.json()["error"]["param"] == param
        assert "at most 32" in refused.json()["error"]["message"]
        assert (await post(client, input=given, truncate_prompt_tokens=-1)).status_code == 200
    long = (await post(client, input=[10**400])).json()["error"]["message"]
    assert len(long) < 120


# -- probes, information, life ---------------------------------------------------------------


async def test_probes_through_a_life(running: Running) -> None:
    paths = ("/livez", "/startupz", "/readyz", "/health", "/ping")
    async with running() as client:
        assert [(await client.get(path)).status_code for path in paths] == [200] * 5
        assert (await client.head("/readyz")).status_code == 200
        lifecycle = client.app.state.models.lifecycle  # type: ignore[attr-defined]
        assert "connection" not in (await post(client, input="w1")).headers
        lifecycle.phase = "draining"
        assert [(await client.get(path)).status_code for path in paths] == [200, 200, 503, 503, 503]
        assert sample(await series(client), "ready") == 0
        for path in ("/readyz", "/metrics", "/nope"):
            assert (await client.get(path)).headers.get_list("connection") == ["close"]
        answered = await post(client, input="w1")
        assert (answered.status_code, answered.headers["connection"]) == (200, "close")
        await lifecycle.drain(serve_on_s=0, finish_s=1)
        refused = await post(client, input="w1")
        assert refused.headers.get_list("connection") == ["close"]
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "5")
        assert refused.json()["error"]["type"] == "not_ready"


async def test_an_engine_that_dies_is_seen_by_everybody(
    running: Running, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fatal(self: Engine, jobs: Any) -> Any:
        raise SystemExit

    async with running() as client:
        assert sample(await series(client), "alive") == 1
        monkeypatch.setattr(Engine, "__call__", fatal)
        responses = [await post(client, input="w1") for _ in range(3)]
        # The first is built anew; the second is the last.
        assert [one.status_code for one in responses] == [500, 503, 503]
        assert responses[1].json()["error"]["message"] == "the engine has stopped"
        async with asyncio.timeout(10):
            while (await client.get("/livez")).status_code == 200:  # noqa: ASYNC110 - see `until`
                await asyncio.sleep(0.001)
        # One truth for the probes and for the gauges.
        assert (await client.get("/readyz")).status_code == 503
        values = await series(client)
        assert sample(values, "ready") == sample(values, "alive") == 0
    assert "an engine thread died" in caplog.text


async def test_refusals_are_logged_by_request_and_without_texts(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "offramp_service")
    async with running(log_level="debug") as client:
        await post(client, input="w1", speedup="secret", request_id="mine")
        await client.post(
            "/classify",
            json={"input": "w1", "speedup": "secret"},
            headers={"X-Request-Id": "theirs"},
        )
    assert "request theirs: 422 invalid_value" in caplog.messages
    assert "secret" not in caplog.text


def test_a_damaged_tokenizer_is_one_line_and_exit_code_2(
    directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Signals and logging belong to the test process.
    monkeypatch.setattr("offramp_service.__main__._prepare_process", lambda _: None)
    damaged = shutil.copytree(directory, tmp_path / "damaged")
    (damaged / "tokenizer.json").write_text("{")
    assert main(["--model-id", str(damaged)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("offramp-serve: ")
    assert "tokenizer.json is not a tokenizer" in line


async def test_requests_before_the_start_are_told_so(directory: Path) -> None:
    app = create_app(Settings(model_id=directory, threads=1))
    transport = httpx.ASGITransport(app)
    async with httpx.AsyncClient(transport=transport, base_url="http://tiny") as client:
        assert (await client.get("/startupz")).status_code == 503
        assert (await post(client, input="w1")).status_code == 503


async def test_info_tells_limits_and_calibration(client: httpx.AsyncClient) -> None:
    info = (await client.get("/info")).json()
    assert info["model_type"]["classifier"]["id2label"]["0"] == "negative"
    assert info["max_input_length"] == 32
    assert (info["num_layers"], info["exit_layers"]) == (4, [1, 2, 3, 4])
    assert (info["exit_policy"], info["speedup"]) == (
        "confidence",
        {"default": 1.0, "min": 1.0, "max": 4.0},
    )
    assert info["threshold"] == {"min": 0.0, "max": 1.0, "direction": "above"}
    assert (info["drain_seconds"], info["shutdown_timeout"]) == (5.0, 30.0)
    assert (info["max_batch_requests"], info["max_queued_characters"]) == (4096, 4_000_000)
    assert info["layer_cost"] is None  # not asked for
    points = info["calibration"]["points"]
    assert points[0]["speedup"] == 1.0
    assert points[0]["threshold"] is None
    assert points[-1]["speedup"] == 4.0
    assert (await client.get("/v1/models")).json()["data"][0]["id"] == "tiny"


async def test_the_document_is_honest_about_the_doors(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    for path in ("/classify", "/v1/classify"):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert {"input", "speedup", "threshold", "text_pair"} <= schema["properties"].keys()
        assert {"200", "413", "422", "429", "503", "504"} <= operation["responses"].keys()
    assert (await client.get("/docs")).status_code == 200


async def test_metrics_add_up(client: httpx.AsyncClient, support: ModuleType) -> None:
    before = await series(client)
    texts = support.random_texts(20, seed=12)
    layers = []
    for speedup in (1.0, 2.0):
        response = await post(client, input=texts, speedup=speedup, return_details=True)
        layers += [item["details"]["exit_layer"] for item in response.json()["data"]]
    values = await series(client)
    assert values.keys() == before.keys()
    assert sample(values, "samples_total") == sample(values, "exits_total") == 40
    assert sample(values, "layer_executions_total") == sum(layers)
    assert sample(values, "layers_saved_total") == 4 * 40 - sum(layers)
    assert sample(values, "exit_layer_sum") == sum(layers)
    assert sample(values, "tokens_total", "real") > 0
    assert sample(values, "requests_total", 'code="200"') == 2
    run, saved = (sample(values, "speedup_layers_total", f'kind="{k}"') for k in ("run", "saved"))
    assert (run, saved) == (sum(layers), 4 * 40 - sum(layers))
    # Refused, and asked for by threshold: neither is a speed-up that was given.
    assert (await post(client, input="w1", speedup=99)).status_code == 422
    assert (await post(client, input="w1", threshold=0.5)).status_code == 200
    values = await series(client)
    assert sample(values, "speedup_requested_sum") == 3.0
    assert sample(values, "speedup_requested_count") == 2
    assert sample(values, "speedup_achieved_count") == 2
    assert sample(values, "model_info", 'exit_policy="confidence"') == 1
    assert sample(values, "ready") == 1


async def test_two_applications_in_one_process(running: Running) -> None:
    async with running() as one, running(served_model_name="second") as two:
        assert (await post(one, input="w1")).json()["model"] == "tiny"
        assert (await post(two, input="w1", model="second")).json()["model"] == "second"
        assert sample(await series(one), "samples_total") == 1
