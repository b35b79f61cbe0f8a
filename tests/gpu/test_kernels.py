"""The compiled kernels on a device, against their twins, bit for bit; skipped without one."""

import pytest
import torch
from torch import Tensor

from offramp_kernels import CompactPlan, compact_plan, gather_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

INTEGERS = {
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


def make_batch(rows: int, longest: int, kept: float = 0.6) -> tuple[Tensor, Tensor]:
    keep = torch.rand(rows, device="cuda") < kept
    lengths = torch.randint(1, longest + 1, (rows,), device="cuda")
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))
    return keep, cu_seqlens


def make_values(keep: Tensor, cu_seqlens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Random survivors, NaN leavers."""
    alive = keep.repeat_interleave(cu_seqlens.diff().long())
    values = torch.randn(len(alive), width, device="cuda", dtype=dtype)
    values[~alive] = torch.nan
    return values


def same_plan(first: CompactPlan, second: CompactPlan) -> bool:
    return (
        torch.equal(first.source, second.source)
        and torch.equal(first.cu_seqlens, second.cu_seqlens)
        and torch.equal(first.counts, second.counts)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 128, 129, 1024, 1025, 4096])
def test_plan_equals_twin(rows: int, kept: float) -> None:
    keep, cu_seqlens = make_batch(rows, 512, kept)
    expected = compact_plan(keep, cu_seqlens, backend="reference")
    for _ in range(5):
        assert same_plan(compact_plan(keep, cu_seqlens), expected)


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize("width", [1, 17, 128, 384, 768, 1024])
@pytest.mark.parametrize("rows", [1, 17, 512])
def test_gather_equals_twin(rows: int, width: int, dtype: torch.dtype) -> None:
    """Several runs: an answer that moves is a race."""
    keep, cu_seqlens = make_batch(rows, 128)
    values = make_values(keep, cu_seqlens, width, dtype)
    plan = compact_plan(keep, cu_seqlens)
    expected = torch.full_like(values, torch.nan)
    gather_rows(values, cu_seqlens, plan, out=expected, backend="reference")
    for _ in range(5):
        out = torch.full_like(values, torch.nan)
        assert gather_rows(values, cu_seqlens, plan, out=out) is out
        assert torch.equal(bits(out), bits(expected))
    _, t_alive = plan.read_counts()
    packed = gather_rows(values, cu_seqlens, plan)
    assert torch.equal(bits(packed), bits(expected[:t_alive]))


def test_offsets_past_two_to_the_31_elements() -> None:
    width, length, rows = 1024, 300_000, 8
    needed = 3 * length * rows * width * 2
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed >> 30} GiB of device memory")
    cu_seqlens = torch.arange(0, (rows + 1) * length, length, device="cuda", dtype=torch.int32)
    keep = torch.arange(rows, device="cuda") > 0
    values = torch.randn(rows * length, width, device="cuda", dtype=torch.bfloat16)
    packed = gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens))
    assert torch.equal(packed, values[length:])


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_when_out_is_given() -> None:
    keep, cu_seqlens = make_batch(32, 64)
    values = make_values(keep, cu_seqlens, 384, torch.float16)
    out = torch.empty_like(values)
    gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_graph_follows_the_flags_and_the_lengths() -> None:
    keep, cu_seqlens = make_batch(32, 64)
    values = torch.randn(32 * 64, 384, device="cuda", dtype=torch.bfloat16)
    out = torch.empty_like(values)
    gather_rows(values, cu_seqlens, compact_plan(keep, cu_seqlens), out=out)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan = compact_plan(keep, cu_seqlens)
        gather_rows(values, cu_seqlens, plan, out=out)
    for kept in (0.9, 0.5, 0.0, 1.0):
        new_keep, new_cu_seqlens = make_batch(32, 64, kept)
        keep.copy_(new_keep)
        cu_seqlens.copy_(new_cu_seqlens)
        out.fill_(torch.nan)
        graph.replay()
        expected = compact_plan(keep, cu_seqlens, backend="reference")
        assert same_plan(plan, expected)
        packed = gather_rows(values, cu_seqlens, expected, backend="reference")
        assert torch.equal(out[: packed.shape[0]], packed)
        assert out[packed.shape[0] :].isnan().all()
