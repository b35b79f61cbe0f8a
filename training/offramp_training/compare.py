"""Several checkpoints on the same labelled rows: curves, one figure each, and how sure they are.

Every exit is recorded once per checkpoint; all else is arithmetic on the records. One policy speaks
for a checkpoint: a named one, or its best at speed-up 2, as chosen on the rows it was calibrated on
(where it was not calibrated, on the compared rows, which flatters it; the report says which). What
the figures mean stands in `statistics.py`. Knows nothing about training or pictures.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from offramp_model.calibrating import ExitTrace, curve, layer_accuracies, oracle, trace
from offramp_model.calibration import REQUESTED_SPEEDUPS, CurvePoint
from offramp_model.checkpoint import Checkpoint
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import RecordedExits
from offramp_training import statistics
from offramp_training.data import Dataset
from offramp_training.errors import DataError, OutputError
from offramp_training.evaluate import (
    HEADLINE_SPEEDUP,
    best_policy,
    check_policies,
    default_policies,
    record_dataset,
)
from offramp_training.statistics import Curves, Floats, Outcomes

BEST = "best"
DRAWS, SEED = 2000, 0  # of the bootstrap


@dataclass(frozen=True)
class Figure:
    """A number and its interval; `value` None where the curve does not reach."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Compared:
    """One checkpoint on the compared rows."""

    name: str
    objective: str
    seed: int
    policy: str
    chosen_on: str  # "request", "calibration rows" or "compared rows"
    num_layers: int
    layers: dict[int, float]  # exit layer -> accuracy if every row left there
    aurocs: dict[int, float | None]  # exit layer -> does the signal tell right from wrong there?
    curve: tuple[CurvePoint, ...]
    truncated: tuple[CurvePoint, ...]  # every row leaves at one layer
    oracle: tuple[float, float]  # speed-up and accuracy of leaving at the first right exit

    @property
    def full_accuracy(self) -> float:
        return self.layers[self.num_layers]


@dataclass(frozen=True)
class Intervals:
    """What the bootstrap says of one checkpoint; differences are to the first one."""

    at_two: Figure
    area: Figure
    at_two_difference: Figure
    area_difference: Figure


@dataclass(frozen=True)
class Comparison:
    """`compare --json`, as Python values."""

    split: str
    rows: int
    draws: int
    seed: int
    checkpoints: tuple[Compared, ...]
    intervals: tuple[Intervals, ...]

    def as_dict(self) -> dict[str, Any]:
        both = zip(self.checkpoints, self.intervals, strict=True)
        return {
            "split": self.split,
            "rows": self.rows,
            "bootstrap": {"draws": self.draws, "seed": self.seed, "level": statistics.LEVEL},
            "checkpoints": [_entry(one, sure) for one, sure in both],
        }


def compare_checkpoints(
    checkpoints: Sequence[Checkpoint],
    datasets: Sequence[Dataset],
    policy: str = BEST,
    *,
    draws: int = DRAWS,
    seed: int = SEED,
) -> Comparison:
    """Measures each checkpoint on its dataset, which must hold the same rows for all."""
    _check_rows(checkpoints, datasets)
    measured = []
    names = distinct_names([checkpoint.directory for checkpoint in checkpoints])
    for name, checkpoint, dataset in zip(names, checkpoints, datasets, strict=True):
        recorded = record_dataset(checkpoint, dataset)
        measured.append(_measure(name, checkpoint, recorded, dataset, policy))
    curves = [step_curve(one.curve) for one, _ in measured]
    intervals = _bootstrap(curves, [outcomes for _, outcomes in measured], draws, seed)
    rows = datasets[0]
    return Comparison(
        rows.split, len(rows), draws, seed, tuple(one for one, _ in measured), intervals
    )


def distinct_names(directories: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell it from the others."""
    paths = [directory.resolve() for directory in directories]
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise DataError(f"{twice} is given twice; allowed: different checkpoints")
    for parts in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def step_curve(points: Sequence[CurvePoint]) -> Curves:
    """A curve's points as arrays."""
    return Curves(
        np.array([point.speedup for point in points]),
        np.array([point.accuracy for point in points]),
    )


def _check_rows(checkpoints: Sequence[Checkpoint], datasets: Sequence[Dataset]) -> None:
    for checkpoint, dataset in zip(checkpoints, datasets, strict=True):
        if dataset.ordered_fingerprint != datasets[0].ordered_fingerprint:
            raise DataError(
                f"{checkpoint.directory}: its {dataset.split!r} rows are not those of "
                f"{checkpoints[0].directory}; allowed: checkpoints with the same rows and labels"
            )


# ---- one checkpoint ------------------------------------------------------------------------------


def _measure(
    name: str, checkpoint: Checkpoint, recorded: RecordedExits, dataset: Dataset, wanted: str
) -> tuple[Compared, Outcomes]:
    labels, manifest = torch.tensor(dataset.labels), checkpoint.manifest
    name_of_policy, chosen_on = _choose(checkpoint, recorded, dataset, wanted)
    policy = make_supported_policy(name_of_policy, checkpoint.model)
    points, seen = curve(recorded, labels, policy), trace(recorded, policy)
    accuracies = layer_accuracies(recorded, labels)
    compared = Compared(
        name=name,
        objective=manifest.objective.name,
        seed=manifest.seed,
        policy=policy.name,
        chosen_on=chosen_on,
        num_layers=recorded.num_layers,
        layers=dict(zip(recorded.exit_layers, accuracies, strict=True)),
        aurocs=dict(zip(recorded.exit_layers, signal_aurocs(seen, labels), strict=True)),
        curve=points,
        truncated=curve(recorded, labels, make_supported_policy("fixed_layer", checkpoint.model)),
        oracle=oracle(recorded, labels),
    )
    return compared, _outcomes(seen, points, labels)


def _choose(
    checkpoint: Checkpoint, recorded: RecordedExits, dataset: Dataset, wanted: str
) -> tuple[str, str]:
    """The policy that speaks for a checkpoint, and the rows that it was chosen on."""
    manifest, here = checkpoint.manifest, "compared rows"
    if wanted != BEST:
        check_policies(checkpoint, [wanted])
        return wanted, "request"
    if manifest.best_policy is not None:
        table = checkpoint.table(manifest.best_policy)
        same = table.data_fingerprint == dataset.fingerprint
        return manifest.best_policy, here if same else "calibration rows"
    labels = torch.tensor(dataset.labels)
    curves = {
        name: curve(recorded, labels, make_supported_policy(name, checkpoint.model))
        for name in default_policies(checkpoint.model)
    }
    return best_policy(curves, manifest.exit_policy) or manifest.exit_policy, here


def signal_aurocs(seen: ExitTrace, labels: torch.Tensor) -> list[float | None]:
    """At each exit: how well the signal tells the rows that are right there from the others.

    A row that cannot leave, whose signal is NaN, counts as the least sure. None where the signal
    is the same for all rows and so tells nothing: votes at the first exit, gates at the last.
    """
    sign = -1.0 if seen.direction == "below" else 1.0
    sureness = torch.where(seen.can_leave, sign * seen.signal, -torch.inf).numpy()
    right = (seen.label == labels).numpy()
    return [
        None if (one == one[0]).all() else statistics.auroc(one, is_right)
        for one, is_right in zip(sureness, right, strict=True)
    ]


def _outcomes(seen: ExitTrace, points: Sequence[CurvePoint], labels: torch.Tensor) -> Outcomes:
    """Each row's exit and answer at every threshold of a curve."""
    exit_layers, right = [], []
    for point in points:
        exit_layer, label = seen.outcome(point.threshold)
        exit_layers.append(exit_layer.float())
        right.append((label == labels).float())
    return Outcomes(
        torch.stack(exit_layers).numpy(), torch.stack(right).numpy(), seen.exit_layers[-1]
    )


# ---- how sure ------------------------------------------------------------------------------------


def _bootstrap(
    curves: Sequence[Curves], outcomes: Sequence[Outcomes], draws: int, seed: int
) -> tuple[Intervals, ...]:
    """Every checkpoint on the same samples of the rows."""
    rows = outcomes[0].right.shape[1]
    at_two: list[list[Floats]] = [[] for _ in outcomes]
    areas: list[list[Floats]] = [[] for _ in outcomes]
    for weights in statistics.resamples(rows, draws, seed):
        for number, one in enumerate(outcomes):
            sampled = one.resampled(weights)
            at_two[number].append(sampled.at(HEADLINE_SPEEDUP))
            areas[number].append(sampled.area())
    all_at_two, all_areas = [np.stack([np.concatenate(x) for x in y]) for y in (at_two, areas)]
    true_at_two = [statistics.accuracy_at(one, HEADLINE_SPEEDUP) for one in curves]
    true_areas = [statistics.area(one) for one in curves]
    return tuple(
        Intervals(
            at_two=_figure(true_at_two[number], all_at_two[number]),
            area=_figure(true_areas[number], all_areas[number]),
            at_two_difference=_difference(true_at_two, all_at_two, number),
            area_difference=_difference(true_areas, all_areas, number),
        )
        for number in range(len(outcomes))
    )


def _figure(value: float | None, sampled: Floats) -> Figure:
    return Figure(None) if value is None else Figure(value, *statistics.interval(sampled))


def _difference(values: Sequence[float | None], sampled: Floats, number: int) -> Figure:
    """Of one checkpoint to the first, sample by sample."""
    own, first = values[number], values[0]
    if own is None or first is None:
        return Figure(None)
    return _figure(own - first, sampled[number] - sampled[0])


# ---- what people get -----------------------------------------------------------------------------


def _entry(one: Compared, sure: Intervals) -> dict[str, Any]:
    own = step_curve(one.curve)
    return {
        "name": one.name,
        "objective": one.objective,
        "seed": one.seed,
        "policy": one.policy,
        "policy_chosen_on": one.chosen_on,
        "full_depth": one.full_accuracy,
        **_steps(own),
        "intervals": {
            "accuracy_at_2": vars(sure.at_two),
            "auc": vars(sure.area),
            "accuracy_at_2_difference": vars(sure.at_two_difference),
            "auc_difference": vars(sure.area_difference),
        },
        "layers": [
            {"exit_layer": layer, "accuracy": accuracy, "auroc": one.aurocs[layer]}
            for layer, accuracy in one.layers.items()
        ],
        "truncated": _steps(step_curve(one.truncated)),
        "oracle": {"speedup": one.oracle[0], "accuracy": one.oracle[1]},
        "curve": [{"speedup": point.speedup, "accuracy": point.accuracy} for point in one.curve],
    }


def _steps(points: Curves) -> dict[str, Any]:
    return {
        "accuracy": {
            f"{speedup:g}": statistics.accuracy_at(points, speedup)
            for speedup in REQUESTED_SPEEDUPS
        },
        "auc": statistics.area(points),
    }


def write_comparison(comparison: Comparison, path: Path) -> None:
    text = json.dumps(comparison.as_dict(), indent=1, allow_nan=False)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--json {path}: {error.strerror}") from None


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Accuracy at each speed-up, the intervals, and what each exit is worth."""
    console.print(_accuracy_table(comparison))
    console.print(_interval_table(comparison))
    console.print(_layer_table(comparison))


def _accuracy_table(comparison: Comparison) -> Table:
    title = f"{comparison.rows} rows of {comparison.split}: accuracy at a speed-up (in layers)"
    table = Table(title=title, title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    table.add_column("policy")
    for speedup in REQUESTED_SPEEDUPS:
        table.add_column(f"{speedup:g}x", justify="right")
    table.add_column("area 1x-3x", justify="right")
    for one in comparison.checkpoints:
        marked = one.policy + "*" * (one.chosen_on == "compared rows")
        for name, policy, points in (
            (one.name, marked, one.curve),
            ("", "one layer for all", one.truncated),
        ):
            steps = _steps(step_curve(points))
            cells = [_number(value) for value in (*steps["accuracy"].values(), steps["auc"])]
            table.add_row(name, policy, *cells)
        speedup, accuracy = one.oracle
        table.add_row("", f"oracle at {speedup:.2f}x", f"{accuracy:.4f}", end_section=True)
    if any(one.chosen_on == "compared rows" for one in comparison.checkpoints):
        table.caption = "* chosen on these very rows"
    return table


def _interval_table(comparison: Comparison) -> Table:
    title = f"95 % intervals from {comparison.draws} bootstrap samples of the rows"
    table = Table(title=title, title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    for name in ("accuracy at 2x", "area 1x-3x", "to the first: at 2x", "area"):
        table.add_column(name, justify="right")
    for place, one in enumerate(comparison.checkpoints):
        sure = comparison.intervals[place]
        cells = [_spread(sure.at_two), _spread(sure.area)]
        if place:
            cells += [_spread(sure.at_two_difference, "+"), _spread(sure.area_difference, "+")]
        table.add_row(one.name, *cells)
    return table


def _layer_table(comparison: Comparison) -> Table:
    title = "each exit: accuracy if every row left there / AUROC of the signal"
    table = Table(title=title, title_justify="left")
    table.add_column("checkpoint", overflow="fold")
    layers = sorted({layer for one in comparison.checkpoints for layer in one.layers})
    for layer in layers:
        table.add_column(f"layer {layer}", justify="right")
    for one in comparison.checkpoints:
        cells = [
            f"{one.layers[layer]:.3f} / {_number(one.aurocs[layer], 3)}"
            if layer in one.layers
            else "-"
            for layer in layers
        ]
        table.add_row(one.name, *cells)
    return table


def _number(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _spread(figure: Figure, sign: str = "") -> str:
    if figure.value is None:
        return "-"
    return f"{figure.value:{sign}.4f} [{figure.low:{sign}.4f}, {figure.high:{sign}.4f}]"
