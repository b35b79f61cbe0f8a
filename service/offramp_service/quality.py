"""The quality watch: do texts leave where calibration said they would, and what to do if not.

Counts of the last few thousand texts that asked for a speed-up through calibration: what they asked
for, and where they left. From these, whenever somebody looks: how far the shares of the exits have
moved from those that calibration gives for exactly this mix, and the speed-up achieved over the one
expected. Traffic that is easier or harder than the calibration rows shows in both.

Plain counts and arithmetic: it knows no clock, threads, metrics or HTTP, and no thresholds.
"""

import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from offramp_service.jobs import Depth

BLOCK_TEXTS, BLOCKS = 500, 10
"""The window is the block that is being filled and those before it: the last 4,501 to 5,000 texts.
Whole blocks are forgotten, so that no sum is ever taken back from and none drifts."""

SMOOTHING = 1e-4
"""Added to every share before ratios are taken, so that an exit nobody used gives no infinity."""

GAIN = 0.2
"""Of the deviation of a block that is corrected after it: noise of single blocks averages out."""
LEAST_CORRECTION, MOST_CORRECTION = 0.8, 1.25


def stability_index(expected: Sequence[float], observed: Sequence[float]) -> float:
    """Population stability index of two rows of counts with the same cells: Σ (o - e)·ln(o / e)
    over their shares. 0 for equal shares and above otherwise; 0 as well where a row is empty.

    By custom below 0.1 is no change worth a look, above 0.25 is a shift. Chance alone gives about
    (cells - 1) / texts.

    Raises:
        ValueError: the rows differ in length, or a count is negative.
    """
    if len(expected) != len(observed) or min((*expected, *observed), default=0) < 0:
        raise ValueError(f"counts must be as many and not negative, got {expected} and {observed}")
    all_expected, all_observed = sum(expected), sum(observed)
    if not all_expected or not all_observed:
        return 0.0
    pairs = [
        (one / all_expected + SMOOTHING, other / all_observed + SMOOTHING)
        for one, other in zip(expected, observed, strict=True)
    ]
    return sum((other - one) * math.log(other / one) for one, other in pairs)


@dataclass(slots=True)
class _Block:
    """Texts that followed each other: what they were expected to do, and where they left."""

    left: list[int]  # by exit layer
    expected: Counter[Depth] = field(default_factory=Counter)
    texts: int = 0


class SpeedupCorrection:
    """A slow integral controller that keeps the achieved speed-up at what was asked for.

    `factor` is what a requested speed-up is multiplied with before it is looked up in the
    calibration table. After each block of texts it moves against that block's deviation, within
    bounds, so that an error that lasts is taken out and a strange hour cannot lead far.
    """

    def __init__(self) -> None:
        self.factor = 1.0

    def learn(self, achieved: float) -> None:
        """A block of texts got `achieved` times the speed-up that was expected of it."""
        wanted = self.factor * achieved**-GAIN
        self.factor = min(max(wanted, LEAST_CORRECTION), MOST_CORRECTION)

    def apply(self, speedup: float, least: float, most: float) -> float:
        """The speed-up to look up for a requested one, within the operator's bounds. 1 asks for
        the full model, whatever others get."""
        if speedup == 1.0:
            return speedup
        return min(max(speedup * self.factor, least), most)


class ExitWatch:
    """Where the last texts left, against calibration. Owned by one thread; others may read, for
    what they read is copied in one step."""

    def __init__(
        self,
        num_layers: int,
        correction: SpeedupCorrection | None = None,
        *,
        block_texts: int = BLOCK_TEXTS,
        blocks: int = BLOCKS,
    ) -> None:
        self._num_layers, self._block_texts = num_layers, block_texts
        self._correction = correction
        self._blocks = deque([self._empty()], maxlen=blocks)

    def note(self, expected: Depth, exit_layer: int) -> None:
        """A text left that calibration expected to go so deep."""
        block = self._blocks[-1]
        block.expected[expected] += 1
        block.left[exit_layer - 1] += 1
        block.texts += 1
        if block.texts == self._block_texts:
            if self._correction is not None:
                self._correction.learn(_achieved([block]))
            self._blocks.append(self._empty())

    @property
    def texts(self) -> int:
        """In the window."""
        return sum(block.texts for block in tuple(self._blocks))

    @property
    def share_drift(self) -> float:
        """Population stability index of where texts left, against where they were expected to; 0
        while there are none."""
        blocks = tuple(self._blocks)
        left = [sum(layer) for layer in zip(*(block.left for block in blocks), strict=True)]
        return stability_index(_expected_exits(blocks, self._num_layers), left)

    @property
    def speedup_drift(self) -> float:
        """Achieved speed-up over the expected one, each a ratio of sums; 1 while there are none."""
        return _achieved(tuple(self._blocks))

    def _empty(self) -> _Block:
        return _Block([0] * self._num_layers)


def _mix(blocks: Sequence[_Block]) -> Counter[Depth]:
    """Texts by what was expected of them."""
    mix: Counter[Depth] = Counter()
    for block in blocks:
        mix.update(block.expected.copy())  # a copy is one step: its owner may be adding to it
    return mix


def _expected_exits(blocks: Sequence[_Block], num_layers: int) -> list[float]:
    """Texts that calibration has leave after each layer, for this mix."""
    exits = [0.0] * num_layers
    for depth, texts in _mix(blocks).items():
        for place, share in enumerate(depth.exit_shares):
            exits[place] += texts * share
    return exits


def _achieved(blocks: Sequence[_Block]) -> float:
    """Full passes over layers run and full passes over layers expected have the same numerator."""
    expected = sum(texts * depth.mean for depth, texts in _mix(blocks).items())
    run = sum(layer * n for block in blocks for layer, n in enumerate(block.left, start=1))
    return expected / run if run else 1.0
