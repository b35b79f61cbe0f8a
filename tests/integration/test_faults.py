"""Faults while serving: each is a clear error for whom it concerns, and disturbs nobody else."""

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI

from offramp_service.app import create_app
from offramp_service.served_model import load_model
from offramp_service.settings import Settings

Running = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


def stack_of(app: FastAPI) -> Any:
    return app.state.models.default.model.stack


async def classify(client: httpx.AsyncClient, *texts: str, **controls: Any) -> httpx.Response:
    return await client.post("/classify", json={"input": texts, **controls})


async def gauges(client: httpx.AsyncClient) -> list[float]:
    names = ("queue_requests", "queue_tokens", "queue_layer_work")
    lines = (await client.get("/metrics")).text.splitlines()
    return [
        float(line.rsplit(" ", 1)[1])
        for line in lines
        if any(line.startswith(f"offramp_{name}{{") for name in names)
    ]


async def test_nan_weights_in_one_texts_path(running: Running, caplog: Any) -> None:
    """One word's embedding is broken: texts with it fail, alone, and their neighbours in the same
    batches get what they would get without them."""
    broken = 4 + 7  # w7

    def poison(app: FastAPI) -> None:
        stack_of(app).embeddings.words[broken] = torch.nan

    texts = [f"w{number} w{number + 1}" for number in range(20, 40)]
    async with running() as client:
        expected = (await classify(client, *texts)).json()["data"]
    async with running(poison) as client:
        asked = [classify(client, text, speedup=2) for text in texts]
        sick = [classify(client, f"w7 {text}") for text in texts[:5]]
        mixed = await asyncio.gather(*sick, *asked)
        assert {one.status_code for one in mixed[:5]} == {500}
        assert {one.status_code for one in mixed[5:]} == {200}
        again = await classify(client, *texts)
        assert again.json()["data"] == expected
        whole = await classify(client, texts[0], "w7", texts[1])
        assert whole.status_code == 500
        assert whole.json()["error"]["message"] == "the model's scores are not finite numbers"
        assert await gauges(client) == [0.0, 0.0, 0.0]
    assert all("w7" not in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
async def test_memory_that_runs_out(running: Running, error: BaseException) -> None:
    """In the second segment of one batch; what comes after is answered as before."""
    countdown = [0]

    def starve(app: FastAPI) -> None:
        stack = stack_of(app)
        segment = stack.segment

        def failing(exit_layer: int, hidden: Any) -> Any:
            countdown[0] -= 1
            if countdown[0] == 0:
                raise error
            return segment(exit_layer, hidden)

        stack.segment = failing

    async with running(starve) as client:
        before = (await classify(client, "w1 w2", "w3")).json()["data"]
        countdown[0] = 2
        failed = await classify(client, "w1 w2", "w3")
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "the model failed on this batch"
        assert (await classify(client, "w1 w2", "w3")).json()["data"] == before
        assert (await client.get("/livez")).status_code == 200
        assert await gauges(client) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("name", ["model.safetensors", "exits.safetensors", "offramp.json"])
@pytest.mark.parametrize("how", ["flip", "cut", "gone"])
def test_a_checkpoint_that_is_broken_on_disk(
    directory: Path, tmp_path: Path, name: str, how: str, support: ModuleType
) -> None:
    """Nothing is served from it, and the message names the file."""
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in directory.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    content = bytearray((copy / name).read_bytes())
    middle = len(content) // 2
    if how == "gone":
        (copy / name).unlink()
    elif how == "cut":
        (copy / name).write_bytes(content[:middle])
    else:
        content[middle] ^= 0xFF
        (copy / name).write_bytes(content)
    with pytest.raises(ValueError, match=name):
        load_model(Settings(model_id=copy, threads=1))


async def test_the_wall_clock_jumps(
    running: Running, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    """A day back, a day ahead, between and during requests: deadlines and durations go by a clock
    that cannot jump."""
    real = time.time
    offset = [0.0]
    monkeypatch.setattr(time, "time", lambda: real() + offset[0])
    async with running() as client:
        expected = (await classify(client, "w1 w2")).json()["data"]
        for jump in (-86_400.0, 86_400.0, 0.0):
            waiting = asyncio.create_task(classify(client, "w1 w2", deadline_ms=20_000))
            await asyncio.sleep(0)
            offset[0] = jump
            response = await waiting
            assert response.json()["data"] == expected
            assert int(response.headers["x-total-time"]) < 20_000
    assert not [one for one in caplog.records if one.levelno >= logging.ERROR]


async def test_an_application_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere"):
        create_app(Settings(model_id=tmp_path / "nowhere"))
