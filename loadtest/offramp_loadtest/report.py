"""What a run of the generator showed, as plain numbers fit for JSON."""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from offramp_loadtest.generator import Result

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed; exact, `ordered` is all there is.

    Raises:
        ValueError: there are no values.
    """
    if not ordered:
        raise ValueError("a quantile of nothing")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def summary(result: Result, *, seconds: float, max_connections: int) -> dict[str, Any]:
    """Counts, rates and latencies in milliseconds of a run whose requests were due within so many
    seconds. Latencies are of requests answered with 200, from when they were due; rates are per
    second."""
    outcomes = result.outcomes
    answered = [one for one in outcomes if one.status == 200]
    began = min((one.due for one in outcomes), default=0.0)
    ended = max((one.done for one in answered), default=began)
    # Answers that came after the last request was due, counted into the time they took.
    took_s = max(seconds, ended - began)
    layers = (one.exit_layer for one in answered if one.exit_layer is not None)
    return {
        "requests": len(outcomes),
        "status": _counted(one.status for one in outcomes),
        "rate_due": len(outcomes) / seconds,
        "rate_answered": len(answered) / took_s,
        "latency_ms": milliseconds([one.latency_s for one in answered]),
        "exit_layers": _counted(layers),
        "generator": {
            "lateness_ms": milliseconds([one.lateness_s for one in outcomes]),
            "cpu_s": result.cpu_s,
            "connections": result.connections,
            "max_connections": max_connections,
            "requests_that_waited_for_a_connection": result.waited,
        },
    }


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, quantiles and largest; empty where there is nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    figures = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    figures = {"mean": sum(ordered) / len(ordered), **figures, "max": ordered[-1]}
    return {name: value * 1000 for name, value in figures.items()}


def _counted(values: Iterable[int]) -> dict[str, int]:
    return {str(value): count for value, count in sorted(Counter(values).items())}
