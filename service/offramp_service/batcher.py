"""Admission, and promises: every admitted text is computed, and answered to whom it belongs.

The batcher knows promises, not tensors and not HTTP; what is computed next is the scheduler's to
say. Routes admit and submit client batches on the event loop; an engine thread runs `serve`, which
asks the scheduler for a step and carries it out, from exit to exit. There is no timer: an idle
engine never waits for company, and while it computes the next batch gathers by itself.

Who owns what. A client batch's answers, its future and the room it takes belong to the event loop;
the engine thread only posts to it. The scheduler belongs to both and is touched under one lock, for
microseconds; a group under way is the engine thread's that runs it. Of these there may be several,
the workers.

A text is answered exactly once: by its answer, or with its whole client batch by the first failure
or by the end of its request (deadline, departure of the client), whichever comes first. Whatever
comes later finds the future done and is dropped.
"""

import asyncio
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

from offramp_service.errors import (
    DeadlineExceeded,
    EmptyInput,
    EngineFailed,
    InvalidInput,
    NotReady,
    Overloaded,
    ServiceError,
)
from offramp_service.jobs import (
    Answer,
    DispatchReason,
    Engine,
    ExitReason,
    Job,
    Left,
    TimedAnswer,
)
from offramp_service.metrics import Metrics, QueueView
from offramp_service.quality import ExitWatch
from offramp_service.scheduler import Group, Scheduler, Step
from offramp_service.shadow import ShadowWatch, sample_of
from offramp_service.slo import Load

log = logging.getLogger(__name__)

# The event loop gets so long to tell those whom a crash concerns; it may have ended.
_TELLING_S = 5.0
# The longest that a refused client is told to wait: nobody knows the load further ahead.
MOST_RETRY_S = 60

# A step that computes longer than this is taken for stuck by /livez.
STUCK_AFTER_S = 60.0


@dataclass(frozen=True, slots=True)
class Limits:
    """What may be inside. `max_texts` are admitted and not yet answered."""

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
            allowed = job.controls.deadline_s
            job.deadline = None if allowed is None else self.admitted_at + allowed

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
        scheduler: Scheduler,
        limits: Limits,
        metrics: Metrics,
        *,
        exits: ExitWatch | None = None,
        shadow: ShadowWatch | None = None,
        turns: Sequence[AbstractContextManager[None]] | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine, self._limits, self._metrics, self._clock = engine, limits, metrics, clock
        self._exits, self._shadow = exits, shadow
        # On the device, where others compute as well; one for each worker.
        self._turns = turns or [nullcontext()] * scheduler.plan.workers
        # Event loop only:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._open: set[ClientBatch] = set()  # submitted and unanswered
        self._texts = 0  # admitted and unanswered
        self._layers_ahead = 0.0  # that the texts of `_open` are expected to run
        self._layers_admitted = 0.0  # that all texts so far were
        self._farewell = ""  # why it was closed
        # Both sides, under the lock of `_changed`:
        self._changed = threading.Condition()
        self.scheduler = scheduler
        self._closed = False
        self._done = (0, 0.0)  # text-layers run, seconds of all workers that they took
        # Each worker writes its own entry:
        self._busy_since: dict[int, float] = {}  # the steps under way

    def show(self) -> None:
        """The metrics' gauges are of this queue from now on."""
        scheduler = self.scheduler
        self._metrics.watch_queue(
            QueueView(
                requests=lambda: len(scheduler.queue),
                tokens=lambda: scheduler.queue.tokens,
                layer_work=lambda: max(0.0, scheduler.queue.layers),
            )
        )

    @property
    def unanswered(self) -> int:
        """Texts admitted and not yet answered."""
        return self._texts

    @property
    def load(self) -> Load:
        """What stands before the engine, and how fast it has been."""
        limits = self._limits
        room_taken = max(
            self._texts / limits.max_texts,
            self.scheduler.queue.tokens / limits.max_queued_tokens,
        )
        return Load(self._layers_ahead, self._layers_admitted, *self._done, room_taken)

    @property
    def busy(self) -> bool:
        """A batch is being computed."""
        return bool(self._busy_since)

    @property
    def stuck(self) -> bool:
        """A worker has been on one step for longer than any step takes."""
        now = self._clock()
        return any(now - since > STUCK_AFTER_S for since in list(self._busy_since.values()))

    # -- event loop --------------------------------------------------------------------------

    @contextmanager
    def admit(self, texts: int, request_id: str) -> Iterator[ClientBatch]:
        """Room for the texts of a request, for all or none, until the block is left.

        It is taken before they are tokenised: whoever is refused has cost next to nothing.

        Raises:
            Overloaded, NotReady, InvalidInput: there is no room.
        """
        most = self._limits.max_texts
        self._check_open()
        if not texts:
            raise EmptyInput("nothing to classify")
        if texts > most:
            raise InvalidInput(
                f"{texts} texts can never be queued at once; at most {most} can", status=413
            )
        excess = self._texts + texts - most
        if excess > 0:
            raise self._overloaded(f"queue is full ({most} requests)", texts=excess)
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
        self._loop = asyncio.get_running_loop()
        batch.fill(jobs, now)
        with self._changed:
            self._check_deadline(batch, jobs, now)
            self.scheduler.add(jobs, now)
            self._open.add(batch)
            self._layers_ahead += _layers(jobs)
            self._layers_admitted += _layers(jobs)
            self._changed.notify()  # who takes a part of them wakes the next
        try:
            return await batch.future
        finally:
            self._leave(batch)

    def close(self, farewell: str = "the server is shutting down") -> None:
        """Let go of everybody still waiting, admit nothing more, and end `serve`."""
        if self._shadow is not None:
            self._shadow.closed = True
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
        most = self._limits.max_queued_tokens
        if tokens > most:
            raise InvalidInput(
                f"{tokens} tokens can never be queued at once; at most {most} can", status=413
            )
        excess = self.scheduler.queue.tokens + tokens - most
        if excess > 0:
            raise self._overloaded(f"queue is full ({most} tokens)", tokens=excess)

    def _overloaded(self, message: str, *, texts: int = 0, tokens: int = 0) -> Overloaded:
        """There is one text or token too many, or more; says when there may be room."""
        with self._changed:
            room_s = self.scheduler.seconds_until_room(self._clock(), texts=texts, tokens=tokens)
        if room_s is None:
            return Overloaded(message)
        retry_after_s = min(max(1, math.ceil(room_s)), MOST_RETRY_S)
        return Overloaded(message, retry_after_s=retry_after_s)

    def _check_deadline(self, batch: ClientBatch, jobs: Sequence[Job], now: float) -> None:
        """Refuse a request whose texts, by what layers cost, cannot all be answered in time; they
        have one deadline."""
        deadline = jobs[0].deadline
        if deadline is None:
            return
        end = now + self.scheduler.seconds_until_answered(jobs, now)
        if end > deadline:
            expected_s, allowed_s = end - batch.admitted_at, deadline - batch.admitted_at
            raise DeadlineExceeded(
                f"the answer would take {expected_s * 1000:.0f} ms, "
                f"deadline_ms is {allowed_s * 1000:.0f}",
                param="deadline_ms",
            )

    def _leave(self, batch: ClientBatch) -> None:
        """Nobody waits for it any more; take those of its texts out that still do."""
        self._open.discard(batch)
        # Sums of floats drift; where nobody waits there is no work.
        self._layers_ahead = self._layers_ahead - _layers(batch.jobs) if self._open else 0.0
        if batch.complete:
            return
        with self._changed:
            for job in batch.jobs:
                if job in self.scheduler.queue:
                    self.scheduler.queue.take_out(job)

    def _settle(self, answers: Sequence[tuple[Job, TimedAnswer | ServiceError]]) -> None:
        for job, answer in answers:
            batch = _client_batch(job)
            if isinstance(answer, ServiceError):
                batch.fail(answer)
            else:
                # Also of those who have gone meanwhile: where a text leaves is not their doing.
                self._watch_exit(job, answer.answer.exit_layer)
                batch.answer(job.index, answer)

    def _watch_exit(self, job: Job, exit_layer: int) -> None:
        if self._exits is not None and job.controls.expected is not None:
            self._exits.note(job.controls.expected, exit_layer)

    def _finish(self, jobs: Sequence[Job], failure: ServiceError) -> None:
        """Nobody may wait for a batch that is over."""
        for job in jobs:
            batch = _client_batch(job)
            if not batch.answered(job.index):
                batch.fail(failure)

    def _lost(self) -> list[Job]:
        """The unanswered texts that neither wait nor are in a worker's hands."""
        with self._changed:
            queue, groups = self.scheduler.queue, self.scheduler.groups
            inside = {job for group in groups for job in group.inside.values()}
            return [
                job
                for batch in self._open
                for job in batch.jobs
                if not (batch.answered(job.index) or job in queue or job in inside)
            ]

    # -- engine thread -----------------------------------------------------------------------

    def serve(self, worker: int = 0) -> None:
        """An engine thread's main loop, until `close`."""
        try:
            while (step := self._next_step(worker)) is not None:
                with self._turns[worker]:
                    if step.group.shadow:
                        self._carry_out_shadow(step, worker)
                    else:
                        self._carry_out(step, worker)
        finally:
            self._busy_since.pop(worker, None)

    def let_go(self, worker: int = 0) -> None:
        """After a worker's `serve` was left by an error: who was in its hands gets a 500, who waits
        goes on waiting. Comes back when they have been told, so that nobody is taken for one who
        is computed by then."""
        told = threading.Event()

        def look() -> None:
            # Texts that have just left another worker's hands look lost as well. Their answers are
            # on the way already, and come before what is called from here.
            lost = self._lost()
            asyncio.get_running_loop().call_soon(tell, lost)

        def tell(lost: Sequence[Job]) -> None:
            self._finish(lost, EngineFailed("the engine crashed on this batch"))
            told.set()

        with self._changed:
            shadows = self.scheduler.let_go(worker)
        self._metrics.shadows_dropped(shadows)
        self._post(look)
        told.wait(_TELLING_S)

    def go_on_with(self, engine: Engine) -> None:
        """For batches that start from now on."""
        self._engine = engine

    def _next_step(self, worker: int) -> Step | None:
        """Wait for something to do; None means closed."""
        with self._changed:
            while True:
                step = self.scheduler.next_step(self._clock(), worker)
                if step is not None or self._closed:
                    if self.scheduler.queue:
                        self._changed.notify()  # another worker's share
                    return step
                # A shadow batch that it left standing is in nobody's hands.
                self._busy_since.pop(worker, None)
                self._changed.wait()

    def _carry_out(self, step: Step, worker: int) -> None:
        """Run a group to its next exit and answer who leaves; a failure stays within the group."""
        group, left, layers_run = step.group, None, 0
        started = self._busy_since[worker] = self._clock()
        failure = EngineFailed("the engine gave no answer to this text")
        try:
            if step.opened is not None:
                self._start(group, step.opened)
            if step.joined is not None:
                group.course.take_in(step.joined.course)
            left = next(group.course, None)
            if left is not None:
                layers_run = left.texts_run * (left.exit_layer - group.layer)
                self._hand_out(group, left)
        except Exception:
            names = _names(group.jobs)
            log.exception("a batch of %d texts failed, requests %s", len(group.jobs), names)
            left, failure = None, EngineFailed("the model failed on this batch")
        finally:
            self._worked(layers_run, self._clock() - started)
        if left is None:
            self._end(group, failure, worker)

    def _worked(self, layers_run: int, seconds: float) -> None:
        """One of the workers did; a second of the engine is one of all of them."""
        seconds /= self.scheduler.plan.workers
        with self._changed:
            self._done = (self._done[0] + layers_run, self._done[1] + seconds)
        self._metrics.engine_worked(seconds)

    def _start(self, group: Group, reason: DispatchReason) -> None:
        waits = [job.started_at - job.queued_at for job in group.jobs]
        self._metrics.batch_formed(reason, group.tokens, waits)
        group.course = self._engine(group.jobs)

    def _hand_out(self, group: Group, left: Left) -> None:
        """Post the answers of those who left together."""
        layers = range(group.layer + 1, left.exit_layer + 1)
        self._metrics.layers_ran(layers, left.texts_run, len(left.answers))
        now = self._clock()
        answers: list[tuple[Job, TimedAnswer | ServiceError]] = []
        broken: list[tuple[Job, Exception]] = []
        exits: list[tuple[ExitReason, float]] = []
        again: list[Job] = []
        for index, answer in left.answers:
            job = group.jobs[index]
            if isinstance(answer, Exception):
                broken.append((job, answer))
                answers.append((job, EngineFailed(str(answer))))
            else:
                began = job.started_at
                timed = TimedAnswer(answer, began - job.queued_at, now - began, began)
                exits.append((answer.reason, timed.inference_s))
                answers.append((job, timed))
                again += self._sample(job, answer, now)
        # Counted first: whoever has an answer finds it in the metrics.
        self._metrics.texts_left(left.exit_layer, exits)
        if answers:
            self._post(lambda: self._settle(answers))
        # After that: a text that is not inside and has no answer to come is lost.
        group.passed(left)
        self._queue_shadows(again)
        if broken:
            names = _names([job for job, _ in broken])
            text = "%d of %d texts of a batch failed: %s, requests %s"
            log.error(text, len(broken), len(group.jobs), broken[0][1], names)

    def _end(self, group: Group, failure: ServiceError, worker: int) -> None:
        """Whoever has not been answered gets the failure."""
        with self._changed:
            self.scheduler.close(group)
            if all(other.worker != worker for other in self.scheduler.groups):
                self._busy_since.pop(worker, None)
        self._post(lambda: self._finish(group.jobs, failure))

    # -- engine thread: second runs, which no client waits for ---------------------------------

    def _sample(self, job: Job, answer: Answer, now: float) -> list[Job]:
        """The second run of a text, if it is to have one."""
        again = self._shadow.choose(job, answer, now) if self._shadow is not None else None
        return [again] if again is not None else []

    def _queue_shadows(self, jobs: Sequence[Job]) -> None:
        if not jobs:
            return
        with self._changed:
            dropped = sum(not self.scheduler.add_shadow(job) for job in jobs)
        self._metrics.shadows_dropped(dropped)

    def _carry_out_shadow(self, step: Step, worker: int) -> None:
        """Run a shadow batch to its next exit. Nothing of it counts as service to anybody, and a
        failure costs a few comparisons."""
        group, left = step.group, None
        self._busy_since[worker] = self._clock()
        try:
            if step.opened is not None:
                group.course = self._engine(group.jobs)
            left = next(group.course, None)
            if left is not None:
                self._compare(group, left)
        except Exception:
            log.exception("a shadow batch of %d texts failed", len(group.jobs))
            left = None
        if left is None:
            self._metrics.shadows_dropped(len(group.inside))
            with self._changed:
                self.scheduler.close(group)
            self._busy_since.pop(worker, None)

    def _compare(self, group: Group, left: Left) -> None:
        self._metrics.shadow_layers_ran(range(group.layer + 1, left.exit_layer + 1), left.texts_run)
        for index, answer in left.answers:
            sample = sample_of(group.jobs[index])
            if isinstance(answer, Exception):
                self._metrics.shadows_dropped(1)
            else:
                self._metrics.shadow_compared(sample.exit_layer, agrees=sample.agrees(answer))
        group.passed(left)

    def _post(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop is closed: nobody is left to be answered
            log.warning("answers came after the event loop had closed")


def _layers(jobs: Sequence[Job]) -> float:
    """That they are expected to run."""
    return sum(job.controls.depth.mean for job in jobs)


def _client_batch(job: Job) -> ClientBatch:
    batch = job.waiter
    assert isinstance(batch, ClientBatch)
    return batch


def _names(jobs: Sequence[Job]) -> str:
    """The requests that these texts belong to, for the log."""
    return ", ".join(dict.fromkeys(_client_batch(job).request_id for job in jobs))
