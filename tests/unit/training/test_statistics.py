"""The figures of comparisons against slow twins written from their definitions."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_training.statistics import (
    Curves,
    Outcomes,
    accuracy_at,
    area,
    auroc,
    interval,
    resamples,
)


def naive_auroc(scores: Sequence[float], positive: Sequence[bool]) -> float | None:
    pairs = [
        (s > t) + 0.5 * (s == t)
        for s, is_right in zip(scores, positive, strict=True)
        for t, other_is_right in zip(scores, positive, strict=True)
        if is_right and not other_is_right
    ]
    return sum(pairs) / len(pairs) if pairs else None


values = st.one_of(
    st.integers(-3, 3).map(float),  # ties
    st.floats(allow_nan=False),
)


@given(st.lists(st.tuples(values, st.booleans()), min_size=1, max_size=40))
def test_auroc_is_the_share_of_pairs_in_the_right_order(rows: list[tuple[float, bool]]) -> None:
    scores, positive = zip(*rows, strict=True)
    assert auroc(np.array(scores), np.array(positive)) == naive_auroc(scores, positive)


def test_auroc_at_its_ends() -> None:
    right = np.array([False, False, True, True])
    assert auroc(np.array([1.0, 2.0, 3.0, 4.0]), right) == 1.0
    assert auroc(np.array([4.0, 3.0, 2.0, 1.0]), right) == 0.0
    assert auroc(np.zeros(4), right) == 0.5
    assert auroc(np.array([-np.inf, -np.inf, np.inf, 0.0]), right) == 1.0
    assert auroc(np.zeros(2), np.array([True, True])) is None
    assert auroc(np.zeros(2), np.array([False, False])) is None


def naive_at(speedups: Sequence[float], accuracies: Sequence[float], wanted: float) -> float:
    return min((s, a) for s, a in zip(speedups, accuracies, strict=True) if s >= wanted)[1]


curves = st.lists(
    st.tuples(st.integers(0, 48), st.integers(0, 100)), max_size=20, unique_by=lambda pair: pair[0]
)


@given(curves)
def test_the_area_is_the_mean_of_the_step_function(pairs: list[tuple[int, int]]) -> None:
    """Speed-ups lie on a grid of sixteenths: the step function is constant in each cell."""
    points = sorted({0: 90, **dict(pairs), 40: 50}.items())
    speedups = [1 + place / 16 for place, _ in points]
    accuracies = [percent / 100 for _, percent in points]
    curve = Curves(np.array(speedups), np.array(accuracies))
    cells = [naive_at(speedups, accuracies, 1 + (cell + 0.5) / 16) for cell in range(32)]
    assert area(curve) == pytest.approx(sum(cells) / 32, abs=1e-12)
    for wanted in (1.0, 1.5, 2.0, 3.0):
        assert accuracy_at(curve, wanted) == naive_at(speedups, accuracies, wanted)


def test_a_curve_that_ends_early_has_no_value_beyond() -> None:
    curve = Curves(np.array([1.0, 2.0 - 1e-12]), np.array([0.9, 0.8]))
    assert accuracy_at(curve, 2.0) == 0.8  # the same ratio, computed twice
    assert accuracy_at(curve, 2.5) is None
    assert area(curve) is None
    flat = Curves(np.array([1.0, 6.0]), np.array([0.2, 0.7]))
    assert area(flat) == pytest.approx(0.7)  # full depth alone has no width


def outcomes(rows: int, thresholds: int, seed: int) -> Outcomes:
    random = np.random.default_rng(seed)
    layers = np.sort(random.integers(1, 7, size=(thresholds, rows)), axis=0)[::-1]
    layers[0] = 6
    return Outcomes(
        layers.astype(np.float32),
        random.integers(2, size=(thresholds, rows)).astype(np.float32),
        num_layers=6,
    )


def test_a_sample_gives_what_its_rows_written_out_give() -> None:
    seen = outcomes(rows=30, thresholds=9, seed=1)
    weights = np.concatenate(list(resamples(30, draws=20, seed=5)))
    stack = seen.resampled(weights)
    for number, counts in enumerate(weights.astype(int)):
        rows = np.repeat(np.arange(30), counts)
        layers, right = seen.exit_layer[:, rows], seen.right[:, rows]
        speedups = 6 * 30 / layers.sum(axis=1, dtype=np.float64)
        assert (np.diff(speedups) >= 0).all()
        one = Curves(speedups, right.mean(axis=1, dtype=np.float64))
        assert stack.at(2.0)[number] == one.at(2.0)
        assert stack.area()[number] == pytest.approx(one.area(), abs=1e-12)
    whole = seen.resampled(np.ones((1, 30), dtype=np.float32))
    assert whole.speedups[0, 0] == 1.0


def test_samples_are_seeded_whole_and_of_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp_training.statistics._CELLS", 70)
    blocks = list(resamples(10, draws=200, seed=3))
    assert {len(block) for block in blocks} == {7, 200 % 7}
    weights = np.concatenate(blocks)
    assert weights.shape == (200, 10)
    assert (weights.sum(axis=1) == 10).all()
    assert weights.sum(axis=0).min() > 120  # of 200 expected, and a deviation of 13
    assert len(np.unique(weights, axis=0)) > 190
    again = np.concatenate(list(resamples(10, draws=200, seed=3)))
    assert np.array_equal(weights, again)
    assert not np.array_equal(weights, np.concatenate(list(resamples(10, draws=200, seed=4))))


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Accuracy of a coin that is right in 70 of 100 cases: 95 % intervals from 200 rows."""
    random, covered = np.random.default_rng(0), 0
    for trial in range(200):
        right = (random.random((1, 200)) < 0.7).astype(np.float32)
        seen = Outcomes(np.full_like(right, 6), right, num_layers=6)
        drawn = [seen.resampled(block).at(1.0) for block in resamples(200, 300, seed=trial)]
        low, high = interval(np.concatenate(drawn))
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199
