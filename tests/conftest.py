"""Settings for every test: one torch thread, a fixed hypothesis profile, loopback only."""

import asyncio
import os
import socket
from collections.abc import Iterator
from typing import Any

# Before anything imports a library that reads them.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest
import torch
from hypothesis import HealthCheck, settings

# Small machines: several pools of threads only get in one another's way.
torch.set_num_threads(1)

settings.register_profile(
    "offramp",
    derandomize=bool(os.environ.get("CI")),
    deadline=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("offramp")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run only where there is a device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True, scope="session")
def _loopback_only() -> Iterator[None]:
    """Nothing in a test may listen anywhere but on loopback."""
    bind = socket.socket.bind

    def checked(self: socket.socket, address: Any) -> None:
        if isinstance(address, tuple) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a test tried to listen on {address[0]!r}")
        bind(self, address)

    socket.socket.bind = checked  # type: ignore[method-assign]
    yield
    socket.socket.bind = bind  # type: ignore[method-assign]


@pytest.fixture(autouse=True, scope="session")
def _no_stray_event_loop() -> None:
    """looptime asks for the current loop before pytest-asyncio has made one; with none ever set,
    asyncio would make one on the spot that nobody closes."""
    asyncio.set_event_loop(None)
