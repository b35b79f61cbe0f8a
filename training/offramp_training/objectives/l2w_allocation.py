"""Budgets of L2W-DEN: which share of the rows leaves at which exit, and which rows those are.

A budget is one number q: exit k gets a share proportional to q^k, so that q < 1 favours shallow
exits and a larger q means deeper. Training allocates the rows of a meta batch to exits by it; the
offline comparison with the paper turns it into one threshold per exit. Serving uses neither: it has
one threshold for all exits, because per-exit thresholds do not make cost monotone in q.

Scores and confidences are [rows, exits], larger is surer, and NaN never leaves early. Knows nothing
about encoders, gradients or weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import torch

Rounding = Literal["cumulative", "largest_remainder", "floor"]

NOBODY, EVERYBODY = 1e8, -1e8  # thresholds that no probability reaches, and that each passes


# ---- shares --------------------------------------------------------------------------------------


def shares(exits: int, q: float) -> list[float]:
    """p_k = q^k / sum_j q^j for k = 1..exits."""
    powers = [q**k for k in range(exits)]  # the common factor q cancels
    return [power / sum(powers) for power in powers]


def mean_exit_layer(exit_layers: Sequence[int], q: float) -> float:
    """Where rows leave on average when every share is met exactly."""
    return math.fsum(
        layer * p for layer, p in zip(exit_layers, shares(len(exit_layers), q), strict=True)
    )


def speedup_for_q(exit_layers: Sequence[int], num_layers: int, q: float) -> float:
    """Speed-up in layers of the ideal shares."""
    return num_layers / mean_exit_layer(exit_layers, q)


def q_for_speedup(exit_layers: Sequence[int], num_layers: int, speedup: float) -> float:
    """The q whose ideal shares give `speedup`; it falls as the speed-up rises."""
    slowest, fastest = num_layers / exit_layers[-1], num_layers / exit_layers[0]
    if not slowest < speedup < fastest:
        raise ValueError(
            f"speedup = {speedup:g}; allowed with exits at layers "
            f"{', '.join(map(str, exit_layers))} of {num_layers}: above {slowest:g} and below "
            f"{fastest:g}"
        )
    low, high = -50.0, 50.0  # of ln q
    for _ in range(100):
        middle = (low + high) / 2
        if speedup_for_q(exit_layers, num_layers, math.exp(middle)) > speedup:
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def round_shares(p: Sequence[float], rows: int, rounding: Rounding = "cumulative") -> list[int]:
    """Whole rows per exit, summing to `rows`.

    "floor" rounds every share but the last down, so the last exit gets all that is lost: nothing
    for hundreds of rows, and every single row for 8 rows and 12 exits. "cumulative" rounds the
    running sum and is off by half a row at most at any depth.
    """
    if rounding == "cumulative":
        bounds = [math.floor(rows * total + 0.5) for total in accumulate(p)]
        return [after - before for before, after in pairwise([0, *bounds[:-1], rows])]
    counts = [math.floor(rows * share) for share in p]
    left = rows - sum(counts)
    if rounding == "floor":
        counts[-1] += left
        return counts
    lost = [rows * share - count for share, count in zip(p, counts, strict=True)]
    for k in sorted(range(len(p)), key=lambda k: -lost[k])[:left]:
        counts[k] += 1
    return counts


# ---- rows ----------------------------------------------------------------------------------------


def allocate(scores: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """Which exit each row is allocated to, 0-based: scores [n, K], counts per exit -> [n].

    Exit by exit, the `counts[k]` surest of the rows that are still there; the last exit takes the
    rest. Of equally sure rows the earlier goes first. Carries no gradient.
    """
    rows, exits = scores.shape
    if len(counts) != exits or sum(counts) != rows:
        raise ValueError(f"counts {list(counts)} do not share {rows} rows among {exits} exits")
    scores = scores.detach().nan_to_num(nan=torch.finfo(scores.dtype).min)
    exit_of_row = torch.full((rows,), exits - 1, device=scores.device)
    gone = torch.zeros(rows, dtype=torch.bool, device=scores.device)
    for k, count in enumerate(counts[:-1]):
        left = scores[:, k].masked_fill(gone, -torch.inf)
        leavers = left.argsort(descending=True, stable=True)[:count]
        exit_of_row[leavers] = k
        gone[leavers] = True
    return exit_of_row


def meta_objective(losses: torch.Tensor, exit_of_row: torch.Tensor) -> torch.Tensor:
    """Sum over the exits that have rows of their rows' mean loss there: losses [n, K].

    Not a mean over rows: a row weighs more where few rows leave.
    """
    counts = torch.bincount(exit_of_row, minlength=losses.shape[1])
    own = losses.gather(1, exit_of_row[:, None]).squeeze(1)
    return (own / counts[exit_of_row]).sum()


# ---- thresholds, for offline comparison with the paper -------------------------------------------


def budget_thresholds(confidences: torch.Tensor, q: float) -> torch.Tensor:
    """One threshold per exit from calibration rows, [N, K] -> [K]; leave when >= it.

    Exit k's is the confidence of the floor(N * p_k)-th surest row still there. Where that is no
    row, or there are fewer, nobody leaves. Ties leave together, so the shares are a floor.
    """
    rows, exits = confidences.shape
    thresholds = confidences.new_full((exits,), NOBODY)
    thresholds[-1] = EVERYBODY
    here = torch.ones(rows, dtype=torch.bool, device=confidences.device)
    for k, share in enumerate(shares(exits, q)[:-1]):
        wanted = math.floor(rows * share)
        able = confidences[here & ~confidences[:, k].isnan(), k]
        if 0 < wanted <= len(able):
            thresholds[k] = able.sort(descending=True).values[wanted - 1]
            here &= ~(confidences[:, k] >= thresholds[k])
    return thresholds


def budget_threshold_sweep(
    confidences: torch.Tensor, budgets: Sequence[float], *, monotone: bool = False
) -> torch.Tensor:
    """`budget_thresholds` of several q, [Q, K].

    A row may leave earlier under a larger q. `monotone` mends that: from the largest q down, each
    exit's threshold is the smallest so far, so that it never falls as q rises.
    """
    sweep = torch.stack([budget_thresholds(confidences, q) for q in budgets])
    if monotone:
        down = sorted(range(len(budgets)), key=lambda place: -budgets[place])
        sweep[down] = sweep[down].cummin(dim=0).values
    return sweep


def exits_at(confidences: torch.Tensor, thresholds: torch.Tensor) -> torch.Tensor:
    """The exit at which each row leaves, numbered from 1: the first with confidence >= threshold.

    The last exit takes whoever comes, NaN included.
    """
    leaves = confidences >= thresholds
    leaves[:, -1] = True
    return leaves.int().argmax(dim=1) + 1
