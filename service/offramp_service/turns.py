"""Turns on one device: of several models' engines, one computes at a time, and none goes short.

Each model has a thread of its own; whoever has used the device least is next (start-time fair
queueing in seconds of use). A model that was idle for long has no claim to what it did not use. It
knows threads and seconds, and nothing of what is computed.
"""

import threading
import time
from collections.abc import Callable
from types import TracebackType


class Device:
    """What the models share."""

    def __init__(self, *, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[Turn] = []
        self._taken = False
        self._reached = 0.0  # seconds that whoever came last had used when its turn began

    def turn(self) -> "Turn":
        """For one more model."""
        return Turn(self)

    def _take(self, turn: "Turn") -> None:
        with self._changed:
            turn.used_s = max(turn.used_s, self._reached)
            self._waiting.append(turn)
            while self._taken or min(self._waiting, key=lambda one: one.used_s) is not turn:
                self._changed.wait()
            self._waiting.remove(turn)
            self._taken, self._reached = True, turn.used_s
        turn.began = self._clock()

    def _give_back(self, turn: "Turn") -> None:
        with self._changed:
            turn.used_s += self._clock() - turn.began
            self._taken = False
            self._changed.notify_all()


class Turn:
    """One model's claim: a context in which it has the device to itself."""

    def __init__(self, device: Device) -> None:
        self._device = device
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
