"""The step table and what it decides."""

import itertools
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.cost import StepTable, compactions

GPU = StepTable((16, 1024, 2048, 4096), (17e-6, 17e-6, 34e-6, 68e-6))
CPU = StepTable((16, 4096), (16e-6, 4096e-6))
PRICE = {"launch_seconds": 5e-6, "seconds_per_token": 1e-9}


def test_points_lines_and_what_lies_beyond() -> None:
    assert GPU(0) == 0
    assert GPU(1) == GPU(16) == GPU(1024) == 17e-6
    assert GPU(1536) == pytest.approx(25.5e-6)
    assert GPU(8192) == pytest.approx(136e-6)
    assert (GPU.knee, CPU.knee) == (1024, 16)


@pytest.mark.parametrize(
    ("tokens", "seconds", "message"),
    [
        ((), (), "at least one"),
        ((16,), (1.0, 2.0), "got 1 and 2"),
        ((32, 16), (1.0, 2.0), "must ascend"),
        ((0, 16), (1.0, 2.0), "from 1 on"),
        ((16, 32), (2.0, 1.0), "never fall"),
        ((16, 32), (0.0, 1.0), "above 0"),
        ((16,), (0.0,), "above 0"),
    ],
)
def test_no_table_of_nonsense(
    tokens: tuple[int, ...], seconds: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        StepTable(tokens, seconds)


@given(st.lists(st.floats(1e-6, 1e-2), min_size=200, max_size=200))
def test_what_is_measured_never_falls(noise: list[float]) -> None:
    times = iter(noise)
    table = StepTable.measured(lambda _: next(times), most_tokens=1024)
    assert table.tokens[-1] == 1024
    assert all(a <= b for a, b in itertools.pairwise(table.seconds))


def test_measuring_keeps_to_its_budget() -> None:
    def slow(tokens: int) -> float:
        time.sleep(0.002 * tokens / 16)
        return tokens / 1e6

    started = time.perf_counter()
    table = StepTable.measured(slow, most_tokens=32768, repeats=1, budget_s=0.1)
    assert 2 <= len(table.tokens) < 8
    assert time.perf_counter() - started < 5  # all of the grid takes 10 s
    assert len(StepTable.measured(slow, most_tokens=32, repeats=1, budget_s=0.0).tokens) == 2


def test_below_the_knee_nothing_is_moved_and_above_it_what_pays() -> None:
    exits, survival = (1, 2, 3, 4), (0.5, 0.3, 0.1, 0.0)
    assert compactions(GPU, 1000, exits, survival, **PRICE) == frozenset()
    # 4096 → 2048 saves 34 µs a layer, → 1229 another 14, → 410 no more: the knee is reached.
    assert compactions(GPU, 4096, exits, survival, **PRICE) == {1, 2}
    assert compactions(CPU, 200, exits, survival, **PRICE) == {1, 2, 3}
    dear = {"launch_seconds": 1.0, "seconds_per_token": 0.0}
    assert compactions(CPU, 4096, exits, survival, **dear) == frozenset()


def test_what_is_not_moved_yet_is_moved_later() -> None:
    """Leavers add up until they are worth it."""
    steps = {"launch_seconds": 300e-6, "seconds_per_token": 0.0}
    assert compactions(CPU, 1000, (1, 2, 3, 4), (0.8, 0.6, 0.4, 0.0), **steps) == {2}


@pytest.mark.parametrize("survival", [(0.5,), (0.2, 0.5, 0.1, 0.0)])
def test_shares_that_do_not_fit_are_refused(survival: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="survival must fall over the 4 exits"):
        compactions(GPU, 64, (1, 2, 3, 4), survival, **PRICE)


def test_the_efficient_size_is_the_smallest_that_is_cheap_by_the_token() -> None:
    assert GPU.efficient == 1024
    assert CPU.efficient == 16
    assert StepTable((8, 16, 64), (1.0, 1.2, 4.4)).efficient == 16


def test_waiting_pays_below_the_knee_for_the_many_and_where_there_is_time() -> None:
    pair = {"tokens": 200, "younger_tokens": 500, "slack_s": 1.0}
    # 2 rows wait 3 layers for others, who with them save a layer's time on each of 4.
    assert GPU.waiting_pays(**pair, rows=2, others=2, layers_behind=3, layers_ahead=4)
    assert not GPU.waiting_pays(**pair, rows=3, others=2, layers_behind=3, layers_ahead=4)
    assert not GPU.waiting_pays(**pair, rows=2, others=2, layers_behind=4, layers_ahead=4)
    hurried = pair | {"slack_s": 2.9 * 17e-6}
    assert not GPU.waiting_pays(**hurried, rows=2, others=2, layers_behind=3, layers_ahead=4)
    # Where cost is linear nothing is saved, however many wait.
    assert not CPU.waiting_pays(**pair, rows=1, others=10**6, layers_behind=1, layers_ahead=4)


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_together_is_never_dearer_where_a_layer_has_a_price_of_its_own(a: int, b: int) -> None:
    assert GPU.saved_together(a, b) >= -1e-12
    assert GPU.saved_together(a, b) == pytest.approx(GPU.saved_together(b, a))
    assert GPU.saved_together(100, 200) == pytest.approx(17e-6)
    assert CPU.saved_together(1000, 2000) == pytest.approx(0.0, abs=1e-12)
