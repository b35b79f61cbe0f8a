"""Whole passes without early exits over made-up texts: to warm a device up, and to time its layers.

Knows how to fill a batch, and nothing about what runs it or what the figures are for.
"""

import time
from collections.abc import Callable, Iterable

from offramp_model.layer_loop import Leavers
from offramp_model.rows import Encoding, RowSettings, TokenBatch

TIMED_LENGTH = 32  # tokens of the texts whose passes are timed

Run = Callable[[TokenBatch, RowSettings], Iterable[Leavers]]
"""A batch and what its rows ask for → the rows that leave at each exit."""


def run_through(run: Run, depth: int, batch: TokenBatch) -> None:
    """Every row through all `depth` layers; comes back when the device is done."""
    # A bound at the last layer and a threshold of NaN, at which nobody leaves.
    asked = RowSettings.uniform(batch.num_rows, float("nan"), max_layer=depth)
    for left in run(batch, asked):
        assert left.rows_run == batch.num_rows
        left.row.tolist()  # waits for the device


def layer_timer(run: Run, depth: int, *, longest: int, most_rows: int) -> Callable[[int], float]:
    """tokens → seconds of a layer: of a whole pass, embedding and heads included, over its depth.

    Texts have `TIMED_LENGTH` tokens, fewer where `longest` is less, and more only where
    `most_rows` of them are too few.
    """

    def time_layer(tokens: int) -> float:
        count = min(max(1, tokens // min(TIMED_LENGTH, longest)), most_rows)
        batch = uniform_batch(count, min(tokens // count, longest))
        started = time.perf_counter()
        run_through(run, depth, batch)
        return (time.perf_counter() - started) / depth

    return time_layer


def uniform_batch(count: int, length: int) -> TokenBatch:
    """So many texts of one length; which tokens they have makes no difference to the time."""
    return TokenBatch.pack([Encoding([0] * length, [0] * length)] * count)
