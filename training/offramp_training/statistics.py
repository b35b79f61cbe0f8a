"""The figures that checkpoints are compared by, and how sure they are.

**Accuracy at a speed-up s** is the accuracy of the curve's point with the smallest speed-up that is
at least s: a step function of s. **The area** is the mean of that function over s from 1 to 3. A
curve that ends before s has no value there, and one that ends before 3 has no area.

**Intervals** are percentiles over bootstrap samples of the rows. A sample counts each row some
number of times; the thresholds stay those of the curve, and both coordinates of every point are
measured anew. The same samples serve every checkpoint, so that a difference is a difference on the
same texts. In a sample that a curve no longer covers, its last point stands for what is missing.

Arrays in, numbers out: knows nothing about checkpoints, policies or files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

LOW, HIGH = 1.0, 3.0  # what the area spans
LEVEL = 0.95  # of an interval
_SLACK = 1e-9  # of a speed-up: the same ratio computed twice may differ in the last bit
_CELLS = 2**22  # of a block of bootstrap samples: samples x rows

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """One curve or a stack of them: float64 [..., T], speed-ups ascending along the last axis."""

    speedups: Floats
    accuracies: Floats

    def reach(self, speedup: float) -> bool:
        """Do all of them get that far?"""
        return bool((self.speedups[..., -1] >= speedup - _SLACK).all())

    def at(self, speedup: float) -> Floats:
        """Accuracy at a speed-up, [...]; beyond the end that of the last point."""
        place = (self.speedups < speedup - _SLACK).sum(axis=-1, keepdims=True)
        place = np.minimum(place, self.speedups.shape[-1] - 1)
        found: Floats = np.take_along_axis(self.accuracies, place, axis=-1)[..., 0]
        return found

    def area(self) -> Floats:
        """Mean accuracy over speed-ups from 1 to 3, [...]; each point holds back to the last."""
        ends = np.clip(self.speedups, LOW, HIGH)
        ends[..., -1] = HIGH
        widths = np.diff(ends, axis=-1, prepend=LOW)
        area: Floats = (widths * self.accuracies).sum(axis=-1) / (HIGH - LOW)
        return area


def accuracy_at(curve: Curves, speedup: float) -> float | None:
    """Of one curve; None where it ends before."""
    return float(curve.at(speedup)) if curve.reach(speedup) else None


def area(curve: Curves) -> float | None:
    """Of one curve; None where it ends before 3."""
    return float(curve.area()) if curve.reach(HIGH) else None


@dataclass(frozen=True)
class Outcomes:
    """Where each row leaves at each threshold of a curve, and whether it is right: [T, N] each.

    Thresholds run from the strictest on, so a row's exit layer never rises along the first axis.
    """

    exit_layer: NDArray[np.float32]
    right: NDArray[np.float32]
    num_layers: int

    def resampled(self, weights: NDArray[np.float32]) -> Curves:
        """The curve of each bootstrap sample: [samples, T] from row counts [samples, N].

        The sums are of small whole numbers, which float32 adds exactly up to 16 million.
        """
        rows = weights.shape[1]
        layers_run = (weights @ self.exit_layer.T).astype(np.float64)
        right = (weights @ self.right.T).astype(np.float64)
        return Curves(rows * self.num_layers / layers_run, right / rows)


def resamples(rows: int, draws: int, seed: int) -> Iterator[NDArray[np.float32]]:
    """Bootstrap samples in blocks: how often each has each row, [block, rows], rows in sum."""
    random = np.random.default_rng(seed)
    block = max(1, _CELLS // rows)
    for start in range(0, draws, block):
        count = min(block, draws - start)
        chosen = random.integers(rows, size=(count, rows))
        chosen += rows * np.arange(count)[:, None]
        weights = np.bincount(chosen.ravel(), minlength=count * rows)
        yield weights.reshape(count, rows).astype(np.float32)


def interval(values: Floats) -> tuple[float, float]:
    """The middle 95 % of the values."""
    low, high = np.quantile(values, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def auroc(scores: Floats, positive: NDArray[np.bool_]) -> float | None:
    """The chance that a positive has a higher score than a negative, a tie counting half.

    By ranks, ties at the mean of the ranks they share, which is exact: ranks are halves of whole
    numbers. None where one of the two kinds is missing.
    """
    positives = int(positive.sum())
    negatives = len(positive) - positives
    if not positives or not negatives:
        return None
    _, group, sizes = np.unique(scores, return_inverse=True, return_counts=True)
    midrank = np.cumsum(sizes) - (sizes - 1) / 2
    wins = midrank[group[positive]].sum() - positives * (positives + 1) / 2
    return float(wins / (positives * negatives))
