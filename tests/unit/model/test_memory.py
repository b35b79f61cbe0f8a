"""Freed memory stays with the process: page faults of a thread, in a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys, threading
from offramp_model.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def passes(count):
    # As a batch that shrinks: some buffers of a megabyte at a time, all of them freed again.
    for _ in range(count):
        held = [bytearray((1200 - 60 * step) << 10) for step in range(6)]
        del held
def count():
    passes(3)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    passes(10)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=count)  # the engine's is one, too
thread.start()
thread.join()
"""


def faults(how: str) -> int:
    run = subprocess.run(
        [sys.executable, "-c", COUNT, how], capture_output=True, text=True, check=False
    )
    if run.returncode == 3:
        pytest.skip("no glibc")
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


def test_freed_memory_is_kept() -> None:
    assert faults("keep") < 100
    assert faults("leave") > 1000
