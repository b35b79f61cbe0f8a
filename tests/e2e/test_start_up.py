"""What the command does once it is ready, before the first request."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from loading import load

PROGRAM = """
import gc, sys
from offramp_service.__main__ import main
code = main(sys.argv[1:])
print("left alone:", gc.get_freeze_count())
sys.exit(code)
"""

COUNTING = """
import gc, sys
import offramp_service.models as models
from offramp_service.__main__ import main
from offramp_service.pipeline import RoomPipeline
collect = models.collect_what_stayed
def counting():
    collect()
    gc.unfreeze()
    pipelines = sum(type(one) is RoomPipeline for one in gc.get_objects())
    print("pipelines:", pipelines, flush=True)
models.collect_what_stayed = counting
sys.exit(main(sys.argv[1:]))
"""


@contextmanager
def ready(program: str, checkpoint: Path) -> Iterator[subprocess.Popen[str]]:
    """The command around which a program is written, ready to answer."""
    load("tests/unit/service/support.py").write_tiny_checkpoint(checkpoint)
    flags = ["--model-id", str(checkpoint), "--port", "0", "--threads", "1"]
    command = [sys.executable, "-c", program, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert "is ready" in process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=10)


def test_garbage_collections_do_not_walk_through_what_stays(tmp_path: Path) -> None:
    with ready(PROGRAM, tmp_path / "tiny") as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        said = process.stdout.read()
        assert process.wait(30) == 0
    assert int(said.rpartition(":")[2]) > 100_000


def test_nothing_in_the_command_holds_an_old_checkpoint(tmp_path: Path) -> None:
    with ready(COUNTING, tmp_path / "tiny") as process:
        process.send_signal(signal.SIGHUP)
        assert process.stdout is not None
        assert process.stdout.readline() == "pipelines: 1\n"
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
