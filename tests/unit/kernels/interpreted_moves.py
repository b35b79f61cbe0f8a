"""Plan and gather under the interpreter, against their twins, bit for bit.

Not collected by name: test_interpreter.py runs this file in a process that sets TRITON_INTERPRET
before anything imports Triton. No bf16 here, which the interpreter gets wrong without a word.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from loading import load
from offramp_kernels import CompactPlan, compact_plan, gather_rows, reference
from offramp_kernels.compact_plan_kernel import compact_plan_kernel
from offramp_kernels.gather_rows_kernel import gather_rows_kernel

interpreting = load("tests/unit/kernels/interpreting.py")
INTEGERS, bits = interpreting.INTEGERS, interpreting.bits
shuffled_programs = interpreting.shuffled_programs
ROW_COUNTS = (0, 1, 2, 15, 16, 17, 129)
KEEP_PATTERNS = ("none", "all", "one", "alternating", "random")
CANARY_ROWS = 3


@pytest.fixture(autouse=True)
def seed_torch() -> None:
    torch.manual_seed(0)


def make_keep(pattern: str, rows: int) -> Tensor:
    row = torch.arange(rows)
    return {
        "none": torch.zeros(rows, dtype=torch.bool),
        "all": torch.ones(rows, dtype=torch.bool),
        "one": row == rows // 2,
        "alternating": row % 2 == 1,
        "random": torch.rand(rows) < 0.6,
    }[pattern]


def make_offsets(rows: int, longest: int) -> Tensor:
    """Lengths 1 to ``longest``, both of them present where there is room."""
    lengths = torch.randint(1, longest + 1, (rows,))
    lengths[:1], lengths[-1:] = 1, longest
    return torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def make_values(keep: Tensor, cu_seqlens: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Random survivors; leavers and the rows past the last text are NaN."""
    alive = keep.repeat_interleave(cu_seqlens.diff().long())
    values = torch.full((int(cu_seqlens[-1]) + CANARY_ROWS, width), torch.nan, dtype=dtype)
    values[: len(alive)][alive] = torch.randn(int(alive.sum()), width).to(dtype)
    return values


def same_plan(first: CompactPlan, second: CompactPlan) -> bool:
    return (
        torch.equal(first.source, second.source)
        and torch.equal(first.cu_seqlens, second.cu_seqlens)
        and torch.equal(first.counts, second.counts)
    )


def check_gather(keep: Tensor, cu_seqlens: Tensor, width: int, dtype: torch.dtype) -> None:
    """Into an ``out`` of NaN canaries, between two guards: exact inside, untouched elsewhere."""
    values = make_values(keep, cu_seqlens, width, dtype)
    plan = reference.compact_plan(keep, cu_seqlens)
    _, t_alive = plan.read_counts()
    guard = 16  # rows; a multiple of 16 bytes at any width
    buffer = torch.full((2 * guard + values.shape[0], width), torch.nan, dtype=dtype)
    expected = buffer.clone()
    reference.gather_rows(values, cu_seqlens, plan, out=expected[guard:-guard])
    gather_rows(values, cu_seqlens, plan, out=buffer[guard:-guard], backend="triton")
    assert torch.equal(bits(buffer), bits(expected))
    assert not buffer[guard : guard + t_alive].isnan().any()
    assert buffer[:guard].isnan().all()
    assert buffer[guard + t_alive :].isnan().all()


@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
@pytest.mark.parametrize("rows", ROW_COUNTS)
def test_plan_equals_twin(rows: int, pattern: str) -> None:
    keep, cu_seqlens = make_keep(pattern, rows), make_offsets(rows, 40)
    plan = compact_plan(keep, cu_seqlens, backend="triton")
    assert same_plan(plan, reference.compact_plan(keep, cu_seqlens))


@pytest.mark.parametrize("rows", [1024, 1025, 4096])
def test_plan_equals_twin_in_the_larger_blocks(rows: int) -> None:
    keep, cu_seqlens = make_keep("random", rows), make_offsets(rows, 512)
    plan = compact_plan(keep, cu_seqlens, backend="triton")
    assert same_plan(plan, reference.compact_plan(keep, cu_seqlens))


@pytest.mark.parametrize("rows", [0, 1, 17, 128])
def test_plan_writes_every_place_once_and_none_beyond(rows: int) -> None:
    """Raw launch into poisoned, guarded outputs; empty texts among the rows."""
    keep = make_keep("random", rows)
    cu_seqlens = torch.randint(0, 3, (rows + 1,), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    cu_seqlens -= cu_seqlens[0].item()
    poison = -777
    source, offsets, counts = (
        torch.full((size + 2,), poison, dtype=torch.int32) for size in (rows, rows + 1, 2)
    )
    compact_plan_kernel[(1,)](
        keep, cu_seqlens, source[1:], offsets[1:], counts[1:], rows, BLOCK=128
    )
    for guarded in (source, offsets, counts):
        assert guarded[0] == guarded[-1] == poison
    plan = CompactPlan(source[1:-1], offsets[1:-1], counts[1:-1])
    assert same_plan(plan, reference.compact_plan(keep, cu_seqlens))


@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17])
def test_gather_equals_twin(rows: int, pattern: str) -> None:
    check_gather(make_keep(pattern, rows), make_offsets(rows, 40), 17, torch.float32)


@pytest.mark.parametrize("dtype", list(INTEGERS))
@pytest.mark.parametrize("width", [1, 16, 17, 128, 255, 257, 384, 768])
def test_gather_equals_twin_at_every_width(width: int, dtype: torch.dtype) -> None:
    check_gather(make_keep("random", 6), make_offsets(6, 33), width, dtype)


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 50)), max_size=12),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.float16]),
)
def test_any_batch(rows: list[tuple[bool, int]], width: int, dtype: torch.dtype) -> None:
    keep = torch.tensor([kept for kept, _ in rows], dtype=torch.bool)
    lengths = torch.tensor([0, *(length for _, length in rows)], dtype=torch.int32)
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
    plan = compact_plan(keep, cu_seqlens, backend="triton")
    assert same_plan(plan, reference.compact_plan(keep, cu_seqlens))
    check_gather(keep, cu_seqlens, width, dtype)


def test_one_long_text_among_short_ones_is_walked_in_steps() -> None:
    lengths = torch.tensor([0, 1, 1, 200, 1, 1, 1, 1, 1], dtype=torch.int32)
    keep = torch.tensor([False, True, True, False, True, True, True, True])
    check_gather(keep, lengths.cumsum(0, dtype=torch.int32), 17, torch.float32)


@pytest.mark.parametrize("pattern", KEEP_PATTERNS)
def test_without_out_the_answer_has_exactly_the_surviving_rows(pattern: str) -> None:
    keep, cu_seqlens = make_keep(pattern, 7), make_offsets(7, 9)
    values = make_values(keep, cu_seqlens, 17, torch.float32)
    plan = compact_plan(keep, cu_seqlens, backend="triton")
    packed = gather_rows(values, cu_seqlens, plan, backend="triton")
    assert torch.equal(bits(packed), bits(reference.gather_rows(values, cu_seqlens, plan)))
    assert (packed.data_ptr() == values.data_ptr()) == (pattern == "all")


def test_an_out_too_small_is_filled_and_not_overrun() -> None:
    keep, cu_seqlens = make_keep("alternating", 6), make_offsets(6, 20)
    values = make_values(keep, cu_seqlens, 17, torch.float32)
    plan = reference.compact_plan(keep, cu_seqlens)
    packed = reference.gather_rows(values, cu_seqlens, plan)
    for fits in (0, 1, packed.shape[0] - 1):
        buffer = torch.full_like(values, torch.nan)
        gather_rows(values, cu_seqlens, plan, out=buffer[:fits], backend="triton")
        assert torch.equal(buffer[:fits], packed[:fits])
        assert buffer[fits:].isnan().all()


def test_contract_breaches_are_refused_by_the_launchers_too() -> None:
    cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
    keep, values = torch.tensor([True, False]), torch.randn(3, 4)
    plan = compact_plan(keep, cu_seqlens, backend="triton")
    with pytest.raises(ValueError, match="keep must be bool"):
        compact_plan(keep.int(), cu_seqlens, backend="triton")
    too_many = torch.zeros(4097, dtype=torch.bool), torch.zeros(4098, dtype=torch.int32)
    with pytest.raises(ValueError, match="at most 4096 rows"):
        compact_plan(*too_many, backend="triton")
    with pytest.raises(ValueError, match="must not overlap"):
        gather_rows(values, cu_seqlens, plan, out=values, backend="triton")
    with pytest.raises(ValueError, match="values must be contiguous"):
        gather_rows(torch.randn(4, 3).T, cu_seqlens, plan, backend="triton")
    with pytest.raises(ValueError, match="multiple of 16 bytes"):
        gather_rows(torch.randn(4, 3)[1:], cu_seqlens, plan, backend="triton")
    with pytest.raises(ValueError, match="no backward"):
        gather_rows(values.clone().requires_grad_(), cu_seqlens, plan, backend="triton")


def racing_case() -> tuple[Tensor, Tensor, CompactPlan]:
    """All but the first of 12 texts stay and move by one token, onto a neighbour's place."""
    keep = torch.ones(12, dtype=torch.bool)
    keep[0] = False
    lengths = torch.tensor([0, 1, *range(30, 41)], dtype=torch.int32)
    cu_seqlens = lengths.cumsum(0, dtype=torch.int32)
    values = make_values(keep, cu_seqlens, 17, torch.float32)
    return values, cu_seqlens, reference.compact_plan(keep, cu_seqlens)


@pytest.mark.parametrize("seed", range(10))
def test_the_order_of_programs_does_not_matter(seed: int) -> None:
    values, cu_seqlens, plan = racing_case()
    out = torch.full_like(values, torch.nan)
    with shuffled_programs(seed) as ran:
        gather_rows(values, cu_seqlens, plan, out=out, backend="triton")
    assert len(ran) == len(set(ran)) == 36  # 12 texts in 3 programs each
    assert ran != sorted(ran)
    expected = reference.gather_rows(values, cu_seqlens, plan)
    assert torch.equal(out[: expected.shape[0]], expected)


def test_the_shuffle_shows_that_a_gather_in_place_would_race() -> None:
    """The harness's own test: what the launcher refuses fails under every shuffle."""
    values, cu_seqlens, plan = racing_case()
    expected = reference.gather_rows(values, cu_seqlens, plan)
    for seed in range(10):
        in_place = values.clone()
        with shuffled_programs(seed):
            gather_rows_kernel[(12, 3, 1)](
                in_place,
                cu_seqlens,
                plan.source,
                plan.cu_seqlens,
                in_place,
                in_place.shape[0],
                WIDTH=17,
                BLOCK_ROWS=16,
                BLOCK_COLUMNS=256,
            )
        assert not torch.equal(in_place[: expected.shape[0]], expected)
