"""An engine that answers at once, and `offramp-serve` around it: what a request costs without the
model.

    python service/bench/null_engine.py --model-id DIR --port 0

Everything else is the real thing: doors, tokeniser, admission, queue, scheduler, the engine's
thread, metrics. Every text gets the same answer after the last layer.
"""

import sys
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI

from offramp_service.__main__ import main
from offramp_service.app import create_app
from offramp_service.jobs import Answer, Course, Job, Left
from offramp_service.served_model import load_model
from offramp_service.settings import Settings


class NullEngine:
    """Takes batches in and lets everybody leave after the last of `layers` layers."""

    def __init__(self, layers: int, labels: int) -> None:
        even = [1 / labels] * labels
        self._answer = Answer(0, [0.0] * labels, even, layers, 1 / labels, "final")

    def __call__(self, jobs: Sequence[Job]) -> Course:
        answers = [(index, self._answer) for index in range(len(jobs))]
        return _AtOnce(Left(self._answer.exit_layer, len(jobs), answers))


class _AtOnce:
    """One turn. It cannot be joined, and never stands long enough to be asked to."""

    def __init__(self, left: Left) -> None:
        self._turns = iter([left])

    def __next__(self) -> Left:
        return next(self._turns)

    def take_in(self, other: Any) -> None:
        raise RuntimeError("the null engine's batches cannot be joined")


def make_app(settings: Settings) -> FastAPI:
    """The application of `offramp-serve` with the model's engine exchanged."""
    model = load_model(settings)
    engine = NullEngine(model.num_layers, len(model.config.labels))
    return create_app(settings, model, computes=engine)


if __name__ == "__main__":
    sys.exit(main(make_app=make_app))
