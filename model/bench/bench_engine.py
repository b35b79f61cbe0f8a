"""Rows per second of the CPU engine, exits off and at several speed-ups, against transformers.

All variants run interleaved in one process on the same tokenised texts, in batches of the same
size and in arrival order; the figure that counts is the ratio within a round, its median over
the rounds. Tokenisation and HTTP are not in it (`service/bench` has those).

    transformers-padded    AutoModel, batches padded to their longest text, last exit's head
    exits-off              the packed engine under `full_depth`
    speedup-S              the packed engine with the checkpoint's policy and calibrated threshold
"""

import argparse
import json
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from offramp_model import (
    Checkpoint,
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
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads
from offramp_model.recorded import record_exits
from offramp_training.data import load_split

SPEEDUPS = (1.5, 2.0, 3.0)


@dataclass(frozen=True)
class Pass:
    """One run over all texts: labels in order, and the layers that were run for them."""

    labels: list[int]
    layers_run: int


Variant = Callable[[list[list[Encoding]]], Pass]


def transformers_padded(checkpoint: Checkpoint) -> Variant:
    """What most people run: a padded forward of the same weights, the last exit's head."""
    from safetensors.torch import load_file
    from transformers import AutoModel

    backbone = AutoModel.from_pretrained(checkpoint.directory).eval()
    heads = ExitHeads(checkpoint.model).eval()
    heads.load_state_dict(load_file(checkpoint.directory / "exits.safetensors"))
    padding, last = backbone.config.pad_token_id or 0, checkpoint.model.num_exits - 1

    @torch.inference_mode()
    def run(batches: list[list[Encoding]]) -> Pass:
        labels: list[int] = []
        for batch in batches:
            longest = max(len(encoding) for encoding in batch)
            ids = torch.full((len(batch), longest), padding)
            mask = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, encoding in enumerate(batch):
                ids[row, : len(encoding)] = torch.tensor(encoding.ids)
                mask[row, : len(encoding)] = 1
            hidden = backbone(input_ids=ids, attention_mask=mask).last_hidden_state
            pooled = heads.pool_padded(last, hidden, mask)
            labels += heads(last, pooled).argmax(-1).tolist()
        return Pass(labels, len(labels) * checkpoint.model.num_layers)

    return run


def engine(stack: LayerStack, policy: ExitPolicy, threshold: float) -> Variant:
    """The packed engine through the layer loop."""

    def run(batches: list[list[Encoding]]) -> Pass:
        labels: list[int] = []
        layers_run = 0
        for batch in batches:
            settings = RowSettings.uniform(len(batch), threshold, max_layer=stack.num_layers)
            rows = start_rows(stack, TokenBatch.pack(batch), policy, settings)
            answers = [-1] * len(batch)
            for leavers in layer_loop(stack, rows, policy):
                layers_run += leavers.exit_layer * len(leavers.row)
                for row, label in zip(leavers.row.tolist(), leavers.label.tolist(), strict=True):
                    answers[row] = label
            labels += answers
        return Pass(labels, layers_run)

    return run


def variants(
    checkpoint: Checkpoint, stack: PackedEncoder, thresholds: dict[float, float], policy: ExitPolicy
) -> dict[str, Variant]:
    full_depth = make_policy("full_depth")
    chosen = {
        "transformers-padded": transformers_padded(checkpoint),
        "exits-off": engine(stack, full_depth, never(full_depth)),
    }
    for speedup, threshold in thresholds.items():
        chosen[f"speedup-{speedup:g}"] = engine(stack, policy, threshold)
    return chosen


def measure(
    chosen: dict[str, Variant], batches: list[list[Encoding]], rounds: int
) -> tuple[dict[str, list[float]], dict[str, Pass]]:
    """Seconds per round and variant, interleaved, after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in chosen}
    last: dict[str, Pass] = {}
    for round_index in range(rounds + 1):
        for name, run in chosen.items():
            started = time.perf_counter()
            last[name] = run(batches)
            if round_index:
                seconds[name].append(time.perf_counter() - started)
        print(f"round {round_index}/{rounds}", file=sys.stderr)
    return seconds, last


def report(
    seconds: dict[str, list[float]],
    last: dict[str, Pass],
    truth: Sequence[int],
    num_layers: int,
) -> Iterator[dict[str, float | str]]:
    for name, times in seconds.items():
        against = {
            f"throughput_vs_{base}": statistics.median(
                b / t for b, t in zip(seconds[base], times, strict=True)
            )
            for base in ("transformers-padded", "exits-off")
        }
        right = sum(p == t for p, t in zip(last[name].labels, truth, strict=True))
        yield {
            "variant": name,
            "rows_per_second": len(truth) / statistics.median(times),
            "accuracy": right / len(truth),
            "speedup_in_layers": len(truth) * num_layers / last[name].layers_run,
            **against,
        }


def machine() -> dict[str, str | int]:
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    return {
        "cpu": model,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "offramp")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--policy", help="default: the checkpoint's own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    checkpoint = load_checkpoint(arguments.checkpoint)
    stack, policy = (
        checkpoint.stack(),
        make_supported_policy(
            arguments.policy or checkpoint.manifest.exit_policy, checkpoint.model
        ),
    )
    rows = load_split(arguments.data, arguments.split)
    truth = rows.labels
    encodings = checkpoint.tokenizer().encode(rows.inputs)
    batches = [
        encodings[start : start + arguments.batch_size]
        for start in range(0, len(encodings), arguments.batch_size)
    ]
    # The operating points of these very rows, so that the speed-up in layers is the nominal one
    # and the time ratio can be read against it.
    points = curve(record_exits(stack, encodings), torch.tensor(truth), policy, num_points=400)
    thresholds = {
        s: next(point.threshold for point in points if point.speedup >= s - 1e-9) for s in SPEEDUPS
    }
    seconds, last = measure(
        variants(checkpoint, stack, thresholds, policy), batches, arguments.rounds
    )
    table = list(report(seconds, last, truth, stack.num_layers))
    result = {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "rows": len(truth),
        "batch_size": arguments.batch_size,
        "rounds": arguments.rounds,
        "policy": policy.name,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "variants": table,
        "seconds": seconds,
    }
    print(f"{'variant':22} {'rows/s':>8} {'layers':>7} {'acc':>6} {'vs hf':>6} {'vs off':>6}")
    for row in table:
        print(
            f"{row['variant']:22} {row['rows_per_second']:8.0f} {row['speedup_in_layers']:7.2f} "
            f"{row['accuracy']:6.3f} {row['throughput_vs_transformers-padded']:6.2f} "
            f"{row['throughput_vs_exits-off']:6.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
