"""What a training step of each objective costs beside one of joint training, in one run.

    python training/bench/bench_objectives.py --data DIR/sst2 --json FILE

Every objective has its own model and optimiser and sees the same 1,280 rows, as 20 steps on 64
rows each (l2w as 10 batches of 128, two steps a batch, one of the ten with a lesson). They take
turns after every two steps, each time another one first, so that whatever else the machine does
hits all alike; the ratio is to joint's time in the same round. A step is loss, backward, clipping
and the optimiser's step. ConsistentEE is measured in its stage 2, the gates on cached states (the
pass that fills the cache is reported by the row), and in stage 3.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compare_objectives import HERE, Protocol

from offramp_model.tokenizer import TextTokenizer
from offramp_training.backbone import resolve_backbone
from offramp_training.batches import EncodedRows, bucketed_order
from offramp_training.config import Recipe, make_recipe, set_value
from offramp_training.data import sample
from offramp_training.fit import choose_rows
from offramp_training.model import build_model, load_tokenizer, save_tokenizer
from offramp_training.objectives import Progress, Stage
from offramp_training.optimiser import make_optimiser

ROWS, STEP_ROWS = 1280, 64
STEPS = ROWS // STEP_ROWS
BASELINE = "joint"
# What the cost of a step may be, as a multiple of joint's.
TARGETS = {"ensemble": 1.1, "cosee": 1.15, "l2w": 1.5, "consistentee stage 2": 0.3}


@dataclass
class Contender:
    """A stage with its own model and optimiser, and the batches it walks through."""

    name: str
    recipe: Recipe
    stage: Stage
    rows: EncodedRows
    order: list[list[int]]

    def __post_init__(self) -> None:
        self.optimiser = make_optimiser(self.stage, self.recipe.optimiser)
        self.stage.optimiser = self.optimiser
        self.parameters = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.stage.model.train()
        self.stage.begin_epoch(0)

    def two_steps(self, turn: int) -> float:
        """Seconds for the turn's 128 rows."""
        started, size = time.perf_counter(), 2 * STEP_ROWS // len(self.order[0])
        for number in range(turn * size, (turn + 1) * size):
            batch = self.rows.batch(self.order[number])
            progress = Progress(0, number * self.stage.steps_per_batch, 10_000, 1e-4)
            for loss in self.stage.losses(batch, progress):
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
                self.optimiser.step()
                self.stage.model.zero_grad(set_to_none=True)
        return time.perf_counter() - started


def contenders(data: str) -> tuple[list[Contender], float]:
    """All of them on the same rows; and the seconds a row costs in ConsistentEE's cached pass."""
    found: list[Contender] = []
    seconds = 0.0
    for objective in Protocol(HERE / "objectives.toml").table["compared"]:
        recipe = recipe_of(objective)
        chosen = choose_rows(recipe, data)
        backbone = resolve_backbone(recipe.model.backbone)
        model = build_model(backbone, recipe.model, chosen.train.label_names, 0)
        with tempfile.TemporaryDirectory() as directory:
            save_tokenizer(load_tokenizer(backbone, model), backbone, Path(directory))
            tokenizer = TextTokenizer(Path(directory) / "tokenizer.json", recipe.model.max_length)
            rows = EncodedRows.of(sample(chosen.train, ROWS, 0), tokenizer, model.pad_id)
        stages = recipe.objective.stages(model, recipe)

        def batches(rows: EncodedRows = rows) -> Any:
            return rows.in_order(64)

        if objective != "consistentee":
            stages[0].prepare(batches)
            found.append(Contender(objective, recipe, stages[0], rows, order(rows, recipe)))
            continue
        started = time.perf_counter()
        stages[1].prepare(batches)
        seconds = (time.perf_counter() - started) / ROWS
        for number in (1, 2):
            name = f"consistentee stage {number + 1}"
            found.append(Contender(name, recipe, stages[number], rows, order(rows, recipe, 64)))
    return found, seconds


def recipe_of(objective: str) -> Recipe:
    """The objective's first configuration on SST-2."""
    protocol = Protocol(HERE / "objectives.toml")
    name = protocol.configurations("sst2", objective)[0]
    table: dict[str, Any] = {}
    for key, value in protocol.run("sst2", objective, name, 0).settings.items():
        set_value(table, key, value)
    return make_recipe(table)


def order(rows: EncodedRows, recipe: Recipe, size: int | None = None) -> list[list[int]]:
    batch_size = size or recipe.loop.batch_size
    return bucketed_order(rows.lengths, batch_size=batch_size, seed=0, epoch=0)


def measure(found: list[Contender], rounds: int, say: Callable[[str], None]) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {one.name: [] for one in found}
    for number in range(rounds + 1):
        spent = dict.fromkeys(seconds, 0.0)
        for turn in range(STEPS // 2):
            first = (number + turn) % len(found)
            for one in found[first:] + found[:first]:
                spent[one.name] += one.two_steps(turn)
        for name in seconds if number else ():  # the first round warms up
            seconds[name].append(spent[name])
        say(f"round {number} of {rounds}")
    base = seconds[BASELINE]
    table = {}
    for name, own in seconds.items():
        ratios = sorted(mine / theirs for mine, theirs in zip(own, base, strict=True))
        table[name] = {
            "milliseconds per step": round(statistics.median(own) / STEPS * 1000, 2),
            "ratio": round(statistics.median(ratios), 4),
            "ratios": [round(ratio, 4) for ratio in ratios],
            "target": TARGETS.get(name),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found, cached = contenders(arguments.data)
    table = measure(found, arguments.rounds, print)
    content = {
        "command": f"bench_objectives.py --rounds {arguments.rounds}",
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "threads": torch.get_num_threads(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "steps per round": STEPS,
        "rows per step": STEP_ROWS,
        "cached pass, milliseconds per row": round(cached * 1000, 3),
        "objectives": table,
    }
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for name, one in table.items():
        print(f"{name:24s} {one['milliseconds per step']:8.1f} ms  x {one['ratio']:.3f}")


if __name__ == "__main__":
    main()
