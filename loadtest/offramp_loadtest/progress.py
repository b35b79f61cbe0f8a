"""What a terminal shows while a run goes on: a line a second, or every ten where nobody watches.

Each process counts its last second and hands that on; here they are put together.
"""

import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TextIO

from offramp_loadtest.histogram import Histogram
from offramp_loadtest.question import Outcome
from offramp_loadtest.recorder import exit_layer, status_name

EVERY_S, EVERY_S_UNWATCHED = 1.0, 10.0


@dataclass
class Moment:
    """What was answered in a length of time."""

    seconds: float = 0.0
    statuses: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=lambda: Histogram(2))
    wrong: int = 0
    exit_layers: Counter[int] = field(default_factory=Counter)

    def note(self, outcome: Outcome) -> None:
        self.statuses[status_name(outcome.status)] += 1
        question = outcome.question
        if outcome.status not in question.right_statuses and question.leave is None:
            self.wrong += 1
        if outcome.status == 200 and outcome.reply is not None:
            self.latency.record(outcome.latency_s)
            if (layer := exit_layer(outcome.reply)) is not None:
                self.exit_layers[layer] += 1

    def add(self, other: "Moment") -> None:
        """What was answered besides; how long it took stays as it is."""
        self.statuses += other.statuses
        self.latency.add(other.latency)
        self.wrong += other.wrong
        self.exit_layers += other.exit_layers


Show = Callable[[float, Moment], None]
"""Seconds since the start, and the moment."""


class Terminal:
    """Writes over its own last line where somebody watches."""

    def __init__(self, seconds: float | None, stream: TextIO | None = None) -> None:
        self._seconds, self._stream = seconds, stream or sys.stderr
        self._watched = self._stream.isatty()
        self._every_s = EVERY_S if self._watched else EVERY_S_UNWATCHED
        self._gathered = Moment()

    def show(self, at: float, moment: Moment) -> None:
        self._gathered.add(moment)
        self._gathered.seconds += moment.seconds
        if self._gathered.seconds < 0.9 * self._every_s:
            return
        line, self._gathered = self.line(at, self._gathered), Moment()
        end = "" if self._watched else "\n"
        start = "\r\x1b[2K" if self._watched else ""
        self._stream.write(f"{start}{line}{end}")
        self._stream.flush()

    def close(self) -> None:
        if self._watched:
            self._stream.write("\n")

    def line(self, at: float, moment: Moment) -> str:
        whole = f"/{self._seconds:.0f}" if self._seconds else ""
        answered = sum(moment.statuses.values())
        parts = [f"{at:.0f}{whole} s", f"{answered / max(moment.seconds, 1e-3):.0f}/s"]
        if moment.latency.count:
            p50, p99 = (moment.latency.quantile(share) * 1000 for share in (0.5, 0.99))
            parts.append(f"p50 {p50:.1f} p99 {p99:.1f} ms")
        parts.append(f"errors {moment.wrong}")
        others = {name: n for name, n in sorted(moment.statuses.items()) if name != "200"}
        parts += [f"{name}: {count}" for name, count in others.items()]
        if moment.exit_layers:
            total = sum(moment.exit_layers.values())
            shares = (f"{n}: {c / total:.0%}" for n, c in sorted(moment.exit_layers.items()))
            parts.append(f"exits {' '.join(shares)}")
        return " | ".join(parts)
