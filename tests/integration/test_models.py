"""Several models in one server, and a checkpoint exchanged under load: no failed and no mixed
answer, and the old one stays where the new one is no good."""

import asyncio
import gc
import hashlib
import json
import shutil
import threading
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from loading import load
from offramp_service import models
from offramp_service.settings import Settings

_service, _conftest = (
    load("tests/integration/test_service.py"),
    load("tests/integration/conftest.py"),
)
serving = _conftest.serving
series, sample, until = _service.series, _service.sample, _service.until

TEXTS = [f"w{number} w{number + 7}" for number in range(24)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, support: ModuleType) -> Path:
    """Another checkpoint: wider, with two exits only, so that its answers differ everywhere."""
    path = tmp_path_factory.mktemp("other") / "wide"
    return support.write_tiny_checkpoint(path, exit_layers=(2, 4), width=32)


async def answers(client: httpx.AsyncClient, **body: Any) -> Any:
    response = await client.post("/classify", json={"input": TEXTS, **body})
    assert response.status_code == 200, response.text
    return response.json()["data"]


async def info(client: httpx.AsyncClient) -> dict[str, Any]:
    return (await client.get("/info")).json()


def replace(directory: Path, by: Path) -> None:
    """As an operator would: fill a new directory, then exchange the two."""
    fresh = directory.with_name("fresh")
    shutil.copytree(by, fresh)
    shutil.rmtree(directory.with_name("old"), ignore_errors=True)
    directory.rename(directory.with_name("old"))
    fresh.rename(directory)


@pytest.fixture
def copied(tmp_path: Path, directory: Path) -> Path:
    """A checkpoint that may be exchanged."""
    return Path(shutil.copytree(directory, tmp_path / "copied"))


# -- several models --------------------------------------------------------------------------


async def test_who_names_a_model_gets_it(directory: Path, other: Path) -> None:
    async with serving(model_id=directory, served_model_name="one") as client:
        first = await answers(client)
    async with serving(model_id=other, served_model_name="two") as client:
        second = await answers(client)
    assert first != second
    async with serving(model=(f"one={directory}", f"two={other}")) as client:
        mixed = await asyncio.gather(
            *(answers(client, model=name) for name in ("one", "two", "one", "two")),
            answers(client),
        )
        assert mixed == [first, second, first, second, first]
        ids = [card["id"] for card in (await client.get("/v1/models")).json()["data"]]
        assert ids == ["one", "two"]
        assert (await info(client))["models"] == ["one", "two"]
        for name, expected in (("one", first), ("two", second)):
            text = {"name": "text", "datatype": "BYTES", "shape": [24], "data": TEXTS}
            response = await client.post(f"/v2/models/{name}/infer", json={"inputs": [text]})
            assert response.json()["model_name"] == name
            labels = response.json()["outputs"][2]["data"]
            assert labels == [item["label"] for item in expected]
        refused = await client.post("/classify", json={"input": "a", "model": "three"})
        assert refused.status_code == 404
        assert "'one', 'two' are" in refused.json()["error"]["message"]
        values = await series(client)
        assert sample(values, "samples_total", 'model_name="one"') == 4 * 24
        assert sample(values, "samples_total", 'model_name="two"') == 3 * 24
        assert sample(values, "requests_total", 'code="404"', 'model_name="one"') == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "model_id or model is needed"),
        ({"model": ("a",)}, "allowed is name=directory"),
        ({"model": ("a b=x",)}, "allowed is name=directory"),
        ({"model": ("a=x", "a=y")}, "names must differ"),
        ({"model_id": Path("a"), "model": ("a=x",)}, "names must differ"),
    ],
)
def test_models_that_cannot_be_told_apart(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**settings)


# -- exchange --------------------------------------------------------------------------------


async def load_anew(client: httpx.AsyncClient, name: str = "copied") -> httpx.Response:
    return await client.post(f"/v2/repository/models/{name}/load")


async def test_an_exchange_under_load(copied: Path, directory: Path, other: Path) -> None:
    """Every answer is wholly of one checkpoint; from the exchange on, of the new one."""
    async with serving(model_id=directory) as client:
        old = await answers(client)
    async with serving(model_id=other) as client:
        new = await answers(client)
    async with serving(model_id=copied, load_over_http=True) as client:
        before = await series(client)
        done = asyncio.Event()
        seen = {"old": 0, "new": 0}

        async def ask() -> None:
            while not done.is_set():
                after_exchange = exchanged.is_set()
                found = await answers(client)
                assert found in (old, new)
                assert not (after_exchange and found == old)
                seen["old" if found == old else "new"] += 1

        exchanged = asyncio.Event()
        clients = [asyncio.create_task(ask()) for _ in range(8)]
        await until(lambda: seen["old"] >= 8)
        replace(copied, other)
        response = await load_anew(client)
        exchanged.set()
        assert response.status_code == 200, response.text
        assert response.json()["sha"] == (await info(client))["model_sha"]
        await until(lambda: seen["new"] >= 16)
        done.set()
        await asyncio.gather(*clients)
        after = await series(client)
        gone = {name for name in before if "model_info" not in name} - after.keys()
        assert not gone
        assert len(after) == len(before)
        for gauge in ("queue_requests", "queue_tokens", "queue_layer_work", "inflight_requests"):
            assert sample(after, gauge) == 0
        assert sample(after, "exits_total", 'layer="2"') + sample(
            after, "exits_total", 'layer="4"'
        ) == sample(after, "samples_total")


def poison(directory: Path) -> None:
    """A checkpoint that is sound on disk, and whose scores are not numbers."""
    path = directory / "exits.safetensors"
    tensors = load_file(path)
    save_file({name: torch.full_like(one, torch.nan) for name, one in tensors.items()}, path)
    manifest = json.loads((directory / "offramp.json").read_text())
    manifest["sha256"]["exits.safetensors"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (directory / "offramp.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("fault", ["broken", "nan", "gone"])
async def test_what_is_no_good_is_not_served(
    copied: Path, other: Path, fault: str, caplog: Any
) -> None:
    async with serving(model_id=copied, load_over_http=True) as client:
        before, sha = await answers(client), (await info(client))["model_sha"]
        figures = await series(client)
        if fault == "gone":
            shutil.rmtree(copied)
        else:
            replace(copied, other)
        if fault == "broken":
            weights = copied / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-7])
        if fault == "nan":
            poison(copied)
        response = await load_anew(client)
        assert response.status_code == 422
        assert "the old one is still served" in response.json()["error"]
        assert (fault == "nan") == ("not finite" in response.json()["error"])
        assert "copied was not loaded anew" in caplog.text
        assert (await info(client))["model_sha"] == sha
        assert await answers(client) == before
        assert (await client.get("/readyz")).status_code == 200
        for gauge in ("expected_accuracy", "speedup_floor", "default_speedup", "model_info"):
            assert sample(await series(client), gauge) == sample(figures, gauge), gauge
        assert len(engines()) == 1


async def test_nobody_loads_over_http_unasked(copied: Path) -> None:
    async with serving(model_id=copied) as client:
        assert (await load_anew(client)).status_code == 404
    async with serving(model_id=copied, load_over_http=True) as client:
        assert (await load_anew(client, "other")).status_code == 404


async def test_a_directory_that_is_watched(copied: Path, other: Path) -> None:
    async with serving(model_id=copied, watch_seconds=0.05) as client:
        old = (await info(client))["model_sha"]
        replace(copied, other)
        async with asyncio.timeout(20):
            while (await info(client))["model_sha"] == old:  # noqa: ASYNC110 - it lies on a disk
                await asyncio.sleep(0.05)
        assert [item["label"] for item in await answers(client)]


def engines() -> list[threading.Thread]:
    """The first worker's thread of each."""
    return [one for one in threading.enumerate() if one.name == "engine-0"]


async def last_request(client: httpx.AsyncClient) -> dict[str, Any]:
    """The scope of a request that was answered."""
    scope = {**_service.CLASSIFY, "headers": []}
    messages = [{"type": "http.request", "body": b'{"input": "w1 w2"}'}]
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop()
        return await asyncio.Event().wait()  # this client stays

    async def send(one: Any) -> None:
        sent.append(one)

    await client.app(scope, receive, send)  # type: ignore[attr-defined]
    assert sent[0]["status"] == 200
    return scope


def others() -> int:
    """Threads beside those that the event loop keeps for itself."""
    return sum(not one.name.startswith("asyncio_") for one in threading.enumerate())


@pytest.mark.parametrize("frozen", [False, True])
async def test_exchanges_leave_nothing_behind(
    copied: Path, directory: Path, other: Path, frozen: bool
) -> None:
    """Not even where the command has told the collector to leave alone what was there; nor where
    connections keep their last request, as a server's do."""
    async with serving(model_id=copied, load_over_http=True) as client:
        await answers(client)
        kept = await last_request(client)
        threads = others()
        rooms = client.app.state.models._rooms  # type: ignore[attr-defined]
        gone = []
        try:
            for by in (other, directory, other):
                gone += [weakref.ref(rooms["copied"]), weakref.ref(rooms["copied"].pipeline)]
                if frozen:
                    gc.freeze()
                replace(copied, by)
                assert (await load_anew(client)).status_code == 200
                await answers(client)
            await until(lambda: all(one() is None for one in gone))
        finally:
            gc.unfreeze()
        assert kept
        assert len(engines()) == 1
        assert others() == threads


async def test_a_body_that_comes_during_an_exchange(copied: Path, other: Path) -> None:
    """Its model is that of the moment when it is complete, on every door."""
    async with serving(model_id=copied, load_over_http=True) as client:
        bodies: dict[str, dict[str, Any]] = {
            "/predict": {"inputs": "w1 w2"},
            "/classify": {"input": "w1 w2"},
            "/v1/models/copied:predict": {"instances": ["w1 w2"]},
            "/v2/models/copied/infer": {
                "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["w1 w2"]}]
            },
        }
        halfway, exchanged = asyncio.Event(), asyncio.Event()

        async def trickle(body: bytes) -> AsyncIterator[bytes]:
            yield body[:10]
            halfway.set()
            await exchanged.wait()
            yield body[10:]

        asked = [
            asyncio.create_task(client.post(path, content=trickle(json.dumps(body).encode())))
            for path, body in bodies.items()
        ]
        await halfway.wait()
        replace(copied, other)
        assert (await load_anew(client)).status_code == 200
        await until(lambda: len(engines()) == 1)  # the old room is closed
        exchanged.set()
        for response in await asyncio.gather(*asked):
            assert response.status_code == 200, response.text


async def test_figures_go_on_over_an_exchange(copied: Path, other: Path) -> None:
    async with serving(model_id=copied, load_over_http=True) as client:
        await answers(client)
        replace(copied, other)
        assert (await load_anew(client)).status_code == 200
        await answers(client)
        (stats,) = (await client.get("/v2/models/stats")).json()["model_stats"]
        assert stats["inference_stats"]["success"]["count"] == 2
        assert stats["inference_count"] >= 48


async def test_two_exchanges_at_once(copied: Path, other: Path) -> None:
    async with serving(model_id=copied, load_over_http=True) as client:
        replace(copied, other)
        loads = await asyncio.gather(*(load_anew(client) for _ in range(3)))
        assert [one.status_code for one in loads] == [200] * 3
        await answers(client)
        await until(lambda: len(engines()) == 1)


async def test_the_server_ends_while_a_checkpoint_is_opened(
    copied: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening, may_open = threading.Event(), threading.Event()
    real = models.load_model

    def slowly(settings: Settings) -> Any:
        opening.set()
        assert may_open.wait(20)
        return real(settings)

    async with serving(model_id=copied, load_over_http=True) as client:
        monkeypatch.setattr(models, "load_model", slowly)
        replace(copied, other)
        loading = asyncio.create_task(load_anew(client))
        await asyncio.to_thread(opening.wait, 20)
        client.app.state.models.lifecycle.phase = "draining"  # type: ignore[attr-defined]
        may_open.set()
        assert (await loading).status_code == 503
        assert len(engines()) == 1


async def test_a_newcomer_that_dies_takes_nobody_along(
    copied: Path, other: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(model_id=copied, load_over_http=True) as client:
        before = await answers(client)
        replace(copied, other)

        def crash(*_: Any) -> Any:
            raise SystemExit("out of luck")

        with monkeypatch.context() as broken:
            # The old room is at rest meanwhile.
            broken.setattr("offramp_service.batcher.Batcher._hand_out", crash)
            assert (await load_anew(client)).status_code == 422
        assert await answers(client) == before
        assert not client.app.state.models.lifecycle.died.is_set()  # type: ignore[attr-defined]
        assert (await client.get("/livez")).status_code == 200
