"""Rows per second on a CPU: ONNX Runtime segments and the torch engine against what others run.

All variants run in one process on the same tokenised texts, taking turns every few batches, so that
a machine that is slow for a second is slow for all. What counts are ratios: of sums over these
stretches of the median over the rounds. Tokenisation and HTTP are not in it.

    transformers        AutoModel in float32, arrival order, batches padded to their longest text
    whole-int8          one int8 graph of the whole model, dynamic quantisation, norms fused as
                        onnxruntime's optimiser does; fed batches of all texts sorted by length
    whole-int8-plain    the same without the fused norms
    torch-S             this engine in torch, float32, at speed-up S in layers; 1 is exits off
    bf16-S              the same in bfloat16
    onnx-S              float32 segments
    int8-S              int8 segments

Thresholds are chosen on these rows for each stack, so that the speed-up in layers is the nominal
one. With batches of one text, seconds of each text are kept: the median is the latency.
"""

import argparse
import json
import os
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # as the commands do
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import matplotlib as mpl
import torch
from bench_engine import Pass, Variant, engine, machine, transformers_padded
from whole_model import WholeModel

from offramp_model import (
    Encoding,
    ExitPolicy,
    LayerStack,
    RowSettings,
    TokenBatch,
    layer_loop,
    load_checkpoint,
    make_policy,
    make_supported_policy,
    never,
    start_rows,
)
from offramp_model.calibrating import curve
from offramp_model.memory import keep_freed_memory
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_training.data import load_split

SPEEDUPS = (1.5, 2.0, 3.0)
STRETCH = 3  # batches that a variant runs before the next one has its turn
T = TypeVar("T")
Batches = list[list[Encoding]]


def cut(encodings: Sequence[Encoding], size: int) -> Batches:
    return cut_list(encodings, size)


def cut_list(values: Sequence[T], size: int) -> list[list[T]]:
    return [list(values[start : start + size]) for start in range(0, len(values), size)]


def whole_graph(model: WholeModel, num_layers: int) -> Variant:
    def run(batches: Batches) -> Pass:
        labels = [label for batch in batches for label in model(batch)]
        return Pass(labels, len(labels) * num_layers)

    return run


def arranged(name: str, encodings: Sequence[Encoding]) -> list[int]:
    """The order in which a variant gets the texts: sorted by length for whole graphs, as an expert
    would feed them, else as they come."""
    order = list(range(len(encodings)))
    if name.startswith("whole"):
        order.sort(key=lambda index: len(encodings[index]))
    return order


def with_exits(
    name: str, stack: LayerStack, recorded: RecordedExits, truth: torch.Tensor, policy: ExitPolicy
) -> dict[str, tuple[Variant, float]]:
    """`name-S` → what runs it, and its threshold."""
    full = make_policy("full_depth")
    found: dict[str, tuple[Variant, float]] = {
        f"{name}-1": (engine(stack, full, never(full)), never(full))
    }  # type: ignore[arg-type]
    points = curve(recorded, truth, policy, num_points=400)
    for speedup in SPEEDUPS:
        point = next((one for one in points if one.speedup >= speedup - 1e-9), None)
        if point is not None:
            run = engine(stack, policy, point.threshold)
            found[f"{name}-{speedup:g}"] = run, point.threshold
    return found


def flips(
    ours: RecordedExits, theirs: RecordedExits, policy: ExitPolicy, threshold: float
) -> dict[str, float]:
    """Shares of rows that leave elsewhere, or with another label, at one threshold."""
    one, other = replay(ours, policy, threshold), replay(theirs, policy, threshold)
    return {
        "threshold": threshold,
        "exit_layer": float((one.exit_layer != other.exit_layer).double().mean()),
        "label": float((one.label != other.label).double().mean()),
    }


def neighbours(
    stack: LayerStack,
    policy: ExitPolicy,
    threshold: float,
    encodings: Sequence[Encoding],
    batches: int,
    size: int = 32,
) -> dict[str, float]:
    """Shares of (text, batch) pairs with another exit layer or label than the text has alone, each
    text in `batches` random batches."""
    alone = [_outcomes(stack, policy, threshold, [one])[0] for one in encodings]
    rng = random.Random(0)
    layers = labels = pairs = 0
    for _ in range(batches):
        order = rng.sample(range(len(encodings)), len(encodings))
        for start in range(0, len(order), size):
            some = order[start : start + size]
            found = _outcomes(stack, policy, threshold, [encodings[index] for index in some])
            for index, (layer, label) in zip(some, found, strict=True):
                pairs += 1
                layers += layer != alone[index][0]
                labels += label != alone[index][1]
    return {"pairs": pairs, "exit_layer": layers / pairs, "label": labels / pairs}


def _outcomes(
    stack: LayerStack, policy: ExitPolicy, threshold: float, batch: Sequence[Encoding]
) -> list[tuple[int, int]]:
    """Exit layer and label of each text."""
    settings = RowSettings.uniform(len(batch), threshold, max_layer=stack.num_layers)
    rows = start_rows(stack, TokenBatch.pack(batch), policy, settings)
    found = [(0, 0)] * len(batch)
    for leavers in layer_loop(stack, rows, policy):
        for row, label in zip(leavers.row.tolist(), leavers.label.tolist(), strict=True):
            found[row] = leavers.exit_layer, label
    return found


@dataclass
class Timed:
    """A variant's seconds, [round][stretch], and its last answers, in the texts' own order."""

    seconds: list[list[float]]
    labels: list[int]
    layers_run: int

    @property
    def typical(self) -> list[float]:
        """Of each stretch, the median over the rounds."""
        return [statistics.median(column) for column in zip(*self.seconds, strict=True)]


def measure(
    runs: dict[str, Variant], encodings: Sequence[Encoding], size: int, rounds: int
) -> dict[str, Timed]:
    """All variants over all texts, a stretch of a few batches each in turn; batches of one text are
    stretches of their own, so that the seconds of each text are kept."""
    stretch = 1 if size == 1 else STRETCH
    orders = {name: arranged(name, encodings) for name in runs}
    stretches = {
        name: cut_list(cut([encodings[index] for index in order], size), stretch)
        for name, order in orders.items()
    }
    timed = {name: Timed([], [], 0) for name in runs}
    names = list(runs)
    for round_index in range(rounds + 1):
        labels: dict[str, list[int]] = {name: [] for name in runs}
        for one in timed.values():
            one.layers_run = 0
            one.seconds.append([])
        for place in range(len(stretches[names[0]])):
            turn = (place + round_index) % len(names)
            for name in names[turn:] + names[:turn]:
                batches = stretches[name][place]
                runs[name](batches[:1])  # takes back caches and threads from the one before
                started = time.perf_counter()
                found = runs[name](batches)
                timed[name].seconds[-1].append(time.perf_counter() - started)
                timed[name].layers_run += found.layers_run
                labels[name] += found.labels
        for name, one in timed.items():
            one.labels = [
                label for _, label in sorted(zip(orders[name], labels[name], strict=True))
            ]
        print(f"round {round_index}/{rounds}", file=sys.stderr)
    for one in timed.values():
        del one.seconds[0]  # to warm up
    return timed


def report(
    timed: dict[str, Timed], truth: Sequence[int], num_layers: int, size: int
) -> list[dict[str, Any]]:
    def ratio(base: str, name: str, of: Callable[[list[float]], float] = sum) -> float | None:
        return of(timed[base].typical) / of(timed[name].typical) if base in timed else None

    table = []
    for name, one in timed.items():
        layers = len(truth) * num_layers / one.layers_run
        off = f"{name.rpartition('-')[0]}-1"
        against = ratio(off, name)
        right = sum(a == b for a, b in zip(one.labels, truth, strict=True))
        row: dict[str, Any] = {
            "variant": name,
            "rows_per_second": len(truth) / sum(one.typical),
            "speedup_in_layers": layers,
            "accuracy": right / len(truth),
            "vs_transformers": ratio("transformers", name),
            "vs_whole_int8": ratio("whole-int8", name),
            "vs_whole_int8_plain": ratio("whole-int8-plain", name),
            "vs_exits_off": against,
            "throughput_per_layer_speedup": None if against is None else against / layers,
        }
        if size == 1:
            row["median_ms"] = statistics.median(one.typical) * 1e3
            faster = ratio(off, name, statistics.median)
            row["latency_vs_exits_off"] = None if faster is None else 1 / faster
        table.append(row)
    return table


def show(size: int, table: list[dict[str, Any]]) -> None:
    keys = ("vs_transformers", "vs_whole_int8", "vs_whole_int8_plain", "vs_exits_off",
            "throughput_per_layer_speedup", "latency_vs_exits_off")  # fmt: skip
    heads = ("hf", "whole", "plain", "off", "per layer", "latency")
    print(f"\nbatches of {size}")
    print(
        f"{'variant':17} {'rows/s':>7} {'layers':>6} {'acc':>6} "
        + " ".join(f"{h:>9}" for h in heads)
    )
    for row in table:
        cells = (("-" if row.get(key) is None else f"{row[key]:.2f}") for key in keys)
        print(
            f"{row['variant']:17} {row['rows_per_second']:7.0f} {row['speedup_in_layers']:6.2f} "
            f"{row['accuracy']:6.3f} " + " ".join(f"{cell:>9}" for cell in cells)
        )


COLOURS = {"torch": "#5f6368", "bf16": "#009E73", "onnx": "#0072B2", "int8": "#D55E00"}


def draw(result: dict[str, Any], path: Path) -> None:
    """Throughput against transformers by speed-up in layers, one sheet for each batch size."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    sizes = result["batches"]
    figure, axes = plt.subplots(1, len(sizes), figsize=(5.2 * len(sizes), 4), squeeze=False)
    for axis, (size, found) in zip(axes[0], sizes.items(), strict=True):
        rows = {one["variant"]: one for one in found["variants"]}
        for stack, colour in COLOURS.items():
            line = [one for name, one in rows.items() if name.rpartition("-")[0] == stack]
            if not line:
                continue
            speedups = [one["speedup_in_layers"] for one in line]
            ratios = [one["vs_transformers"] for one in line]
            axis.plot(speedups, ratios, color=colour, marker="o", markersize=4, label=stack)
            ideal = [ratios[0] * speedup for speedup in speedups]
            axis.plot(speedups, ideal, color=colour, linewidth=0.7, linestyle=":")
        whole = rows["whole-int8"]["vs_transformers"]
        axis.axhline(whole, color="black", linewidth=0.8, linestyle="--", label="whole-model int8")
        axis.set(title=f"batches of {size}", xlabel="speed-up in layers")
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("throughput, transformers = 1")
    axes[0][0].legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--onnx", type=Path, required=True, help="its float32 export")
    parser.add_argument("--int8", type=Path, required=True, help="its int8 export")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--policy", help="default: the checkpoint's own")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[32, 8, 1])
    parser.add_argument("--only", nargs="+", help="variants that start so")
    parser.add_argument("--rows", type=int, help="of the split, from the first; default: all")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--no-neighbours", dest="neighbours", action="store_false")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    keep_freed_memory()  # as the service does
    torch.set_num_threads(arguments.threads)
    checkpoint = load_checkpoint(arguments.checkpoint)
    chosen_policy = arguments.policy or checkpoint.manifest.exit_policy
    policy = make_supported_policy(chosen_policy, checkpoint.model)
    dataset = load_split(arguments.data, arguments.split)
    encodings = checkpoint.tokenizer().encode(dataset.inputs)[: arguments.rows]
    truth = list(dataset.labels)[: arguments.rows]
    labels, layers = torch.tensor(truth), checkpoint.model.num_layers
    stacks: dict[str, LayerStack] = {
        "onnx": load_checkpoint(arguments.onnx).onnx_stack(threads=arguments.threads),
        "int8": load_checkpoint(arguments.int8).onnx_stack(threads=arguments.threads),
        "torch": checkpoint.stack(),
        "bf16": checkpoint.stack(dtype=torch.bfloat16),
    }
    recorded = {name: record_exits(stack, encodings) for name, stack in stacks.items()}
    chosen: dict[str, Variant] = {"transformers": transformers_padded(checkpoint)}
    thresholds: dict[str, float] = {}
    for name, fused in (("whole-int8", True), ("whole-int8-plain", False)):
        whole = WholeModel(checkpoint, fused_norms=fused)
        chosen[name] = whole_graph(whole, layers)
    for name, stack in stacks.items():
        for variant, (run, threshold) in with_exits(
            name, stack, recorded[name], labels, policy
        ).items():
            chosen[variant], thresholds[variant] = run, threshold
    if arguments.only:
        chosen = {k: v for k, v in chosen.items() if k.startswith(tuple(arguments.only))}
    result: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine() | {name: version(name) for name in ("onnx", "onnxruntime")},
        "rows": len(truth),
        "rounds": arguments.rounds,
        "policy": policy.name,
        "thresholds": {
            name: value for name, value in thresholds.items() if abs(value) != float("inf")
        },
        "full_depth_label_flips_int8": float(
            (recorded["int8"].logits[-1].argmax(-1) != recorded["torch"].logits[-1].argmax(-1))
            .double()
            .mean()
        ),
        "flips_at_float32_thresholds": {
            name: {
                f"{speedup:g}": flips(
                    recorded[name], recorded["torch"], policy, thresholds[f"torch-{speedup:g}"]
                )
                for speedup in SPEEDUPS
                if f"torch-{speedup:g}" in thresholds
            }
            for name in ("bf16", "onnx", "int8")
        },
        "flips_by_neighbours_at_2": {
            name: neighbours(stacks[name], policy, thresholds[f"{name}-2"], encodings, count)
            for name, count in (("int8", 50), ("onnx", 5), ("bf16", 5))
            if f"{name}-2" in thresholds and arguments.neighbours
        },
        "batches": {},
    }
    for size in arguments.batch_sizes:
        timed = measure(chosen, encodings, size, arguments.rounds)
        table = report(timed, truth, layers, size)
        show(size, table)
        result["batches"][str(size)] = {
            "variants": table,
            "seconds": {name: [sum(one) for one in of.seconds] for name, of in timed.items()},
        }
        result["peak_memory_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        if arguments.json:  # after each size: a run that is cut short has its figures
            arguments.json.write_text(json.dumps(result, indent=1) + "\n")
            if size > 1:
                draw(result, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
