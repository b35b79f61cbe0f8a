"""One line in the log for each finished request of a door: who, how it went, how long, how deep.

In JSON lines every quantity is a field of its own, and null where the texts were not answered. It
says nothing of texts, labels or keys. Where lines go, and in which form, it does not know.
"""

import logging
from typing import Any

from offramp_service.witness import Record, exit_layers, speedup_asked

log = logging.getLogger(__name__)


class RequestLog:
    """A listener of `Witness`."""

    def __init__(self, level: int) -> None:
        self._level = level

    def __call__(self, record: Record) -> None:
        if log.isEnabledFor(self._level):
            log.log(
                self._level,
                "request %s: %d %s",
                *(record.call.request_id, record.status, record.failure or "ok"),
                extra={"fields": fields(record)},
            )


def fields(record: Record) -> dict[str, Any]:
    """The quantities of a request; queue and inference are means over its texts."""
    call, outcome = record.call, record.outcome
    line: dict[str, Any] = {
        "request_id": call.request_id,
        "route": call.route,
        "status": record.status,
        "error": record.failure,
        "total_ms": _milliseconds(record.ended - record.started),
    }
    if outcome is None:
        return line | dict.fromkeys(_OF_AN_OUTCOME)
    texts = len(outcome.answers)
    values = (
        texts,
        outcome.tokens,
        _milliseconds(outcome.tokenization_s),
        _milliseconds(sum(one.queue_s for one in outcome.answers) / texts),
        _milliseconds(sum(one.inference_s for one in outcome.answers) / texts),
        exit_layers(outcome),
        speedup_asked(outcome),
        round(outcome.speedup_achieved, 3),
    )
    return line | dict(zip(_OF_AN_OUTCOME, values, strict=True))


_OF_AN_OUTCOME = (
    "texts",
    "tokens",
    "tokenization_ms",
    "queue_ms",
    "inference_ms",
    "exit_layers",
    "speedup_asked",
    "speedup_achieved",
)


def _milliseconds(seconds: float) -> float:
    return round(seconds * 1000, 3)
