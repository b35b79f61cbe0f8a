"""Fixtures of the training tests, for tests that go on to serve what was trained."""

from pathlib import Path

import pytest

from loading import load
from offramp_training.config import make_recipe
from offramp_training.fit import fit

_fixtures = load("tests/unit/training/conftest.py")

backbone: pytest.FixtureDef[Path] = _fixtures.backbone
data: pytest.FixtureDef[Path] = _fixtures.data


@pytest.fixture(scope="session", params=["mean", "attention"])
def checkpoint(
    request: pytest.FixtureRequest,
    backbone: Path,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Trained until it knows the task, and calibrated; with heads that learn to pool, too."""
    recipe = make_recipe(
        {
            "model": {"backbone": str(backbone), "max_length": 16, "pooling": request.param},
            "optimiser": {"lr": 3e-3, "head_lr": 3e-3},
            "loop": {"epochs": 8, "batch_size": 16},
        }
    )
    return fit(recipe, tmp_path_factory.mktemp("trained") / "verbs", data=str(data))
