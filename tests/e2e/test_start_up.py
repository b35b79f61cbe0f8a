"""What the command does once it is ready, before the first request."""

import signal
import subprocess
import sys
from pathlib import Path

from loading import load

PROGRAM = """
import gc, sys
from offramp_service.__main__ import main
code = main(sys.argv[1:])
print("left alone:", gc.get_freeze_count())
sys.exit(code)
"""


def test_garbage_collections_do_not_walk_through_what_stays(tmp_path: Path) -> None:
    support = load("tests/unit/service/support.py")
    checkpoint = support.write_tiny_checkpoint(tmp_path / "tiny")
    flags = ["--model-id", str(checkpoint), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *flags], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert "is ready" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    assert int(said.rpartition(":")[2]) > 100_000


COUNTING = """
import gc, sys
import offramp_service.models as models
from offramp_service.__main__ import main
from offramp_service.pipeline import Pipeline
collect = models.collect_what_stayed
def counting():
    collect()
    gc.unfreeze()
    pipelines = sum(type(one) is Pipeline for one in gc.get_objects())
    print("pipelines:", pipelines, flush=True)
models.collect_what_stayed = counting
sys.exit(main(sys.argv[1:]))
"""


def test_nothing_in_the_command_holds_an_old_checkpoint(tmp_path: Path) -> None:
    support = load("tests/unit/service/support.py")
    checkpoint = support.write_tiny_checkpoint(tmp_path / "tiny")
    flags = ["--model-id", str(checkpoint), "--port", "0", "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", COUNTING, *flags], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "pipelines: 1\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate(timeout=10)
