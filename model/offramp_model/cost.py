"""What a layer costs by its live tokens, as measured, and what pays by that: compaction, merging.

A step table instead of a formula: on a GPU a layer takes the same time for any few tokens (below
the *knee*) and then grows in steps. Knows nothing about devices, rows or how it was measured.
"""

import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median
from typing import Self

import numpy as np

GRID = (16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 16384, 32768)
"""Tokens at which a layer is timed; a measurement stops at what its device is to hold."""
KNEE_SLACK = 1.15


@dataclass(frozen=True)
class StepTable:
    """Seconds of one layer at so many live tokens: ascending, never falling, straight between."""

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise ValueError(
                f"a step table needs as many seconds as tokens and at least one, got "
                f"{len(self.tokens)} and {len(self.seconds)}"
            )
        if list(self.tokens) != sorted(set(self.tokens)) or self.tokens[0] < 1:
            raise ValueError(f"tokens must ascend from 1 on, got {self.tokens}")
        if self.seconds[0] <= 0 or list(self.seconds) != sorted(self.seconds):
            raise ValueError(f"seconds must be above 0 and never fall, got {self.seconds}")

    @classmethod
    def measured(
        cls,
        time_layer: Callable[[int], float],
        *,
        most_tokens: int,
        repeats: int = 5,
        budget_s: float = float("inf"),
    ) -> Self:
        """Medians of `time_layer(tokens)` seconds over the grid, made monotone: more tokens cannot
        be cheaper, so what looks so is noise. Ends early, after two points at least, where the next
        one would likely take it past `budget_s` seconds."""
        tokens = [count for count in GRID if count <= most_tokens] or [most_tokens]
        medians: list[float] = []
        started = before = time.perf_counter()
        for count in tokens:
            now = time.perf_counter()
            # The grid about doubles, and so may the time of a point.
            if len(medians) >= 2 and now - started + 2 * (now - before) > budget_s:
                break
            before = now
            medians.append(median(time_layer(count) for _ in range(repeats)))
        rising: list[float] = np.maximum.accumulate(medians).tolist()
        return cls(tuple(tokens[: len(rising)]), tuple(rising))

    def __call__(self, tokens: float) -> float:
        """Seconds of a layer. Past the last point it goes on as between the last two."""
        if tokens <= 0:
            return 0.0
        right = bisect_left(self.tokens, tokens)
        if right == 0 or len(self.tokens) == 1:
            return self.seconds[0]
        right = min(right, len(self.tokens) - 1)
        x0, x1 = self.tokens[right - 1 : right + 1]
        y0, y1 = self.seconds[right - 1 : right + 1]
        return y0 + (tokens - x0) * (y1 - y0) / (x1 - x0)

    @cached_property
    def knee(self) -> int:
        """The most tokens that take no longer than a few (15 % at most): below it dropping rows
        saves no time."""
        free = [
            count
            for count, seconds in zip(self.tokens, self.seconds, strict=True)
            if seconds <= KNEE_SLACK * self.seconds[0]
        ]
        return free[-1]

    @cached_property
    def efficient(self) -> int:
        """The fewest tokens that cost nearly as little each (15 % more at most) as any number."""
        each = [s / count for s, count in zip(self.seconds, self.tokens, strict=True)]
        limit = KNEE_SLACK * min(each)
        return next(t for t, one in zip(self.tokens, each, strict=True) if one <= limit)

    def moving_pays(
        self,
        *,
        layers: int,
        carried: float,
        left: float,
        launch_seconds: float,
        seconds_per_token: float,
    ) -> bool:
        """Is it worth its price to move `left` of the `carried` tokens together, with so many
        layers to go before the next chance?

        layers · [t(T) − t(T')] > c₀ + c₁·T', with T carried and T' left.
        """
        gain = layers * (self(carried) - self(left))
        return gain > launch_seconds + seconds_per_token * left

    def saved_together(self, tokens: float, other: float) -> float:
        """Seconds of a layer that two batches save as one; about 0 where cost is linear."""
        return self(tokens) + self(other) - self(tokens + other)

    def waiting_pays(
        self,
        *,
        tokens: float,
        rows: int,
        younger_tokens: float,
        others: int,
        layers_behind: float,
        layers_ahead: float,
        slack_s: float,
    ) -> bool:
        """Should a batch wait between two layers until a younger one has caught up and joins it?

        Its own `rows` lose the time in which the younger one runs `layers_behind`. The `others`,
        the younger one's rows and those still queued, all come earlier by what the two save in the
        `layers_ahead` that they run as one. In the flat part of the table, with nobody queued, this
        is the rule "younger rows · layers ahead > rows · layers behind"; where cost is linear
        nothing is saved. And only if the older batch has the time.
        """
        wait_s = layers_behind * self(younger_tokens)
        gain_s = layers_ahead * self.saved_together(tokens, younger_tokens)
        return slack_s >= wait_s and others * gain_s > rows * wait_s


def compactions(
    table: StepTable,
    tokens: int,
    exit_layers: Sequence[int],
    survival: Sequence[float],
    *,
    launch_seconds: float,
    seconds_per_token: float,
) -> frozenset[int]:
    """The exits after which moving the survivors together is worth its price.

    See `StepTable.moving_pays`; the next chance is the next exit.

    Args:
        table: cost of a layer.
        tokens: of the batch at its start.
        exit_layers: 1-based, ascending, the last is the model's.
        survival: share of the tokens that goes on after each exit, not rising; 0 after the last.
        launch_seconds: c₀, of plan and gather.
        seconds_per_token: c₁, of copying one token's row.

    Raises:
        ValueError: `survival` does not fit the exits.
    """
    shares = list(survival)
    if len(shares) != len(exit_layers) or shares != sorted(shares, reverse=True):
        raise ValueError(
            f"survival must fall over the {len(exit_layers)} exits, one share each, got {shares}"
        )
    price = {"launch_seconds": launch_seconds, "seconds_per_token": seconds_per_token}
    chosen, carried = set(), float(tokens)
    for place, exit_layer in enumerate(exit_layers[:-1]):
        left = tokens * shares[place]
        layers = exit_layers[place + 1] - exit_layer
        if left > 0 and table.moving_pays(layers=layers, carried=carried, left=left, **price):
            chosen.add(exit_layer)
            carried = left
    return frozenset(chosen)
