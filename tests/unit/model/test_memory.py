"""Freed memory stays with the process: counted in page faults, in a process of its own."""

import subprocess
import sys

import pytest

COUNT = """
import resource, sys
from offramp_model.memory import keep_freed_memory

if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def faults():
    # Two sizes in turn, the smaller one from the kernel anew unless freed memory is kept.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for size in (40 << 20, 36 << 20) * 5:
        bytearray(size)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
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
    # Without it the kernel hands out the 40 MB each time, 4 KiB a fault, or 2 MiB where it may.
    assert faults("leave") >= 10 * 36 / 2
