"""Times the ops of offramp_kernels and prints JSON: medians, bytes, FLOPs, and % of a floor.

The moves' floor is a plain copy of as many bytes. A layer's ops are held against the larger of
bytes over the speed of a large copy and FLOPs over the speed of a large matmul of the same dtype,
both measured in the same run, so the floor is that of this very device.

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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from offramp_kernels import (
    CompactPlan,
    Dense,
    ExitSpec,
    SlotTable,
    add_layernorm,
    add_layernorm_kernel,
    compact_plan,
    exit_head,
    exit_head_kernel,
    gather_rows,
    linear,
    linear_kernel,
    varlen_attn,
    varlen_attn_kernel,
)
from offramp_kernels.compact_plan_kernel import bytes_moved as plan_bytes
from offramp_kernels.dispatch import Backend
from offramp_kernels.gather_rows_kernel import bytes_moved as gather_bytes

BACKENDS: tuple[Backend, Backend] = ("auto", "reference")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 1e-2}


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


@dataclass(frozen=True)
class Timed:
    """One op of a layer: how to run it on a backend, and what it cannot do without."""

    name: str
    run: Callable[[Backend], Tensor]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Speeds:
    """What this device does at best: bytes and FLOPs per microsecond."""

    copy: float
    matmul: float

    @classmethod
    def measure(cls, device: str, dtype: torch.dtype) -> "Speeds":
        size = 8192 if device == "cuda" else 1024
        x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        return cls(
            copy=2 * x.nbytes / median_us(lambda: y.copy_(x), device),
            matmul=2 * size**3 / median_us(lambda: x @ y, device),
        )


def layer_ops(case: Case, device: str) -> Iterator[Timed]:
    """The GEMMs, norm, attention and exits of one encoder layer, all rows live."""
    _, cu_seqlens, hidden = case.make(device)
    tokens, width = hidden.shape
    size, lengths = hidden.element_size(), cu_seqlens.diff().tolist()
    counts = torch.tensor([case.rows, tokens], dtype=torch.int32, device=device)

    def random(*shape: int) -> Tensor:
        return (torch.randn(*shape, device=device) / shape[-1] ** 0.5).to(case.dtype)

    wide, narrow = random(4 * width, width), random(width, 4 * width)
    inner, bias, qkv = random(tokens, 4 * width), random(4 * width), random(tokens, 3 * width)
    short = bias[:width].clone()
    yield Timed(
        "linear_gelu",
        lambda b: linear(hidden, wide, bias, activation="gelu", counts=counts, backend=b),
        linear_kernel.bytes_moved(tokens, width, 4 * width, size, residual=False),
        linear_kernel.flops(tokens, width, 4 * width),
    )
    yield Timed(
        "linear_residual",
        lambda b: linear(inner, narrow, short, residual=hidden, counts=counts, backend=b),
        linear_kernel.bytes_moved(tokens, 4 * width, width, size, residual=True),
        linear_kernel.flops(tokens, 4 * width, width),
    )
    yield Timed(
        "add_layernorm",
        lambda b: add_layernorm(
            hidden, short, short, eps=1e-12, residual=hidden, counts=counts, backend=b
        ),
        add_layernorm_kernel.bytes_moved(tokens, width, size, residual=True),
        add_layernorm_kernel.flops(tokens, width),
    )
    if max(lengths) <= 128:
        yield Timed(
            "varlen_attn",
            lambda b: varlen_attn(
                qkv, cu_seqlens, width // 64, max(lengths), counts=counts, backend=b
            ),
            varlen_attn_kernel.bytes_moved(tokens, width, size),
            varlen_attn_kernel.flops(lengths, width),
        )
    slots = torch.arange(case.rows, dtype=torch.int32, device=device)
    for labels in (2, 150):
        classifier = Dense(random(labels, width).float(), random(labels).float())
        spec = ExitSpec(classifier, exit_layer=1, exit_number=1, is_last=False)
        check_exit(replace(spec, is_last=True), hidden, cu_seqlens, counts, slots)
        # Nobody leaves, or there would be nothing to do from the second run on.
        table = SlotTable.empty(case.rows, labels, device)
        arguments = (hidden, cu_seqlens, counts, slots, spec, table)
        yield Timed(
            f"exit_head_{labels}",
            lambda b, arguments=arguments: exit_head(*arguments, backend=b),
            exit_head_kernel.bytes_moved(spec, case.rows, tokens, size),
            exit_head_kernel.flops(spec, case.rows, tokens),
        )


def check_exit(spec: ExitSpec, *batch: Tensor) -> None:
    """The logits that the timed exit keeps to itself."""
    tables = []
    for backend in BACKENDS:
        table = SlotTable.empty(batch[-1].shape[0], spec.num_labels, batch[0].device)
        exit_head(*batch, spec, table, backend=backend)
        tables.append(table)
    ours, twin = tables
    if (ours.logits - twin.logits).norm() > 1e-4 * twin.logits.norm():
        raise SystemExit("exit_head disagrees with its twin: nothing was timed")


def measure_layer(case: Case, device: str, speeds: Speeds) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    for op in layer_ops(case, device):
        ours, twin = (op.run(backend).double() for backend in BACKENDS)
        if (ours - twin).norm() > TOLERANCE[case.dtype] * twin.norm():
            raise SystemExit(f"{op.name} disagrees with its twin: nothing was timed")
        took = median_us(lambda op=op: op.run("auto"), device)
        floor = max(op.bytes / speeds.copy, op.flops / speeds.matmul)
        measured[op.name] = {
            "median_us": took,
            "bytes": op.bytes,
            "flops": op.flops,
            "floor_us": floor,
            "percent_of_floor": 100 * floor / took,
        }
    return measured | {"rows": case.rows, "length": case.length, "width": case.width}


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
        chosen = list(cases(arguments.device, arguments.quick))
        measured = [measure(case, arguments.device) for case in chosen]
        speeds = Speeds.measure(arguments.device, chosen[0].dtype)
        layers = [
            measure_layer(case, arguments.device, speeds) for case in chosen if case.kept == 1.0
        ]
    report = json.dumps(
        {
            "command": " ".join(["python", *sys.argv]),
            "environment": environment(arguments.device),
            "cases": measured,
            "large_copy_gb_per_s": speeds.copy / 1e3,
            "large_matmul_tflop_per_s": speeds.matmul / 1e6,
            "layers": layers,
        },
        indent=2,
    )
    print(report)
    if arguments.out is not None:
        arguments.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
