"""Runs interpreted_suite.py in a process of its own, where TRITON_INTERPRET may be set."""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

SUITE = Path(__file__).parent / "interpreted_suite.py"
ROOT = Path(__file__).parents[3]


def test_kernels_agree_with_their_twins_under_the_interpreter(tmp_path: Path) -> None:
    report = tmp_path / "report.xml"
    run = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", SUITE, "-q", "--no-header", "--durations=5"),
            *("-p", "no:cacheprovider", f"--junitxml={report}"),
        ],
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.attrib[name]) for name in ("tests", "failures", "errors", "skipped")}
    assert counts.pop("tests") > 0
    assert set(counts.values()) == {0}, run.stdout
