"""What a checkpoint is worth on labelled rows: per layer, per exit policy, and at best.

Every exit's logits are recorded once on the serving stack; curves come from them, and the points at
the requested speed-ups are replayed through the layer loop that serves. Knows nothing about
training and writes nothing but what it is asked to.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from offramp_model.calibrating import curve, layer_accuracies, measure_point, oracle
from offramp_model.calibration import CalibrationTable, CurvePoint, point_for, reachable_speedups
from offramp_model.checkpoint import Checkpoint, CheckpointError, update_manifest
from offramp_model.config import MultiExitConfig
from offramp_model.policies import (
    POLICIES,
    ExitPolicy,
    make_supported_policy,
    supported_policies,
)
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_training.data import Dataset
from offramp_training.errors import DataError, OutputError
from offramp_training.progress import rows_bar

HEADLINE_SPEEDUP = 2.0
"""Where policies and checkpoints are compared when one number must do; one of those reported."""

YARDSTICKS = ("full_depth", "fixed_layer")
"""What policies are measured against."""


def default_policies(model: MultiExitConfig) -> tuple[str, ...]:
    """The curves worth comparing, of those that the model supports: not full depth (one point) nor
    a fixed layer (the `layers` table)."""
    return tuple(name for name in supported_policies(model) if name not in YARDSTICKS)


@dataclass(frozen=True)
class PolicyReport:
    """One policy: the points at the reachable requested speed-ups, and its whole curve.

    `points` have the thresholds that these very rows ask for; `calibrated` those that the
    checkpoint's own table gives for a requested speed-up, which is what a request will get.
    `natural` is at the threshold that the exits were trained for, where there is one.
    """

    requested: tuple[float, ...]
    points: tuple[CurvePoint, ...]
    curve: tuple[CurvePoint, ...]
    calibrated: dict[float, CurvePoint]  # requested speed-up -> what came out
    natural: CurvePoint | None = None


@dataclass(frozen=True)
class Report:
    """`evaluate --json`, as Python values."""

    num_layers: int
    rows: int
    labels: tuple[str, ...]
    layers: dict[int, float]  # exit layer -> accuracy if every row left there
    policies: dict[str, PolicyReport]
    oracle_speedup: float
    oracle_accuracy: float

    @property
    def full_accuracy(self) -> float:
        """Of the model that never leaves early."""
        return self.layers[self.num_layers]

    def as_dict(self, *, with_curves: bool = True) -> dict[str, Any]:
        return {
            "num_layers": self.num_layers,
            "rows": self.rows,
            "labels": list(self.labels),
            "layers": [
                {"exit_layer": layer, "accuracy": accuracy}
                for layer, accuracy in self.layers.items()
            ],
            "policies": {
                name: {
                    "points": [_plain(point) for point in one.points],
                    "calibrated": [
                        {"requested": speedup, **_plain(point)}
                        for speedup, point in one.calibrated.items()
                    ],
                }
                | ({"natural": _plain(one.natural)} if one.natural else {})
                | ({"curve": [_plain(point) for point in one.curve]} if with_curves else {})
                for name, one in self.policies.items()
            },
            "oracle": {"speedup": self.oracle_speedup, "accuracy": self.oracle_accuracy},
        }


def evaluate_checkpoint(
    checkpoint: Checkpoint, dataset: Dataset, policies: Sequence[str] | None = None
) -> Report:
    """Records every exit on `dataset` and measures each policy, or those worth it."""
    manifest, chosen = checkpoint.manifest, policies or default_policies(checkpoint.model)
    check_policies(checkpoint, chosen)
    recorded = record_dataset(checkpoint, dataset)
    tables = {
        table.policy: table
        for table in manifest.calibration
        if (table.backend, table.dtype) == (checkpoint.backend, checkpoint.dtype)
    }
    natural = {}
    if manifest.exit_threshold is not None:
        natural[manifest.exit_policy] = manifest.exit_threshold
    made = [make_supported_policy(name, checkpoint.model) for name in chosen]
    return make_report(recorded, dataset, made, tables, natural)


def check_policies(checkpoint: Checkpoint, policies: Sequence[str]) -> None:
    """Whether the checkpoint has what each policy looks at, found out before any row runs."""
    for name in policies:
        try:
            make_supported_policy(name, checkpoint.model)
        except ValueError as error:
            raise CheckpointError(f"{checkpoint.directory}: {error}") from None


def record_dataset(
    checkpoint: Checkpoint, dataset: Dataset, dtype: str | None = None
) -> RecordedExits:
    """What every exit says on the stack that serves, in the checkpoint's own dtype by default."""
    if dataset.label_names != checkpoint.model.labels:
        raise DataError(
            f"the data's labels are {', '.join(dataset.label_names)}; "
            f"the checkpoint's are {', '.join(checkpoint.model.labels)}"
        )
    if dataset.problem_type != checkpoint.model.problem_type:
        raise DataError(
            f"the data's problem_type is {dataset.problem_type}; "
            f"the checkpoint's is {checkpoint.model.problem_type}"
        )
    if not dataset.rows:
        raise DataError(f"split {dataset.split!r} has no rows")
    encodings = checkpoint.tokenizer().encode(dataset.inputs)
    stack = checkpoint.any_stack(dtype)
    with rows_bar(f"{dataset.split}: rows through every exit", len(dataset)) as progress:
        return record_exits(stack, encodings, progress=progress)


def make_report(
    recorded: RecordedExits,
    dataset: Dataset,
    policies: Sequence[ExitPolicy],
    tables: Mapping[str, CalibrationTable],
    natural: Mapping[str, float] | None = None,
) -> Report:
    """All figures from recorded exits; no encoder runs here.

    `tables` and `natural`, thresholds that exits were trained for, are by policy.
    """
    labels = torch.tensor(dataset.labels)
    speedup, accuracy = oracle(recorded, labels)
    accuracies = layer_accuracies(recorded, labels)
    return Report(
        num_layers=recorded.num_layers,
        rows=len(dataset),
        labels=dataset.label_names,
        layers=dict(zip(recorded.exit_layers, accuracies, strict=True)),
        policies={
            policy.name: _measure_policy(
                recorded, labels, policy, tables.get(policy.name), (natural or {}).get(policy.name)
            )
            for policy in policies
        },
        oracle_speedup=speedup,
        oracle_accuracy=accuracy,
    )


def _measure_policy(
    recorded: RecordedExits,
    labels: torch.Tensor,
    policy: ExitPolicy,
    table: CalibrationTable | None,
    natural: float | None,
) -> PolicyReport:
    points = curve(recorded, labels, policy)
    requested = reachable_speedups(points)

    def replayed(threshold: float) -> CurvePoint:
        outcome = replay(recorded, policy, threshold)
        return measure_point(
            threshold,
            outcome.exit_layer,
            outcome.label,
            labels,
            recorded.num_layers,
            recorded.problem_type,
        )

    calibrated = {}
    if table is not None:
        for speedup in reachable_speedups(table.points):
            calibrated[speedup] = replayed(table.threshold_for(speedup))
    return PolicyReport(
        requested=requested,
        points=tuple(replayed(point_for(points, speedup).threshold) for speedup in requested),
        curve=points,
        calibrated=calibrated,
        natural=None if natural is None else replayed(natural),
    )


def best_policy(curves: Mapping[str, Sequence[CurvePoint]], natural: str) -> str | None:
    """The policy with the highest accuracy at speed-up 2, of curves over the same rows.

    None where no curve gets that far. Full depth and a fixed layer are what policies are measured
    against and do not compete. Of equals the objective's natural policy is the best, else the one
    that `POLICIES` lists first.
    """
    reaching = {
        name: point_for(tuple(curves[name]), HEADLINE_SPEEDUP).accuracy
        for name in POLICIES
        if name not in YARDSTICKS
        and name in curves
        and HEADLINE_SPEEDUP in reachable_speedups(curves[name])
    }
    if not reaching:
        return None
    return max(reaching, key=lambda name: (reaching[name], name == natural))


def store_report(checkpoint: Checkpoint, report: Report, split: str) -> None:
    """Keeps the figures (not the curves: those are calibration's) in the manifest, draws
    `curve.png` and writes the model card around them."""
    from offramp_training.card import model_card
    from offramp_training.plot import plot_report  # matplotlib is slow to import

    directory, manifest = checkpoint.directory, checkpoint.manifest
    evaluation = {"split": split, **report.as_dict(with_curves=False)}
    manifest = manifest.model_copy(update={"evaluation": evaluation})
    title, card = f"{manifest.data.name}, {split}", model_card(manifest)
    update_manifest(directory, manifest)
    _replace(directory / "curve.png", lambda part: plot_report(report, part, title=title))
    _replace(directory / "README.md", lambda part: part.write_text(card, encoding="utf-8"))


def _replace(path: Path, write: Callable[[Path], object]) -> None:
    """Whoever reads `path` meanwhile finds the old file or the new one, never a part."""
    part = path.with_name(f".{path.name}")
    write(part)
    part.replace(path)


def write_json(report: Report, path: Path) -> None:
    text = json.dumps(report.as_dict(), indent=1)
    try:
        path.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"--json {path}: {error.strerror}") from None


def print_report(report: Report, console: Console) -> None:
    """Two tables: accuracy by exit layer, and accuracy at the requested speed-ups."""
    layers = Table(title=f"{report.rows} rows: accuracy if every row left at one layer")
    layers.add_column("exit layer", justify="right")
    layers.add_column("speed-up", justify="right")
    layers.add_column("accuracy", justify="right")
    for layer, accuracy in report.layers.items():
        layers.add_row(str(layer), f"{report.num_layers / layer:.2f}", f"{accuracy:.4f}")
    console.print(layers)

    requested = max((one.requested for one in report.policies.values()), key=len, default=())
    points = Table(title="accuracy at a requested speed-up (in layers)")
    points.add_column("policy")
    for speedup in requested:
        points.add_column(f"{speedup:g}x", justify="right")
    for name, one in report.policies.items():
        points.add_row(name, *(f"{point.accuracy:.4f}" for point in one.points))
    points.add_section()
    points.add_row("oracle", f"{report.oracle_accuracy:.4f} at {report.oracle_speedup:.2f}x")
    console.print(points)

    served = Table(title="accuracy and achieved speed-up with the calibrated thresholds")
    served.add_column("policy")
    for speedup in requested:
        served.add_column(f"{speedup:g}x", justify="right")
    for name, one in report.policies.items():
        cells = (f"{p.accuracy:.4f} at {p.speedup:.2f}x" for p in one.calibrated.values())
        served.add_row(name, *list(cells)[: len(requested)])
    if any(one.calibrated for one in report.policies.values()):
        console.print(served)
    for name, one in report.policies.items():
        if one.natural is not None:
            console.print(
                f"{name} at the threshold it was trained for, {one.natural.threshold:g}: accuracy "
                f"{one.natural.accuracy:.4f} at {one.natural.speedup:.2f}x"
            )


def _plain(point: CurvePoint) -> dict[str, Any]:
    """JSON values; an infinite threshold becomes a string, since JSON has no infinity."""
    values: dict[str, Any] = json.loads(point.model_dump_json())
    return values
