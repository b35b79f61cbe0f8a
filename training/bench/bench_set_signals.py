"""Which signal of a set of labels is worth leaving by: that of the least certain label, or of all?

Rows are made of a single-label data set: one to four of its texts joined, whose labels are the set.
A model is trained on them as a recipe says, and the candidates are measured on the test rows as
evaluation does it: accuracy (the whole set is right) at requested speed-ups, and the area under the
curve.

    python training/bench/bench_set_signals.py RECIPE --data DIR --output DIR [--rows N] [options]

On 800 rows of joined SNIPS texts (`--rows 1600 --set model.freeze_embeddings=true --set
optimiser.lr=3e-4 --set optimiser.head_lr=3e-3` with the SNIPS recipe: one short epoch, 0.585 of the
sets right at full depth), accuracy at speed-ups 1.5, 2 and 3, and the area:

    mean entropy                             0.560  0.495  0.331  0.481
    least certain label, largest entropy     0.544  0.468  0.376  0.476  (they order texts alike)
    chance that all are right                0.555  0.483  0.339  0.479
    patience                                 0.453  0.453  0.199  0.347

Writes the rows and the checkpoint to --output; a checkpoint that is there already is used.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from offramp_model.calibrating import curve
from offramp_model.calibration import point_for, reachable_speedups
from offramp_model.checkpoint import load_checkpoint
from offramp_model.labels import label_set
from offramp_model.policies import Direction, ExitPolicy, SignalPolicy, make_supported_policy
from offramp_model.recorded import RecordedExits
from offramp_model.signals import least_certain, mean_binary_entropy
from offramp_training.config import read_recipe
from offramp_training.data import Dataset, load_split, load_splits
from offramp_training.evaluate import record_dataset
from offramp_training.fit import fit
from offramp_training.statistics import Curves, area

MOST_JOINED = 4
SPLIT_SHARE = {"train": 1.0, "validation": 0.15, "test": 0.5}  # of --rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--set", action="append", default=[], dest="overrides")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows, made = options.output / "rows", options.output / "checkpoint"
    if not made.exists():
        write_rows(load_splits(options.data), rows, options.rows)
        fit(read_recipe(options.recipe, options.overrides), made, data=str(rows))
    checkpoint, test = load_checkpoint(made), load_split(str(rows), "test")
    recorded = record_dataset(checkpoint, test)
    found = {
        policy.name: measure(recorded, torch.tensor(test.labels), policy)
        for policy in (*candidates(), make_supported_policy("patience", checkpoint.model))
    }
    for name, one in found.items():
        print(f"{name:30} {one}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def write_rows(splits: dict[str, Dataset], directory: Path, count: int) -> None:
    """Joined texts of each split; a text of one split is in no other."""
    directory.mkdir(parents=True, exist_ok=True)
    for split, share in SPLIT_SHARE.items():
        lines = (json.dumps(row) for row in joined(splits[split], int(count * share), seed=0))
        (directory / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    names = {"label_names": list(splits["train"].label_names)}
    (directory / "dataset_info.json").write_text(json.dumps(names))


def joined(dataset: Dataset, count: int, seed: int) -> Iterator[dict[str, Any]]:
    rng = random.Random(seed)
    for _ in range(count):
        chosen = rng.sample(dataset.rows, rng.randint(1, MOST_JOINED))
        yield {
            "text": ". ".join(row.text for row in chosen),
            "label": sorted({row.label for row in chosen}),
        }


def candidates() -> Iterator[ExitPolicy]:
    signals: dict[str, tuple[Direction, Callable[[Tensor], Tensor]]] = {
        "least certain label": ("above", least_certain),
        "mean entropy": ("below", mean_binary_entropy),
        "largest entropy": ("below", largest_entropy),
        "chance that all are right": ("above", chance_of_all),
    }
    for name, (direction, signal) in signals.items():
        yield SignalPolicy(name, direction, signal, label_set)


def largest_entropy(logits: Tensor) -> Tensor:
    """Of the labels, each a set of its own."""
    return mean_binary_entropy(logits[..., None]).amax(dim=-1)


def chance_of_all(logits: Tensor) -> Tensor:
    """The product of max(p, 1 - p) over the labels."""
    return torch.nn.functional.logsigmoid(logits.float().abs()).sum(dim=-1).exp()


def measure(recorded: RecordedExits, labels: Tensor, policy: ExitPolicy) -> dict[str, float]:
    points = curve(recorded, labels, policy)
    found = {
        f"{speedup:g}": round(point_for(points, speedup).accuracy, 4)
        for speedup in reachable_speedups(points)
    }
    curves = Curves(
        np.array([point.speedup for point in points]),
        np.array([point.accuracy for point in points]),
    )
    mean = area(curves)
    return found | {"area": math.nan if mean is None else round(mean, 4)}


if __name__ == "__main__":
    main()
