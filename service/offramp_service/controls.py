"""From what a request asks for to the threshold and bounds of its texts.

The order of precedence is the same on every door: a body field wins over a header, a header over
the server's default; at one level a raw `threshold` wins over a `speedup`, which may also be said
as `max_accuracy_drop`. All controls are checked here, against the checkpoint that is served. It
knows nothing about doors or bodies.
"""

import math
import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from offramp_model.calibration import CalibrationTable, CurvePoint
from offramp_model.policies import never, threshold_range
from offramp_service.errors import InvalidInput
from offramp_service.jobs import LEAST_PRIORITY, MOST_PRIORITY, Controls, Depth
from offramp_service.quality import SpeedupCorrection
from offramp_service.schemas.shared import Asked
from offramp_service.served_model import DescribedModel, accurate_speedups

SPEEDUP_HEADER = "X-Speedup"
THRESHOLD_HEADER = "X-Exit-Threshold"
DEADLINE_HEADER = "X-Deadline-Ms"

ExitCounts = tuple[int, ...]
"""Calibration rows that left after each layer 1..L."""

_ROUNDING = 1e-9  # of accuracies, which are ratios of row counts

_DECIMAL = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?")


@dataclass(frozen=True, slots=True)
class _Aim:
    """A threshold, where calibration rows leave at it, and the speed-ups if that is how it was
    said: asked for, and given."""

    threshold: float
    exit_counts: ExitCounts
    speedup: float | None = None
    effective: float | None = None


class ControlDesk:
    """Resolves controls for one served model; the server waits `longest_ms` for anybody.

    `floor` says to which speed-up requests are raised at this moment that ask for a smaller one.
    """

    def __init__(
        self,
        model: DescribedModel,
        longest_ms: int,
        floor: Callable[[], float] = lambda: 1.0,
        correction: SpeedupCorrection | None = None,
    ) -> None:
        self._model, self._longest_ms = model, longest_ms
        self._floor, self._correction = floor, correction
        self.default_speedup = model.default_speedup  # an operator may change it
        self._never = never(model.policy)
        self._thresholds = threshold_range(model.policy, model.config)
        self._to_the_end: ExitCounts = (*[0] * (model.num_layers - 1), 1)

    @property
    def correction(self) -> float:
        """What requested speed-ups are multiplied with."""
        return self._correction.factor if self._correction is not None else 1.0

    def check_speedup(self, speedup: float, param: str) -> None:
        """May it be asked for?

        Raises:
            InvalidInput: it may not.
        """
        model = self._model
        if not model.min_speedup <= speedup <= model.max_speedup:  # false for NaN as well
            raise InvalidInput(
                f"{param} is {speedup:g}, allowed is {model.min_speedup:g} to "
                f"{_rounded_down(model.max_speedup)} (calibrated for policy {model.policy.name})",
                param=param,
            )

    def resolve(self, asked: Asked, headers: Mapping[str, str]) -> Controls:
        """The controls of one request.

        Raises:
            InvalidInput: a value is out of range; names the field or header.
        """
        min_layer, max_layer = self._bounds(asked)
        aim = self._aim(asked, headers)
        return Controls(
            threshold=aim.threshold,
            min_layer=min_layer,
            max_layer=max_layer,
            depth=_depth(aim.exit_counts, min_layer, max_layer),
            speedup=aim.speedup,
            deadline_s=self._deadline(asked.deadline_ms, headers),
            priority=_priority(asked.priority),
            effective_speedup=aim.effective,
            expected=self._expected(aim.effective, min_layer, max_layer),
        )

    def _expected(self, speedup: float | None, min_layer: int, max_layer: int) -> Depth | None:
        """How deep calibration has texts go at a speed-up, if it was asked."""
        table = self._model.table
        if speedup is None or speedup == 1.0 or table is None:
            return None
        return _depth(table.point_for(speedup).exit_counts, min_layer, max_layer)

    def _deadline(self, deadline_ms: float | None, headers: Mapping[str, str]) -> float | None:
        param = "deadline_ms"
        if deadline_ms is None and (text := headers.get(DEADLINE_HEADER)) is not None:
            deadline_ms, param = _number(text, DEADLINE_HEADER), DEADLINE_HEADER
        if deadline_ms is None:
            return None
        if not 1 <= deadline_ms <= self._longest_ms:
            raise InvalidInput(
                f"{param} is {deadline_ms!s:.40}, allowed is 1 to {self._longest_ms}", param=param
            )
        return deadline_ms / 1000

    def _aim(self, asked: Asked, headers: Mapping[str, str]) -> _Aim:
        if asked.threshold is not None:
            return self._at_threshold(asked.threshold, "threshold")
        if asked.speedup is not None:
            if asked.max_accuracy_drop is not None:
                raise InvalidInput(
                    "speedup and max_accuracy_drop exclude each other; allowed is one of them",
                    param="max_accuracy_drop",
                )
            return self._at_speedup(asked.speedup, "speedup")
        if asked.max_accuracy_drop is not None:
            # Whoever names an accuracy keeps it, whatever the load.
            speedup = self._within_drop(asked.max_accuracy_drop)
            return self._at_speedup(speedup, "speedup", exactly=True)
        if (text := headers.get(THRESHOLD_HEADER)) is not None:
            return self._at_threshold(_number(text, THRESHOLD_HEADER), THRESHOLD_HEADER)
        if (text := headers.get(SPEEDUP_HEADER)) is not None:
            return self._at_speedup(_number(text, SPEEDUP_HEADER), SPEEDUP_HEADER)
        return self._at_speedup(self.default_speedup, "speedup")

    def _within_drop(self, drop: float) -> float:
        """The largest speed-up that may be asked for and whose accuracy, on the rows of
        calibration, is at most `drop` below that of full depth."""
        if not 0.0 <= drop <= 1.0:  # false for NaN as well
            raise InvalidInput(
                f"max_accuracy_drop is {drop:g}, allowed is 0 to 1", param="max_accuracy_drop"
            )
        model = self._model
        if model.table is None:
            return model.min_speedup
        least = model.expected_accuracy(1.0) - drop - _ROUNDING
        fastest = accurate_speedups(model.table, model.max_speedup, least)[-1]
        if fastest < model.min_speedup:
            raise InvalidInput(
                f"max_accuracy_drop {drop:g} allows no speed-up from {model.min_speedup:g} on, "
                "which is the least that is served",
                param="max_accuracy_drop",
            )
        return fastest

    def _at_speedup(self, speedup: float, param: str, *, exactly: bool = False) -> _Aim:
        """`exactly`: neither raised under load nor corrected."""
        model = self._model
        self.check_speedup(speedup, param)
        effective = speedup if exactly else max(speedup, self._floor())
        if effective == 1.0 or model.table is None:
            return _Aim(self._never, self._to_the_end, speedup, effective)
        # Who was raised is not corrected: the floor keeps to an accuracy.
        keeps = exactly or effective != speedup
        looked_up = effective if keeps else self._corrected(speedup)
        point = model.table.point_for(looked_up)
        return _Aim(point.threshold, point.exit_counts, speedup, effective)

    def _corrected(self, speedup: float) -> float:
        """The speed-up to look up, so that the one that was asked for is what comes out."""
        if self._correction is None:
            return speedup
        return self._correction.apply(speedup, self._model.min_speedup, self._model.max_speedup)

    def _at_threshold(self, threshold: float, param: str) -> _Aim:
        """A raw threshold is the client's own, whatever the load."""
        least, most = self._thresholds
        if not least <= threshold <= most:
            raise InvalidInput(
                f"{param} is {threshold:g}, allowed is {least:g} to {most:g} "
                f"(policy {self._model.policy.name})",
                param=param,
            )
        table = self._model.table
        exit_counts = _point_at(table, threshold).exit_counts if table else self._to_the_end
        return _Aim(threshold, exit_counts)

    def _bounds(self, asked: Asked) -> tuple[int, int]:
        """Layer bounds: `max_layer` is a promise, so it falls to an exit at or before it; who may
        not leave before `min_layer` runs on to an exit at or after it."""
        depth, exits = self._model.num_layers, self._model.config.exit_layers
        for name, layer in (("min_layer", asked.min_layer), ("max_layer", asked.max_layer)):
            if layer is not None and not 1 <= layer <= depth:
                raise InvalidInput(f"{name} is {layer!s:.40}, allowed is 1 to {depth}", param=name)
        low = 1 if asked.min_layer is None else asked.min_layer
        high = depth if asked.max_layer is None else asked.max_layer
        if low > high:
            raise InvalidInput(f"min_layer {low} is above max_layer {high}", param="min_layer")
        exits_before = bisect_right(exits, high)
        if not exits_before or exits[exits_before - 1] < low:
            raise InvalidInput(
                f"there is no exit in layers {low} to {high}; exits are after layers "
                f"{', '.join(map(str, exits))}",
                param="max_layer",
            )
        return exits[bisect_left(exits, low)], exits[exits_before - 1]


def full_depth(model: DescribedModel) -> Controls:
    """Those of a text that is to run to the end, whatever its exits say."""
    layers = model.num_layers
    return Controls(never(model.policy), 1, layers, Depth.full(layers))


@lru_cache(maxsize=1024)
def _depth(exit_counts: tuple[int, ...], min_layer: int, max_layer: int) -> Depth:
    """One object for each class, because its sums are kept in it."""
    return Depth.of(exit_counts, min_layer, max_layer)


def _point_at(table: CalibrationTable, threshold: float) -> CurvePoint:
    """The point near a raw threshold; points run from the strictest on."""
    points = table.points[1:]
    if not points:
        return table.points[0]
    rising = points[-1].threshold >= points[0].threshold
    sign = 1.0 if rising else -1.0
    index = bisect_left(points, sign * threshold, key=lambda point: sign * point.threshold)
    return points[min(index, len(points) - 1)]


def _priority(priority: int) -> int:
    if not LEAST_PRIORITY <= priority <= MOST_PRIORITY:
        raise InvalidInput(
            f"priority is {priority!s:.40}, allowed is {LEAST_PRIORITY} to {MOST_PRIORITY}",
            param="priority",
        )
    return priority


def _number(text: str, header: str) -> float:
    """A header's decimal number; `nan`, `inf` and the like are words, not numbers."""
    number = float(text) if _DECIMAL.fullmatch(text.strip()) else math.nan
    if not math.isfinite(number):
        raise InvalidInput(f"{header} is {text[:40]!r}, allowed is a number", param=header)
    return number


def _rounded_down(speedup: float) -> str:
    """Rounded down, so that the limit a message names can be asked for."""
    return f"{math.floor(speedup * 1000) / 1000:g}"
