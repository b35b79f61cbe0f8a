"""What `test_two_processes` has launched: several runs, one after the other, in each process.

Started without a launcher the same runs are those of one process. Each process leaves what it ends
with in `DIRECTORY/kept/RUN/RANK`. Runs come as JSON: name -> recipe table.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from offramp_training import fit as fitting
from offramp_training.__main__ import main
from offramp_training.batches import Batch
from offramp_training.config import make_recipe
from offramp_training.errors import TrainingError
from offramp_training.loop import Run, exit_accuracies
from offramp_training.objectives import Progress
from offramp_training.objectives.joint import JointStage
from offramp_training.resume import save_tree

TRAIN, CLIP = fitting.train, Run.clip


class Killed(Exception):
    pass


def keep(directory: Path, name: str) -> None:
    """Has `fit` keep a run's weights, what its stages remember, the seed of its draws, each step's
    loss and the gradients' norm. The norm, because Adam hides a wrong scale."""
    steps: list[list[float]] = []

    def clip(run: Run) -> None:
        gradients = [p.grad for p in run.parameters if p.grad is not None]
        steps.append([run.loss, float(torch.nn.utils.get_total_norm(gradients))])
        CLIP(run)

    def train(run: Run) -> Any:
        seed = torch.initial_seed()
        model = TRAIN(run)
        place = directory / "kept" / name / str(run.processes.rank)
        place.mkdir(parents=True)
        state = {
            "weights": model.state_dict(),
            "stages": [stage.state_dict() for stage in run.stages],
            "accuracies": exit_accuracies(model, run.held_out, run.processes),
            "steps": steps,
            "position": run.position.steps,
            "seed": seed,
        }
        save_tree(place, state)
        return model

    Run.clip, fitting.train = clip, train  # type: ignore[method-assign]


def run_all(runs: dict[str, dict[str, Any]], data: str, directory: Path) -> None:
    for name, table in runs.items():
        keep(directory, name)
        fitting.fit(make_recipe(table), directory / name, data=data, calibrate=False)


def run_killed(table: dict[str, Any], data: str, directory: Path) -> None:
    """One run that is killed in its second epoch and goes on."""
    original, seen = JointStage.losses, 0

    def losses(self: JointStage, batch: Batch, progress: Progress) -> Any:
        nonlocal seen
        seen += 1
        if seen == 8:
            raise Killed
        return original(self, batch, progress)

    JointStage.losses = losses  # type: ignore[method-assign]
    try:
        run_all({"killed": table}, data, directory)
    except Killed:
        run_all({"killed": table}, data, directory)


def refuse(table: dict[str, Any], data: str, directory: Path) -> str:
    """Rows that are missing in the last process only; what this one says to that."""
    is_last = os.environ["RANK"] == "1"
    try:
        fitting.fit(make_recipe(table), directory / "x", data="/nowhere" if is_last else data)
    except TrainingError as error:
        return str(error)
    return "nothing"


if __name__ == "__main__":
    directory, data = Path(sys.argv[1]), sys.argv[2]
    runs = json.loads((directory / "runs.json").read_text())
    run_all(runs, data, directory)
    run_killed(runs["dropout"], data, directory)
    complaint = refuse(runs["dropout"], data, directory)
    (directory / f"refused-{os.environ['RANK']}").write_text(complaint)
    (directory / "broken.toml").write_text("[loop]\nepochs = 0\n")
    arguments = ["fit", str(directory / "broken.toml"), "--output", str(directory / "y")]
    (directory / f"status-{os.environ['RANK']}").write_text(str(main(arguments)))
