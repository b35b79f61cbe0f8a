"""When requests are due: seconds from the start, drawn beforehand, the same for the same seed.

Arithmetic only. It knows nothing about requests, clocks or servers.
"""

from collections.abc import Callable
from random import Random

BURST_FACTOR = 2.0
"""How much faster than on average requests come in a burst; between bursts none come."""
BURST_S = 0.25
"""How long a burst lasts on average."""

Arrivals = Callable[[float, float, Random], list[float]]
"""Requests a second, seconds, source of chance → when each is due, rising, below `seconds`."""


def constant(rate: float, seconds: float, _: Random) -> list[float]:
    """One after another at the same distance."""
    return [index / rate for index in range(int(rate * seconds))]


def poisson(rate: float, seconds: float, random: Random) -> list[float]:
    """Many clients that know nothing of each other."""
    due, at = [], random.expovariate(rate)
    while at < seconds:
        due.append(at)
        at += random.expovariate(rate)
    return due


def bursty(rate: float, seconds: float, random: Random) -> list[float]:
    """A Poisson stream that is switched on and off: bursts and pauses of exponential length, with
    `rate` kept on average."""
    bursting = random.random() < 1 / BURST_FACTOR
    due: list[float] = []
    begins = 0.0
    while begins < seconds:
        mean_s = BURST_S if bursting else BURST_S * (BURST_FACTOR - 1)
        ends = min(seconds, begins + random.expovariate(1 / mean_s))
        if bursting:
            due += [begins + at for at in poisson(rate * BURST_FACTOR, ends - begins, random)]
        begins, bursting = ends, not bursting
    return due


PATTERNS: dict[str, Arrivals] = {"constant": constant, "poisson": poisson, "bursty": bursty}


def schedule(pattern: str, rate: float, seconds: float, seed: int) -> list[float]:
    """When requests are due.

    Raises:
        ValueError: the pattern is unknown, or a number is not positive.
    """
    if pattern not in PATTERNS:
        raise ValueError(f"pattern is {pattern!r}, allowed are {', '.join(PATTERNS)}")
    if not (rate > 0 and seconds > 0):
        raise ValueError(f"rate is {rate:g} and seconds {seconds:g}, both must be above 0")
    return PATTERNS[pattern](rate, seconds, Random(seed))
