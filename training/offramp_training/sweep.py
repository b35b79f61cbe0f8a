"""`offramp-train sweep`: one `fit` for each point of a grid over a recipe's keys, and their table.

A point is a checkpoint in a directory of its own, named for its values. The table beside them is
written anew after every point: what it calls done is not run again, and a point that was killed
goes on through `fit`'s own resume. Every point is checked before the first one starts; one that
fails later is recorded with its error and the others still run.

Points that differ only in what their objective's first stage does not know share that stage: the
first of them to come to its end leaves it in `.first-stages`, the others go on from there, and a
point ends with the same bits as alone. `max_minutes` counts a shared stage's seconds too, and a
stage that it cut short is not shared.

Figures are of each checkpoint's best policy (`Manifest.best_policy`, chosen on the rows it was
calibrated on), measured on the rows that `fit` reports on. Knows nothing about how a point is
trained. Not for two sweeps at once into one directory.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from offramp_model.checkpoint import BACKBONE, EXITS, load_checkpoint
from offramp_training.compare import step_curve
from offramp_training.errors import TrainingError
from offramp_training.evaluate import evaluate_checkpoint
from offramp_training.first_stage import FirstStage
from offramp_training.fit import (
    FitData,
    check_recipe,
    choose_rows,
    first_stage_identity,
    fit,
    is_finished,
    run_identity,
)
from offramp_training.grid import Point, make_points
from offramp_training.results import METRICS, SPEEDUPS, Configuration, Result, ResultTable, rank
from offramp_training.statistics import accuracy_at, area

FIRST_STAGES = ".first-stages"


def sweep(
    table: dict[str, Any],
    grid: dict[str, list[Any]],
    output: Path,
    *,
    data: str | None = None,
    metric: str = "accuracy_at_2",
    keep: Literal["all", "best"] = "all",
    say: Callable[[str], None] = lambda _: None,
) -> list[Configuration]:
    """Runs what is not done yet; returns the configurations, the best one first."""
    points = make_points(table, grid)
    identities = _check(points, data)
    results, first_stages = ResultTable(output), _first_stages(output, points, identities)
    for point, (identity, _) in zip(points, identities, strict=True):
        results.expect(point, identity)
    for number, point in enumerate(points, start=1):
        if results[point.name].state != "done":
            say(f"point {number} of {len(points)}: {point.name}")
            where = first_stages.get(point.name)
            _run(point, results, data, FirstStage(where, point.name) if where else None)
            say(_outcome(results[point.name], metric))
        if keep == "best":
            _delete_weights(rank(points, results, metric), results, metric)
        _delete_first_stages(first_stages, results)
    ranked = rank(points, results, metric)
    results.save(ranked)
    return ranked


def _check(points: Sequence[Point], data: str | None) -> list[tuple[str, str]]:
    """All that `fit` would refuse, found before any point runs; the identities of each point and
    of its first stage."""
    read: dict[str, FitData] = {}
    identities = []
    for point in points:
        loop = point.recipe.loop
        which = f"{point.recipe.data.model_dump_json()} {loop.seed} {loop.max_train_rows}"
        try:
            if which not in read:
                read[which] = choose_rows(point.recipe, data)
            recipe = check_recipe(point.recipe, read[which])
        except TrainingError as error:
            raise type(error)(f"point {point.name}: {error}") from None
        whole = run_identity(recipe, read[which])
        first_stage = first_stage_identity(recipe, read[which])
        identities.append((_hash(whole), _hash(first_stage)))
    return identities


def _first_stages(
    output: Path, points: Sequence[Point], identities: Sequence[tuple[str, str]]
) -> dict[str, Path]:
    """Where the end of a point's first stage is kept, for those that share it with another."""
    names = [first_stage for _, first_stage in identities]
    return {
        point.name: output / FIRST_STAGES / name[:16]
        for point, name in zip(points, names, strict=True)
        if names.count(name) > 1
    }


def _hash(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _run(
    point: Point, results: ResultTable, data: str | None, first_stage: FirstStage | None
) -> None:
    """One point, from the table's line that says it started to the one that says how it ended."""
    before = results[point.name]
    killed = before.state == "started"  # nobody stopped the clock
    started = before.model_copy(
        update={
            "state": "started",
            "attempts": before.attempts + 1,
            "all_seconds": before.all_seconds and not killed,
            "error": None,
        }
    )
    results.put(started)
    directory, start = results.directory / point.name, time.monotonic()
    end: dict[str, Any] = {"state": "waiting"}  # unless it comes to an end of its own
    try:
        if not is_finished(directory):
            try:
                fit(point.recipe, directory, data=data, first_stage=first_stage)
            finally:
                if first_stage is not None:
                    whose = first_stage.trained_by
                    whose = "own" if whose == point.name else whose
                    started = started.model_copy(update={"first_stage": whose})
                    results.put(started)
        end = {"state": "done", **_measure(point, directory, data)}
    except Exception as error:  # whatever a point dies of, the others are still worth running
        end = {"state": "failed", "error": _reason(error)}
    finally:
        seconds = started.seconds + time.monotonic() - start
        results.put(started.model_copy(update={**end, "seconds": round(seconds, 1)}))


def _measure(point: Point, directory: Path, data: str | None) -> dict[str, Any]:
    checkpoint = load_checkpoint(directory)
    rows = choose_rows(point.recipe, data).report
    policy = checkpoint.manifest.best_policy or checkpoint.manifest.exit_policy
    report = evaluate_checkpoint(checkpoint, rows, [policy])
    curve = step_curve(report.policies[policy].curve)
    figures = (report.full_accuracy, *(accuracy_at(curve, s) for s in SPEEDUPS), area(curve))
    metrics = dict(zip(METRICS, figures, strict=True))
    return {"split": rows.split, "rows": len(rows), "policy": policy, "metrics": metrics}


def _reason(error: Exception) -> str:
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return first if isinstance(error, TrainingError) else f"{type(error).__name__}: {first}"


def _outcome(result: Result, metric: str) -> str:
    if result.state == "failed":
        return f"failed: {result.error}"
    value = result.metrics[metric]
    return f"{metric} {'-' if value is None else f'{value:.4f}'} with {result.policy}"


def _delete_first_stages(first_stages: dict[str, Path], results: ResultTable) -> None:
    """Those that no unfinished point needs; with the last of them, what killed sweeps left."""
    needed = {where for name, where in first_stages.items() if results[name].state != "done"}
    for where in set(first_stages.values()) - needed:
        shutil.rmtree(where, ignore_errors=True)
    if not needed:
        shutil.rmtree(results.directory / FIRST_STAGES, ignore_errors=True)


def _delete_weights(ranked: list[Configuration], results: ResultTable, metric: str) -> None:
    """Of every configuration that is finished and not the best of those."""
    finished = [one for one in ranked if one.finished and one.mean(metric) is not None]
    for configuration in finished[1:]:
        for result in (one for one in configuration.done if one.weights):
            for file in (BACKBONE, EXITS):
                (results.directory / result.name / file).unlink(missing_ok=True)
            results.put(result.model_copy(update={"weights": False}))
