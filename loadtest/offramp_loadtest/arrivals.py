"""When requests are due: seconds from the start, drawn one after the other, the same for the same
seed.

A pattern is a rate over time and a way to spread requests at that rate. Streams, not lists: a run
of hours needs no more memory than one of seconds. Arithmetic only. It knows nothing about
requests, clocks or servers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from random import Random

BURST_FACTOR = 2.0
"""How much faster than on average requests come in a burst; between bursts none come."""
BURST_S = 0.25
"""How long a burst lasts on average."""

Spread = Callable[[Random], Iterator[float]]
"""How requests follow each other at a rate of one a second."""


@dataclass(frozen=True)
class Phase:
    """A length of time in which the rate goes in a straight line from one value to another."""

    seconds: float
    from_rate: float
    to_rate: float

    @property
    def requests(self) -> float:
        """That are due in it, on average."""
        return self.seconds * (self.from_rate + self.to_rate) / 2

    def when(self, requests: float) -> float:
        """Seconds into the phase after which so many are due.

        The time t solves from·t + (to - from)·t² / 2·seconds = requests; the form with the root
        below is exact for a flat phase too, and for one that begins or ends at nothing.
        """
        slope = (self.to_rate - self.from_rate) / self.seconds
        root = math.sqrt(max(0.0, self.from_rate**2 + 2 * slope * requests))
        return min(self.seconds, 2 * requests / (self.from_rate + root)) if requests else 0.0


def regular(_: Random) -> Iterator[float]:
    """At the same distance from each other."""
    return map(float, count())


def by_chance(random: Random) -> Iterator[float]:
    """As from many clients that know nothing of each other: a Poisson stream."""
    at = random.expovariate(1.0)
    while True:
        yield at
        at += random.expovariate(1.0)


def along(phases: Sequence[Phase], spread: Spread, random: Random) -> Iterator[float]:
    """One phase after the other. What is drawn at a rate of one is stretched by the rate, so that a
    Poisson stream stays one while its rate changes.

    Raises:
        ValueError: a phase lasts no time or has a rate below 0, or nothing is ever due.
    """
    for one in phases:
        if not (0 < one.seconds < math.inf and _is_rate(one.from_rate) and _is_rate(one.to_rate)):
            raise ValueError(
                f"rate is {one.from_rate:g} to {one.to_rate:g} over seconds {one.seconds:g}; "
                "allowed are rates of 0 or more over more than 0 seconds"
            )
    if not any(one.requests for one in phases):
        raise ValueError("rate is 0 all the time, nothing would be due")
    return _along(phases, spread(random))


def _is_rate(rate: float) -> bool:
    return 0 <= rate < math.inf


def _along(phases: Sequence[Phase], places: Iterator[float]) -> Iterator[float]:
    begins = requests_before = 0.0
    place = next(places)
    for phase in phases:
        while place < requests_before + phase.requests:
            at = begins + phase.when(place - requests_before)
            if at < begins + phase.seconds:  # rounding apart, it always is
                yield at
            place = next(places)
        requests_before += phase.requests
        begins += phase.seconds


def constant(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """One after another at the same distance."""
    return along([Phase(seconds, rate, rate)], regular, random)


def poisson(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """Many clients that know nothing of each other."""
    return along([Phase(seconds, rate, rate)], by_chance, random)


def bursty(rate: float, seconds: float, random: Random) -> Iterator[float]:
    """A Poisson stream that is switched on and off: bursts and pauses of exponential length, with
    `rate` kept on average."""
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"rate is {rate:g} and seconds {seconds:g}, both must be above 0")
    return _bursty(rate, seconds, random)


def _bursty(rate: float, seconds: float, random: Random) -> Iterator[float]:
    bursting = random.random() < 1 / BURST_FACTOR
    begins = 0.0
    while begins < seconds:
        mean_s = BURST_S if bursting else BURST_S * (BURST_FACTOR - 1)
        ends = min(seconds, begins + random.expovariate(1 / mean_s))
        if bursting:
            at = begins + random.expovariate(rate * BURST_FACTOR)
            while at < ends:
                yield at
                at += random.expovariate(rate * BURST_FACTOR)
        begins, bursting = ends, not bursting


PATTERNS: dict[str, Callable[[float, float, Random], Iterator[float]]] = {
    "constant": constant,
    "poisson": poisson,
    "bursty": bursty,
}
"""Those that are one rate and a length of time."""


def schedule(pattern: str, rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due, as a list.

    Raises:
        ValueError: the pattern is unknown, or a number is not positive.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}, allowed are {', '.join(PATTERNS)}")
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"rate is {rate:g} and seconds {seconds:g}, both must be above 0")
    return list(PATTERNS[pattern](rate, seconds, Random(seed)))
