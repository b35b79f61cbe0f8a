"""Fixtures of the training tests, for tests that go on to serve what was trained."""

import importlib.util
from pathlib import Path

import pytest

from offramp_training.config import make_recipe
from offramp_training.fit import fit

_PATH = Path(__file__).parents[1] / "unit" / "training" / "conftest.py"
_spec = importlib.util.spec_from_file_location("training_fixtures", _PATH)
assert _spec is not None
assert _spec.loader is not None
_fixtures = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_fixtures)

backbone: pytest.FixtureDef[Path] = _fixtures.backbone
data: pytest.FixtureDef[Path] = _fixtures.data


@pytest.fixture(scope="session")
def checkpoint(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained until it knows the task, and calibrated."""
    recipe = make_recipe(
        {
            "model": {"backbone": str(backbone), "max_length": 16},
            "optimiser": {"lr": 3e-3, "head_lr": 3e-3},
            "loop": {"epochs": 8, "batch_size": 16},
        }
    )
    return fit(recipe, tmp_path_factory.mktemp("trained") / "verbs", data=str(data))
