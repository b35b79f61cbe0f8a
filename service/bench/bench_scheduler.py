"""Throughput and latency by load for each way to schedule, in the simulator (`simulator.py`).

Each device is a cost table and the exits that texts take:

    h200-256, h200-32   a BERT-base-shaped model of 12 layers as it is reckoned for an H200:
                        17 µs or 29.9 ns a token, whichever is more; compaction 5 µs and 1.5 ns a
                        token; at most 256 or 32 texts of 32 tokens a batch. Assumed, not measured.
    NAME                a checkpoint given on the command line: its layers timed here and now, the
                        exits of its calibration at speed-ups 1, 2 and 3, lengths of real texts

Each load is a share of what the default could do with full batches. "deadlines": every other text
has one, four times what an empty server would need; it counts who was answered in time.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from simulator import Device, Outcome, Simulation, poisson

from offramp_model import load_checkpoint, make_supported_policy
from offramp_model.cost import GRID, StepTable
from offramp_service.engine import Engine
from offramp_service.jobs import Controls, Depth, Job
from offramp_service.scheduler import Plan, expected_seconds
from offramp_service.settings import usable_cores
from offramp_training.data import load_split

LOADS = (0.2, 0.4, 0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.3)
SPEEDUPS = (1.0, 2.0, 3.0)
PATIENCE = 4.0


@dataclass(frozen=True)
class Setting:
    """A device, what comes to it, and how much it takes at once."""

    name: str
    device: Device
    plan: Plan
    classes: tuple[tuple[float, Depth], ...]
    tokens: tuple[int, ...]

    @property
    def capacity(self) -> float:
        """Texts a second, run to completion in full batches."""
        mean = sum(self.tokens) / len(self.tokens)
        count = int(min(self.plan.max_batch_tokens / mean, self.plan.max_batch_texts))
        texts = poisson(random.Random(0), 1.0, count, classes=self.classes, tokens=self.tokens)
        jobs = [Job([0] * one.tokens, [], Controls(0.0, 1, 0, one.depth)) for one in texts]
        return count / expected_seconds(jobs, self.device.costs)


@dataclass(frozen=True)
class Way:
    """One way to schedule: changes of the plan and of the device."""

    name: str
    plan: dict[str, bool]
    device: dict[str, Any]


WAYS = (
    Way("batch never shrinks", {}, {"compacts": False}),
    Way("run to completion (default)", {}, {}),
    Way("alike together", {"group_alike": True}, {}),
    Way("backlog merging", {"merge_backlog": True}, {}),
    Way("both", {"group_alike": True, "merge_backlog": True}, {}),
    Way("host waits 12 µs at each exit", {}, {"sync_s": 12e-6}),
)
DEADLINES = {
    "deadlines told, late work refused": {"costs_known": True, "refuses": True},
    "deadlines told, nothing refused": {"costs_known": True, "refuses": False},
    "deadlines not told": {"costs_known": False, "refuses": False},
}


def main() -> None:
    args = _arguments()
    settings = [reference(256), reference(32), *(measured(args, one) for one in args.checkpoints)]
    report: dict[str, Any] = {
        "machine": machine(),
        "texts": args.texts,
        "settings": [describe(one) for one in settings],
        "loads": [
            row for setting in settings for way in WAYS for row in by_load(setting, way, args.texts)
        ],
        "deadlines": [row for setting in settings for row in by_deadline(setting, args.texts)],
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, args.json.with_suffix(".png"))
    print(table(report))


# -- devices ---------------------------------------------------------------------------------------


def reference(texts: int) -> Setting:
    grid = (*GRID, 65536)
    costs = StepTable(grid, tuple(max(17e-6, 29.9e-9 * tokens) for tokens in grid))
    layers = 12
    falling = [1.0, 0.8353, 0.7032]  # mean depths 12, 5.2 and 3.2: 6.8 in all
    classes = tuple(
        (1 / 3, Depth(tuple(share**layer for layer in range(layers)))) for share in falling
    )
    device = Device(costs, tuple(range(1, layers + 1)), move_s=5e-6, move_token_s=1.5e-9)
    return Setting(f"h200-{texts}", device, Plan(32 * texts, texts), classes, (32,))


def measured(args: argparse.Namespace, directory: Path) -> Setting:
    """The checkpoint as this machine runs it; moving rows is part of what was timed."""
    checkpoint = load_checkpoint(directory)
    model = checkpoint.model
    policy = make_supported_policy(checkpoint.manifest.exit_policy, model)
    threads = usable_cores()
    stack = checkpoint.any_stack(checkpoint.dtype, threads=threads)
    table = checkpoint.table(policy.name, backend=checkpoint.backend, dtype=checkpoint.dtype)
    engine = Engine(stack, policy, torch_threads=threads if checkpoint.backend == "torch" else None)
    engine.warm_up(model.max_length)
    costs = engine.measure(args.max_batch_tokens, model.max_length, repeats=9, budget_s=20)
    depths = [
        Depth.of(table.point_for(min(one, table.max_speedup)).exit_counts, 1, model.num_layers)
        for one in SPEEDUPS
    ]
    rows = load_split(args.data, "validation").inputs[:1000]
    lengths = tuple(len(one) for one in checkpoint.tokenizer().encode(rows, truncate=True))
    return Setting(
        name=directory.name,
        device=Device(costs, model.exit_layers),
        plan=Plan(args.max_batch_tokens, 32),
        classes=tuple((1 / len(depths), depth) for depth in depths),
        tokens=lengths,
    )


# -- runs ------------------------------------------------------------------------------------------


def by_load(setting: Setting, way: Way, count: int) -> list[dict[str, Any]]:
    rows = []
    plan, device = replace(setting.plan, **way.plan), replace(setting.device, **way.device)
    for load in LOADS:
        rate = load * setting.capacity
        traffic = poisson(
            random.Random(0), rate, count, classes=setting.classes, tokens=setting.tokens
        )
        started = time.perf_counter()
        outcome = Simulation(plan, device, traffic).run()
        rows.append(
            {"setting": setting.name, "way": way.name, "load": load, "rate": rate}
            | figures(outcome)
            | {"simulated_in_s": time.perf_counter() - started}
        )
    return rows


def figures(outcome: Outcome) -> dict[str, float]:
    took = sorted(outcome.answered.values())
    return {
        "texts_per_s": len(took) / outcome.ends,
        "mean_s": sum(took) / len(took),
        "p50_s": took[len(took) // 2],
        "p99_s": took[int(0.99 * len(took))],
        "joined": outcome.joined,
        "longest_pause_s": outcome.longest_pause_s,
    }


def by_deadline(setting: Setting, count: int) -> list[dict[str, Any]]:
    """Of those with a deadline: in time, refused at once, given up after they had cost something;
    of the others, how long they took."""
    mean = round(sum(setting.tokens) / len(setting.tokens))
    layers = setting.device.exit_layers[-1]
    deadline_s = PATIENCE * layers * setting.device.costs(mean)
    rows = []
    for load in LOADS:
        traffic = poisson(
            random.Random(0),
            load * setting.capacity,
            count,
            classes=setting.classes,
            tokens=setting.tokens,
            deadline_s=deadline_s,
            with_deadline=0.5,
        )
        due = {number for number, one in enumerate(traffic) if one.deadline_s is not None}
        for name, known in DEADLINES.items():
            outcome = Simulation(setting.plan, setting.device, traffic, **known).run()
            others = sorted(s for number, s in outcome.answered.items() if number not in due)
            rows.append(
                {
                    "setting": setting.name,
                    "way": name,
                    "load": load,
                    "deadline_s": deadline_s,
                    "in_time": len(due & outcome.answered.keys()) / len(due),
                    "refused": len(outcome.refused) / len(due),
                    "given_up": len(outcome.given_up) / len(due),
                    "p99_s_without": others[int(0.99 * len(others))],
                }
            )
    return rows


# -- report ----------------------------------------------------------------------------------------


def describe(setting: Setting) -> dict[str, Any]:
    return {
        "name": setting.name,
        "plan": asdict(setting.plan),
        "capacity_per_s": setting.capacity,
        "exit_layers": setting.device.exit_layers,
        "tokens": setting.device.costs.tokens,
        "layer_s": setting.device.costs.seconds,
        "knee": setting.device.costs.knee,
        "mean_depths": [depth.mean for _, depth in setting.classes],
        "mean_tokens": sum(setting.tokens) / len(setting.tokens),
    }


def draw(report: dict[str, Any], path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import EngFormatter

    names = [one["name"] for one in report["settings"]]
    figure, axes = plt.subplots(len(names), 2, figsize=(11, 3.2 * len(names)), squeeze=False)
    colours = ("#5f6368", "#0072B2", "#009E73", "#D55E00", "#CC79A7", "#E69F00")
    marks = ("x", "o", "^", "s", "D", "v")
    for (throughput, tail), name in zip(axes, names, strict=True):
        for way, colour, mark in zip(WAYS, colours, marks, strict=True):
            rows = [
                one for one in report["loads"] if (one["setting"], one["way"]) == (name, way.name)
            ]
            rates = [one["rate"] for one in rows]
            look = {"color": colour, "marker": mark, "markersize": 4, "linewidth": 1.2}
            throughput.plot(rates, [one["texts_per_s"] for one in rows], label=way.name, **look)
            tail.plot(rates, [one["p99_s"] * 1000 for one in rows], **look)
        throughput.set(ylabel=f"{name}\ntexts answered a second", xlabel="texts arriving a second")
        tail.set(ylabel="p99, ms", xlabel="texts arriving a second", yscale="log")
        for one in (throughput, tail):
            one.grid(alpha=0.3)
            one.xaxis.set_major_formatter(EngFormatter(sep=""))
            one.spines[["top", "right"]].set_visible(False)
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def table(report: dict[str, Any]) -> str:
    """Markdown: per setting and way, p99 at 0.4, 0.8 and 1.0 of capacity, and what it can do."""
    shown = (0.4, 0.8, 1.0)
    lines = [
        "| device | way | " + " | ".join(f"p99 at {load:g}, ms" for load in shown) + " | texts/s |",
        "|---|---|" + "---:|" * (len(shown) + 1),
    ]
    for setting in report["settings"]:
        for way in WAYS:
            rows = {
                one["load"]: one
                for one in report["loads"]
                if (one["setting"], one["way"]) == (setting["name"], way.name)
            }
            p99 = " | ".join(f"{rows[load]['p99_s'] * 1000:.3g}" for load in shown)
            most = rows[LOADS[-1]]["texts_per_s"]
            lines.append(f"| {setting['name']} | {way.name} | {p99} | {most:,.0f} |")
    lines += [
        "",
        "| device | way | load | in time | refused | given up | p99 of the others, ms |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {one['setting']} | {one['way']} | {one['load']:g} | {one['in_time']:.3f} | "
        f"{one['refused']:.3f} | {one['given_up']:.3f} | {one['p99_s_without'] * 1000:.3g} |"
        for one in report["deadlines"]
        if one["load"] in (0.8, 1.1)
    ]
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    return {
        "cores": usable_cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "onnxruntime", "offramp")},
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, help="SST-2, for the lengths of its texts")
    parser.add_argument("--max-batch-tokens", type=int, default=2048)
    parser.add_argument("--texts", type=int, default=20_000, help="of one simulated run")
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.checkpoints and args.data is None:
        parser.error("checkpoints need --data")
    return args


if __name__ == "__main__":
    main()
