"""A front before the application, both in this process and joined by a real socket: doors answer
through it as they do without it."""

import asyncio
import json
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager

from loading import load
from offramp_service.fronts.counterpart import Counterpart, state_of
from offramp_service.fronts.front import Front, create_front
from offramp_service.settings import Settings

_conftest = load("tests/integration/conftest.py")
_service = load("tests/integration/test_service.py")
serving, until, Gate = _conftest.serving, _service.until, _service.Gate


@dataclass
class Fronted:
    """A client of the front, one of the application behind it, and the two ends of the link."""

    front: httpx.AsyncClient
    behind: httpx.AsyncClient
    end: Front
    counterpart: Counterpart

    @property
    def models(self) -> Any:
        return self.behind.app.state.models  # type: ignore[attr-defined]

    def tell(self) -> None:
        """As the keeper does when something has changed."""
        self.counterpart.link.send(state_of(self.models))


@asynccontextmanager
async def fronted(
    around: Callable[[Any], None] = lambda _: None, **settings: Any
) -> AsyncIterator[Fronted]:
    async with serving(around, **settings) as behind:
        app = behind.app
        ours, theirs = socket.socketpair()
        counterpart = Counterpart(ours, app, lambda: state_of(app.state.models))
        app.state.models.still_asked = lambda name, sha: sha in counterpart.holds.get(name, ())
        end = Front(Settings(**{"threads": 1, **settings}), theirs)
        await asyncio.gather(counterpart.open(), end.open())
        door = create_front(end)
        async with (
            LifespanManager(door),
            httpx.AsyncClient(transport=httpx.ASGITransport(door), base_url="http://tiny") as front,
        ):
            front.app = door  # type: ignore[attr-defined]
            yield Fronted(front, behind, end, counterpart)
            end.close()
            await until(lambda: not counterpart.link.alive)


@pytest.fixture
def copied(directory: Path, tmp_path: Path) -> Path:
    shutil.copytree(directory, tmp_path / "copied")
    return tmp_path / "copied"


QUESTIONS: list[tuple[str, str, dict[str, Any] | None]] = [
    ("POST", "/classify", {"input": "w1 w2 w3"}),
    ("POST", "/classify", {"input": ["w1", "w4 w5"], "speedup": 2.0, "return_details": True}),
    ("POST", "/classify", {"input": ["w1", "w4 w5"], "speedup": 2.0, "return_signals": True}),
    ("POST", "/v1/classify", {"input": [[1, 2, 3], [4, 5]], "model": "tiny", "speedup": 1.5}),
    ("POST", "/classify", {"input": "w1", "threshold": 0.5, "min_layer": 2, "nonsense": 1}),
    ("POST", "/predict", {"inputs": [["w1"], ["w2 w3"]], "parameters": {"speedup": 2}}),
    ("POST", "/predict", {"inputs": ""}),
    ("POST", "/", {"inputs": "w1 w2"}),
    (
        "POST",
        "/v2/models/tiny/infer",
        {
            "id": "7",
            "inputs": [
                {"name": "text", "datatype": "BYTES", "shape": [2], "data": ["w1", "w2 w3"]},
                {"name": "speedup", "datatype": "FP32", "shape": [2], "data": [1.0, 2.0]},
            ],
        },
    ),
    ("POST", "/v1/models/tiny:predict", {"instances": ["w1", "w5 w6"]}),
    ("POST", "/v2/models/other/infer", {"inputs": []}),
    ("POST", "/classify", {"input": "w1", "model": "other"}),
    ("POST", "/classify", {"input": "w1", "speedup": 99}),
    ("POST", "/classify", {"input": " ".join(["w1"] * 50)}),
    ("POST", "/classify", {"input": ["w1"] * 33}),
    ("POST", "/classify", {"input": [[10**9]]}),
    ("GET", "/readyz", None),
    ("HEAD", "/livez", None),
    ("GET", "/info", None),
    ("GET", "/info?model=other", None),
    ("GET", "/ui", None),
    ("GET", "/ui/", None),
    ("HEAD", "/ui/app.js", None),
    ("GET", "/ui/exits?model=tiny", None),
    ("GET", "/v1/models", None),
    ("GET", "/v2", None),
    ("GET", "/v2/models/tiny/config", None),
    ("GET", "/v2/models/other", None),
    ("POST", "/v2/repository/models/tiny/load", None),
    ("GET", "/openapi.json", None),
    ("GET", "/docs", None),
    ("GET", "/nowhere?a=b", None),
    ("PUT", "/classify", {}),
]

# What is of the moment.
PASSING = ("id", "created", "timings_ms", "date")


def settled(response: httpx.Response) -> Any:
    """Status, names of headers, and the body without what is of the moment."""
    try:
        body = json.loads(response.content, object_hook=without_passing)
    except ValueError:
        body = response.content
    return response.status_code, set(response.headers) - {"allow"}, body


def without_passing(one: dict[str, Any]) -> dict[str, Any]:
    return {
        name: pytest.approx(value, abs=1e-6) if isinstance(value, float) else value
        for name, value in one.items()
        if name not in PASSING and name != "probs"
    }


async def ask(client: httpx.AsyncClient, method: str, path: str, body: Any) -> httpx.Response:
    content = None if body is None else json.dumps(body).encode()
    return await client.request(method, path, content=content)


async def test_answers_are_those_of_the_application_behind(directory: Path) -> None:
    async with fronted(model_id=directory) as world:
        for method, path, body in QUESTIONS:
            there = settled(await ask(world.behind, method, path, body))
            here = settled(await ask(world.front, method, path, body))
            assert here == there, (method, path)


async def test_what_fronts_see_is_counted(directory: Path) -> None:
    async with fronted(model_id=directory) as world:
        for _ in range(3):
            await ask(world.front, "POST", "/classify", {"input": ["w1", "w2"], "speedup": 2})
        await ask(world.front, "POST", "/classify", {"input": "w1", "speedup": 99})

        async def counted() -> dict[str, float]:
            return await _service.series(world.front)

        await asyncio.sleep(0.2)
        values = await counted()
        sample = _service.sample
        assert sample(values, "requests_total", "/classify", "200") == 3
        assert sample(values, "requests_total", "/classify", "422") == 1
        assert sample(values, "request_failures_total", "validation") == 1
        assert sample(values, "samples_total") == 6
        assert sample(values, "speedup_requested_count") == 3
        assert sample(values, "tokenization_duration_seconds_count") == 3


async def test_who_leaves_is_taken_out_behind(directory: Path) -> None:
    gate = Gate()
    async with fronted(gate.around, model_id=directory) as world:
        batcher = world.models.default.batcher
        first = asyncio.create_task(ask(world.front, "POST", "/classify", {"input": "w1"}))
        await asyncio.to_thread(gate.entered.wait, 20)
        second = asyncio.create_task(ask(world.front, "POST", "/classify", {"input": "w1 w2"}))
        await until(lambda: batcher.unanswered == 2)
        assert world.end.models.lifecycle.inflight == 2
        second.cancel()
        await until(lambda: batcher.unanswered == 1)
        assert len(batcher.scheduler.queue) == 0
        gate.opened.set()
        assert (await first).status_code == 200
        await until(lambda: world.counterpart.inflight == 0)


async def test_a_full_queue_is_full_for_all_fronts(directory: Path) -> None:
    gate = Gate()
    how = {"max_concurrent_requests": 2, "max_client_batch_size": 2}
    async with fronted(gate.around, model_id=directory, **how) as world:
        inside = [
            asyncio.create_task(ask(client, "POST", "/classify", {"input": "w1"}))
            for client in (world.front, world.behind)
        ]
        await until(lambda: world.models.default.batcher.unanswered == 2)
        refused = await ask(world.front, "POST", "/classify", {"input": "w1"})
        assert refused.status_code == 429
        assert refused.json()["error"]["message"] == "queue is full (2 requests)"
        assert int(refused.headers["retry-after"]) >= 1
        gate.opened.set()
        assert [one.status_code for one in await asyncio.gather(*inside)] == [200, 200]


async def test_an_old_checkpoint_stays_until_no_front_asks_for_it(
    copied: Path, tmp_path: Path, support: ModuleType
) -> None:
    gate, large = _service.TokenizerGate(), _service.LARGE
    other = support.write_tiny_checkpoint(tmp_path / "other", width=32)
    async with fronted(model_id=copied, load_over_http=True) as world:
        old_sha = world.end.models.default.model.sha
        gate.around(SimpleNamespace(state=SimpleNamespace(models=world.end.models)))
        slow = asyncio.create_task(ask(world.front, "POST", "/classify", large))
        await asyncio.to_thread(gate.entered.wait, 20)
        shutil.rmtree(copied)
        shutil.copytree(other, copied)
        path = "/v2/repository/models/copied/load"
        loaded = await ask(world.front, "POST", path, None)
        assert loaded.status_code == 200, loaded.text
        # Nobody is inside the old one, but somebody may still come, and does.
        await asyncio.sleep(0.2)
        assert world.models.inside("copied", old_sha) is not None
        world.tell()
        await until(lambda: world.end.models.default.model.sha != old_sha)
        assert (await ask(world.front, "POST", "/classify", {"input": "w3"})).status_code == 200
        assert world.models.inside("copied", old_sha) is not None
        gate.opened.set()
        assert (await slow).status_code == 200
        await until(lambda: world.models.inside("copied", old_sha) is None)
        assert world.counterpart.holds == {"copied": [world.models.default.model.sha]}


async def test_floor_and_phase_are_those_behind(directory: Path) -> None:
    how = {"model_id": directory, "slo_p95_ms": 50.0, "speedup_correction": True}
    async with fronted(**how) as world:
        default = world.models.default
        default.slo._controller._level = 2.0
        default.controls._correction.factor = 1.1
        world.tell()
        await until(lambda: world.end.models.default.slo.floor() == default.slo.floor() > 1)
        assert world.end.models.default.controls.correction == 1.1
        response = await ask(world.front, "POST", "/classify", {"input": "w1"})
        assert float(response.headers["x-speedup-effective"]) == pytest.approx(
            default.slo.floor(), abs=1e-3
        )
        world.models.lifecycle.phase = "draining"
        world.tell()
        await until(lambda: world.end.models.lifecycle.leaving)
        response = await ask(world.front, "POST", "/classify", {"input": "w1"})
        assert (response.status_code, response.headers["connection"]) == (200, "close")


async def test_without_the_other_process_nothing_is_promised(directory: Path) -> None:
    gate = Gate()
    async with fronted(gate.around, model_id=directory) as world:
        waiting = asyncio.create_task(ask(world.front, "POST", "/classify", {"input": "w1"}))
        await asyncio.to_thread(gate.entered.wait, 20)
        world.counterpart.forget()
        await asyncio.wait_for(world.end.lost.wait(), 10)
        gate.opened.set()
        response = await ask(world.front, "POST", "/classify", {"input": "w1"})
        assert response.status_code == 503
        waiting.cancel()
        await until(lambda: world.models.default.batcher.unanswered == 0)


async def test_keys_are_asked_for_before_anything_else(directory: Path) -> None:
    async with fronted(model_id=directory, api_key="k1") as world:
        for path in ("/classify", "/info"):
            response = await world.front.post(path, content=b"{}")
            assert response.status_code == 401
        shown = {"authorization": "Bearer k1"}
        assert (await world.front.get("/info", headers=shown)).status_code == 200
        asked = world.front.post("/classify", json={"input": "w1"}, headers=shown)
        assert (await asked).status_code == 200
