"""Calibration tables: threshold → speed-up and accuracy, monotone.

A table is measured on held-out rows, never on training rows, for one policy, backend and dtype
(`calibrating.py`). It is what gives the portable knob `speedup` its meaning. Nothing here measures
or touches a file.
"""

from bisect import bisect_left
from collections.abc import Iterable
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offramp_model.policies import make_policy, never

REQUESTED_SPEEDUPS = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
"""The operating points that reports name."""

SLACK = 1e-9  # of a speed-up: a ratio of integers computed twice may differ in the last bit


class CurvePoint(BaseModel):
    """One operating point: a threshold and what it gave on the calibration rows.

    `exit_counts` has one entry for each layer 1..L. `accuracy` of a multi-label model is the
    share of rows whose whole set of labels is right.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    threshold: float
    speedup: Annotated[float, Field(ge=1.0)]
    mean_exit_layer: Annotated[float, Field(ge=1.0)]
    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    macro_f1: Annotated[float, Field(ge=0.0, le=1.0)]
    exit_counts: tuple[int, ...]


def point_for(points: tuple[CurvePoint, ...], speedup: float) -> CurvePoint:
    """The point with the smallest speed-up that is at least the requested one.

    Raises:
        ValueError: the request is below 1 or beyond the last point.
    """
    if not 1.0 <= speedup <= points[-1].speedup + SLACK:
        raise ValueError(
            f"speedup {speedup} is outside the calibrated range 1.0 to {points[-1].speedup:.4g}"
        )
    return points[bisect_left(points, speedup - SLACK, key=lambda point: point.speedup)]


class CalibrationTable(BaseModel):
    """A policy's operating points on one backend and dtype, in order of speed-up.

    The first point never leaves early. Thresholds are monotone in the speed-up, so a higher
    request can never make a row leave later.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    policy: str
    backend: str = "torch"
    dtype: str = "float32"
    split: str
    rows: Annotated[int, Field(ge=1)]
    data_fingerprint: str
    points: Annotated[tuple[CurvePoint, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        policy = make_policy(self.policy)
        speedups = [point.speedup for point in self.points]
        if speedups[0] != 1.0 or speedups != sorted(speedups):
            raise ValueError(f"{self.policy}: speed-ups must ascend from 1.0, got {speedups[:3]}…")
        if self.points[0].threshold != never(policy):
            raise ValueError(
                f"{self.policy}: the first threshold must be {never(policy)}, which never leaves "
                f"early, got {self.points[0].threshold}"
            )
        thresholds = [point.threshold for point in self.points]
        if thresholds != sorted(thresholds, reverse=policy.direction != "below"):
            raise ValueError(f"{self.policy}: thresholds must be monotone in the speed-up")
        if any(sum(point.exit_counts) != self.rows for point in self.points):
            raise ValueError(f"{self.policy}: exit counts must add up to the {self.rows} rows")
        return self

    @property
    def max_speedup(self) -> float:
        """The largest speed-up that this policy reaches on the calibration rows."""
        return self.points[-1].speedup

    def point_for(self, speedup: float) -> CurvePoint:
        """See `point_for`; 1.0 is the point that never leaves early."""
        return point_for(self.points, speedup)

    def threshold_for(self, speedup: float) -> float:
        """The raw threshold that a requested speed-up stands for."""
        return self.point_for(speedup).threshold


def reachable_speedups(points: Iterable[CurvePoint]) -> tuple[float, ...]:
    """Those of the named speed-ups that a curve reaches."""
    largest = max(point.speedup for point in points)
    return tuple(s for s in REQUESTED_SPEEDUPS if s <= largest + SLACK)
