"""The chart, rendered once with each file of values.

Where Helm's library is not installed (it has no wheel for every machine), what needs it is not
collected.
"""

from importlib.util import find_spec
from typing import Any

import pytest

from loading import load

kube = load("tests/deploy/kube.py")

if find_spec("helm_python") is None:
    collect_ignore = ["test_chart.py", "test_manifests.py", "test_release.py", "test_scaling.py"]

CASES = sorted((kube.CHART / "ci").glob("*-values.yaml"))


@pytest.fixture(scope="session")
def rendered() -> dict[str, dict[str, Any]]:
    """By the name of the file of values: `objects` by template, and `notes`."""
    names = [path.name.removesuffix("-values.yaml") for path in CASES]
    return dict(zip(names, kube.render(*CASES), strict=True))
