"""Measures what a layer costs: a `CostTable` of the real stack, on this machine, at start.

It runs the stretch to the first exit, exit head included, on made-up tokens of growing number. It
knows tensors and the clock, and nothing about queues or requests. Call it in the engine's thread,
after the warm-up.
"""

import time
from collections.abc import Iterator
from statistics import median

import torch

from offramp_model.layer_loop import LayerStack
from offramp_model.rows import Encoding, TokenBatch
from offramp_service.cost import GRID, CostTable

# Texts are made of so many tokens, where the count allows it.
_TEXT = 32
# Rounds over the grid; the median of a point's times stands in the table.
_ROUNDS = 5


def measure_cost(
    stack: LayerStack,
    *,
    max_tokens: int,
    max_length: int,
    device: str = "cpu",
    limit_s: float = 1.5,
) -> CostTable:
    """Medians over a few rounds, in about `limit_s` seconds.

    A stack that is too slow for all of it gets fewer rounds, or in the first round fewer points;
    beyond its last point a table grows in proportion.
    """
    end = time.perf_counter() + limit_s
    times: dict[int, list[float]] = {}
    with torch.inference_mode():
        for tokens in _plan(max_tokens):
            if times and time.perf_counter() > end:
                break
            batch = TokenBatch.pack(_texts(tokens, min(_TEXT, max_length)), device)
            times.setdefault(tokens, []).append(_seconds(stack, batch))
    return CostTable.from_measurements((tokens, median(some)) for tokens, some in times.items())


def _plan(max_tokens: int) -> Iterator[int]:
    """The grid up to the budget, the budget itself, a few times over."""
    grid = [*(tokens for tokens in GRID if tokens < max_tokens), max_tokens]
    for _ in range(_ROUNDS):
        yield from grid


def _texts(tokens: int, length: int) -> list[Encoding]:
    lengths = [length] * (tokens // length) + [tokens % length] * (tokens % length > 0)
    return [Encoding([0] * one, [0] * one) for one in lengths]


def _seconds(stack: LayerStack, batch: TokenBatch) -> float:
    """One layer of the stretch to the first exit."""
    exit_layer = stack.exit_layers[0]
    hidden = stack.embed(batch)
    started = time.perf_counter()
    stack.exit_head(exit_layer, stack.segment(exit_layer, hidden))
    if batch.order.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / exit_layer
