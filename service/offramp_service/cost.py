"""What a layer costs, as measured, and the rules that follow from it.

A `CostTable` says how many seconds one layer takes for so many tokens. It is measured on the real
stack (`stopwatch.py`) or written down for a simulation. Arithmetic only: no tensors, no clock, no
queue; `scheduler.py` asks it what a step would cost.
"""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

GRID = (
    *(16, 32, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192),
    *(12_288, 16_384, 24_576, 32_768, 49_152, 65_536),
)
"""Token counts at which a table is measured."""

_FLAT = 1.15
"""Up to so many times the smallest cost, more tokens count as free: below the knee."""

MIN_MERGING_KNEE = 128
"""Merging groups can pay only if two of them together stay below the knee. With a knee of less
than one row of GEMM tiles, that is a few texts, and the flat part is the call, not the device."""


@dataclass(frozen=True)
class CostTable:
    """Seconds that one layer takes, by tokens: linear between points, never falling.

    Below the first point the cost is the first one's; beyond the last it grows in proportion.
    """

    tokens: tuple[int, ...]
    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.seconds):
            raise ValueError(
                f"a cost table needs as many seconds as token counts, and at least one: "
                f"got {len(self.tokens)} and {len(self.seconds)}"
            )
        if self.tokens[0] < 1 or any(low >= high for low, high in pairwise(self.tokens)):
            raise ValueError(f"token counts must be positive and ascend, got {self.tokens}")
        if not self.seconds[0] >= 0 or any(low > high for low, high in pairwise(self.seconds)):
            raise ValueError(f"seconds must not be negative or fall, got {self.seconds}")

    @classmethod
    def from_measurements(cls, points: Iterable[tuple[int, float]]) -> "CostTable":
        """The never-falling table closest to (tokens, seconds) as measured (least squares)."""
        ordered = sorted(points)
        return cls(
            tuple(tokens for tokens, _ in ordered),
            tuple(_isotonic([seconds for _, seconds in ordered])),
        )

    @property
    def known(self) -> bool:
        """False for `UNKNOWN_COST`, with which nothing can be predicted."""
        return self.seconds[-1] > 0

    def at(self, tokens: float) -> float:
        """Seconds of one layer over so many tokens; none cost nothing."""
        if tokens <= 0:
            return 0.0
        right = bisect_left(self.tokens, tokens)
        if right == 0:
            return self.seconds[0]
        if right == len(self.tokens):
            return self.seconds[-1] * tokens / self.tokens[-1]
        low, high = self.tokens[right - 1], self.tokens[right]
        share = (tokens - low) / (high - low)
        return self.seconds[right - 1] * (1 - share) + self.seconds[right] * share

    @property
    def knee(self) -> float:
        """T*: the most tokens that still cost about as much as the fewest."""
        limit = _FLAT * self.seconds[0]
        index = max(i for i, seconds in enumerate(self.seconds) if seconds <= limit)
        if index + 1 == len(self.tokens):
            return float(self.tokens[index])
        share = (limit - self.seconds[index]) / (self.seconds[index + 1] - self.seconds[index])
        return self.tokens[index] + share * (self.tokens[index + 1] - self.tokens[index])

    @property
    def merging_can_pay(self) -> bool:
        """Is there a flat part wide enough for two groups to share? False where cost is linear."""
        return self.known and self.knee >= MIN_MERGING_KNEE


UNKNOWN_COST = CostTable((1,), (0.0,))
"""Nothing was measured: everything seems free, so nothing is refused or moved for its cost."""


def compaction_pays(
    cost: CostTable,
    *,
    tokens: float,
    tokens_after: float,
    layers: float,
    launch_s: float,
    per_token_s: float,
) -> bool:
    """Does dropping the rows that left save more than it costs?

    `layers` are those until the next chance to compact. Below the knee nothing is saved, and the
    rule says no by itself.
    """
    saved = layers * (cost.at(tokens) - cost.at(tokens_after))
    return saved > launch_s + per_token_s * tokens_after


def waiting_to_merge_pays(
    cost: CostTable,
    *,
    tokens: float,
    texts: int,
    younger_tokens: float,
    younger_texts: int,
    layers_behind: float,
    layers_ahead: float,
    slack_s: float,
) -> bool:
    """Should a group wait until a younger one, so many layers behind, has caught up?

    In the flat part the younger group's texts save `layers_ahead` turns and the older one's lose
    `layers_behind`. Where cost is linear nothing is saved: hence only below the knee.
    """
    return (
        tokens + younger_tokens <= cost.knee
        and younger_texts * layers_ahead > texts * layers_behind
        and slack_s >= layers_behind * cost.at(younger_tokens)
    )


def _isotonic(values: Sequence[float]) -> list[float]:
    """Pool neighbours that fall into their mean, until none falls."""
    pools: list[tuple[float, int]] = []  # mean, members
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (left, left_size), (right, right_size) = pools[-2:]
            size = left_size + right_size
            pools[-2:] = [((left * left_size + right * right_size) / size, size)]
    return [mean for mean, size in pools for _ in range(size)]
