"""Turns on one device: of several models' engines, one computes at a time, or as many threads as
share the device, and none goes short.

Each model has a thread of its own, or several of which each takes its share of the device; whoever
has used it least is next (start-time fair queueing in seconds of use). A model that was idle for
long has no claim to what it did not use. A second counts the same whatever the share: all models on
a device have as many threads. It knows threads and seconds, and nothing of what is computed.
"""

import threading
import time
from collections.abc import Callable
from fractions import Fraction
from types import TracebackType


class Device:
    """What the models share."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._taken: list[Turn] = []
        self._reached = 0.0  # seconds that whoever came last had used when its turn began

    def turn(self, sharing: int = 1) -> "Turn":
        """For one more thread; so many of its model's fill the device."""
        return Turn(self, sharing)

    def _take(self, turn: "Turn") -> None:
        with self._changed:
            turn.used_s = max(turn.used_s, self._reached)
            self._waiting.append(turn)
            while not self._fits(turn) or self._first is not turn:
                self._changed.wait()
            self._waiting.remove(turn)
            self._taken.append(turn)
            self._reached = turn.used_s
            self._changed.notify_all()  # who comes after it may fit beside it
        turn.began = self._clock()

    @property
    def _first(self) -> "Turn":
        return min(self._waiting, key=lambda one: one.used_s)

    def _fits(self, turn: "Turn") -> bool:
        return sum(Fraction(1, one.sharing) for one in (*self._taken, turn)) <= 1

    def _give_back(self, turn: "Turn") -> None:
        with self._changed:
            turn.used_s += self._clock() - turn.began
            self._taken.remove(turn)
            self._changed.notify_all()


class Turn:
    """One thread's claim: a context in which it has its part of the device to itself."""

    def __init__(self, device: Device, sharing: int) -> None:
        self._device, self.sharing = device, sharing
        self.used_s, self.began = 0.0, 0.0

    def __enter__(self) -> None:
        self._device._take(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._device._give_back(self)
