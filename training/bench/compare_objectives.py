"""The comparison of the training objectives: runs what `objectives.toml` asks for, once each.

    python training/bench/compare_objectives.py --data DIR [--only sst2/joint] [--workers 2]

First every configuration with the first seed, then, for each data set and objective, the winner
with the other seeds. A run is one `fit` and one measurement, kept as a small JSON file under
`--results`; whatever has one is not run again, and a run that was killed goes on where it stood.
The checkpoints stay under `--work` and are not needed again. `objectives_report.py` makes tables
and plots of the JSON. Knows no objective by name: what is particular stands in the TOML file.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from offramp_model.calibrating import curve, layer_accuracies, oracle, trace
from offramp_model.calibration import CurvePoint
from offramp_model.checkpoint import Checkpoint, load_checkpoint
from offramp_model.policies import make_supported_policy
from offramp_training.compare import signal_aurocs, step_curve
from offramp_training.config import Recipe, make_recipe, set_value
from offramp_training.data import Dataset, load_split
from offramp_training.evaluate import default_policies, record_dataset
from offramp_training.first_stage import FirstStage
from offramp_training.fit import FitData, choose_rows, first_stage_identity, fit, is_finished
from offramp_training.statistics import accuracy_at, area
from offramp_training.teacher import open_teacher

HERE = Path(__file__).parent
TEACHER = "distillation.teacher"
SPEEDUPS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
Settings = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run of the protocol."""

    data_set: str
    objective: str
    configuration: str
    seed: int
    settings: Settings  # dotted keys of a recipe
    data: str  # directory of the rows
    report: str  # the split whose figures are reported

    @property
    def name(self) -> str:
        return f"{self.data_set}/{self.objective}-{self.configuration}-s{self.seed}"

    @property
    def directory(self) -> str:
        """Of its checkpoint: other settings, another directory."""
        return f"{self.name}-{_hash(self.settings)[:8]}"

    @property
    def first_stage(self) -> str:
        """The same for runs whose first stage is the same, as far as settings tell."""
        ignored = [f"objective.{key}" for key in self.recipe().objective.not_in_first_stage]
        known = {key: value for key, value in self.settings.items() if key not in ignored}
        return _hash([self.data_set, known])

    @property
    def teacher(self) -> list[Any] | None:
        """The run that is this one's teacher, where it has one: as `Protocol.run` names it."""
        found: list[Any] | None = self.settings.get(TEACHER)
        return found

    def recipe(self, teacher: Path = Path("teacher")) -> Recipe:
        """With the directory of its teacher, where it has one."""
        table: dict[str, Any] = {}
        for key, value in self.settings.items():
            set_value(table, key, str(teacher) if key == TEACHER else value)
        return make_recipe(table)


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Protocol:
    """`objectives.toml`, unfolded."""

    def __init__(self, path: Path) -> None:
        self.table = tomllib.loads(path.read_text(encoding="utf-8"))

    def contests(self) -> Iterator[tuple[str, str]]:
        """Data set and objective: what has one winner."""
        for data_set, of_set in self.table["sets"].items():
            for objective in of_set.get("only", self.table["compared"]):
                yield data_set, objective

    def seeds(self, data_set: str) -> list[int]:
        """The first is the one that configurations compete with."""
        found: list[int] = self.table["sets"][data_set].get("seeds", self.table["seeds"])
        return found

    def every_seed(self, data_set: str) -> bool:
        """Do all configurations run with all seeds, not only the winner?"""
        return bool(self.table["sets"][data_set].get("every_seed", False))

    def configurations(self, data_set: str, objective: str) -> list[str]:
        """Names, in the order in which they are run."""
        wanted = self.table["sets"][data_set].get("only", {}).get(objective)
        return [
            one["name"]
            for one in self.table["objectives"][objective]["configurations"]
            if data_set in one.get("sets", (data_set,)) and (not wanted or one["name"] in wanted)
        ]

    def run(self, data_set: str, objective: str, configuration: str, seed: int) -> Run:
        of_set, of_objective = self.table["sets"][data_set], self.table["objectives"][objective]
        chosen = next(one for one in of_objective["configurations"] if one["name"] == configuration)
        settings = {
            **self.table["common"],
            **of_set["settings"],
            "objective.name": of_objective.get("name", objective),
            **of_objective.get("settings", {}),
            **of_set.get(objective, {}),
            **chosen.get("settings", {}),
            "loop.seed": seed,
        }
        data = of_set.get("data", data_set)
        return Run(data_set, objective, configuration, seed, settings, data, of_set["report"])


class Results:
    """The JSON files of the runs that are done."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def path(self, run: Run) -> Path:
        return self.directory / f"{run.name}.json"

    def read(self, run: Run) -> dict[str, Any] | None:
        """None unless this very run is done: one with other settings is another run."""
        if not self.path(run).exists():
            return None
        content: dict[str, Any] = json.loads(self.path(run).read_text(encoding="utf-8"))
        return content if content["settings"] == run.settings else None

    def write(self, run: Run, content: Mapping[str, Any]) -> None:
        path = self.path(run)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        part.replace(path)

    def winner(self, protocol: Protocol, data_set: str, objective: str) -> str | None:
        """The configuration with the largest area on calibration rows; None until all are done."""
        areas = {}
        for name in protocol.configurations(data_set, objective):
            done = self.read(protocol.run(data_set, objective, name, protocol.seeds(data_set)[0]))
            if done is None:
                return None
            areas[name] = chosen_area(done["selection"])
        return max(areas, key=lambda name: areas[name])


def chosen_area(figures: Mapping[str, Any]) -> float:
    """The area under the curve of the policy that speaks for the run; none counts as nothing."""
    found = figures["policies"][figures["policy"]]["auc"]
    return 0.0 if found is None else float(found)


# ---- which run comes next ------------------------------------------------------------------------


def pending(protocol: Protocol, results: Results, only: Sequence[str]) -> Iterator[Run]:
    """What can be run now and is not done: first configurations first, other seeds last."""
    contests = [
        contest
        for contest in protocol.contests()
        if not only or contest[0] in only or "/".join(contest) in only
    ]
    lists = [protocol.configurations(*contest) for contest in contests]
    for place in range(max(map(len, lists), default=0)):
        for contest, names in zip(contests, lists, strict=True):
            if place < len(names):
                run = protocol.run(*contest, names[place], protocol.seeds(contest[0])[0])
                if results.read(run) is None:
                    yield run
    for contest in contests:
        winner = results.winner(protocol, *contest)
        if winner is None:
            continue
        every = protocol.every_seed(contest[0])
        for name in protocol.configurations(*contest) if every else [winner]:
            for seed in protocol.seeds(contest[0])[1:]:
                run = protocol.run(*contest, name, seed)
                if results.read(run) is None:
                    yield run


def run_all(arguments: argparse.Namespace) -> None:
    """Keeps the workers busy until nothing is left that has not been tried."""
    protocol, results = Protocol(HERE / "objectives.toml"), Results(arguments.results)
    taken: set[str] = set()
    running: list[str] = []  # first stages: two runs must not train the same one
    lock = threading.Lock()

    def may_start(run: Run) -> bool:
        waits = run.teacher and results.read(protocol.run(*run.teacher)) is None
        return run.name not in taken and run.first_stage not in running and not waits

    def take() -> Run | None:
        with lock:
            free = pending(protocol, results, arguments.only)
            run = next((one for one in free if may_start(one)), None)
            if run is not None:
                taken.add(run.name)
                running.append(run.first_stage)
            return run

    def work() -> None:
        while (run := take()) is not None:
            started = time.monotonic()
            code = subprocess.call(command(arguments, run), env=environment(arguments.threads))
            running.remove(run.first_stage)
            outcome = "done" if code == 0 else f"failed with {code}"
            print(f"{run.name}: {outcome} in {time.monotonic() - started:.0f} s", flush=True)

    with ThreadPoolExecutor(arguments.workers) as pool:
        for future in [pool.submit(work) for _ in range(arguments.workers)]:
            future.result()


def command(arguments: argparse.Namespace, run: Run) -> list[str]:
    """This script again, for one run: a process of its own has its own threads and memory."""
    one = json.dumps([run.data_set, run.objective, run.configuration, run.seed])
    paths = {"--data": arguments.data, "--results": arguments.results, "--work": arguments.work}
    options = [text for key, path in paths.items() for text in (key, str(path))]
    return [sys.executable, __file__, *options, "--run", one]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


# ---- one run -------------------------------------------------------------------------------------


def run_one(arguments: argparse.Namespace) -> None:
    """Trains unless that is done, measures, writes the JSON."""
    protocol, results = Protocol(HERE / "objectives.toml"), Results(arguments.results)
    run = protocol.run(*json.loads(arguments.run))
    recipe = run.recipe() if run.teacher is None else run.recipe(teacher(protocol, run, arguments))
    data, output = str(arguments.data / run.data), arguments.work / run.directory
    rows, started = choose_rows(recipe, data), time.monotonic()
    shared = shared_first_stage(arguments.work, run, recipe, rows)
    if not is_finished(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        fit(recipe, output, data=data, first_stage=shared)
    seconds, checkpoint = time.monotonic() - started, load_checkpoint(output)
    policy = checkpoint.manifest.best_policy or checkpoint.manifest.exit_policy
    reported = load_split(data, run.report)
    results.write(
        run,
        {
            "run": run.name,
            "settings": run.settings,
            "seconds": round(seconds, 1),  # of the last attempt, and without a shared first stage
            "first_stage": "own" if shared is None else shared.trained_by,
            "selection": {"policy": policy, **figures(checkpoint, rows.held_out)},
            "report": {"policy": policy, **figures(checkpoint, reported, policy)},
            "machine": f"{os.cpu_count()} cores, {platform.machine()}",
            "threads": torch.get_num_threads(),
            "versions": {name: version(name) for name in ("offramp", "torch", "transformers")},
        },
    )


def teacher(protocol: Protocol, run: Run, arguments: argparse.Namespace) -> Path:
    """The checkpoint of the run's teacher."""
    assert run.teacher is not None
    directory: Path = arguments.work / protocol.run(*run.teacher).directory
    if not is_finished(directory):
        raise SystemExit(f"{run.name}: its teacher is measured, but {directory} is gone: delete "
                         "the teacher's JSON file to train it again")  # fmt: skip
    return directory


def shared_first_stage(work: Path, run: Run, recipe: Recipe, rows: FitData) -> FirstStage | None:
    """Where runs leave a first stage for each other, if there is one that options do not touch: one
    alpha's is all alphas'."""
    if not recipe.objective.not_in_first_stage:
        return None
    pinned, _ = open_teacher(recipe, rows.train.label_names, rows.train.problem_type)
    name = _hash(first_stage_identity(pinned, rows))
    return FirstStage(work / "first-stages" / name[:16], run.name)


def figures(checkpoint: Checkpoint, rows: Dataset, curve_of: str | None = None) -> dict[str, Any]:
    """Accuracy by layer, by policy and speed-up, and the area; the whole curve of one policy."""
    recorded, labels = record_dataset(checkpoint, rows), torch.tensor(rows.labels)
    curves = {
        name: curve(recorded, labels, make_supported_policy(name, checkpoint.model))
        for name in (*default_policies(checkpoint.model), "fixed_layer")
    }
    found: dict[str, Any] = {
        "split": rows.split,
        "rows": len(rows),
        "layers": layer_accuracies(recorded, labels),
        "policies": {name: _steps(points) for name, points in curves.items()},
        "oracle": dict(zip(("speedup", "accuracy"), oracle(recorded, labels), strict=True)),
    }
    if curve_of is not None:
        found["aurocs"] = signal_aurocs(
            trace(recorded, make_supported_policy(curve_of, checkpoint.model)), labels
        )
        found["curve"] = _thinned(curves[curve_of])
    return found


def _steps(points: Sequence[CurvePoint]) -> dict[str, Any]:
    steps = step_curve(points)
    at = {f"{speedup:g}": accuracy_at(steps, speedup) for speedup in SPEEDUPS}
    return {"at": at, "auc": area(steps)}


def _thinned(points: Sequence[CurvePoint]) -> list[list[float]]:
    """For a plot: at most one point for each hundredth of a speed-up."""
    kept = {round(point.speedup, 2): [point.speedup, point.accuracy] for point in points}
    return [[round(value, 5) for value in pair] for pair in kept.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="directory of the data sets")
    parser.add_argument("--results", type=Path, default=Path("docs/results/objectives"))
    parser.add_argument("--work", type=Path, default=Path("checkpoints/objectives"))
    parser.add_argument("--only", action="append", default=[], metavar="SET[/OBJECTIVE]")
    parser.add_argument("--workers", type=int, default=2, help="runs at a time")
    parser.add_argument("--threads", type=int, default=1, help="threads of each")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    run_one(arguments) if arguments.run else run_all(arguments)


if __name__ == "__main__":
    main()
