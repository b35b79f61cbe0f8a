"""Fakes for the service: an engine without a model, and a batcher around it."""

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from offramp_service.batcher import Batcher, Limits
from offramp_service.jobs import Answer, Controls, Depth, Engine, Job, Left, TimedAnswer
from offramp_service.metrics import Families, Metrics
from offramp_service.scheduler import Plan, Scheduler

LAYERS = 4


def job(number: int, *, tokens: int = 3, threshold: float = 1.0) -> Job:
    """A text whose answer will carry its number."""
    return Job([number] * tokens, [0] * tokens, Controls(threshold, 1, LAYERS, Depth.full(LAYERS)))


def answer_to(job: Job, layer: int = LAYERS) -> Answer:
    reason = "final" if layer == LAYERS else "criterion"
    return Answer(job.ids[0], [0.0, 1.0], [0.3, 0.7], layer, 0.7, reason)


async def ask(batcher: Batcher, jobs: Sequence[Job], request_id: str = "r") -> list[TimedAnswer]:
    """One request, whose texts need no tokenising."""
    with batcher.admit(len(jobs), request_id) as batch:
        return await batcher.submit(batch, jobs)


@dataclass
class FakeEngine:
    """Answers each text with its number; fails a whole batch that holds a number in `poison`."""

    poison: set[int] = field(default_factory=set)
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Left]:
        numbers = [one.ids[0] for one in jobs]
        self.batches.append(numbers)
        if self.poison & set(numbers):
            raise RuntimeError("poisoned")
        # Half leave early, in reverse order; the rest at the end.
        early = [index for index in range(len(jobs)) if numbers[index] % 2]
        late = [index for index in range(len(jobs)) if not numbers[index] % 2]
        for layer, left in ((2, early[::-1]), (LAYERS, late)):
            inside = len(jobs) if layer == 2 else len(late)
            if inside:
                answers = [(index, answer_to(jobs[index], layer)) for index in left]
                yield Left(layer, inside, answers)


@dataclass
class GatedEngine:
    """Runs two exits and waits for leave before each, so that a test can look in between."""

    gate: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    entered: threading.Event = field(default_factory=threading.Event)
    batches: list[list[int]] = field(default_factory=list)

    def __call__(self, jobs: Sequence[Job]) -> Iterator[Left]:
        self.batches.append([one.ids[0] for one in jobs])
        self.entered.set()
        half = len(jobs) // 2
        for layer, part in ((2, range(half)), (LAYERS, range(half, len(jobs)))):
            if not self.gate.acquire(timeout=20):
                raise TimeoutError("the test forgot to open the gate")
            answers = [(index, answer_to(jobs[index], layer)) for index in part]
            yield Left(layer, len(jobs) if layer == 2 else len(part), answers)


def batcher_of(
    engine: Engine,
    metrics: Metrics,
    *,
    max_batch_tokens: int = 1000,
    max_batch_texts: int = 100,
    max_texts: int = 100,
    max_queued_tokens: int = 1000,
    workers: int = 1,
    **how: Any,
) -> Batcher:
    """A batcher that nobody serves yet, with wide limits."""
    plan = Plan(max_batch_tokens, max_batch_texts, workers)
    limits = Limits(max_texts, max_queued_tokens)
    batcher = Batcher(engine, Scheduler(plan), limits, metrics, **how)
    batcher.show()
    return batcher


def make_metrics() -> Metrics:
    families = Families(CollectorRegistry(), LAYERS, ["/classify"])
    return Metrics(families, model_name="tiny", model_version="1", num_layers=LAYERS)


@pytest.fixture
def metrics() -> Metrics:
    return make_metrics()


@pytest.fixture
def read(metrics: Metrics) -> Callable[..., float]:
    """Value of one series of the fixture's metrics."""

    def value(name: str, **labels: str) -> float:
        everything = {"model_name": "tiny", "model_version": "1", **labels}
        found = metrics.registry.get_sample_value(f"offramp_{name}", everything)
        assert found is not None, f"there is no series {name} {labels}"
        return found

    return value


@pytest.fixture
def make_batcher(metrics: Metrics) -> Callable[..., Batcher]:
    """A batcher that nobody serves yet."""

    def make(engine: Engine, **limits: int) -> Batcher:
        return batcher_of(engine, metrics, **limits)

    return make


@pytest.fixture
def served() -> Iterator[Callable[[Batcher], Batcher]]:
    """Start engine threads, and end them with the test."""
    running: list[tuple[Batcher, threading.Thread]] = []

    def start(batcher: Batcher) -> Batcher:
        for worker in range(batcher.scheduler.plan.workers):
            thread = threading.Thread(target=batcher.serve, args=[worker], daemon=True)
            thread.start()
            running.append((batcher, thread))
        return batcher

    yield start
    for batcher, thread in running:
        batcher.close()
        thread.join(10)
        assert not thread.is_alive()
