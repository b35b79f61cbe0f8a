"""The chart, rendered once with each file of values."""

from typing import Any

import pytest

from loading import load

kube = load("tests/deploy/kube.py")

CASES = sorted((kube.CHART / "ci").glob("*-values.yaml"))


@pytest.fixture(scope="session")
def rendered() -> dict[str, dict[str, Any]]:
    """By the name of the file of values: `objects` by template, and `notes`."""
    names = [path.name.removesuffix("-values.yaml") for path in CASES]
    return dict(zip(names, kube.render(*CASES), strict=True))
