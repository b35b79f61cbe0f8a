"""Admission, the queue, and batches: which text is computed when, and who gets which answer.

The batcher knows time and promises, not tensors and not HTTP. Routes submit client batches on the
event loop; the engine thread runs `serve`, which takes what is queued, up to the token budget, the
moment the engine is idle. There is no timer: an idle engine never waits for company, and while it
computes the next batch gathers by itself.

Who owns what. A client batch's answers, its future and the count of unanswered texts belong to
the event loop; the engine thread only posts to it. The queue belongs to both and is touched under
one lock, for microseconds.

A text is answered exactly once: by its answer, or with its whole client batch by the first
failure, timeout or departure of the client, whichever comes first. Whatever comes later finds the
future done and is dropped.
"""

import asyncio
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass

from offramp_service.errors import (
    ClientGone,
    DeadlineExceeded,
    EngineFailed,
    InvalidInput,
    NotReady,
    Overloaded,
    ServiceError,
)
from offramp_service.jobs import Answer, Engine, Job, TimedAnswer
from offramp_service.metrics import DispatchReason, Metrics, QueueView

log = logging.getLogger(__name__)

# A batch that computes longer than this is taken for stuck by /livez.
STUCK_AFTER_S = 60.0

Left = Sequence[tuple[int, Answer | Exception]]


@dataclass(frozen=True, slots=True)
class Limits:
    """What the queue and a batch may hold. `max_texts` are admitted and not yet answered."""

    max_batch_tokens: int
    max_batch_texts: int | None
    max_texts: int
    max_queued_tokens: int


class ClientBatch:
    """The texts of one request: all are answered, or the request fails as a whole."""

    def __init__(self, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop) -> None:
        self.jobs = jobs
        self.future: asyncio.Future[list[TimedAnswer]] = loop.create_future()
        self._answers: list[TimedAnswer | None] = [None] * len(jobs)
        self._missing = len(jobs)

    @property
    def abandoned(self) -> bool:
        """Nobody waits any more; true as well once everything is answered."""
        return self.future.done()

    @property
    def unanswered(self) -> int:
        return self._missing

    def answer(self, index: int, answer: TimedAnswer) -> bool:
        """Note an answer; False if it was not expected any more."""
        if self.future.done() or self._answers[index] is not None:
            return False
        self._answers[index] = answer
        self._missing -= 1
        if not self._missing:
            self.future.set_result([one for one in self._answers if one is not None])
        return True

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
        self._engine, self._limits, self._metrics, self._clock = engine, limits, metrics, clock
        # Event loop only:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[ClientBatch] = set()
        self._texts = 0  # admitted and unanswered
        # Both sides, under the lock of `_changed`:
        self._changed = threading.Condition()
        self._queue: OrderedDict[Job, None] = OrderedDict()
        self._queued_tokens = 0
        self._queued_work = 0.0
        self._closed = False
        # Written by the engine thread:
        self._busy_since: float | None = None
        metrics.watch_queue(
            QueueView(
                requests=lambda: len(self._queue),
                tokens=lambda: self._queued_tokens,
                layer_work=lambda: max(0.0, self._queued_work),
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

    async def submit(
        self,
        jobs: Sequence[Job],
        *,
        timeout_s: float | None = None,
        gone: Callable[[], Coroutine[object, object, object]] | None = None,
    ) -> list[TimedAnswer]:
        """Admit a client batch as a whole and wait for its answers, in its own order.

        Args:
            timeout_s: give up after so long.
            gone: completes when the client no longer waits.

        Raises:
            Overloaded, NotReady, InvalidInput: not admitted.
            DeadlineExceeded, ClientGone, EngineFailed: admitted, then failed.
        """
        loop = asyncio.get_running_loop()
        batch = self._admit(jobs, loop)
        reasons_to_stop: list[asyncio.TimerHandle | asyncio.Task[object]] = []
        if timeout_s is not None:
            late = DeadlineExceeded(f"no answer within {timeout_s * 1000:.0f} ms")
            reasons_to_stop.append(loop.call_later(timeout_s, batch.fail, late))
        if gone is not None:
            watcher = loop.create_task(gone())
            watcher.add_done_callback(lambda _: batch.fail(ClientGone("the client has left")))
            reasons_to_stop.append(watcher)
        try:
            return await batch.future
        finally:
            for reason in reasons_to_stop:
                reason.cancel()
            self._release(batch)

    def close(self) -> None:
        """Admit nothing more, let go of everybody still waiting, and end `serve`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for batch in self._open:
            batch.fail(NotReady("the server is shutting down"))

    def _admit(self, jobs: Sequence[Job], loop: asyncio.AbstractEventLoop) -> ClientBatch:
        tokens = sum(job.tokens for job in jobs)
        self._check_room(len(jobs), tokens)
        self._loop = loop
        batch = ClientBatch(jobs, loop)
        now = self._clock()
        for index, job in enumerate(jobs):
            job.waiter, job.index, job.queued_at = batch, index, now
        self._open.add(batch)
        self._texts += len(jobs)
        with self._changed:
            self._queue.update(dict.fromkeys(jobs))
            self._queued_tokens += tokens
            self._queued_work += sum(job.controls.expected_layers for job in jobs)
            self._changed.notify()
        return batch

    def _check_room(self, texts: int, tokens: int) -> None:
        limits = self._limits
        if self._closed:
            raise NotReady("the server is shutting down")
        if not texts:
            raise InvalidInput("nothing to classify", status=400)
        if texts > limits.max_texts or tokens > limits.max_queued_tokens:
            raise InvalidInput(
                f"{texts} texts with {tokens} tokens can never be queued at once; at most "
                f"{limits.max_texts} texts and {limits.max_queued_tokens} tokens can",
                status=413,
            )
        if self._texts + texts > limits.max_texts:
            raise Overloaded(f"queue is full ({limits.max_texts} requests)")
        if self._queued_tokens + tokens > limits.max_queued_tokens:
            raise Overloaded(f"queue is full ({limits.max_queued_tokens} tokens)")

    def _release(self, batch: ClientBatch) -> None:
        """Give back the room of whatever was not answered, queued texts first of all."""
        self._open.discard(batch)
        if not batch.unanswered:
            return
        self._texts -= batch.unanswered
        with self._changed:
            for job in batch.jobs:
                if job in self._queue:
                    self._take_out(job)

    def _settle(self, answers: Sequence[tuple[Job, TimedAnswer | ServiceError]]) -> None:
        for job, answer in answers:
            batch = job.waiter
            assert isinstance(batch, ClientBatch)
            if isinstance(answer, ServiceError):
                batch.fail(answer)
            elif batch.answer(job.index, answer):
                self._texts -= 1

    def _finish(self, jobs: Sequence[Job], failure: ServiceError) -> None:
        """Nobody may wait for a batch that is over."""
        for job in jobs:
            batch = job.waiter
            assert isinstance(batch, ClientBatch)
            if not batch.answered(job.index):
                batch.fail(failure)

    # -- engine thread -----------------------------------------------------------------------

    def serve(self) -> None:
        """The engine thread's main loop, until `close`."""
        while jobs := self._next_batch():
            self._busy_since = self._clock()
            self._run(jobs)
            self._busy_since = None

    def _next_batch(self) -> list[Job]:
        """Wait for work; an empty batch means closed."""
        with self._changed:
            while True:
                jobs, reason = self._take()
                if jobs or self._closed:
                    break
                self._changed.wait()
        if jobs:
            now = self._clock()
            waits = [now - job.queued_at for job in jobs]
            self._metrics.batch_formed(reason, sum(job.tokens for job in jobs), waits)
        return jobs

    def _take(self) -> tuple[list[Job], DispatchReason]:
        """First come, first served, as many as fit the token budget."""
        jobs: list[Job] = []
        room = self._limits.max_batch_tokens
        while self._queue:
            job = next(iter(self._queue))
            if jobs and job.tokens > room:
                return jobs, "tokens"
            if len(jobs) == self._limits.max_batch_texts:
                return jobs, "full"
            self._take_out(job)
            if job.abandoned:
                continue
            jobs.append(job)
            room -= job.tokens
        return jobs, "idle"

    def _take_out(self, job: Job) -> None:
        del self._queue[job]
        self._queued_tokens -= job.tokens
        # Sums of floats drift; an empty queue holds no work.
        self._queued_work -= job.controls.expected_layers
        if not self._queue:
            self._queued_work = 0.0

    def _run(self, jobs: list[Job]) -> None:
        """Compute a batch, answer its texts as they leave; a failure stays within the batch."""
        started = self._clock()
        exit_layers: list[int] = []
        failure = EngineFailed("the engine gave no answer to this text")
        try:
            for left in self._engine(jobs):
                exit_layers += self._hand_out(jobs, left, started)
        except Exception:
            log.exception("a batch of %d texts failed", len(jobs))
            failure = EngineFailed("the model failed on this batch")
        self._metrics.batch_done(exit_layers)
        self._post(lambda: self._finish(jobs, failure))

    def _hand_out(self, jobs: list[Job], left: Left, started: float) -> list[int]:
        """Post the answers of those who left together; returns their exit layers."""
        inference_s = self._clock() - started
        answers: list[tuple[Job, TimedAnswer | ServiceError]] = []
        exits: list[Answer] = []
        for index, answer in left:
            job = jobs[index]
            if isinstance(answer, Exception):
                log.error("one text of a batch failed: %s", answer)
                answers.append((job, EngineFailed(str(answer))))
            else:
                exits.append(answer)
                timed = TimedAnswer(answer, started - job.queued_at, inference_s)
                answers.append((job, timed))
        # Counted first: whoever has an answer finds it in the metrics.
        if exits:
            layer = exits[0].exit_layer
            self._metrics.texts_left(layer, (one.reason for one in exits), inference_s)
        self._post(lambda: self._settle(answers))
        return [one.exit_layer for one in exits]

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody is left to be answered
            log.warning("answers came after the event loop had closed")
