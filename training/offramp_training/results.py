"""The table of a sweep: what came of each point, kept in `sweep.json`, and the ranking of it.

A *configuration* is a point without its seed; configurations are ranked by the mean over their
seeds. Knows nothing about how a point is run or measured.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table

from offramp_model.checkpoint import MANIFEST
from offramp_training.errors import OutputError
from offramp_training.grid import Point, Settings, value_text

TABLE = "sweep.json"
SPEEDUPS = (1.5, 2.0, 3.0)
METRICS = ("full_depth", *(f"accuracy_at_{speedup:g}" for speedup in SPEEDUPS), "auc")
SHARED = "*"  # seconds without a first stage that another point trained

Metrics = dict[str, float | None]  # None: the checkpoint's best policy does not get that far


class Result(BaseModel):
    """A line of the table: what is known of a point. `identity` is of its recipe and rows."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    settings: Settings
    identity: str
    state: Literal["waiting", "started", "done", "failed"] = "waiting"
    attempts: int = 0
    seconds: float = 0.0  # of training, calibration and evaluation, in attempts that came to an end
    all_seconds: bool = True  # false: an attempt was killed, and its seconds are not known
    # "own", or the point that trained it: then `seconds` are without it.
    first_stage: str = "own"
    error: str | None = None
    weights: bool = True  # false: deleted, since another configuration is better
    split: str | None = None
    rows: int | None = None
    policy: str | None = None
    metrics: Metrics = {}


@dataclass(frozen=True)
class Configuration:
    """What the seeds of one configuration have in common."""

    settings: Settings
    results: tuple[Result, ...]  # one for each seed, in the grid's order

    @property
    def done(self) -> tuple[Result, ...]:
        return tuple(one for one in self.results if one.state == "done")

    @property
    def finished(self) -> bool:
        return all(one.state in ("done", "failed") for one in self.results)

    def values(self, metric: str) -> list[float]:
        """Of the seeds that are done; empty unless all of those have one."""
        values = [one.metrics[metric] for one in self.done]
        known = [value for value in values if value is not None]
        return known if len(known) == len(values) else []

    def mean(self, metric: str) -> float | None:
        values = self.values(metric)
        return statistics.fmean(values) if values else None


class ResultTable:
    """`sweep.json`: a line for each point that was ever wanted in this directory."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.path = directory, directory / TABLE
        self._lines: dict[str, Result] = self._read()

    def __getitem__(self, name: str) -> Result:
        return self._lines[name]

    def expect(self, point: Point, identity: str) -> None:
        """A line for a point; one that is there must be of the same run."""
        line = self._lines.get(point.name)
        if line is None and (self.directory / point.name / MANIFEST).exists():
            raise OutputError(
                f"{self.directory / point.name} is a checkpoint that {self.path} does not know; "
                "allowed: another --output"
            )
        if line is not None and line.identity != identity:
            raise OutputError(
                f"{self.path}: {point.name} was run with another recipe or other rows; "
                "allowed: the same ones, or another --output"
            )
        if line is None:
            line = Result(name=point.name, settings=point.settings, identity=identity)
            self._lines[point.name] = line

    def put(self, line: Result) -> None:
        self._lines[line.name] = line
        self.save()

    def save(self, ranked: Sequence[Configuration] = ()) -> None:
        """Written at once; with the ranking, once there is one."""
        content = {
            "points": [line.model_dump(mode="json") for line in self._lines.values()],
            "configurations": [_summary(one) for one in ranked],
        }
        part = self.path.with_name(f".{TABLE}")
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
            part.replace(self.path)
        except OSError as error:
            raise OutputError(f"{self.path}: {error.strerror}") from None

    def _read(self) -> dict[str, Result]:
        if not self.path.exists():
            return {}
        try:
            content = json.loads(self.path.read_text(encoding="utf-8"))
            lines = [Result.model_validate(line) for line in content["points"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = str(error).splitlines()[0]
            raise OutputError(f"{self.path} is not a table of results: {what}") from None
        return {line.name: line for line in lines}


def _summary(one: Configuration) -> dict[str, Any]:
    return {
        "settings": one.settings,
        "points": [result.name for result in one.results],
        "done": len(one.done),
        "metrics": {
            metric: {"mean": one.mean(metric), "deviation": _deviation(one.values(metric))}
            for metric in METRICS
        },
    }


def _deviation(values: Sequence[float]) -> float | None:
    """Over seeds; None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def print_sweep(ranked: Sequence[Configuration], metric: str, console: Console) -> None:
    """One line for each configuration, the best first."""
    table = Table(title=f"by {metric}, best policy of each point", title_justify="left")
    table.add_column("configuration", overflow="fold")
    table.add_column("policy")
    for name in METRICS:
        table.add_column(name.replace("accuracy_at_", "at ") + "x" * name[-1].isdecimal(),
                         justify="right")  # fmt: skip
    table.add_column("seconds", justify="right")
    table.add_column("done")
    for one in ranked:
        lines = [f"{key} = {value_text(value)}" for key, value in one.settings.items()]
        table.add_row("\n".join(lines) or "the recipe", *_cells(one))
    console.print(table)
    results = [result for one in ranked for result in one.results]
    if any(result.first_stage != "own" for result in results):
        console.print(f"{SHARED} seconds without the first stage, which another point trained:")
        for result in results:
            if result.first_stage != "own":
                console.print(f"{result.name}: {result.first_stage}")
    for one in ranked:
        for result in one.results:
            if result.state == "failed":
                console.print(f"failed: {result.name}: {result.error}")
            elif not result.weights:
                console.print(f"weights deleted: {result.name}")


def _cells(one: Configuration) -> Iterator[str]:
    yield "\n".join(dict.fromkeys(result.policy or "-" for result in one.done)) or "-"
    for metric in METRICS:
        deviation = _deviation(one.values(metric))
        spread = "" if deviation is None else f"\n±{deviation:.4f}"
        yield _number(one.mean(metric)) + spread
    whole = all(result.all_seconds for result in one.results)
    shared = any(result.first_stage != "own" for result in one.results)
    seconds = sum(result.seconds for result in one.results)
    yield f"{'' if whole else '>'}{seconds:.0f}{SHARED if shared else ''}"
    yield f"{len(one.done)}/{len(one.results)}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def rank(points: Sequence[Point], results: ResultTable, metric: str) -> list[Configuration]:
    """Configurations by their mean over seeds, those without one at the end."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(value_text(point.configuration), []).append(point)
    ranked = [
        Configuration(group[0].configuration, tuple(results[point.name] for point in group))
        for group in groups.values()
    ]

    def key(one: Configuration) -> float:
        mean = one.mean(metric)
        return float("-inf") if mean is None else mean

    return sorted(ranked, key=key, reverse=True)
