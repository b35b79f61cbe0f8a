"""Several models in one server, and a checkpoint exchanged under load: no failed and no mixed
answer, and the old one stays where the new one is no good."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager

from loading import load
from offramp_service.app import create_app
from offramp_service.settings import Settings

_service = load("tests/integration/test_service.py")
series, sample, until = _service.series, _service.sample, _service.until

TEXTS = [f"w{number} w{number + 7}" for number in range(24)]


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, support: ModuleType) -> Path:
    """Another checkpoint: wider, with two exits only, so that its answers differ everywhere."""
    path = tmp_path_factory.mktemp("other") / "wide"
    return support.write_tiny_checkpoint(path, exit_layers=(2, 4), width=32)


@asynccontextmanager
async def serving(**settings: Any) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(Settings(threads=1, **settings))
    transport = httpx.ASGITransport(app)
    async with (
        LifespanManager(app, startup_timeout=30, shutdown_timeout=30),
        httpx.AsyncClient(transport=transport, base_url="http://tiny") as client,
    ):
        client.app = app  # type: ignore[attr-defined]
        yield client


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


@pytest.mark.parametrize("fault", ["broken", "nan", "gone"])
async def test_what_is_no_good_is_not_served(
    copied: Path, other: Path, fault: str, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(model_id=copied, load_over_http=True) as client:
        before, sha = await answers(client), (await info(client))["model_sha"]
        if fault == "gone":
            shutil.rmtree(copied)
        else:
            replace(copied, other)
        if fault == "broken":
            weights = copied / "model.safetensors"
            weights.write_bytes(weights.read_bytes()[:-7])
        if fault == "nan":

            def nothing(*_: Any) -> Any:
                raise ArithmeticError("the model's scores are not finite numbers")

            monkeypatch.setattr("offramp_service.engine.Engine.warm_up", nothing)
        response = await load_anew(client)
        assert response.status_code == 422
        assert "the old one is still served" in response.json()["error"]
        assert (await info(client))["model_sha"] == sha
        assert await answers(client) == before
        assert (await client.get("/readyz")).status_code == 200


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


async def test_exchanges_leave_no_threads(copied: Path, directory: Path, other: Path) -> None:
    import threading

    async with serving(model_id=copied, load_over_http=True) as client:
        await answers(client)
        for by in (other, directory, other):
            replace(copied, by)
            assert (await load_anew(client)).status_code == 200
            await answers(client)
        engines = [one for one in threading.enumerate() if one.name == "engine"]
        await until(
            lambda: len([one for one in threading.enumerate() if one.name == "engine"]) == 1
        )
        assert engines
