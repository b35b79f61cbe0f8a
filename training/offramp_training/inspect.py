"""`offramp-train inspect`: what a checkpoint is, on one screen. Reads; never writes or runs it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from offramp_model.checkpoint import Checkpoint, GraphRecord, Manifest, load_checkpoint
from offramp_model.config import MultiExitConfig
from offramp_training.config import DistillationSection


def inspect_checkpoint(directory: Path, console: Console) -> None:
    """Loads with every check (hashes among them) and prints what is there."""
    checkpoint = load_checkpoint(directory)
    _print_facts(checkpoint, console)
    _print_settings(checkpoint, console)
    _print_tables(checkpoint, console)


def _print_facts(checkpoint: Checkpoint, console: Console) -> None:
    manifest, model = checkpoint.manifest, checkpoint.model
    facts = Table(show_header=False, box=None)
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    labels = ", ".join(model.labels[:10]) + (", ..." if model.num_labels > 10 else "")
    data, recipe = manifest.data, manifest.objective.parameters
    distilled = DistillationSection.model_validate(recipe.get("distillation", {})).in_words
    for name, value in (
        ("checkpoint", f"{checkpoint.directory.name}, weights {checkpoint.version}"),
        ("hashes", "ok: " + ", ".join(sorted(manifest.sha256))),
        ("backbone", f"{checkpoint.backbone.get('model_type')}, {model.num_layers} layers, "
                     f"{model.hidden_size} wide, {model.max_length} tokens at most"),
        *([("graphs", _graphs(manifest.graphs))] if manifest.graphs else []),
        ("exits", "after layers " + ", ".join(map(str, model.exit_layers))),
        ("heads", f"pooling {model.pooling_form}, pooler {model.pooler}, {_gates(model)}"),
        ("labels", f"{model.num_labels}: {labels}"),
        ("problem type", model.problem_type),
        ("objective", _objective(manifest)),
        *([("distilled from", distilled)] if distilled else []),
        ("exit policy", manifest.exit_policy),
        ("best at 2x", manifest.best_policy or "unknown: not calibrated, or none gets that far"),
        ("data", f"{data.name}: {data.train_rows} training rows, {data.held_out_rows} held out"),
        ("seed", str(manifest.seed)),
        ("versions", ", ".join(f"{name} {v}" for name, v in manifest.versions.items())),
    ):  # fmt: skip
        facts.add_row(name, value)
    console.print(facts)


def _objective(manifest: Manifest) -> str:
    objective = manifest.objective
    missing = ", ".join(objective.untrained_stages)
    return objective.name + (f"; not trained for want of time: {missing}" if missing else "")


def _graphs(graphs: GraphRecord) -> str:
    words = f"ONNX, {graphs.dtype}, of weights {graphs.source}"
    if (flips := graphs.flips) is None:
        return words
    exits = "" if flips.exit_flips is None else f", {flips.exit_flips:.2%} leave elsewhere at 2x"
    return (
        f"{words}; on {flips.rows} held-out rows accuracy {flips.accuracy:.4f} against "
        f"{flips.source_accuracy:.4f}, {flips.label_flips:.2%} of labels flip{exits}"
    )


def _gates(model: MultiExitConfig) -> str:
    if not model.has_gates:
        return "no gates"
    return f"gates {model.gate_hidden} wide" if model.gate_hidden else "linear gates"


def _print_settings(checkpoint: Checkpoint, console: Console) -> None:
    settings = Table(title="recipe", show_header=False, box=None, title_justify="left")
    settings.add_column()
    settings.add_column(overflow="fold")
    for key, value in _flat(checkpoint.manifest.objective.parameters):
        settings.add_row(key, str(value))
    console.print(settings)


def _print_tables(checkpoint: Checkpoint, console: Console) -> None:
    if not checkpoint.manifest.calibration:
        console.print("not calibrated: offramp-train calibrate makes the tables that serving needs")
        return
    tables = Table(title="calibration", title_justify="left")
    for column in (
        "policy",
        "backend",
        "dtype",
        "split",
        "rows",
        "points",
        "speed-ups",
        "accuracy",
    ):
        tables.add_column(column)
    for table in checkpoint.manifest.calibration:
        first, last = table.points[0], table.points[-1]
        tables.add_row(
            table.policy,
            table.backend,
            table.dtype,
            table.split,
            str(table.rows),
            str(len(table.points)),
            f"1-{last.speedup:.2f}",
            f"{first.accuracy:.3f}-{last.accuracy:.3f}",
        )
    console.print(tables)


def _flat(table: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for key, value in table.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{key}.")
        else:
            rows.append((prefix + key, value))
    return rows
