"""Admission, the queue, and batches: which text is computed when, and who gets which answer.

The batcher knows promises, not tensors and not HTTP. Routes admit and submit client batches on the
event loop; the engine thread runs `serve`, which takes what is queued, up to the token budget, the
moment the engine is idle. There is no timer: an idle engine never waits for company, and while it
computes the next batch gathers by itself.

Who owns what. A client batch's answers, its future and the room it takes belong to the event loop;
the engine thread only posts to it. The queue belongs to both and is touched under one lock, for
microseconds.

A text is answered exactly once: by its answer, or with its whole client batch by the first failure
or by the end of its request (deadline, departure of the client), whichever comes first. Whatever
comes later finds the future done and is dropped.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from offramp_service.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidInput,
    NotReady,
    Overloaded,
    ServiceError,
)
from offramp_service.job_queue import JobQueue, latest_start
from offramp_service.jobs import Answer, Engine, Job, Left, TimedAnswer
from offramp_service.metrics import DispatchReason, Metrics, QueueView

if TYPE_CHECKING:  # its package brings torch
    from offramp_model.cost import StepTable

log = logging.getLogger(__name__)

# A batch that computes longer than this is taken for stuck by /livez.
STUCK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What the queue and a batch may hold. `max_texts` are admitted and not yet answered."""

    max_batch_tokens: int
    max_batch_texts: int
    max_texts: int
    max_queued_tokens: int


class ClientBatch:
    """The texts of one request: all are answered, or the request fails as a whole.

    Admitted empty, before its texts are tokenised; `submit` fills it.
    """

    def __init__(self, request_id: str, loop: asyncio.AbstractEventLoop, now: float) -> None:
        self.request_id, self.admitted_at = request_id, now
        self.future: asyncio.Future[list[TimedAnswer]] = loop.create_future()
        self.jobs: Sequence[Job] = ()
        self._answers: list[TimedAnswer | None] = []
        self._missing = 0

    def fill(self, jobs: Sequence[Job], now: float) -> None:
        self.jobs = jobs
        self._answers = [None] * len(jobs)
        self._missing = len(jobs)
        for index, job in enumerate(jobs):
            job.waiter, job.index, job.queued_at = self, index, now

    @property
    def abandoned(self) -> bool:
        """Nobody waits any more; true as well once everything is answered."""
        return self.future.done()

    @property
    def complete(self) -> bool:
        return not self._missing

    def answer(self, index: int, answer: TimedAnswer) -> None:
        """Note an answer, unless it is not expected any more."""
        if self.future.done() or self._answers[index] is not None:
            return
        self._answers[index] = answer
        self._missing -= 1
        if not self._missing:
            self.future.set_result([one for one in self._answers if one is not None])

    def answered(self, index: int) -> bool:
        return self._answers[index] is not None

    def fail(self, error: ServiceError) -> None:
        """Fail as a whole, unless it is over already."""
        if not self.future.done():
            self.future.set_exception(error)


class Batcher:
    """The bounded queue in front of one engine."""

    def __init__(
        self,
        engine: Engine,
        limits: Limits,
        metrics: Metrics,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self.limits, self._metrics, self._clock = engine, limits, metrics, clock
        # Event loop only:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[ClientBatch] = set()  # submitted and unanswered
        self._texts = 0  # admitted and unanswered
        self._farewell = ""  # why it was closed
        # Both sides, under the lock of `_changed`:
        self._changed = threading.Condition()
        self._queue = JobQueue()
        self._closed = False
        # What a layer costs, once the engine has been measured; set before `serve`.
        self.costs: StepTable | None = None
        # Written by the engine thread:
        self._busy_since: float | None = None
        metrics.watch_queue(
            QueueView(
                requests=lambda: len(self._queue),
                tokens=lambda: self._queue.tokens,
                layer_work=lambda: max(0.0, self._queue.layers),
            )
        )

    @property
    def unanswered(self) -> int:
        """Texts admitted and not yet answered."""
        return self._texts

    @property
    def busy(self) -> bool:
        """A batch is being computed."""
        return self._busy_since is not None

    @property
    def stuck(self) -> bool:
        """The engine has been on one batch for longer than any batch takes."""
        since = self._busy_since
        return since is not None and self._clock() - since > STUCK_AFTER_S

    # -- event loop --------------------------------------------------------------------------

    @contextmanager
    def admit(self, texts: int, request_id: str) -> Iterator[ClientBatch]:
        """Room for the texts of a request, for all or none, until the block is left.

        It is taken before they are tokenised: whoever is refused has cost next to nothing.

        Raises:
            Overloaded, NotReady, InvalidInput: there is no room.
        """
        most = self.limits.max_texts
        self._check_open()
        if not texts:
            raise InvalidInput("nothing to classify", status=400)
        if texts > most:
            raise InvalidInput(
                f"{texts} texts can never be queued at once; at most {most} can", status=413
            )
        if self._texts + texts > most:
            raise Overloaded(f"queue is full ({most} requests)")
        self._texts += texts
        try:
            yield ClientBatch(request_id, asyncio.get_running_loop(), self._clock())
        finally:
            self._texts -= texts

    async def submit(self, batch: ClientBatch, jobs: Sequence[Job]) -> list[TimedAnswer]:
        """Queue the texts of an admitted client batch and wait for their answers, in their order.

        Whoever gives up cancels it.

        Raises:
            Overloaded, NotReady, InvalidInput, DeadlineExceeded: they could not be queued.
            NotReady, EngineFailed: they were, and got no answer.
        """
        self._check_open()
        self._check_tokens(sum(job.tokens for job in jobs))
        now = self._clock()
        start = self._latest_start(batch, jobs, now)
        self._loop = asyncio.get_running_loop()
        batch.fill(jobs, now)
        self._open.add(batch)
        with self._changed:
            self._queue.add(jobs, start)
            self._changed.notify()
        try:
            return await batch.future
        finally:
            self._leave(batch)

    def close(self, farewell: str = "the server is shutting down") -> None:
        """Let go of everybody still waiting, admit nothing more, and end `serve`."""
        # Failed first, so that the engine takes none of them in the meantime.
        for batch in self._open:
            batch.fail(NotReady(farewell))
        self._farewell = farewell
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._closed:
            raise NotReady(self._farewell)

    def _check_tokens(self, tokens: int) -> None:
        most = self.limits.max_queued_tokens
        if tokens > most:
            raise InvalidInput(
                f"{tokens} tokens can never be queued at once; at most {most} can", status=413
            )
        if self._queue.tokens + tokens > most:
            raise Overloaded(f"queue is full ({most} tokens)")

    def _latest_start(self, batch: ClientBatch, jobs: Sequence[Job], now: float) -> float:
        """Of the request's most urgent text.

        Raises:
            DeadlineExceeded: by what layers cost, all of them cannot be answered in time.
        """
        allowed = jobs[0].controls.deadline_s
        deadline = None if allowed is None else batch.admitted_at + allowed
        start = min(latest_start(job, now, deadline, self.costs) for job in jobs)
        if allowed is None or deadline is None or self.costs is None:
            return start
        with self._changed:
            budget = self.limits.max_batch_tokens
            needed = self._queue.seconds_before(start, jobs, self.costs, budget)
        if now + needed > deadline:
            raise DeadlineExceeded(
                f"the answer would take {(now + needed - batch.admitted_at) * 1000:.0f} ms, "
                f"deadline_ms is {allowed * 1000:.0f}",
                param="deadline_ms",
            )
        return start

    def _leave(self, batch: ClientBatch) -> None:
        """Nobody waits for it any more; take those of its texts out that still do."""
        self._open.discard(batch)
        if batch.complete:
            return
        with self._changed:
            for job in batch.jobs:
                if job in self._queue:
                    self._queue.take_out(job)

    def _settle(self, answers: Sequence[tuple[Job, TimedAnswer | ServiceError]]) -> None:
        for job, answer in answers:
            batch = _client_batch(job)
            if isinstance(answer, ServiceError):
                batch.fail(answer)
            else:
                batch.answer(job.index, answer)

    def _finish(self, jobs: Sequence[Job], failure: ServiceError) -> None:
        """Nobody may wait for a batch that is over."""
        for job in jobs:
            batch = _client_batch(job)
            if not batch.answered(job.index):
                batch.fail(failure)

    # -- engine thread -----------------------------------------------------------------------

    def serve(self) -> None:
        """The engine thread's main loop, until `close`."""
        while True:
            jobs, reason = self._next_batch()
            if not jobs:
                return
            self._run(jobs, reason)

    def _next_batch(self) -> tuple[list[Job], DispatchReason]:
        """Wait for work; an empty batch means closed."""
        with self._changed:
            while True:
                jobs, reason = self._take()
                if jobs or self._closed:
                    return jobs, reason
                self._changed.wait()

    def _take(self) -> tuple[list[Job], DispatchReason]:
        """In the queue's order, as many as fit the token budget."""
        jobs: list[Job] = []
        room = self.limits.max_batch_tokens
        while self._queue:
            job = self._queue.first()
            if jobs and job.tokens > room:
                return jobs, "tokens"
            if len(jobs) == self.limits.max_batch_texts:
                return jobs, "full"
            self._queue.take_out(job)
            if job.abandoned:
                continue
            jobs.append(job)
            room -= job.tokens
        return jobs, "idle"

    def _run(self, jobs: list[Job], reason: DispatchReason) -> None:
        """Compute a batch, answer its texts as they leave; a failure stays within the batch."""
        started = self._busy_since = self._clock()
        broken: list[tuple[Job, Exception]] = []
        failure = EngineFailed("the engine gave no answer to this text")
        try:
            waits = [started - job.queued_at for job in jobs]
            self._metrics.batch_formed(reason, sum(job.tokens for job in jobs), waits)
            depth = 0
            for left in self._engine(jobs):
                self._metrics.layers_ran(range(depth + 1, left.exit_layer + 1), left.texts_run)
                depth = left.exit_layer
                broken += self._hand_out(jobs, left, started)
        except Exception:
            log.exception("a batch of %d texts failed, requests %s", len(jobs), _names(jobs))
            failure = EngineFailed("the model failed on this batch")
        finally:
            self._busy_since = None
            self._metrics.batch_done(self._clock() - started)
        if broken:
            names = _names([job for job, _ in broken])
            text = "%d of %d texts of a batch failed: %s, requests %s"
            log.error(text, len(broken), len(jobs), broken[0][1], names)
        self._post(lambda: self._finish(jobs, failure))

    def _hand_out(self, jobs: list[Job], left: Left, started: float) -> list[tuple[Job, Exception]]:
        """Post the answers of those who left together; returns those whose computation broke."""
        inference_s = self._clock() - started
        answers: list[tuple[Job, TimedAnswer | ServiceError]] = []
        broken: list[tuple[Job, Exception]] = []
        exits: list[Answer] = []
        for index, answer in left.answers:
            job = jobs[index]
            if isinstance(answer, Exception):
                broken.append((job, answer))
                answers.append((job, EngineFailed(str(answer))))
            else:
                exits.append(answer)
                timed = TimedAnswer(answer, started - job.queued_at, inference_s)
                answers.append((job, timed))
        # Counted first: whoever has an answer finds it in the metrics.
        self._metrics.texts_left(left.exit_layer, (one.reason for one in exits), inference_s)
        if answers:
            self._post(lambda: self._settle(answers))
        return broken

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody is left to be answered
            log.warning("answers came after the event loop had closed")


def _client_batch(job: Job) -> ClientBatch:
    batch = job.waiter
    assert isinstance(batch, ClientBatch)
    return batch


def _names(jobs: Sequence[Job]) -> str:
    """The requests that these texts belong to, for the log."""
    return ", ".join(dict.fromkeys(_client_batch(job).request_id for job in jobs))
