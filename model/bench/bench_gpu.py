"""Rows per second of the device lane on a GPU against transformers, and what its answers are worth.

    python model/bench/bench_gpu.py [--device cuda|cpu] [--quick] [--json F]

MiniLM-L6 and BERT-base shapes with random weights, bf16 on CUDA. Speed does not depend on weights,
and exits are drawn: every row leaves at a layer of its own (`fixed_layer`), so that the speed-up in
layers is exactly the nominal one. Lengths follow SST-2's mix (log-normal, 25 tokens on average).

    transformers   BertModel, SDPA, torch.compile, batches padded to their longest text
    lane-S         the lane's captured graph at speed-up S in layers, rows moved where the measured
                   table says that it pays; 1 is exits off

Variants take turns; ratios are within a round, their median counts. Besides: seconds of a layer by
live tokens, the relative error of the last exit's logits against fp64, and the share of labels
that differ with rows moved and not moved. `--device cpu --quick` runs the twins: plumbing only.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import BertConfig, BertModel

from offramp_model.config import MultiExitConfig
from offramp_model.cost import StepTable, compactions
from offramp_model.device_lane import Bucket, DeviceLane
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads
from offramp_model.lane_buckets import moving_price
from offramp_model.policies import make_policy
from offramp_model.rows import Encoding, RowSettings, TokenBatch

SHAPES = {
    "minilm-l6": {"num_hidden_layers": 6, "hidden_size": 384, "num_attention_heads": 12},
    "bert-base": {"num_hidden_layers": 12, "hidden_size": 768, "num_attention_heads": 12},
}
TINY = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
VOCAB, LONGEST = 2000, 128
SPEEDUPS = (1.0, 1.5, 2.0, 3.0)


class Subject:
    """One shape: the same random weights for transformers and for the lane."""

    def __init__(self, shape: dict[str, int], device: str, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        backbone = BertConfig(
            vocab_size=VOCAB, intermediate_size=4 * shape["hidden_size"], **shape,
            attn_implementation="sdpa",
        )  # fmt: skip
        torch.manual_seed(0)
        self.model = BertModel(backbone, add_pooling_layer=False).eval().requires_grad_(False)
        self.layers, self.width = shape["num_hidden_layers"], shape["hidden_size"]
        self.config = MultiExitConfig(
            num_layers=self.layers,
            hidden_size=self.width,
            exit_layers=tuple(range(1, self.layers + 1)),
            labels=("negative", "positive"),
        )
        self.heads = ExitHeads(self.config)
        self.stack = self.make_stack(dtype, device)

    def make_stack(self, dtype: torch.dtype, device: str) -> PackedEncoder:
        weights = self.model.state_dict()
        return PackedEncoder(
            self.model.config.to_dict(),
            weights.__getitem__,
            self.heads,
            self.config,
            device=device,
            dtype=dtype,
        )

    def lane(self, tokens: int, rows: int, moved_after: frozenset[int]) -> DeviceLane:
        bucket = Bucket(tokens, rows, LONGEST, moved_after)
        return DeviceLane(self.stack, "gelu", make_policy("fixed_layer"), [bucket])


def draw_texts(rows: int, generator: torch.Generator) -> list[Encoding]:
    lengths = torch.randn(rows, generator=generator).mul(0.5).add(3.1).exp().round().int()
    return [
        Encoding(torch.randint(1, VOCAB, (length,), generator=generator).tolist(), [0] * length)
        for length in lengths.clamp(4, LONGEST).tolist()
    ]


def draw_exits(rows: int, layers: int, speedup: float, generator: torch.Generator) -> torch.Tensor:
    """Exit layers, float64 [rows], whose mean is layers / speedup as nearly as whole layers allow:
    as many early as late, around the mean."""
    mean = layers / speedup
    spread = min(mean - 1, layers - mean)
    exits = mean + spread * (2 * torch.rand(rows, generator=generator, dtype=torch.float64) - 1)
    exits = exits.round().clamp(1, layers)
    for row in torch.randperm(rows, generator=generator).tolist() * layers:
        error = int(exits.sum()) - round(rows * mean)
        if error == 0:
            break
        step = -1 if error > 0 else 1
        exits[row] = (exits[row] + step).clamp(1, layers)
    return exits


def padded(subject: Subject, texts: list[Encoding], compiled: bool) -> Callable[[], Any]:
    model = subject.model.to(subject.device, subject.dtype)
    run = torch.compile(model, dynamic=False) if compiled else model
    longest = max(map(len, texts))
    ids, mask = torch.zeros(2, len(texts), longest, dtype=torch.int64)
    for row, text in enumerate(texts):
        ids[row, : len(text)], mask[row, : len(text)] = torch.tensor(text.ids), 1

    @torch.inference_mode()
    def forward() -> Any:
        hidden = run(input_ids=ids.to(subject.device), attention_mask=mask.to(subject.device))
        return hidden.last_hidden_state[:, 0].float().cpu()

    return forward


def through_lane(lane: DeviceLane, batch: TokenBatch, asked: RowSettings) -> Callable[[], Any]:
    def forward() -> Any:
        return list(lane(batch, asked))

    return forward


def time_layer(subject: Subject, tokens: int) -> float:
    """Seconds of one layer of the lane's kernels over so many live tokens, in texts of 16."""
    rows = max(1, tokens // 16)
    one = subject.lane(tokens, rows, frozenset())._passes[0]
    batch = TokenBatch.pack([Encoding([1] * (tokens // rows), [0] * (tokens // rows))] * rows)
    asked = RowSettings.uniform(rows, 1.0, max_layer=subject.layers)
    one.load(batch, asked.at(batch.order), 1)
    hidden, spare = one._hidden

    @torch.inference_mode()
    def run() -> None:
        one._layer(subject.stack.layers[0], hidden, spare, one._cu_seqlens, one._counts)

    if subject.device == "cuda":
        from triton.testing import do_bench_cudagraph

        return float(do_bench_cudagraph(run)) / 1e3
    run()
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def measure(variants: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for round_index in range(rounds + 1):
        names = list(variants)
        for name in names[round_index % len(names) :] + names[: round_index % len(names)]:
            started = time.perf_counter()
            variants[name]()
            if round_index:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def labels_of(answers: Any, rows: int) -> torch.Tensor:
    labels = torch.full((rows,), -1)
    for one in answers:
        labels[one.row] = one.label
    return labels


def bench_rows(
    subject: Subject, table: StepTable, rows: int, rounds: int, compiled: bool
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(rows)
    texts = draw_texts(rows, generator)
    batch = TokenBatch.pack(texts)
    price = moving_price(subject.stack)
    variants: dict[str, Callable[[], Any]] = {"transformers": padded(subject, texts, compiled)}
    speedups, flips, moved_after = {}, {}, {}
    for speedup in SPEEDUPS:
        exits = draw_exits(rows, subject.layers, speedup, generator)
        name = f"lane-{speedup:g}"
        speedups[name] = rows * subject.layers / float(exits.sum())
        survival = [float((exits > layer).double().mean()) for layer in subject.config.exit_layers]
        moved = compactions(table, batch.num_tokens, subject.config.exit_layers, survival, **price)
        asked = RowSettings(
            exits.numpy(), np.ones(rows, np.int64), np.full(rows, subject.layers, np.int64)
        )
        lane = subject.lane(batch.num_tokens, rows, moved)
        still = subject.lane(batch.num_tokens, rows, frozenset())
        variants[name] = through_lane(lane, batch, asked)
        ours, theirs = (labels_of(one(batch, asked), rows) for one in (lane, still))
        flips[name] = float((ours != theirs).double().mean())
        moved_after[name] = sorted(moved)
    seconds = measure(variants, rounds)
    full = seconds["lane-1"]

    def ratio(base: list[float], name: str) -> float:
        return statistics.median(b / t for b, t in zip(base, seconds[name], strict=True))

    return {
        name: {
            "rows_per_second": rows / statistics.median(times),
            "vs_transformers": ratio(seconds["transformers"], name),
            "speedup_in_layers": speedups.get(name),
            "throughput_per_layer_speedup": ratio(full, name) / speedups[name]
            if name in speedups
            else None,
            "moved_after": moved_after.get(name),
            "label_flips_by_moving": flips.get(name),
        }
        for name, times in seconds.items()
    } | {"tokens": batch.num_tokens}


def relative_error(subject: Subject) -> float:
    """Of the last exit's logits against the same weights in fp64, in the Euclidean norm."""
    texts = draw_texts(32, torch.Generator().manual_seed(1))
    batch = TokenBatch.pack(texts)
    asked = RowSettings.uniform(32, float(subject.layers), max_layer=subject.layers)
    lane = subject.lane(batch.num_tokens, 32, frozenset())
    ours = torch.zeros(32, 2, dtype=torch.float64)
    for one in lane(batch, asked):
        ours[one.row] = one.logits.double()
    exact = subject.make_stack(torch.float64, "cpu")
    hidden = exact.embed(batch)
    for exit_layer in exact.exit_layers:
        hidden = exact.segment(exit_layer, hidden)
    expected = torch.empty_like(ours)
    expected[batch.order] = exact.exit_head(subject.layers, hidden).logits.double()
    return float((ours - expected).norm() / expected.norm())


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--quick", action="store_true", help="a tiny shape, two rounds")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    dtype = torch.bfloat16 if arguments.device == "cuda" else torch.float32
    shapes = {"tiny": TINY} if arguments.quick else SHAPES
    sizes, rounds = ((8,), 2) if arguments.quick else ((32, 128, 512), arguments.rounds)
    result: dict[str, Any] = {
        "device": device_name(arguments.device),
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("torch", "transformers", "triton")},
        "shapes": {},
    }
    for name, shape in shapes.items():
        subject = Subject(shape, arguments.device, dtype)
        table = StepTable.measured(
            lambda tokens, subject=subject: time_layer(subject, tokens),  # type: ignore[misc]
            most_tokens=256 if arguments.quick else 32768,
            repeats=3,
        )
        rows = {
            str(size): bench_rows(subject, table, size, rounds, compiled=arguments.device == "cuda")
            for size in sizes
        }
        result["shapes"][name] = {
            "layer_seconds": asdict(table),
            "knee": table.knee,
            "relative_error": relative_error(subject),
            "rows": rows,
        }
    print(text := json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
