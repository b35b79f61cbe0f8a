"""The SLO controller at work in the service: it has the clock, and whoever passes by winds it up.

Every request asks for the floor when it comes in and reports when it ends; a scrape looks, too.
There is no task of its own: what nobody asks about needs no decision, and after a silence the
controller makes up for it. Event loop only. What a floor should be is `slo.py`'s to say.
"""

import logging
import math
import time
from collections.abc import Callable
from typing import Any

from offramp_service.metrics import Metrics
from offramp_service.served_model import DescribedModel
from offramp_service.settings import Settings, SloMode
from offramp_service.slo import Load, SloController

log = logging.getLogger(__name__)


class SloWatch:
    """Drives the controller, tells metrics and `/info`; without a target it does nothing."""

    def __init__(
        self,
        settings: Settings,
        model: DescribedModel,
        load: Callable[[], Load],
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._settings, self._model, self._metrics = settings, model, metrics
        self._load, self._clock = load, clock
        self.default_speedup = model.default_speedup  # an operator may change it
        self._controller: SloController | None = None
        self._shown = False  # are the metrics of this model?
        self.aim(settings.slo_p95_ms, settings.slo_mode)

    def aim(self, target_p95_ms: float | None, mode: SloMode) -> None:
        """Keep another target from now on, or none, from where the floor is."""
        before = self._controller
        self.target_p95_ms, self.mode, self._controller = target_p95_ms, mode, None
        if target_p95_ms is not None and mode != "off":
            self._controller = SloController(target_p95_ms / 1000, self._model.floors)
            if before is not None:
                self._controller.go_on_from(before)
        self._tell()

    def show(self, before: "SloWatch | None" = None) -> None:
        """From now on the metrics tell of this one; it goes on from where the one before was."""
        if before is not None:
            before._shown = False
            if self._controller is not None and before._controller is not None:
                self._controller.go_on_from(before._controller)
        self._shown = True
        self._tell()

    def floor(self) -> float:
        """The speed-up that a request which comes in now gets at least."""
        self.look()
        return self._enforced

    def ended(self, admitted_at: float, *, answered: bool) -> None:
        """A request that was admitted is over.

        One that was not answered counts if it had waited for longer than the target by then;
        sooner it tells nothing.
        """
        if self._controller is None:
            return
        now = self._clock()
        took_s = now - admitted_at
        if answered or took_s > self._controller.target_s:
            self._controller.finished(now, took_s)
        self.look()

    def look(self) -> None:
        """Decide, if it is time to."""
        controller, now = self._controller, self._clock()
        if controller is None or not controller.due(now):
            return
        before = controller.floor
        direction = controller.decide(now, self._load())
        if direction is not None:
            self._metrics.floor_moved(direction)
            self._log_move(controller, before)
        self._tell()

    def describe(self) -> dict[str, Any]:
        """For `/info`."""
        floors = self._model.floors
        return {
            "target_p95_ms": self.target_p95_ms,
            "mode": self.mode,
            "floor": self._controller.floor if self._controller is not None else 1.0,
            "ceiling": floors[-1],
            "min_accuracy": self._settings.min_accuracy,
        }

    @property
    def _enforced(self) -> float:
        if self._controller is None or self.mode != "enforce":
            return 1.0
        return self._controller.floor

    def _tell(self) -> None:
        if not self._shown:
            return
        controller, target_ms = self._controller, self.target_p95_ms
        self._metrics.slo_set(math.nan if target_ms is None else target_ms / 1000)
        p95_s = controller.p95_s if controller is not None else None
        self._metrics.slo_seen(
            p95_s=math.nan if p95_s is None else p95_s,
            floor=controller.floor if controller is not None else 1.0,
            expected_accuracy=self._model.expected_accuracy(
                max(self.default_speedup, self._enforced)
            ),
        )

    def _log_move(self, controller: SloController, before: float) -> None:
        """The first step up and the last one down; those between are in the metrics."""
        if before == 1.0:
            text = "a p95 of %.4g ms is in danger: speed-ups below %.4g are raised (%s)"
            log.info(text, controller.target_s * 1000, controller.floor, self.mode)
        elif controller.floor == 1.0:
            log.info("the load is over: speed-ups are as asked for")
