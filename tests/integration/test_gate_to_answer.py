"""Learned gates from rows to HTTP: trained, calibrated, evaluated, and served by their policy."""

from pathlib import Path
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager

from offramp_model.checkpoint import Checkpoint, load_checkpoint
from offramp_model.policies import make_policy, supported_policies
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_service.app import create_app
from offramp_service.settings import Settings
from offramp_training.config import make_recipe
from offramp_training.data import Dataset, load_split
from offramp_training.evaluate import evaluate_checkpoint
from offramp_training.fit import fit


@pytest.fixture(scope="module")
def gated(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Warmed up until it knows the task, then taught when to leave."""
    objective = {
        "name": "consistentee",
        "alpha": 0.3,
        **{f"stage1_{what}": "recipe" for what in ("epochs", "batch_size", "lr")},
        "stage2_epochs": 10,
        "stage2_lr": 5e-3,
        "stage3_lr": 5e-4,
    }
    recipe = make_recipe(
        {
            "model": {"backbone": str(backbone), "max_length": 16},
            "objective": objective,
            "optimiser": {"lr": 3e-3, "head_lr": 3e-3},
            "loop": {"epochs": 8, "batch_size": 16},
        }
    )
    output = tmp_path_factory.mktemp("gated") / "verbs"
    return load_checkpoint(fit(recipe, output, data=str(data)))


@pytest.fixture(scope="module")
def test_rows(data: Path) -> Dataset:
    return load_split(str(data), "test")


@pytest.fixture(scope="module")
def recorded(gated: Checkpoint, test_rows: Dataset) -> RecordedExits:
    return record_exits(gated.stack(), gated.tokenizer().encode(test_rows.inputs))


async def ask(checkpoint: Checkpoint, body: dict[str, Any], **settings: Any) -> Any:
    app = create_app(Settings(model_id=checkpoint.directory, max_client_batch_size=64, **settings))
    async with LifespanManager(app) as manager:
        transport = httpx.ASGITransport(app=manager.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            answer = await client.post("/classify", json=body | {"return_details": True})
            info = (await client.get("/info")).json()
    assert answer.status_code == 200, answer.text
    return answer.json()["data"], info


def test_every_policy_is_calibrated_and_measured(gated: Checkpoint, test_rows: Dataset) -> None:
    assert "gate" in supported_policies(gated.model)
    assert gated.table("gate").points[0].threshold == float("inf")
    report = evaluate_checkpoint(gated, test_rows)
    assert list(report.policies)[-1] == "gate"
    natural = report.policies["gate"].natural
    assert natural is not None
    assert natural.threshold == 0.5
    assert natural.accuracy > 0.9, "it did not learn what a verb gives away"
    assert natural.speedup > 1.2, "it did not learn that depth is not needed"


@pytest.mark.parametrize("control", [{"threshold": 0.5}, {"speedup": 1.5}, {"speedup": 1.0}])
async def test_what_was_trained_is_what_answers(
    gated: Checkpoint, test_rows: Dataset, recorded: RecordedExits, control: dict[str, float]
) -> None:
    texts = [str(text) for text in test_rows.inputs]
    answers, info = await ask(gated, {"input": texts, **control})
    assert info["exit_policy"] == "gate"
    assert info["threshold"] == {"min": 0.0, "max": 1.0, "direction": "above"}
    threshold = control.get("threshold")
    if threshold is None:
        threshold = gated.table("gate").threshold_for(control["speedup"])
    expected = replay(recorded, make_policy("gate"), threshold)
    names = gated.model.labels
    details = [answer["details"] for answer in answers]
    assert [one["exit_layer"] for one in details] == expected.exit_layer.tolist()
    assert [answer["label"] for answer in answers] == [names[y] for y in expected.label.tolist()]
    signals = [one["exit_signal"] for one in details]
    assert signals == pytest.approx(expected.signal.tolist(), abs=1e-5)


async def test_another_policy_serves_the_same_checkpoint(
    gated: Checkpoint, test_rows: Dataset, recorded: RecordedExits
) -> None:
    texts = [str(text) for text in test_rows.inputs]
    answers, info = await ask(gated, {"input": texts, "speedup": 1.5}, exit_policy="entropy")
    assert info["exit_policy"] == "entropy"
    threshold = gated.table("entropy").threshold_for(1.5)
    expected = replay(recorded, make_policy("entropy"), threshold)
    assert [one["details"]["exit_layer"] for one in answers] == expected.exit_layer.tolist()
