"""A server with a latency target, over HTTP: it raises speed-ups under load, and says so."""

import asyncio
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest

from loading import load

_service = load("tests/integration/test_service.py")

post, sample, series = _service.post, _service.sample, _service.series

IMPOSSIBLE = {"slo_p95_ms": 0.1}
"""No request is that fast, so that any traffic is overload."""


async def until_raised(client: httpx.AsyncClient) -> httpx.Response:
    """Ask until an answer is raised."""
    async with asyncio.timeout(40):
        while True:
            responses = await asyncio.gather(*(post(client, input="w1 w2 w3") for _ in range(8)))
            for response in responses:
                assert response.status_code == 200
                if "x-speedup-effective" in response.headers:
                    return response


async def slo_info(client: httpx.AsyncClient) -> dict[str, Any]:
    info: dict[str, Any] = (await client.get("/info")).json()["slo"]
    return info


async def test_overload_raises_the_floor_and_says_so(running: Any, directory: Path) -> None:
    calibration = json.loads((directory / "offramp.json").read_text())["calibration"]
    (points,) = (one["points"] for one in calibration if one["policy"] == "confidence")
    least = points[0]["accuracy"] - 0.05
    async with running(**IMPOSSIBLE, min_accuracy=least, max_speedup=3.0) as client:
        slo = client.app.state.models.default.slo
        before = await series(client)
        assert sample(before, "slo_target_seconds") == pytest.approx(1e-4)
        assert sample(before, "speedup_floor") == 1.0
        assert sample(before, "expected_accuracy") == pytest.approx(points[0]["accuracy"])
        await until_raised(client)
        async with asyncio.timeout(40):
            while (await slo_info(client))["floor"] < (await slo_info(client))["ceiling"]:
                await asyncio.gather(*(post(client, input="w1 w2 w3") for _ in range(30)))
        # From here on no decision is due, however slow this machine is.
        stopped = slo._clock()
        slo._clock = lambda: stopped
        response = await post(client, input="w1 w2 w3")
        effective = float(response.headers["x-speedup-effective"])
        assert 1.0 < effective <= 3.0
        assert response.headers["x-exit-threshold"] != "inf"

        info = await slo_info(client)
        assert (info["mode"], info["target_p95_ms"], info["min_accuracy"]) == (
            "enforce",
            0.1,
            least,
        )
        assert effective == pytest.approx(info["floor"], rel=1e-3)
        assert info["floor"] == info["ceiling"] <= 3.0
        values = await series(client)
        assert values.keys() == before.keys()
        assert sample(values, "speedup_floor") == info["floor"]
        assert sample(values, "controller_adjustments_total", 'direction="up"') >= 1
        accuracies = {one["speedup"]: one["accuracy"] for one in points}
        assert sample(values, "expected_accuracy") == accuracies[info["floor"]] >= least

        # Not touched: who asks for more, and raw controls.
        fast = await post(client, input="w1 w2 w3", speedup=3.0)
        assert "x-speedup-effective" not in fast.headers
        raw = await post(client, input="w1 w2 w3", threshold=1.0)
        assert (raw.headers["x-exit-threshold"], raw.headers["x-exit-layer"]) == ("1", "4")
        assert "x-speedup-effective" not in raw.headers
        held = await post(client, input="w1 w2 w3", min_layer=4)
        assert held.headers["x-exit-layer"] == "4"

        # Nobody asks for a while, and then for an hour.
        slo._clock = lambda: stopped + 100
        await client.get("/metrics")
        slo._clock = lambda: stopped + 3700
        values = await series(client)
        assert sample(values, "speedup_floor") == 1.0
        assert sample(values, "controller_adjustments_total", 'direction="down"') >= 1
        assert (await slo_info(client))["floor"] == 1.0
        assert "x-speedup-effective" not in (await post(client, input="w1")).headers


async def test_observing_changes_nothing(running: Any) -> None:
    async with running(**IMPOSSIBLE, slo_controller="observe") as client:
        async with asyncio.timeout(40):
            while (await slo_info(client))["floor"] == 1.0:
                responses = await asyncio.gather(*(post(client, input="w1") for _ in range(8)))
                assert all("x-speedup-effective" not in one.headers for one in responses)
        assert sample(await series(client), "speedup_floor") > 1.0
        response = await post(client, input="w1 w2")
        assert "x-speedup-effective" not in response.headers
        assert response.headers["x-exit-layer"] == "4"


async def test_a_queue_that_fills_raises_before_anybody_is_refused(
    running: Any, support: ModuleType
) -> None:
    """The forecast and the room, not the clock: nothing has been answered yet."""
    gate = _service.Gate()
    how = {"slo_p95_ms": 3_600_000, "max_concurrent_requests": 20, "max_client_batch_size": 20}
    async with running(gate.around, **how) as client:
        pipeline = client.app.state.models.default
        waiting = [asyncio.create_task(post(client, input="w1")) for _ in range(12)]
        await _service.until(lambda: pipeline.batcher.unanswered == 12)
        clock = pipeline.slo._clock
        pipeline.slo._clock = lambda: clock() + 1
        assert pipeline.slo.floor() > 1.0
        gate.opened.set()
        assert [(await one).status_code for one in waiting] == [200] * 12
        assert sample(await series(client), "queue_layer_work") == 0
        assert pipeline.batcher.load.layers_ahead == 0
        assert pipeline.batcher.load.layers_run > 0
        assert pipeline.batcher.load.busy_s > 0
