"""Fixtures of the training tests, for tests that go on to serve what was trained; and a tiny random
checkpoint behind the whole application."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from asgi_lifespan import LifespanManager
from fastapi import FastAPI

from loading import load
from offramp_service.app import create_app
from offramp_service.settings import Settings
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


@pytest.fixture(scope="session")
def support() -> ModuleType:
    return load("tests/unit/service/support.py")


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory, support: ModuleType) -> Path:
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("service") / "tiny")


Running = Callable[..., AbstractAsyncContextManager[httpx.AsyncClient]]


@asynccontextmanager
async def serving(
    around: Callable[[FastAPI], None] = lambda _: None, **settings: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """A started application and a client for it."""
    app = create_app(Settings(**{"threads": 1, **settings}))
    around(app)
    transport = httpx.ASGITransport(app)
    async with (
        LifespanManager(app, startup_timeout=30, shutdown_timeout=30),
        httpx.AsyncClient(transport=transport, base_url="http://tiny") as client,
    ):
        client.app = app  # type: ignore[attr-defined]
        yield client


@pytest.fixture
def running(directory: Path) -> Running:
    """`serving` the tiny checkpoint, unless told otherwise."""

    def start(
        around: Callable[[FastAPI], None] = lambda _: None, **settings: Any
    ) -> AbstractAsyncContextManager[httpx.AsyncClient]:
        return serving(around, **{"model_id": directory, **settings})

    return start


@pytest.fixture
async def client(running: Running) -> AsyncIterator[httpx.AsyncClient]:
    async with running() as client:
        yield client
