"""Times the ops of offramp_kernels and prints JSON: medians, bytes, and % of a plain copy's speed.

    python kernels/bench/bench_kernels.py [--device cuda|cpu] [--quick] [--threads N] [--out F]

On CUDA it times the Triton kernels (``triton.testing.do_bench``: L2 flushed before every run), on a
CPU the torch twins. Every case is first checked against another way to the same answer; a wrong
kernel is not timed. Needs Triton installed on either device, for the byte counts.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from offramp_kernels import CompactPlan, compact_plan, gather_rows
from offramp_kernels.compact_plan_kernel import bytes_moved as plan_bytes
from offramp_kernels.gather_rows_kernel import bytes_moved as gather_bytes


@dataclass(frozen=True)
class Case:
    rows: int
    length: int  # mean; each text has 1 to 2 * length - 1 tokens
    width: int
    dtype: torch.dtype
    kept: float

    def make(self, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """keep, cu_seqlens, values; random data, since zeros copy faster."""
        torch.manual_seed(0)
        keep = torch.rand(self.rows) < self.kept
        lengths = torch.randint(1, 2 * self.length, (self.rows,))
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
        values = torch.randn(int(cu_seqlens[-1]), self.width).to(self.dtype)
        return keep.to(device), cu_seqlens.to(device), values.to(device)


def cases(device: str, quick: bool) -> Iterator[Case]:
    cpu = device == "cpu"
    batches = ((8, 32), (32, 64)) if cpu else ((32, 32), (128, 64), (512, 128))
    for rows, length in batches[:1] if quick else batches:
        for width in (384, 768):
            for kept in (1.0, 0.7, 0.3):
                yield Case(rows, length, width, torch.float32 if cpu else torch.bfloat16, kept)


def median_us(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        return 1e3 * float(triton.testing.do_bench(run, return_mode="median"))
    for _ in range(5):
        run()
    timings = []
    for _ in range(100):
        start = time.perf_counter()
        run()
        timings.append(time.perf_counter() - start)
    return 1e6 * statistics.median(timings)


def check(keep: Tensor, cu_seqlens: Tensor, values: Tensor, plan: CompactPlan, out: Tensor) -> None:
    """Boolean indexing is the third way, besides the kernel and its twin."""
    twin = compact_plan(keep, cu_seqlens, backend="reference")
    packed = values[keep.repeat_interleave(cu_seqlens.diff().long())]
    same = (
        torch.equal(plan.source, twin.source)
        and torch.equal(plan.cu_seqlens, twin.cu_seqlens)
        and torch.equal(plan.counts, twin.counts)
        and torch.equal(out[: packed.shape[0]], packed)
    )
    if not same:
        raise SystemExit("the kernels disagree with boolean indexing: nothing was timed")


def measure(case: Case, device: str) -> dict[str, Any]:
    keep, cu_seqlens, values = case.make(device)
    out = torch.empty_like(values)
    plan = compact_plan(keep, cu_seqlens)
    gather_rows(values, cu_seqlens, plan, out=out)
    check(keep, cu_seqlens, values, plan, out)

    n_alive, t_alive = plan.read_counts()
    moved = gather_bytes(t_alive, case.width, values.element_size())
    # The floor: the same number of bytes in one contiguous copy of the same size class, so that
    # a cache that helps the one helps the other.
    copy_us = median_us(lambda: out[:t_alive].copy_(values[:t_alive]), device)
    plan_us = median_us(lambda: compact_plan(keep, cu_seqlens), device)
    gather_us = median_us(lambda: gather_rows(values, cu_seqlens, plan, out=out), device)
    fresh_us = median_us(lambda: gather_rows(values, cu_seqlens, plan), device)
    return {
        "rows": case.rows,
        "tokens": values.shape[0],
        "width": case.width,
        "dtype": str(case.dtype).removeprefix("torch."),
        "rows_kept": n_alive,
        "tokens_kept": t_alive,
        "compact_plan": {"median_us": plan_us, "bytes": plan_bytes(case.rows)},
        "copy_floor": {"median_us": copy_us, "gb_per_s": moved / copy_us / 1e3},
        "gather_rows": {
            "median_us": gather_us,
            "median_us_without_out": fresh_us,
            "bytes": moved,
            "gb_per_s": moved / gather_us / 1e3,
            "percent_of_copy_floor": 100 * copy_us / gather_us,
        },
    }


def environment(device: str) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "backend": "triton" if device == "cuda" else "reference",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        return facts | {"cuda": torch.version.cuda, "driver": driver_version()}
    return facts | {"threads": torch.get_num_threads()}


def driver_version() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--quick", action="store_true", help="the smallest batch only")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="on a CPU")
    parser.add_argument("--out", type=Path, help="also write the JSON here")
    arguments = parser.parse_args()
    torch.set_num_threads(
        arguments.threads
    )  # one more than there are idle cores costs milliseconds

    with torch.inference_mode():
        measured = [measure(c, arguments.device) for c in cases(arguments.device, arguments.quick)]
    report = json.dumps(
        {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(arguments.device),
            "cases": measured,
        },
        indent=2,
    )
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
