"""Drift against calibration, as properties of the arithmetic and in traffic that changes; and the
correction that takes it out."""

import math
import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from offramp_service.jobs import Depth
from offramp_service.quality import (
    LEAST_CORRECTION,
    MOST_CORRECTION,
    ExitWatch,
    SpeedupCorrection,
    stability_index,
)

LAYERS = 6
FAST = Depth.of((50, 20, 10, 10, 5, 5), 1, LAYERS)
SLOW = Depth.of((5, 10, 20, 20, 20, 25), 1, LAYERS)
CAPPED = Depth.of((5, 10, 20, 20, 20, 25), 2, 4)

COUNTS = st.lists(st.integers(0, 1000), min_size=LAYERS, max_size=LAYERS).filter(any)
EVENTS = st.lists(
    st.tuples(st.sampled_from([FAST, SLOW]), st.integers(1, LAYERS)), min_size=1, max_size=60
)


def leaves(rng: random.Random, depth: Depth, *, harder: float = 1.0) -> int:
    """The layer at which a text leaves; `harder` makes each exit so much less likely to let it."""
    layer = 1
    while layer < len(depth.inside):
        inside = depth.inside[layer - 1]
        let_go = depth.exit_shares[layer - 1] / inside if inside else 1.0
        if rng.random() < let_go / harder:
            break
        layer += 1
    return layer


# -- the index -------------------------------------------------------------------------------------


@given(COUNTS, st.integers(1, 50))
def test_equal_shares_have_no_drift(counts: list[int], times: int) -> None:
    assert stability_index(counts, [times * one for one in counts]) == pytest.approx(0, abs=1e-12)


@given(COUNTS, COUNTS)
def test_other_shares_have_some_and_it_is_finite(one: list[int], other: list[int]) -> None:
    index = stability_index(one, other)
    assert math.isfinite(index)
    assert index == pytest.approx(stability_index(other, one))
    scaled = [sum(other) * a - sum(one) * b for a, b in zip(one, other, strict=True)]
    assert index >= 0
    if any(scaled):
        assert index > 0


@given(COUNTS, COUNTS, st.randoms())
def test_cells_are_alike(one: list[int], other: list[int], rng: random.Random) -> None:
    order = rng.sample(range(LAYERS), LAYERS)
    moved = [[row[place] for place in order] for row in (one, other)]
    assert stability_index(*moved) == pytest.approx(stability_index(one, other))


def test_nothing_seen_is_no_drift_and_nonsense_is_refused() -> None:
    assert stability_index([0, 0], [3, 1]) == stability_index([3, 1], [0, 0]) == 0.0
    for wrong in (([1, 2], [1]), ([1, -1], [1, 1])):
        with pytest.raises(ValueError, match="not negative"):
            stability_index(*wrong)


# -- the window ------------------------------------------------------------------------------------


def watch_of(events: Sequence[tuple[Depth, int]], **size: int) -> ExitWatch:
    watch = ExitWatch(LAYERS, **size)
    for expected, exit_layer in events:
        watch.note(expected, exit_layer)
    return watch


@given(EVENTS, st.randoms())
def test_the_order_of_texts_is_of_no_account(
    events: list[tuple[Depth, int]], rng: random.Random
) -> None:
    watch = watch_of(events, block_texts=7)
    again = watch_of(rng.sample(events, len(events)), block_texts=7)
    assert watch.texts == again.texts == len(events)
    assert again.share_drift == pytest.approx(watch.share_drift)
    assert again.speedup_drift == pytest.approx(watch.speedup_drift)


@given(EVENTS)
def test_expectations_are_those_of_the_very_mix(events: list[tuple[Depth, int]]) -> None:
    watch = watch_of(events)
    expected = [sum(depth.exit_shares[k] for depth, _ in events) for k in range(LAYERS)]
    left = [sum(layer == k + 1 for _, layer in events) for k in range(LAYERS)]
    assert watch.share_drift == pytest.approx(stability_index(expected, left))
    ratio = sum(depth.mean for depth, _ in events) / sum(layer for _, layer in events)
    assert watch.speedup_drift == pytest.approx(ratio)


@given(EVENTS, st.integers(1, 9), st.integers(2, 5))
def test_the_window_is_the_last_texts(events, block_texts: int, blocks: int) -> None:
    watch = watch_of(events, block_texts=block_texts, blocks=blocks)
    whole = len(events) // block_texts * block_texts
    first = max(0, whole - (blocks - 1) * block_texts)
    recent = watch_of(events[first:])
    assert watch.texts == recent.texts == len(events) - first
    assert watch.share_drift == pytest.approx(recent.share_drift)
    assert watch.speedup_drift == pytest.approx(recent.speedup_drift)


def test_before_the_first_text_nothing_has_moved() -> None:
    watch = ExitWatch(LAYERS)
    assert (watch.texts, watch.share_drift, watch.speedup_drift) == (0, 0.0, 1.0)


def test_bounds_of_a_request_are_part_of_what_is_expected() -> None:
    assert CAPPED.exit_shares == pytest.approx((0, 0.15, 0.2, 0.65))
    watch = watch_of([(CAPPED, layer) for layer in [2] * 15 + [3] * 20 + [4] * 65])
    assert watch.share_drift == pytest.approx(0, abs=1e-12)
    assert watch.speedup_drift == pytest.approx(1.0)


@given(st.integers(0, 2**32))
def test_calibrated_traffic_shows_no_drift_in_any_mix_and_harder_texts_do(seed: int) -> None:
    rng = random.Random(seed)
    share = rng.random()
    mix = [FAST if rng.random() < share else SLOW for _ in range(3000)]
    same = watch_of([(depth, leaves(rng, depth)) for depth in mix])
    assert same.share_drift < 0.02
    assert same.speedup_drift == pytest.approx(1.0, abs=0.07)
    harder = watch_of([(depth, leaves(rng, depth, harder=2.0)) for depth in mix])
    assert harder.share_drift > 0.1
    assert harder.speedup_drift < 0.9


# -- the correction --------------------------------------------------------------------------------


@given(st.lists(st.floats(0.01, 100), max_size=100), st.floats(1.0, 6.0))
def test_a_correction_is_bounded_and_leaves_one_alone(seen: list[float], speedup: float) -> None:
    correction = SpeedupCorrection()
    for achieved in seen:
        correction.learn(achieved)
    assert LEAST_CORRECTION <= correction.factor <= MOST_CORRECTION
    assert 1.0 <= correction.apply(speedup, 1.0, 6.0) <= 6.0
    assert correction.apply(1.0, 1.0, 6.0) == 1.0
    assume(1.5 <= speedup <= 3.0)
    assert 1.5 <= correction.apply(speedup, 1.5, 3.0) <= 3.0


def drift_in_the_end(harder: float, correction: SpeedupCorrection | None) -> float:
    """Of texts that ask for a speed-up of 3, where what is looked up gives so much less."""
    rng, thrice = random.Random(0), Depth((1.0, *[0.2] * (LAYERS - 1)))
    watch = ExitWatch(LAYERS, correction)
    for _ in range(60_000):
        factor = correction.factor if correction is not None else 1.0
        mean = thrice.mean * harder / factor
        leaves_at_first = (LAYERS - mean) / (LAYERS - 1)  # the others at the last exit
        watch.note(thrice, 1 if rng.random() < leaves_at_first else LAYERS)
    return watch.speedup_drift


@pytest.mark.parametrize("harder", [0.87, 1.0, 1.15])
def test_an_error_that_lasts_is_taken_out(harder: float) -> None:
    assert drift_in_the_end(harder, None) == pytest.approx(1 / harder, rel=0.04)
    correction = SpeedupCorrection()
    assert drift_in_the_end(harder, correction) == pytest.approx(1.0, rel=0.03)
    assert correction.factor == pytest.approx(harder, rel=0.06)


def test_an_error_beyond_the_bounds_is_taken_out_as_far_as_they_go() -> None:
    correction = SpeedupCorrection()
    assert drift_in_the_end(1.6, correction) == pytest.approx(MOST_CORRECTION / 1.6, rel=0.04)
    assert correction.factor == pytest.approx(MOST_CORRECTION, rel=0.03)
