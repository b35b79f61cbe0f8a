"""Why the encoder packs tokens and attends per run of one length: the layouts it was chosen from.

All layouts run the same layers of the same checkpoint on the same texts, interleaved, without
exits. What differs is where padding is computed:

    padded         every batch padded to its longest text, attention masked
    groups-G       sorted by length, cut into padded groups of G texts
    packed-padded  linear layers on packed tokens, attention padded per batch
    packed-runs    linear layers on packed tokens, attention per run of one length, no mask
                   (`offramp_model.encoder`)
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from bench_engine import machine
from torch import Tensor

from offramp_model import Encoding, TokenBatch, load_checkpoint
from offramp_model.encoder import PackedEncoder
from offramp_training.data import load_split

Layout = Callable[[list[Encoding]], None]


def rest_of_layer(layer, x: Tensor, context: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    x = layer.attention_norm(layer.attention_out(context) + x)
    return layer.ffn_norm(layer.ffn_out(layer.activation(layer.ffn_in(x))) + x)


def attend_padded(layer, qkv: Tensor, mask: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
    """[B, S, 3H] with mask [B, S] → [B, S, H]."""
    q, k, v = qkv.unflatten(-1, (3, layer.num_heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None])
    return attended.transpose(1, 2).flatten(2)


def pad_mask(lengths: Tensor) -> Tensor:
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]


def groups(stack: PackedEncoder, size: int, *, by_length: bool) -> Layout:
    def run(encodings: list[Encoding]) -> None:
        ordered = sorted(encodings, key=len) if by_length else encodings
        for start in range(0, len(ordered), size):
            group = ordered[start : start + size]
            mask = pad_mask(torch.tensor([len(one) for one in group]))
            x = torch.zeros(*mask.shape, stack.config.hidden_size)
            x[mask] = stack.embed(TokenBatch.pack(group)).values
            for layer in stack._layers:
                x = rest_of_layer(layer, x, attend_padded(layer, layer.qkv(x), mask))

    return run


def packed_padded(stack: PackedEncoder) -> Layout:
    def run(encodings: list[Encoding]) -> None:
        hidden = stack.embed(TokenBatch.pack(encodings))
        mask, x = pad_mask(hidden.lengths), hidden.values
        for layer in stack._layers:
            qkv = torch.zeros(*mask.shape, 3 * x.shape[1])
            qkv[mask] = layer.qkv(x)
            x = rest_of_layer(layer, x, attend_padded(layer, qkv, mask)[mask])

    return run


def packed_runs(stack: PackedEncoder) -> Layout:
    def run(encodings: list[Encoding]) -> None:
        hidden = stack.embed(TokenBatch.pack(encodings))
        for exit_layer in stack.exit_layers:
            hidden = stack.segment(exit_layer, hidden)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--rows", type=int, default=640)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    checkpoint = load_checkpoint(arguments.checkpoint)
    stack = checkpoint.stack()
    texts = load_split(arguments.data, arguments.split).inputs[: arguments.rows]
    encodings = checkpoint.tokenizer().encode(texts)
    layouts = {
        "padded": groups(stack, 1 << 30, by_length=False),
        "groups-8": groups(stack, 8, by_length=True),
        "groups-4": groups(stack, 4, by_length=True),
        "packed-padded": packed_padded(stack),
        "packed-runs": packed_runs(stack),
    }
    sizes: dict[int, dict[str, float]] = {}
    result = {"command": " ".join(["python", *sys.argv]), "machine": machine(), "sizes": sizes}
    for size in (32, 8, 1):
        batches = [encodings[i : i + size] for i in range(0, len(encodings), size)]
        seconds: dict[str, list[float]] = {name: [] for name in layouts}
        with torch.inference_mode():
            for _ in range(arguments.rounds):
                for name, run in layouts.items():
                    started = time.perf_counter()
                    for batch in batches:
                        run(batch)
                    seconds[name].append(time.perf_counter() - started)
        relative = {
            name: statistics.median(p / t for p, t in zip(seconds["padded"], times, strict=True))
            for name, times in seconds.items()
        }
        sizes[size] = relative
        print(f"batches of {size}:", {name: round(value, 2) for name, value in relative.items()})
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
