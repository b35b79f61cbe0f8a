"""The torch twins against plain Python lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from offramp_kernels import CompactPlan, compact_plan, gather_rows

ROW_COUNTS = (0, 1, 2, 3, 15, 16, 17, 64)
KEEP_PATTERNS = ("none", "all", "first", "last", "alternating", "random")


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


def naive_plan(keep: list[bool], lengths: list[int]) -> tuple[list[int], list[int], list[int]]:
    source = [row for row, kept in enumerate(keep) if kept]
    cu_seqlens = [0]
    for row in source:
        cu_seqlens.append(cu_seqlens[-1] + lengths[row])
    n_alive, t_alive = len(source), cu_seqlens[-1]
    vacant = len(keep) - n_alive
    return source + [-1] * vacant, cu_seqlens + [t_alive] * vacant, [n_alive, t_alive]


def naive_gather(
    values: list[list[float]], keep: list[bool], lengths: list[int]
) -> list[list[float]]:
    packed, start = [], 0
    for kept, length in zip(keep, lengths, strict=True):
        packed += values[start : start + length] if kept else []
        start += length
    return packed


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[bool], list[int]]:
    rows = draw(st.sampled_from(ROW_COUNTS))
    pattern = draw(st.sampled_from(KEEP_PATTERNS))
    lengths = draw(st.lists(st.integers(0, 9), min_size=rows, max_size=rows))
    keep = {
        "none": [False] * rows,
        "all": [True] * rows,
        "first": [row == 0 for row in range(rows)],
        "last": [row == rows - 1 for row in range(rows)],
        "alternating": [row % 2 == 0 for row in range(rows)],
        "random": draw(st.lists(st.booleans(), min_size=rows, max_size=rows)),
    }[pattern]
    return keep, lengths


def plan_of(keep: list[bool], lengths: list[int]) -> CompactPlan:
    return compact_plan(torch.tensor(keep, dtype=torch.bool), offsets(lengths))


@settings(deadline=None, max_examples=200)
@given(batches())
def test_plan_agrees_with_plain_python(batch: tuple[list[bool], list[int]]) -> None:
    keep, lengths = batch
    plan = plan_of(keep, lengths)
    source, cu_seqlens, counts = naive_plan(keep, lengths)
    assert plan.source.tolist() == source
    assert plan.cu_seqlens.tolist() == cu_seqlens
    assert plan.counts.tolist() == counts
    assert plan.read_counts() == tuple(counts)
    assert plan.capacity == len(keep)
    for tensor in (plan.source, plan.cu_seqlens, plan.counts):
        assert tensor.dtype is torch.int32


@settings(deadline=None, max_examples=200)
@given(batches(), st.sampled_from((1, 3, 17)), st.integers(0, 3))
def test_gather_agrees_with_plain_python(
    batch: tuple[list[bool], list[int]], width: int, spare_rows: int
) -> None:
    keep, lengths = batch
    values = torch.randn(sum(lengths) + spare_rows, width)
    plan = plan_of(keep, lengths)
    expected = naive_gather(values.tolist(), keep, lengths)

    packed = gather_rows(values, offsets(lengths), plan)
    assert packed.shape == (len(expected), width)
    assert packed.tolist() == expected

    out = torch.full((len(expected) + spare_rows, width), torch.nan)
    assert gather_rows(values, offsets(lengths), plan, out=out) is out
    assert out[: len(expected)].tolist() == expected
    assert out[len(expected) :].isnan().all()


@settings(deadline=None, max_examples=50)
@given(batches(), st.data())
def test_two_compactions_are_one(batch: tuple[list[bool], list[int]], data: st.DataObject) -> None:
    keep, lengths = batch
    again = data.draw(st.lists(st.booleans(), min_size=len(keep), max_size=len(keep)))
    values, old = torch.randn(sum(lengths), 3), offsets(lengths)

    first = plan_of(keep, lengths)
    n_alive, _ = first.read_counts()
    middle = gather_rows(values, old, first)
    survivors = first.source[:n_alive].long()
    keep_again = torch.tensor(again, dtype=torch.bool)[survivors]
    middle_offsets = first.cu_seqlens[: n_alive + 1]
    second = compact_plan(keep_again, middle_offsets)
    in_two_steps = gather_rows(middle, middle_offsets, second)

    both = [a and b for a, b in zip(keep, again, strict=True)]
    at_once = gather_rows(values, old, plan_of(both, lengths))
    assert torch.equal(in_two_steps, at_once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_gather_copies_bits(dtype: torch.dtype) -> None:
    """NaNs and signed zeros of survivors come through; those of leavers are never looked at."""
    values = torch.tensor([[1.0], [-0.0], [torch.nan], [torch.inf], [2.0]], dtype=dtype)
    plan = plan_of([True, False, True], [2, 1, 2])
    packed = gather_rows(values, offsets([2, 1, 2]), plan)
    assert packed.dtype is dtype
    assert packed.flatten().tolist() == [1.0, 0.0, torch.inf, 2.0]
    assert packed[1].signbit().item()


@pytest.mark.parametrize(
    ("keep", "rows"),
    [([True] * 4, slice(0, 8)), ([False, True, True, False], slice(2, 6)), ([False] * 4, slice(0))],
)
def test_survivors_side_by_side_are_not_copied(keep: list[bool], rows: slice) -> None:
    lengths = [2, 2, 2, 2]
    values = torch.randn(8, 5)
    packed = gather_rows(values, offsets(lengths), plan_of(keep, lengths))
    assert packed.data_ptr() == values[rows].data_ptr()
    assert torch.equal(packed, values[rows])


def test_the_twin_has_a_gradient() -> None:
    values = torch.randn(5, 2, requires_grad=True)
    plan = plan_of([True, False, True], [2, 1, 2])
    gather_rows(values, offsets([2, 1, 2]), plan).sum().backward()
    assert values.grad is not None
    assert values.grad[:, 0].tolist() == [1, 1, 0, 1, 1]


def test_an_out_too_small_is_refused() -> None:
    values = torch.randn(5, 2)
    plan = plan_of([True, False, True], [2, 1, 2])
    with pytest.raises(ValueError, match="out holds 3 rows, 4 survive"):
        gather_rows(values, offsets([2, 1, 2]), plan, out=torch.empty(3, 2))
