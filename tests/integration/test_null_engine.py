"""The service around an engine that answers at once: all of it but the model."""

from pathlib import Path

import httpx
import pytest
from asgi_lifespan import LifespanManager

from loading import load
from offramp_service.settings import Settings


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support = load("tests/unit/service/support.py")
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("null") / "tiny")


async def test_every_text_gets_the_same_answer_after_the_last_layer(directory: Path) -> None:
    app = load("service/bench/null_engine.py").make_app(Settings(model_id=directory, threads=1))
    transport = httpx.ASGITransport(app)
    async with (
        LifespanManager(app, startup_timeout=30),
        httpx.AsyncClient(transport=transport, base_url="http://null") as client,
    ):
        texts = ["w1 w2", "w3", "w4"]
        reply = await client.post(
            "/classify", json={"input": texts, "speedup": 4, "return_details": True}
        )
        assert reply.status_code == 200
        items = reply.json()["data"]
        assert [item["details"]["exit_layer"] for item in items] == [4, 4, 4]
        assert all(item["probs"] == pytest.approx([1 / 3] * 3) for item in items)
        assert (await client.post("/classify", json={"input": ""})).status_code == 400
        samples = [
            line.rpartition(" ")[2]
            for line in (await client.get("/metrics")).text.splitlines()
            if line.startswith("offramp_samples_total{")
        ]
        assert [float(value) for value in samples] == [3]
