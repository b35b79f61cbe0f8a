"""A step of load with the SLO controller and without, in the simulator (`simulator.py`).

The device is a checkpoint: its layers as `bench_scheduler.py` has timed them, the exits of its
calibration, lengths of real texts. Every text asks for speed-up 1; full depth can carry a load of
1. The load goes from 0.6 to a peak and back. The controller, the scheduler and their limits are
the service's own; HTTP and tokenisation are not in it. The same files give the same figures.
"""

import argparse
import json
import random
from bisect import bisect_right
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench_scheduler import Setting, describe
from simulator import Device, Front, Simulation, Text, poisson

from offramp_model import load_checkpoint
from offramp_model.calibration import CalibrationTable
from offramp_model.checkpoint import Checkpoint
from offramp_model.cost import StepTable
from offramp_service.jobs import Depth
from offramp_service.scheduler import Plan
from offramp_service.served_model import accurate_speedups
from offramp_service.settings import Settings
from offramp_service.slo import SloController
from offramp_training.data import load_split

BASE = 0.6
PEAKS = (0.9, 1.1, 1.3, 1.6, 2.0)
SHOWN = 1.6
BEFORE_S, PEAK_S, AFTER_S = 15.0, 45.0, 60.0
TRANSITION_S = 3.0
"""After a step of load; what happens in it is told apart."""
LIMITS = Settings(model_id="-")
"""The service's own defaults."""


@dataclass(frozen=True)
class Course:
    """One run, second by second."""

    load: list[float]
    p95_ms: list[float | None]  # of the texts that came in that second and were answered
    floor: list[float]  # at its end
    accuracy: list[float | None]  # calibrated, mean of the texts admitted in it
    refused: list[int]


def main() -> None:
    args = _arguments()
    checkpoint = load_checkpoint(args.checkpoint)
    table = checkpoint.table(
        checkpoint.manifest.exit_policy, backend=checkpoint.backend, dtype=checkpoint.dtype
    )
    setting = full_depth(args, checkpoint)
    floors = accurate_speedups(table, table.max_speedup, args.min_accuracy)
    runs = [
        run(setting, table, floors, args.slo_p95_ms / 1000, peak=peak, on=on, seed=seed)
        for peak in PEAKS
        for on in (True, False)
        for seed in range(args.seeds)
    ]
    report: dict[str, Any] = {
        "setting": describe(setting),
        "slo_p95_ms": args.slo_p95_ms,
        "min_accuracy": args.min_accuracy,
        "ceiling": floors[-1],
        "full_accuracy": table.points[0].accuracy,
        "max_texts": LIMITS.max_concurrent_requests,
        "phases_s": [BEFORE_S, PEAK_S, AFTER_S],
        "transition_s": TRANSITION_S,
        "runs": [{k: v for k, v in one.items() if k != "course"} for one in runs],
        "courses": {
            "on" if one["on"] else "off": asdict(one["course"])
            for one in runs
            if (one["peak"], one["seed"]) == (SHOWN, 0)
        },
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.json.with_suffix(".png"))
    print(markdown(report))


def full_depth(args: argparse.Namespace, checkpoint: Checkpoint) -> Setting:
    """The checkpoint as it was timed, for texts that run all layers."""
    model, name = checkpoint.model, args.checkpoint.name
    timed = {one["name"]: one for one in json.loads(args.costs.read_text())["settings"]}[name]
    rows = load_split(args.data, "validation").inputs[:1000]
    return Setting(
        name=name,
        device=Device(
            StepTable(tuple(timed["tokens"]), tuple(timed["layer_s"])), model.exit_layers
        ),
        plan=Plan(LIMITS.max_batch_tokens, LIMITS.max_concurrent_requests),
        classes=((1.0, Depth.full(model.num_layers)),),
        tokens=tuple(len(one) for one in checkpoint.tokenizer().encode(rows, truncate=True)),
    )


# -- runs ------------------------------------------------------------------------------------------


def run(
    setting: Setting,
    table: CalibrationTable,
    floors: tuple[float, ...],
    target_s: float,
    *,
    peak: float,
    on: bool,
    seed: int,
) -> dict[str, Any]:
    front = Front(
        table,
        LIMITS.max_concurrent_requests,
        SloController(target_s, floors) if on else None,
    )
    traffic = step_of_load(random.Random(seed), setting, peak)
    Simulation(setting.plan, setting.device, traffic, costs_known=False, front=front).run()
    return {"peak": peak, "on": on, "seed": seed, "course": course(front, peak)} | figures(front)


def step_of_load(rng: random.Random, setting: Setting, peak: float) -> list[Text]:
    traffic: list[Text] = []
    start = 0.0
    for load, seconds in ((BASE, BEFORE_S), (peak, PEAK_S), (BASE, AFTER_S)):
        rate = load * setting.capacity
        # A few more than are expected, so that none of the phase is without.
        count = int(1.1 * rate * seconds)
        texts = poisson(rng, rate, count, classes=setting.classes, tokens=setting.tokens)
        traffic += [
            replace(one, arrives=start + one.arrives, hardness=rng.random())
            for one in texts
            if one.arrives < seconds
        ]
        start += seconds
    return traffic


def figures(front: Front) -> dict[str, Any]:
    """`steady`: under the peak, after the transition."""
    steps = (0.0, BEFORE_S, BEFORE_S + PEAK_S)
    phase = {name: list[float]() for name in ("before", "transition", "steady", "after")}
    for arrived, took in front.answered:
        name = ("before", "steady", "after")[bisect_right(steps, arrived) - 1]
        if name == "steady" and arrived < BEFORE_S + TRANSITION_S:
            name = "transition"
        phase[name].append(took)
    under_peak = [
        point.accuracy for at, point in front.admitted if BEFORE_S <= at < BEFORE_S + PEAK_S
    ]
    # The last floor that is not 1 ends when the load has been let go of.
    let_go = [at for at, floor in front.moves if floor == 1.0 and at > BEFORE_S + PEAK_S]
    return {
        **{f"p95_ms_{name}": p95_ms(took) for name, took in phase.items()},
        "refused": len(front.refused),
        "texts": len(front.answered) + len(front.refused),
        "accuracy_mean": sum(under_peak) / len(under_peak),
        "accuracy_least": min(point.accuracy for _, point in front.admitted),
        "floor_most": max((floor for _, floor in front.moves), default=1.0),
        "turns": turns([1.0, *(floor for _, floor in front.moves)]),
        "let_go_after_s": let_go[0] - BEFORE_S - PEAK_S if let_go else None,
    }


def turns(floors: list[float]) -> int:
    """How often a floor changed its direction."""
    ups = [after > before for before, after in pairwise(floors)]
    return sum(one != other for one, other in pairwise(ups))


def course(front: Front, peak: float) -> Course:
    seconds = range(int(BEFORE_S + PEAK_S + AFTER_S))
    took, accuracy, refused = defaultdict(list), defaultdict(list), defaultdict(int)
    for arrived, latency in front.answered:
        took[int(arrived)].append(latency)
    for at, point in front.admitted:
        accuracy[int(at)].append(point.accuracy)
    for at in front.refused:
        refused[int(at)] += 1
    moves = [(0.0, 1.0), *front.moves]
    times = [at for at, _ in moves]
    return Course(
        load=[peak if BEFORE_S <= one < BEFORE_S + PEAK_S else BASE for one in seconds],
        p95_ms=[p95_ms(took[one]) for one in seconds],
        floor=[moves[bisect_right(times, one + 1) - 1][1] for one in seconds],
        accuracy=[_mean(accuracy[one]) for one in seconds],
        refused=[refused[one] for one in seconds],
    )


def p95_ms(took_s: list[float]) -> float | None:
    return 1000 * sorted(took_s)[int(0.95 * len(took_s))] if took_s else None


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


# -- report ----------------------------------------------------------------------------------------


def draw(report: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(4, 1, figsize=(9, 9), sharex=True)
    load, tail, floor, accuracy = axes
    for name, colour in (("off", "#D55E00"), ("on", "#0072B2")):
        one = report["courses"][name]
        look = {"color": colour, "linewidth": 1.3, "label": f"controller {name}"}
        tail.plot(_gaps(one["p95_ms"]), **look)
        floor.step(range(len(one["floor"])), one["floor"], where="post", **look)
        accuracy.plot(_gaps(one["accuracy"]), **look)
    off, on = report["courses"]["off"], report["courses"]["on"]
    load.step(range(len(on["load"])), on["load"], where="post", color="#5f6368")
    load.set(ylabel="load", ylim=(0, None))
    refusals = load.twinx()
    refusals.bar(range(len(off["refused"])), off["refused"], color="#D55E00", alpha=0.4, width=1)
    refusals.bar(range(len(on["refused"])), on["refused"], color="#0072B2", alpha=0.4, width=1)
    refusals.set(ylabel="429 a second")
    tail.axhline(report["slo_p95_ms"], color="black", linewidth=0.8, linestyle="--")
    tail.set(ylabel="p95, ms", yscale="log")
    floor.set(ylabel="speed-up floor")
    accuracy.axhline(report["min_accuracy"], color="black", linewidth=0.8, linestyle="--")
    accuracy.set(ylabel="calibrated accuracy", xlabel="seconds")
    for one in axes:
        one.grid(alpha=0.3)
        one.spines[["top", "right"]].set_visible(False)
    refusals.spines[["top"]].set_visible(False)
    tail.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _gaps(values: list[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def markdown(report: dict[str, Any]) -> str:
    """The worst of the seeds in every cell, but for the mean accuracy."""
    lines = [
        "| peak | controller | p95 before, ms | first seconds | steady | after | 429 | "
        "accuracy, mean | least | floor, most | turns | let go after |",
        "|---:|---|" + "---:|" * 10,
    ]
    groups = defaultdict(list)
    for one in report["runs"]:
        groups[one["peak"], one["on"]].append(one)
    for (peak, on), runs in groups.items():
        tails = [
            f"{max(one[f'p95_ms_{name}'] for one in runs):.0f}"
            for name in ("before", "transition", "steady", "after")
        ]
        let_go = [one["let_go_after_s"] for one in runs if one["let_go_after_s"] is not None]
        lines.append(
            f"| {peak:g} | {'on' if on else 'off'} | {' | '.join(tails)} | "
            f"{max(one['refused'] / one['texts'] for one in runs):.1%} | "
            f"{sum(one['accuracy_mean'] for one in runs) / len(runs):.4f} | "
            f"{min(one['accuracy_least'] for one in runs):.4f} | "
            f"{max(one['floor_most'] for one in runs):.2f} | "
            f"{max(one['turns'] for one in runs)} | "
            f"{f'{max(let_go):.0f} s' if let_go else '-'} |"
        )
    return "\n".join(lines)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path, help="with a calibration for its own backend")
    parser.add_argument(
        "--costs", type=Path, required=True, help="of bench_scheduler.py, with this checkpoint"
    )
    parser.add_argument("--data", type=Path, required=True, help="SST-2, for the lengths of texts")
    parser.add_argument("--slo-p95-ms", type=float, default=100.0)
    parser.add_argument("--min-accuracy", type=float, default=0.87)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
