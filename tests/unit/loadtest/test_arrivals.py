"""When requests are due."""

import statistics
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.arrivals import BURST_S, PATTERNS, schedule


@given(
    pattern=st.sampled_from(sorted(PATTERNS)),
    rate=st.floats(0.1, 2000),
    seconds=st.floats(0.01, 2),
    seed=st.integers(0, 2**31),
)
def test_rising_in_time_and_the_same_again(
    pattern: str, rate: float, seconds: float, seed: int
) -> None:
    due = schedule(pattern, rate, seconds, seed)
    assert due == sorted(due)
    assert all(0 <= at < seconds for at in due)
    assert due == schedule(pattern, rate, seconds, seed)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_rate_is_kept_on_average(pattern: str) -> None:
    # Bursty: 400 bursts and pauses, a standard error of 5 %.
    due = schedule(pattern, 50, 400 * BURST_S, seed=1)
    assert len(due) == pytest.approx(50 * 400 * BURST_S, rel=0.15)


def dispersion(pattern: str) -> float:
    """Variance over mean of the number of arrivals in 100 ms; 1 for a Poisson stream."""
    counts = [0] * 2000
    for at in schedule(pattern, 100, 200, seed=2):
        counts[int(at / 0.1)] += 1
    return statistics.variance(counts) / statistics.mean(counts)


def test_each_pattern_is_what_it_is_called() -> None:
    gaps = [later - earlier for earlier, later in pairwise(schedule("constant", 100, 2, 0))]
    assert gaps == pytest.approx([0.01] * len(gaps))
    assert dispersion("constant") < 0.1
    assert dispersion("poisson") == pytest.approx(1, abs=0.15)
    assert dispersion("bursty") > 3


def test_seeds_differ() -> None:
    assert schedule("poisson", 100, 1, 0) != schedule("poisson", 100, 1, 1)


@pytest.mark.parametrize(
    ("pattern", "rate", "seconds", "said"),
    [
        ("waves", 1, 1, "allowed are constant, poisson, bursty"),
        ("poisson", 0, 1, "rate is 0"),
        ("poisson", 1, -1, "seconds -1"),
        ("poisson", float("nan"), 1, "rate is nan"),
    ],
)
def test_what_cannot_be(pattern: str, rate: float, seconds: float, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedule(pattern, rate, seconds, 0)
