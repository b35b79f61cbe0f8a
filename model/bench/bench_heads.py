"""What each form of pooling costs in serving: rows per second of the packed encoder at full depth.

Random weights of MiniLM's shape (6 layers of 384) with an exit after each layer; every exit head
runs. The forms take turns batch by batch on the same texts; the figure that counts is the time of
`mean` over a form's time within a turn, its median over the turns. Beside it the time of all exit
heads alone, which needs a quiet machine less. A length of `mixed` gives each row of a batch a
length of its own, which costs one call of a pooling per row.

    python model/bench/bench_heads.py --json heads.json
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from offramp_model import (
    Encoding,
    MultiExitConfig,
    RowSettings,
    TokenBatch,
    layer_loop,
    make_policy,
    never,
    start_rows,
)
from offramp_model.config import Pooling
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads

LAYERS, WIDTH, VOCAB = 6, 384, 30522
BACKBONE = {
    "model_type": "bert",
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": 12,
    "intermediate_size": 4 * WIDTH,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}
SHAPES = {
    "word_embeddings.weight": (VOCAB, WIDTH),
    "position_embeddings.weight": (512, WIDTH),
    "token_type_embeddings.weight": (2, WIDTH),
    "intermediate.dense.weight": (4 * WIDTH, WIDTH),
    "intermediate.dense.bias": (4 * WIDTH,),
    "attention.output.dense.weight": (WIDTH, WIDTH),
    "output.dense.weight": (WIDTH, 4 * WIDTH),
}


def random_tensor(name: str) -> Tensor:
    """A weight of the backbone, whatever its name asks for."""
    for ending, shape in SHAPES.items():
        if name.endswith(ending):
            return torch.randn(shape) * 0.02
    if "LayerNorm" in name:
        return torch.ones(WIDTH) if name.endswith("weight") else torch.zeros(WIDTH)
    return torch.randn((WIDTH, WIDTH) if name.endswith("weight") else (WIDTH,)) * 0.02


def stack_with(pooling: Pooling, labels: int, device: str, dtype: torch.dtype) -> PackedEncoder:
    torch.manual_seed(0)
    config = MultiExitConfig(
        num_layers=LAYERS,
        hidden_size=WIDTH,
        exit_layers=tuple(range(1, LAYERS + 1)),
        labels=tuple(f"label {number}" for number in range(labels)),
        pooling=pooling,
        max_length=512,
    )
    heads = ExitHeads(config)
    for parameter in heads.poolings.parameters():
        torch.nn.init.normal_(parameter)
    return PackedEncoder(BACKBONE, random_tensor, heads, config, device=device, dtype=dtype)


def batch_of(rows: int, length: str) -> list[Encoding]:
    lengths = range(4, 4 + 2 * rows, 2) if length == "mixed" else [int(length)] * rows
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(1000, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    return [Encoding(row, [0] * len(row)) for row in ids]


def full_depth(stack: PackedEncoder, encodings: list[Encoding]) -> Callable[[], None]:
    """One batch through the layer loop; nobody leaves early."""
    policy = make_policy("full_depth")
    settings = RowSettings.uniform(len(encodings), never(policy), max_layer=LAYERS)
    batch = TokenBatch.pack(encodings)

    def run() -> None:
        for leavers in layer_loop(stack, start_rows(stack, batch, policy, settings), policy):
            leavers.logits.cpu()

    return run


def heads_alone(stack: PackedEncoder, encodings: list[Encoding]) -> Callable[[], None]:
    """What every exit head adds to one batch."""
    hidden = stack.embed(TokenBatch.pack(encodings))

    def run() -> None:
        for exit_layer in stack.exit_layers:
            stack.exit_head(exit_layer, hidden).logits.cpu()

    return run


def measure(runs: dict[Pooling, Callable[[], None]], repeats: int) -> dict[Pooling, list[float]]:
    """Seconds per turn and form, after two turns to warm up; each turn starts with another form."""
    seconds: dict[Pooling, list[float]] = {form: [] for form in runs}
    forms = list(runs)
    for turn in range(-2, repeats):
        first = turn % len(forms)
        for form in forms[first:] + forms[:first]:
            started = time.perf_counter()
            runs[form]()
            if turn >= 0:
                seconds[form].append(time.perf_counter() - started)
    return seconds


def report(
    seconds: dict[Pooling, list[float]],
    heads: dict[Pooling, list[float]],
    length: str,
    rows: int,
) -> Iterator[dict[str, float | str]]:
    for form, times in seconds.items():
        ratios = [mean / t for mean, t in zip(seconds["mean"], times, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        yield {
            "pooling": form,
            "length": length,
            "rows_per_second": rows / statistics.median(times),
            "throughput_vs_mean": statistics.median(ratios),
            "quartile_low": low,
            "quartile_high": high,
            "heads_ms": 1000 * statistics.median(heads[form]),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", nargs="+", default=["16", "64", "mixed"])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--labels", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=100, help="at least 2")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    forms: tuple[Pooling, ...] = get_args(Pooling)
    stacks = {
        form: stack_with(form, arguments.labels, arguments.device, getattr(torch, arguments.dtype))
        for form in forms
    }
    table = []
    print(f"{'length':>8} {'pooling':12} {'rows/s':>8} {'vs mean':>8}  quartiles   heads ms")
    for length in arguments.lengths:
        texts = batch_of(arguments.batch_size, length)
        seconds, heads = (
            measure(
                {form: part(stack, texts) for form, stack in stacks.items()},
                arguments.repeats,
            )
            for part in (full_depth, heads_alone)
        )
        for row in report(seconds, heads, length, arguments.batch_size):
            table.append(row)
            print(
                f"{row['length']:>8} {row['pooling']:12} {row['rows_per_second']:8.0f} "
                f"{row['throughput_vs_mean']:8.3f}  {row['quartile_low']:.3f}"
                f"-{row['quartile_high']:.3f} {row['heads_ms']:9.2f}"
            )
    if arguments.json:
        result = {
            "command": " ".join(["python", *sys.argv]),
            "machine": {
                "threads": torch.get_num_threads(),
                "python": platform.python_version(),
                **{name: version(name) for name in ("torch", "offramp")},
            },
            **{name: getattr(arguments, name) for name in ("batch_size", "repeats", "device")},
            "dtype": arguments.dtype,
            "forms": table,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
