"""Calibrating: from recorded exits to the operating points of a policy (`calibration.py`).

The search is exact. A policy's signals do not depend on the threshold, so a row leaves at or
before exit e exactly when the most favourable signal it has shown by then passes. One sort per
exit therefore gives the speed-up of *every* threshold at which anything changes. Nothing here runs
an encoder or touches a file.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp_model.calibration import REQUESTED_SPEEDUPS, SLACK, CurvePoint
from offramp_model.config import ProblemType
from offramp_model.labels import from_bits
from offramp_model.layer_loop import start_rows
from offramp_model.policies import Direction, ExitPolicy, never
from offramp_model.recorded import RecordedExits, RecordedStack
from offramp_model.rows import RowSettings
from offramp_model.speed import count_exits, mean_exit_layer, speedup_ratio


@dataclass(frozen=True, slots=True)
class ExitTrace:
    """What a policy sees of each row at each exit, whatever the threshold.

    `signal` float64 [E, N]; `can_leave` bool [E, N] (false for NaN signals and where the policy
    never leaves); `label` int64 [E, N] if the row leaves there by the policy; `end_label` int64
    [N] if it runs to the end without. `dtype` is the signal's own, in which it is compared.
    """

    signal: Tensor
    can_leave: Tensor
    label: Tensor
    end_label: Tensor
    exit_layers: tuple[int, ...]
    direction: Direction
    dtype: torch.dtype
    problem_type: ProblemType

    def leaves(self, threshold: float) -> Tensor:
        """bool [E, N]: would the row leave at this exit, had it come so far?"""
        limit = torch.tensor(threshold, dtype=torch.float64).to(self.dtype).double()
        passes = {
            "below": self.signal < limit,
            "above": self.signal > limit,
            "at_least": self.signal >= limit,
        }[self.direction]
        return passes & self.can_leave

    def outcome(self, threshold: float) -> tuple[Tensor, Tensor]:
        """Exit layer and label of each row, int64 [N] each: the layer loop, vectorised."""
        leaves = self.leaves(threshold)
        at_end = ~leaves.any(dim=0)
        index = torch.where(at_end, leaves.shape[0] - 1, leaves.int().argmax(dim=0))
        label = self.label.gather(0, index[None]).squeeze(0)
        return torch.tensor(self.exit_layers)[index], torch.where(at_end, self.end_label, label)


def trace(recorded: RecordedExits, policy: ExitPolicy) -> ExitTrace:
    """Ask the policy at every exit about every row, once eager to leave and once never."""
    stack = RecordedStack(recorded)

    def ask(threshold: float) -> list[tuple[Tensor, Tensor, Tensor]]:
        settings = RowSettings.uniform(recorded.num_rows, threshold, max_layer=stack.num_layers)
        rows = start_rows(stack, stack.batch(), policy, settings)
        answers = []
        for exit_layer in stack.exit_layers:
            decision = policy.decide(exit_layer, stack.exit_head(exit_layer, rows.hidden), rows)
            answers.append((decision.signal, decision.leaving, decision.label))
        return answers

    eager = ask(-never(policy))
    return ExitTrace(
        signal=torch.stack([signal for signal, _, _ in eager]).double(),
        can_leave=torch.stack([leaving for _, leaving, _ in eager]),
        label=torch.stack([label for _, _, label in eager]),
        end_label=ask(never(policy))[-1][2],
        exit_layers=recorded.exit_layers,
        direction=policy.direction,
        dtype=eager[0][0].dtype,
        problem_type=recorded.problem_type,
    )


def curve(
    recorded: RecordedExits, labels: Tensor, policy: ExitPolicy, *, num_points: int = 200
) -> tuple[CurvePoint, ...]:
    """The policy's accuracy–speed curve on recorded rows with true labels int64 [N].

    At most about `num_points` points, evenly spaced in log speed-up, plus those closest to the
    speed-ups that reports name. The first point never leaves early.
    """
    seen = trace(recorded, policy)
    thresholds = [never(policy), *spread_thresholds(seen, num_points)]
    points = [_measure(seen, labels, threshold) for threshold in thresholds]
    # Two thresholds of the same speed-up (only the last exit differs) are one point.
    return tuple(
        point
        for index, point in enumerate(points)
        if index == 0 or point.speedup > points[index - 1].speedup
    )


def spread_thresholds(seen: ExitTrace, num_points: int) -> list[float]:
    """Thresholds that change something, from the strictest on, spread over the speed-ups.

    Each stands halfway to the next signal at which something changes. The same text can get a
    signal that differs in the last bit from batch to batch; at a distance it leaves at the same
    exit all the same. Between signals that are neighbours there is no halfway: then it is the way
    beyond the second one that is halved.
    """
    values, speedups = threshold_speedups(seen)
    if not len(values):
        return []
    targets = np.geomspace(1.0, speedups[-1], num_points)
    targets = np.union1d(targets, [s for s in REQUESTED_SPEEDUPS if s <= speedups[-1]])
    chosen = np.unique(np.searchsorted(speedups, targets - SLACK, side="left"))
    if seen.direction == "at_least":  # counts are exact, and read better as they are
        return [_rounded(values[index], seen.dtype) for index in chosen]
    halfway = [_rounded(value, seen.dtype) for value in values[:-1] + np.diff(values) / 2]
    apart = [index for index, one in enumerate(halfway) if one != values[index + 1]]
    roomy = np.array([*apart, len(values) - 1])
    indices = np.unique(roomy[np.searchsorted(roomy, chosen)])
    thresholds = [*halfway, _rounded(values[-1], seen.dtype)]
    return [thresholds[index] for index in indices]


def threshold_speedups(seen: ExitTrace) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Every threshold at which an exit changes, strictest first, and the speed-up it gives."""
    layers = np.array(seen.exit_layers, dtype=np.float64)
    rows = seen.signal.shape[1]
    sign = 1.0 if seen.direction == "below" else -1.0
    # Smaller is more eager; a row that cannot leave somewhere is never eager there.
    cost = torch.where(seen.can_leave, sign * seen.signal, torch.inf)[:-1].numpy()
    best = np.minimum.accumulate(cost, axis=0)  # the most favourable signal so far
    values = np.unique(best[np.isfinite(best)])
    layers_run = np.full(len(values), rows * layers[0])
    for exit_index, best_so_far in enumerate(best):
        left = np.searchsorted(np.sort(best_so_far), values, side="right")
        layers_run += (rows - left) * (layers[exit_index + 1] - layers[exit_index])
    return _just_passing(sign * values, seen), rows * layers[-1] / layers_run


def _just_passing(signals: NDArray[np.float64], seen: ExitTrace) -> NDArray[np.float64]:
    """The strictest threshold that each signal passes, in the dtype in which they are compared."""
    if seen.direction == "at_least":
        return signals
    towards = np.inf if seen.direction == "below" else -np.inf
    if seen.dtype == torch.float64:
        return np.nextafter(signals, towards)
    in_float32: NDArray[np.float32] = np.nextafter(signals.astype(np.float32), np.float32(towards))
    return in_float32.astype(np.float64)


def _rounded(threshold: float, dtype: torch.dtype) -> float:
    """As it will be compared."""
    return float(torch.tensor(threshold, dtype=torch.float64).to(dtype))


def _measure(seen: ExitTrace, labels: Tensor, threshold: float) -> CurvePoint:
    exit_layer, predicted = seen.outcome(threshold)
    return measure_point(
        threshold, exit_layer, predicted, labels, seen.exit_layers[-1], seen.problem_type
    )


def measure_point(
    threshold: float,
    exit_layer: Tensor,
    predicted: Tensor,
    labels: Tensor,
    num_layers: int,
    problem_type: ProblemType,
) -> CurvePoint:
    """Summarise where rows left and what they said; all tensors int64 [N]."""
    f1 = set_macro_f1 if problem_type == "multi_label_classification" else macro_f1
    counts = tuple(torch.bincount(exit_layer, minlength=num_layers + 1)[1:].tolist())
    return CurvePoint(
        threshold=threshold,
        speedup=speedup_ratio(counts),
        mean_exit_layer=mean_exit_layer(counts),
        accuracy=float((predicted == labels).double().mean()),
        macro_f1=f1(predicted, labels),
        exit_counts=counts,
    )


def macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """Unweighted mean of the F1 of every class that occurs among labels or predictions."""
    classes = int(torch.cat([predicted, labels]).max()) + 1

    def count(of: Tensor) -> Tensor:
        return torch.bincount(of, minlength=classes).double()

    occurrences = count(predicted) + count(labels)
    hits = count(labels[predicted == labels])
    return float((2 * hits / occurrences)[occurrences > 0].mean())


def set_macro_f1(predicted: Tensor, labels: Tensor) -> float:
    """The same of sets of labels; 1 where no label occurs at all, as then nothing was missed."""
    said, true = from_bits(predicted), from_bits(labels)
    occurrences = said.sum(dim=0).double() + true.sum(dim=0)
    hits = (said & true).sum(dim=0)
    found = (2 * hits / occurrences)[occurrences > 0]
    return float(found.mean()) if len(found) else 1.0


def layer_accuracies(recorded: RecordedExits, labels: Tensor) -> list[float]:
    """Accuracy of every exit if all rows left there."""
    right: list[float] = (recorded.said == labels).double().mean(dim=1).tolist()
    return right


def oracle(recorded: RecordedExits, labels: Tensor) -> tuple[float, float]:
    """Speed-up and accuracy if each row left at its first right exit, else ran to the end."""
    right = recorded.said == labels
    found = right.any(dim=0)
    index = torch.where(found, right.int().argmax(dim=0), right.shape[0] - 1)
    exit_layer = torch.tensor(recorded.exit_layers)[index]
    counts = count_exits(exit_layer.tolist(), recorded.num_layers)
    return speedup_ratio(counts), float(found.double().mean())
