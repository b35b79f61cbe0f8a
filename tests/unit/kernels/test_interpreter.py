"""Runs the interpreted suites in processes of their own, where TRITON_INTERPRET may be set."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

SUITES = sorted(Path(__file__).parent.glob("interpreted_*.py"))
ROOT = Path(__file__).parents[3]


@pytest.mark.timeout(200)  # 20 s each on a quiet machine
@pytest.mark.parametrize("suite", SUITES, ids=lambda path: path.stem)
def test_kernels_agree_with_their_twins_under_the_interpreter(suite: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", suite, "-q", "--no-header", "--durations=5"),
            *("-p", "no:cacheprovider", f"--junitxml={report}"),
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    results = ElementTree.parse(report).getroot().find("testsuite")
    assert results is not None
    counts = {
        name: int(results.attrib[name]) for name in ("tests", "failures", "errors", "skipped")
    }
    assert counts.pop("tests") > 0
    assert set(counts.values()) == {0}, run.stdout
