"""When requests are due."""

import statistics
from itertools import islice, pairwise
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.arrivals import (
    BURST_S,
    PATTERNS,
    Phase,
    along,
    by_chance,
    regular,
    schedule,
)


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


# -- phases ----------------------------------------------------------------------------------------

rates = st.floats(0, 500)
phases = st.lists(
    st.builds(Phase, seconds=st.floats(0.01, 3), from_rate=rates, to_rate=rates),
    min_size=1,
    max_size=5,
).filter(lambda them: any(one.requests > 0.01 for one in them))


@given(phases, st.sampled_from([regular, by_chance]), st.integers(0, 1000))
def test_phases_follow_each_other(them: list[Phase], spread: object, seed: int) -> None:
    due = list(along(them, spread, Random(seed)))  # type: ignore[arg-type]
    assert due == sorted(due)
    assert all(0 <= at < sum(one.seconds for one in them) for at in due)


@given(phases)
def test_as_many_are_due_in_each_phase_as_its_rate_says(them: list[Phase]) -> None:
    due, begins = list(along(them, regular, Random(0))), 0.0
    for one in them:
        found = sum(begins <= at < begins + one.seconds for at in due)
        assert abs(found - one.requests) <= 1.001
        begins += one.seconds


@given(st.floats(0.01, 100), rates, rates, st.floats(0, 1))
def test_when_is_the_inverse_of_how_many(
    seconds: float, from_rate: float, to_rate: float, share: float
) -> None:
    phase = Phase(seconds, from_rate, to_rate)
    at = phase.when(share * phase.requests)
    assert 0 <= at <= seconds
    so_far = from_rate * at + (to_rate - from_rate) * at**2 / (2 * seconds)
    assert so_far == pytest.approx(share * phase.requests, rel=1e-6, abs=1e-6)


def test_a_ramp_by_chance_is_dense_where_its_rate_is_high() -> None:
    due = list(along([Phase(100, 0, 100)], by_chance, Random(3)))
    assert len(due) == pytest.approx(5000, rel=0.05)
    assert sum(at < 50 for at in due) == pytest.approx(1250, rel=0.1)


def test_streams_are_drawn_as_they_are_needed() -> None:
    week = along([Phase(7 * 86400.0, 1e5, 1e5)], by_chance, Random(0))
    assert len(list(islice(week, 1000))) == 1000


@pytest.mark.parametrize(
    ("phase", "said"),
    [
        (Phase(0, 1, 1), "seconds 0"),
        (Phase(1, -1, 1), "rate is -1"),
        (Phase(1, 1, float("inf")), "inf"),
        (Phase(1, 0, 0), "nothing would be due"),
    ],
)
def test_phases_that_cannot_be(phase: Phase, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        along([phase], regular, Random(0))
