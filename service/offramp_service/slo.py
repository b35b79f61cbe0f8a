"""The SLO controller: how far everybody's speed-up is raised so that answers stay in time.

It is told the time, how long each request took and how much work stands before the engine, and
says one number: the *floor* below which no request's speed-up may be while load is high. It knows
no clock, threads or HTTP, and nothing about who it is that asks.

Three signs of danger, the first two as shares of the target:

    p95        of the requests admitted since the last raise: what the present floor gives
    forecast   text-layers that wait or run, over text-layers a second: what newcomers will wait
    room       share of the admission limits that is taken; `FULL` of it is as bad as the target

The p95 is the truth, and late: it shows a queue only when its texts come out of it. The forecast is
early, and sees a raised floor at once, because newcomers bring fewer layers. The room is there for
targets so long that requests would be refused before one is in danger. Above `THREATENED` the
floor goes up in steps; but where there is a queue, only while it grows: one into which fewer layers
come than the engine runs is on its way out already, and latencies with it. Below `CALM`, for long
enough, the floor goes down in smaller and slower steps. Whoever had to raise again soon after
letting go waits twice as long the next time, so that a constant load does not make it flutter.
"""

import math
from bisect import bisect_right
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Direction = Literal["up", "down"]

DECIDE_S = 0.1
"""Between two decisions."""
THREATENED, CALM = 0.8, 0.5
"""Of the target: above the one the floor goes up, below the other it may go down."""
RAISE, LET_GO = 1.25, 1.05
"""Factors of one step. From full depth to 1.6 times as fast takes three decisions: less than it
takes 500 texts a second too many to fill a queue of 512."""
FULL = 0.5
"""Of the admission limits. Raising helps newcomers only, who stand behind all that wait at full
depth: until those are through, the queue grows by as much again as the load is too high."""
LET_GO_S = 1.0
"""Between two steps down."""
PATIENCE_S, LONGEST_PATIENCE_S = 5.0, 40.0
"""Of calm before the first step down, and what it grows to where letting go went wrong."""
SHRINKING = 0.97
"""Of what the engine runs meanwhile: a queue into which fewer layers come is on its way out."""
RATE_MEMORY_S = 1.0
"""Seconds of computing over which the engine's rate is known."""

WINDOW_S, SLOTS = 10.0, 10
LEAST_SAMPLES = 20
"""Fewer have no 95th percentile."""
_FINEST_S, _RATIO, _BINS = 1e-4, 1.05, 300  # up to 200 s


@dataclass(frozen=True, slots=True)
class Load:
    """The engine and what stands before it, as a decision sees it."""

    layers_ahead: float = 0.0  # text-layers that the unanswered texts are expected to need in all
    layers_admitted: float = 0.0  # expected text-layers of all texts since the start
    layers_run: int = 0  # text-layers since the start
    busy_s: float = 0.0  # that they took
    room_taken: float = 0.0  # share of what may be inside before requests are refused


class LatencyWindow:
    """Latencies of the last `WINDOW_S` seconds, in bins 5 % wide: bounded memory, whatever the
    load. It forgets a tenth of the window at a time."""

    def __init__(self) -> None:
        self._slots: deque[tuple[int, list[int]]] = deque()  # number of the slot, counts by bin
        self._counts = [0] * _BINS
        self._samples = 0

    def add(self, now: float, latency_s: float) -> None:
        """One latency; times never run backwards."""
        self.forget(now)
        number = math.floor(now * SLOTS / WINDOW_S)
        if not self._slots or self._slots[-1][0] < number:
            self._slots.append((number, [0] * _BINS))
        place = _bin(latency_s)
        self._slots[-1][1][place] += 1
        self._counts[place] += 1
        self._samples += 1

    def forget(self, now: float) -> None:
        """Drop what is older than the window."""
        oldest = math.floor(now * SLOTS / WINDOW_S) - SLOTS
        while self._slots and self._slots[0][0] <= oldest:
            _, gone = self._slots.popleft()
            self._counts = [all_ - old for all_, old in zip(self._counts, gone, strict=True)]
            self._samples -= sum(gone)

    @property
    def p95_s(self) -> float | None:
        """Seconds that 95 % of the latencies do not exceed, rounded up to a bin; None where there
        are too few to tell."""
        if self._samples < LEAST_SAMPLES:
            return None
        slower = self._samples // 20
        for place in range(_BINS - 1, -1, -1):
            slower -= self._counts[place]
            if slower < 0:
                return _FINEST_S * _RATIO**place
        raise AssertionError("a window holds as many samples as it counts")


class SloController:
    """Raises and lets go the floor. Not thread-safe: called on the event loop only.

    `speedups` are those that the floor may take, ascending from 1.0; the last is the ceiling.
    """

    def __init__(self, target_s: float, speedups: Sequence[float]) -> None:
        if not speedups or speedups[0] != 1.0 or list(speedups) != sorted(speedups):
            raise ValueError(f"speedups must ascend from 1.0, got {list(speedups)[:5]}")
        self.target_s, self._speedups = target_s, tuple(speedups)
        self._level = 1.0  # what the floor is rounded down from
        self._recent, self._fresh = LatencyWindow(), LatencyWindow()
        self._rate = _Rate()
        self._admitted = 0.0  # layers, as of the last decision
        self._decided_at = -math.inf
        self._raised_at = self._let_go_at = -math.inf
        self._calm_since: float | None = None
        self._let_go_due = math.inf
        self._patience_s = PATIENCE_S

    def go_on_from(self, other: "SloController") -> None:
        """Take over the floor of another checkpoint's controller, as far as this one may go."""
        self._level = min(other._level, self.ceiling)

    @property
    def ceiling(self) -> float:
        return self._speedups[-1]

    @property
    def floor(self) -> float:
        """The largest allowed speed-up that is not above the level; 1.0 does nothing."""
        return self._speedups[bisect_right(self._speedups, self._level) - 1]

    @property
    def p95_s(self) -> float | None:
        """Of the window as of the last decision, for whoever reports; None: too few requests."""
        return self._recent.p95_s

    def finished(self, now: float, latency_s: float) -> None:
        """A request was answered, so long after it was admitted."""
        self._recent.add(now, latency_s)
        if now - latency_s >= self._raised_at:
            self._fresh.add(now, latency_s)

    def due(self, now: float) -> bool:
        """It is time for a decision."""
        return now - self._decided_at >= DECIDE_S

    def decide(self, now: float, load: Load) -> Direction | None:
        """Move the floor if it is time to; to be asked as often as anything happens.

        After a silence it lets go as far as it would have meanwhile.
        """
        if not self.due(now):
            return None
        self._recent.forget(now)
        self._fresh.forget(now)
        queue, grows = self._look_ahead(load, now - self._decided_at)
        late = (self._fresh.p95_s or 0.0) / self.target_s
        self._decided_at = now
        before = self.floor
        danger = max(late, queue)
        if danger < CALM:
            self._stay_calm(now)
        else:
            self._calm_since = None
        if danger > THREATENED and (grows or queue < CALM):
            self._raise(now)
        if self.floor == before:
            return None
        return "up" if self.floor > before else "down"

    def _look_ahead(self, load: Load, seconds: float) -> tuple[float, bool]:
        """What the queue says of danger, and whether it has been growing for so many seconds."""
        per_second = self._rate.after(load)
        came = load.layers_admitted - self._admitted
        self._admitted = load.layers_admitted
        if not per_second:
            return load.room_taken / FULL, True
        forecast_s = load.layers_ahead / per_second
        queue = max(forecast_s / self.target_s, load.room_taken / FULL)
        return queue, came >= SHRINKING * per_second * seconds

    def _raise(self, now: float) -> None:
        if self._level >= self.ceiling:
            return
        if now - self._let_go_at <= LONGEST_PATIENCE_S:
            self._patience_s = min(2 * self._patience_s, LONGEST_PATIENCE_S)
        elif now - self._raised_at > LONGEST_PATIENCE_S:
            self._patience_s = PATIENCE_S
        self._let_go_at = -math.inf  # one raise after it is enough of a lesson
        self._level = min(RAISE * self._level, self.ceiling)
        self._raised_at = now
        self._fresh = LatencyWindow()

    def _stay_calm(self, now: float) -> None:
        if self._calm_since is None:
            self._calm_since = now
            self._let_go_due = now + self._patience_s
        while self._level > 1.0 and self._let_go_due <= now:
            self._level = max(self._level / LET_GO, 1.0)
            self._let_go_at = self._let_go_due
            self._let_go_due += LET_GO_S


class _Rate:
    """Text-layers a second of computing, of the last seconds in which there was any."""

    def __init__(self) -> None:
        self._seen = Load()
        self._layers = self._seconds = 0.0

    def after(self, load: Load) -> float:
        """Layers a second with what has been computed since; 0 while nothing has."""
        seconds = load.busy_s - self._seen.busy_s
        kept = math.exp(-seconds / RATE_MEMORY_S)
        self._layers = kept * self._layers + load.layers_run - self._seen.layers_run
        self._seconds = kept * self._seconds + seconds
        self._seen = load
        return self._layers / self._seconds if self._seconds else 0.0


def _bin(latency_s: float) -> int:
    if latency_s <= _FINEST_S:
        return 0
    return min(math.ceil(math.log(latency_s / _FINEST_S) / math.log(_RATIO)), _BINS - 1)
