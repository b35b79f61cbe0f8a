"""The queue's promises: bounds, order, isolation, and exactly one answer for everybody."""

import asyncio
import itertools
import random
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loading import load
from offramp_model.cost import StepTable
from offramp_service.batcher import Batcher, ClientBatch
from offramp_service.errors import (
    DeadlineExceeded,
    EngineFailed,
    InvalidInput,
    NotReady,
    Overloaded,
    ServiceError,
)
from offramp_service.jobs import Answer, Controls, Depth, Engine, Job, Left, TimedAnswer
from offramp_service.metrics import Metrics
from offramp_service.quality import ExitWatch
from offramp_service.routes.door import Patience
from offramp_service.scheduler import LEAST_SHARE, MOST_SHADOWS
from offramp_service.shadow import ShadowWatch

fakes = load("tests/unit/service/conftest.py")

MakeBatcher = Callable[..., Batcher]
Serve = Callable[[Batcher], Batcher]
Read = Callable[..., float]


def labels(answers: list) -> list[int]:
    return [one.answer.label for one in answers]


def _until_it_dies(batcher: Batcher) -> None:
    with suppress(SystemExit):
        batcher.serve()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is awaited lies in a thread
            await asyncio.sleep(0.001)


async def test_a_client_batch_is_answered_in_its_own_order(
    make_batcher: MakeBatcher, served: Serve
) -> None:
    batcher = served(make_batcher(fakes.FakeEngine()))
    answers = await fakes.ask(batcher, [fakes.job(number) for number in (5, 2, 9, 4)])
    assert labels(answers) == [5, 2, 9, 4]
    assert [one.answer.exit_layer for one in answers] == [2, 4, 2, 4]


async def test_many_clients_get_their_own_answers(make_batcher: MakeBatcher, served: Serve) -> None:
    engine = fakes.FakeEngine()
    batcher = served(make_batcher(engine, max_batch_tokens=20))
    requests = [[client * 10 + place for place in range(client % 4 + 1)] for client in range(24)]
    answers = await asyncio.gather(
        *(fakes.ask(batcher, [fakes.job(number) for number in request]) for request in requests)
    )
    assert [labels(one) for one in answers] == requests
    assert all(3 * len(batch) <= 20 for batch in engine.batches)


async def test_an_idle_engine_starts_at_once_and_a_busy_one_gathers(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    engine = fakes.GatedEngine()
    batcher = served(make_batcher(engine))
    first = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    await until(engine.entered.is_set)
    others = [asyncio.create_task(fakes.ask(batcher, [fakes.job(number)])) for number in (2, 3, 4)]
    await until(lambda: read("queue_requests") == 3)
    for _ in range(4):
        engine.gate.release()
    await asyncio.gather(first, *others)
    assert engine.batches == [[1], [2, 3, 4]]
    assert read("batch_dispatch_total", reason="idle") == 2


async def test_who_leaves_early_is_answered_before_the_batch_ends(
    make_batcher: MakeBatcher, served: Serve
) -> None:
    engine = fakes.GatedEngine()
    batcher = make_batcher(engine)
    early = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    late = asyncio.create_task(fakes.ask(batcher, [fakes.job(2)]))
    await asyncio.sleep(0)
    served(batcher)
    engine.gate.release()
    assert labels(await early) == [1]
    assert not late.done()
    engine.gate.release()
    assert labels(await late) == [2]
    assert engine.batches == [[1, 2]]


@pytest.mark.parametrize(
    ("limits", "batches", "reason"),
    [
        ({"max_batch_tokens": 7}, [[0, 1], [2, 3], [4]], "tokens"),
        ({"max_batch_texts": 3}, [[0, 1, 2], [3, 4]], "full"),
    ],
)
async def test_size_is_counted_in_texts_and_tokens(
    make_batcher: MakeBatcher, served: Serve, read: Read, limits, batches, reason
) -> None:
    engine = fakes.FakeEngine()
    batcher = make_batcher(engine, **limits)
    task = asyncio.create_task(fakes.ask(batcher, [fakes.job(number) for number in range(5)]))
    await asyncio.sleep(0)
    served(batcher)
    assert labels(await task) == [0, 1, 2, 3, 4]
    assert engine.batches == batches
    assert read("batch_dispatch_total", reason=reason) == len(batches) - 1


async def test_a_full_queue_refuses_whole_client_batches(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    batcher = make_batcher(fakes.FakeEngine(), max_texts=4, max_queued_tokens=20)
    waiting = asyncio.create_task(fakes.ask(batcher, [fakes.job(number) for number in range(3)]))
    await asyncio.sleep(0)
    with pytest.raises(Overloaded, match=r"queue is full \(4 requests\)"):
        await fakes.ask(batcher, [fakes.job(8), fakes.job(9)])
    with pytest.raises(Overloaded, match=r"queue is full \(20 tokens\)"):
        await fakes.ask(batcher, [fakes.job(8, tokens=12)])
    with pytest.raises(InvalidInput, match="never be queued") as error:
        await fakes.ask(batcher, [fakes.job(8, tokens=21)])
    assert error.value.status == 413
    assert (read("queue_requests"), read("queue_tokens"), read("queue_layer_work")) == (3, 9, 12)
    fits = asyncio.create_task(fakes.ask(batcher, [fakes.job(3)]))
    await asyncio.sleep(0)
    served(batcher)
    await asyncio.gather(waiting, fits)
    assert (read("queue_requests"), read("queue_tokens"), read("queue_layer_work")) == (0, 0, 0)
    assert batcher.unanswered == 0


async def test_who_is_refused_is_told_when_there_may_be_room(make_batcher: MakeBatcher) -> None:
    """Texts of 3 tokens and 4 layers, of which a layer takes 0.5 s; a batch holds all."""
    batcher = make_batcher(fakes.FakeEngine(), max_texts=10, max_queued_tokens=33)

    async def retry_after(texts: int, tokens: int = 3) -> int | None:
        with pytest.raises(Overloaded) as error:
            await fakes.ask(batcher, [fakes.job(9, tokens=tokens) for _ in range(texts)])
        return error.value.retry_after_s

    waiting = asyncio.create_task(fakes.ask(batcher, [fakes.job(number) for number in range(10)]))
    await asyncio.sleep(0)
    assert await retry_after(1) == 1  # nobody knows
    batcher.scheduler.learn(StepTable((3, 3000), (0.5, 500.0)))
    assert await retry_after(1) == 2  # a tenth of 20 s
    assert await retry_after(7) == 14
    batcher.scheduler.learn(StepTable((3, 3000), (50.0, 50_000.0)))
    assert await retry_after(5) == 60
    batcher.scheduler.learn(StepTable((3, 3000), (5e-6, 5e-3)))
    assert await retry_after(5) == 1
    batcher._texts -= 1  # a text was answered, and the tokens are what is short
    batcher.scheduler.learn(StepTable((3, 3000), (0.5, 500.0)))
    assert await retry_after(1, tokens=18) == 10  # 15 of the 30 that wait
    batcher._texts += 1
    waiting.cancel()


async def test_a_failing_batch_fails_its_own_requests_only(
    make_batcher: MakeBatcher, served: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    batcher = make_batcher(fakes.FakeEngine(poison={2}), max_batch_texts=2)
    tasks = [
        asyncio.create_task(fakes.ask(batcher, [fakes.job(number)], f"r{number}"))
        for number in range(6)
    ]
    await asyncio.sleep(0)
    served(batcher)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [isinstance(one, EngineFailed) for one in results] == [False, False, True, True] + [
        False
    ] * 2
    assert batcher.unanswered == 0
    assert "poisoned" in caplog.text
    assert "a batch of 2 texts failed, requests r2, r3" in caplog.text


async def test_a_broken_text_fails_alone(
    make_batcher: MakeBatcher, served: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    def engine(jobs: list[Job]):
        answers = [
            (index, ValueError("broken") if job.ids[0] in (1, 2) else fakes.answer_to(job))
            for index, job in enumerate(jobs)
        ]
        yield Left(4, len(jobs), answers)

    batcher = make_batcher(engine)
    tasks = [
        asyncio.create_task(fakes.ask(batcher, [fakes.job(number)], f"r{number}"))
        for number in range(4)
    ]
    await asyncio.sleep(0)
    served(batcher)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [list, EngineFailed, EngineFailed, list]
    await until(lambda: not batcher.busy)
    (line,) = caplog.messages  # one line a batch
    assert line == "2 of 4 texts of a batch failed: broken, requests r1, r2"


async def test_an_engine_that_forgets_a_text_leaves_nobody_waiting(
    make_batcher: MakeBatcher, served: Serve
) -> None:
    def engine(jobs: list[Job]):
        yield Left(4, len(jobs), [(0, fakes.answer_to(jobs[0]))])

    batcher = make_batcher(engine)
    tasks = [asyncio.create_task(fakes.ask(batcher, [fakes.job(number)])) for number in range(2)]
    await asyncio.sleep(0)
    served(batcher)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [list, EngineFailed]


async def test_who_leaves_the_queue_frees_it_and_is_never_computed(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    engine = fakes.FakeEngine()
    batcher = make_batcher(engine, max_texts=2)
    gone = asyncio.create_task(fakes.ask(batcher, [fakes.job(1), fakes.job(2)]))
    await asyncio.sleep(0)
    gone.cancel()
    with pytest.raises(asyncio.CancelledError):
        await gone
    assert (read("queue_requests"), read("queue_tokens"), batcher.unanswered) == (0, 0, 0)
    served(batcher)
    assert labels(await fakes.ask(batcher, [fakes.job(3), fakes.job(4)])) == [3, 4]
    assert engine.batches == [[3, 4]]


async def test_who_leaves_a_running_batch_is_seen_as_abandoned(
    make_batcher: MakeBatcher, served: Serve
) -> None:
    jobs = [fakes.job(1), fakes.job(2)]
    engine = fakes.GatedEngine()
    batcher = served(make_batcher(engine))
    task = asyncio.create_task(fakes.ask(batcher, jobs))
    await until(engine.entered.is_set)
    assert not jobs[0].abandoned
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert jobs[0].abandoned
    assert jobs[1].abandoned
    assert batcher.unanswered == 0
    engine.gate.release(2)


async def test_what_nobody_waits_for_is_still_counted_as_run(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    """Three texts, abandoned while they run to the exit after layer 2: six text-layers."""

    def engine(jobs: list[Job]):
        entered.set()
        assert gate.wait(20)
        yield Left(2, len(jobs), [])

    entered, gate = threading.Event(), threading.Event()
    batcher = served(make_batcher(engine))
    task = asyncio.create_task(fakes.ask(batcher, [fakes.job(number) for number in range(3)]))
    await until(entered.is_set)
    task.cancel()
    gate.set()
    await until(lambda: not batcher.busy)
    assert [read("layer_executions_total", layer=str(layer)) for layer in (1, 2, 3, 4)] == [
        *(3, 3, 0, 0)
    ]
    assert read("layer_batch_size_sum", layer="2") == 3
    assert read("engine_busy_seconds_total") > 0
    assert (read("samples_total"), read("layers_saved_total")) == (0, 0)


async def test_a_text_is_answered_once() -> None:
    batch = ClientBatch("r", asyncio.get_running_loop(), 0.0)
    jobs = [fakes.job(1), fakes.job(2)]
    batch.fill(jobs, now=0.0)
    first, other = (TimedAnswer(fakes.answer_to(one), 0.0, 0.0, 0.0) for one in jobs)
    batch.answer(0, first)
    batch.answer(0, other)
    assert not batch.complete
    batch.answer(1, other)
    batch.answer(1, first)
    batch.fail(EngineFailed("too late"))
    assert await batch.future == [first, other]


async def test_room_is_taken_before_there_are_tokens(make_batcher: MakeBatcher) -> None:
    batcher = make_batcher(fakes.FakeEngine(), max_texts=4)
    with batcher.admit(3, "r"):
        with pytest.raises(Overloaded, match=r"queue is full \(4 requests\)"):
            await fakes.ask(batcher, [fakes.job(8), fakes.job(9)])
        with batcher.admit(1, "s"):
            assert batcher.unanswered == 4
    assert batcher.unanswered == 0


async def test_an_engine_thread_that_dies_leaves_nobody_waiting(
    make_batcher: MakeBatcher,
) -> None:
    """Whatever ends the thread, the batch is not taken for running any more."""

    def engine(jobs: list[Job]):
        raise SystemExit
        yield

    batcher = make_batcher(engine)
    task = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    await asyncio.sleep(0)
    thread = threading.Thread(target=_until_it_dies, args=[batcher])
    thread.start()
    await asyncio.to_thread(thread.join, 10)
    assert not batcher.busy
    batcher.close("the engine has stopped")
    with pytest.raises(NotReady, match="the engine has stopped"):
        await task
    with pytest.raises(NotReady, match="the engine has stopped"):
        await fakes.ask(batcher, [fakes.job(2)])


async def test_a_metric_that_breaks_costs_one_batch(
    make_batcher: MakeBatcher, served: Serve, metrics: Metrics, monkeypatch: pytest.MonkeyPatch
) -> None:
    batcher = served(make_batcher(fakes.FakeEngine()))
    with monkeypatch.context() as broken:
        broken.setattr(metrics, "batch_formed", lambda *_: 1 / 0)
        with pytest.raises(EngineFailed):
            await fakes.ask(batcher, [fakes.job(1)])
    assert labels(await fakes.ask(batcher, [fakes.job(2)])) == [2]


async def test_closing_answers_everybody_and_ends_the_thread(make_batcher: MakeBatcher) -> None:
    engine = fakes.GatedEngine()
    batcher = make_batcher(engine, max_batch_texts=1)
    thread = threading.Thread(target=batcher.serve, daemon=True)
    thread.start()
    tasks = [asyncio.create_task(fakes.ask(batcher, [fakes.job(number)])) for number in range(3)]
    await until(engine.entered.is_set)
    batcher.close()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert [type(one) for one in results] == [NotReady] * 3
    with pytest.raises(NotReady):
        await fakes.ask(batcher, [fakes.job(4)])
    engine.gate.release(2)
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
    assert batcher.unanswered == 0


async def test_stuck_is_a_batch_that_never_ends(metrics) -> None:
    now = 0.0
    seen: list[bool] = []

    def engine(jobs: list[Job]):
        nonlocal now
        seen.append(batcher.stuck)
        now += 61
        seen.append(batcher.stuck)
        yield Left(4, len(jobs), [(index, fakes.answer_to(job)) for index, job in enumerate(jobs)])

    batcher = fakes.batcher_of(engine, metrics, clock=lambda: now)
    task = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    await asyncio.sleep(0)
    thread = threading.Thread(target=batcher.serve, daemon=True)
    thread.start()
    await task
    batcher.close()
    await asyncio.to_thread(thread.join, 10)
    assert seen == [False, True]
    assert not batcher.stuck


def due(number: int, deadline_s: float | None, tokens: int = 3) -> Job:
    job = fakes.job(number, tokens=tokens)
    return replace(job, controls=replace(job.controls, deadline_s=deadline_s))


async def test_who_must_start_first_is_taken_first(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    engine = fakes.GatedEngine()
    batcher = served(make_batcher(engine, max_batch_texts=1))
    tasks = [asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))]
    await until(engine.entered.is_set)
    # 20 s is later than the second in which a text without a deadline is to start.
    for number, deadline_s in ((2, None), (3, 20.0), (4, 0.5), (5, None), (6, 0.5)):
        tasks.append(asyncio.create_task(fakes.ask(batcher, [due(number, deadline_s)])))
        await until(lambda: read("queue_requests") == len(tasks) - 1)
    for _ in range(12):
        engine.gate.release()
    await asyncio.gather(*tasks)
    assert engine.batches == [[1], [4], [6], [2], [5], [3]]


async def test_what_cannot_be_in_time_is_refused_before_it_costs_anything(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    engine = fakes.GatedEngine()
    batcher = make_batcher(engine)
    batcher.scheduler.learn(StepTable((10, 1000), (0.01, 1.0)))  # 1 ms a token and layer
    served(batcher)
    first = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    await until(engine.entered.is_set)
    waiting = asyncio.create_task(fakes.ask(batcher, [fakes.job(2, tokens=100)]))
    await until(lambda: read("queue_requests") == 1)
    layers = fakes.job(0).controls.depth.mean
    # 50 tokens: as many milliseconds a layer alone, three times as many behind the 100. Whoever has
    # to start before those is not behind them.
    for deadline_s, in_time in ((0.04 * layers, False), (1.5 + 0.04 * layers, True)):
        asked = fakes.ask(batcher, [due(3, deadline_s, tokens=50)])
        if in_time:
            last = asyncio.create_task(asked)
            await until(lambda: read("queue_requests") == 2)
        else:
            with pytest.raises(DeadlineExceeded, match=r"the answer would take .* ms, deadline_ms"):
                await asked
            assert read("queue_requests") == 1
    for _ in range(8):
        engine.gate.release()
    await asyncio.gather(first, waiting, last)
    assert sorted(itertools.chain(*engine.batches)) == [1, 2, 3]


class _Moody:
    """Fails some batches, breaks some texts, forgets some, and lets clients go meanwhile."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self.computed: list[int] = []

    def __call__(self, jobs: list[Job]):
        self.computed += [job.ids[0] for job in jobs]
        mood = self._rng.random()
        for layer in (2, 4):
            part: list[tuple[int, Answer | Exception]] = []
            for index, job in enumerate(jobs):
                if (job.ids[0] % 2 == 1) is (layer == 2):
                    broken = self._rng.random() < 0.1
                    part.append((index, ValueError("x") if broken else fakes.answer_to(job, layer)))
            if mood < 0.2 and layer == 4:
                raise RuntimeError("moody")
            if mood > 0.9:
                part = part[1:]  # forget one
            yield Left(layer, len(jobs), part)


@given(seed=st.integers(0, 2**32))
async def test_every_admitted_request_ends_exactly_once_and_the_books_balance(seed: int) -> None:
    """Random clients against a moody engine: success, failure, timeout, departure, drain."""
    await asyncio.wait_for(_storm(random.Random(seed)), 20)


async def _storm(rng: random.Random) -> None:
    metrics = fakes.make_metrics()
    engine: Engine = _Moody(rng)
    limits = {
        "max_batch_tokens": 12,
        "max_batch_texts": 4,
        "max_texts": 12,
        "max_queued_tokens": 30,
    }
    workers = rng.randint(1, 3)
    batcher = fakes.batcher_of(engine, metrics, workers=workers, **limits)
    threads = [
        threading.Thread(target=batcher.serve, args=[worker], daemon=True)
        for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    admitted_and_answered = 0

    async def client(number: int) -> None:
        nonlocal admitted_and_answered
        numbers = [number * 10 + place for place in range(rng.randint(1, 4))]
        jobs = [fakes.job(one, tokens=rng.randint(1, 4)) for one in numbers]
        timeout_s = rng.choice([0.0, 0.001, 5.0])
        leaves = rng.random() < 0.3

        async def gone() -> None:
            await asyncio.sleep(0.0005 if leaves else 30)

        await asyncio.sleep(rng.random() * 0.005)
        try:
            async with Patience(timeout_s) as patience:
                patience.until(gone)
                answers = await fakes.ask(batcher, jobs)
        except ServiceError:
            return
        assert labels(answers) == numbers
        admitted_and_answered += len(answers)

    tasks = [asyncio.create_task(client(number)) for number in range(20)]
    for task in rng.sample(tasks, 3):
        asyncio.get_running_loop().call_later(rng.random() * 0.005, task.cancel)
    if rng.random() < 0.3:
        asyncio.get_running_loop().call_later(0.003, batcher.close)
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(one is None or isinstance(one, asyncio.CancelledError) for one in results), results
    batcher.close()
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()
    assert not batcher.busy
    assert batcher.unanswered == 0
    model = {"model_name": "tiny", "model_version": "1"}
    for gauge in ("queue_requests", "queue_tokens", "queue_layer_work"):
        assert metrics.registry.get_sample_value(f"offramp_{gauge}", model) == 0
    assert (
        metrics.registry.get_sample_value("offramp_samples_total", model) >= admitted_and_answered
    )
    assert len(engine.computed) == len(set(engine.computed)), "a text was computed twice"


# -- several workers -------------------------------------------------------------------------------


async def test_one_request_is_shared_out_among_workers(
    make_batcher: MakeBatcher, served: Serve, read: Read
) -> None:
    engine = fakes.GatedEngine()
    batcher = served(make_batcher(engine, workers=2))
    jobs = [fakes.job(number, tokens=LEAST_SHARE) for number in range(4)]
    task = asyncio.create_task(fakes.ask(batcher, jobs))
    await until(lambda: len(engine.batches) == 2)  # nothing but the first woke the second
    engine.gate.release(4)
    assert labels(await task) == [0, 1, 2, 3]
    assert sorted(engine.batches) == [[0, 1], [2, 3]]
    assert read("batch_dispatch_total", reason="share") == 1
    await until(lambda: not batcher.busy)


async def test_a_second_of_the_engine_is_one_of_all_its_workers(metrics: Metrics) -> None:
    now = 0.0

    def engine(jobs: list[Job]):
        nonlocal now
        now += 6.0
        yield Left(4, len(jobs), [(index, fakes.answer_to(job)) for index, job in enumerate(jobs)])

    batcher = fakes.batcher_of(engine, metrics, workers=3, clock=lambda: now)
    thread = threading.Thread(target=batcher.serve, args=[2], daemon=True)
    thread.start()
    await fakes.ask(batcher, [fakes.job(1)])
    batcher.close()
    await asyncio.to_thread(thread.join, 10)
    assert batcher.load.busy_s == pytest.approx(2.0)
    assert batcher.load.layers_run == 4


class HeldEngine:
    """Computes batches once it is let to; a text with the number 1 brings its worker down."""

    def __init__(self) -> None:
        self.gate, self.entered = threading.Event(), threading.Event()

    def __call__(self, jobs: list[Job]):
        if jobs[0].ids[0] == 1:
            raise SystemExit
        self.entered.set()
        assert self.gate.wait(20)
        yield Left(4, len(jobs), [(index, fakes.answer_to(job)) for index, job in enumerate(jobs)])


async def one_inside(batcher: Batcher, engine: HeldEngine) -> tuple[threading.Thread, asyncio.Task]:
    """Worker 1 serves, and has the text with the number 2 in hands."""
    healthy = threading.Thread(target=batcher.serve, args=[1], daemon=True)
    healthy.start()
    inside = asyncio.create_task(fakes.ask(batcher, [fakes.job(2)]))
    await until(engine.entered.is_set)
    return healthy, inside


async def test_a_worker_that_crashes_takes_nobody_elses_texts_along(
    make_batcher: MakeBatcher,
) -> None:
    engine = HeldEngine()
    batcher = make_batcher(engine, workers=2)
    healthy, inside = await one_inside(batcher, engine)
    doomed = asyncio.create_task(fakes.ask(batcher, [fakes.job(1)]))
    await asyncio.sleep(0)
    crashing = threading.Thread(target=_until_it_dies, args=[batcher])
    crashing.start()
    await asyncio.to_thread(crashing.join, 10)
    waiting = asyncio.create_task(fakes.ask(batcher, [fakes.job(3)]))
    await asyncio.sleep(0)
    await asyncio.to_thread(batcher.let_go, 0)
    with pytest.raises(EngineFailed, match="crashed"):
        await doomed
    assert not inside.done()
    assert not waiting.done()
    engine.gate.set()
    assert labels(await inside) == [2]
    assert labels(await waiting) == [3]
    batcher.close()
    await asyncio.to_thread(healthy.join, 10)
    assert not healthy.is_alive()


async def test_what_another_worker_has_just_handed_out_is_not_lost(
    make_batcher: MakeBatcher,
) -> None:
    """Its answer is on the way behind the news of a crash, as the event loop was busy."""
    engine = HeldEngine()
    batcher = make_batcher(engine, workers=2)
    healthy, inside = await one_inside(batcher, engine)
    crash = threading.Thread(target=batcher.let_go, args=[0], daemon=True)
    crash.start()
    engine.gate.set()
    while batcher.busy:
        time.sleep(0.001)  # noqa: ASYNC251 - the loop is busy, and nothing posted is looked at
    assert labels(await inside) == [2]
    batcher.close()
    for thread in (crash, healthy):
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


async def test_a_worker_that_leaves_a_shadow_batch_to_another_is_idle(metrics: Metrics) -> None:
    """Else an idle server would call itself stuck a minute later."""
    gates = {True: threading.Semaphore(0), False: threading.Semaphore(0)}
    in_shadow = threading.Event()

    def engine(jobs: list[Job]):
        answers = [(index, fakes.answer_to(job)) for index, job in enumerate(jobs)]
        shadow = jobs[0].controls is FULL_DEPTH
        if not shadow and jobs[0].ids[0] == 1:
            yield Left(2, 1, [(0, fakes.answer_to(jobs[0], 2))])
            return
        for layer in (2, fakes.LAYERS) if shadow else (fakes.LAYERS,):
            in_shadow.set()
            assert gates[shadow].acquire(timeout=20)
            yield Left(layer, len(jobs), answers if layer == fakes.LAYERS else [])

    watch = ShadowWatch(1.0, FULL_DEPTH)
    batcher = fakes.batcher_of(engine, metrics, workers=2, shadow=watch)
    threads = [
        threading.Thread(target=batcher.serve, args=[worker], daemon=True) for worker in (0, 1)
    ]
    for thread in threads:
        thread.start()
    await fakes.ask(batcher, [fakes.job(1)])  # leaves early, and is run again
    await until(in_shadow.is_set)
    second = asyncio.create_task(fakes.ask(batcher, [fakes.job(2)]))
    await until(lambda: len(batcher.scheduler.groups) == 1)
    gates[True].release()  # the stretch ends, and the batch stands aside
    await until(lambda: len(batcher._busy_since) == 1)
    gates[False].release()
    await second
    gates[True].release()  # whoever is done last runs it to its end
    await until(lambda: not batcher.busy)
    batcher.close()
    for thread in threads:
        await asyncio.to_thread(thread.join, 10)
        assert not thread.is_alive()


# -- second runs -----------------------------------------------------------------------------------

FULL_DEPTH = Controls(9.0, 1, fakes.LAYERS, Depth.full(fakes.LAYERS))


class ShadowedEngine(fakes.FakeEngine):
    """Clients' odd texts leave early; run again to the end, one in three says something else."""

    def __call__(self, jobs):
        if jobs[0].controls is not FULL_DEPTH:
            assert all(job.controls is not FULL_DEPTH for job in jobs)
            yield from super().__call__(jobs)
            return
        self.batches.append([-job.ids[0] for job in jobs])
        if self.poison & {-job.ids[0] for job in jobs}:
            raise RuntimeError("poisoned")
        yield Left(2, len(jobs), [])
        answers = [fakes.answer_to(job) for job in jobs]
        answers = [replace(one, label=0) if one.label % 3 == 0 else one for one in answers]
        yield Left(fakes.LAYERS, len(jobs), list(enumerate(answers)))


def agreement(read: Read, agree: str) -> float:
    return read("shadow_agreement_total", layer="2", agree=agree)


async def test_texts_that_left_early_are_compared_and_counted_nowhere_else(
    metrics: Metrics, served: Serve, read: Read
) -> None:
    shadow, engine = ShadowWatch(1.0, FULL_DEPTH), ShadowedEngine()
    batcher = served(fakes.batcher_of(engine, metrics, shadow=shadow))
    await fakes.ask(batcher, [fakes.job(number) for number in range(1, 13)])
    await until(lambda: agreement(read, "true") + agreement(read, "false") == 6)
    assert agreement(read, "true") == 4
    assert agreement(read, "false") == 2  # 3 and 9
    assert read("shadow_layer_executions_total") == 6 * fakes.LAYERS
    await until(lambda: not batcher.busy)
    assert (read("samples_total"), read("batch_size_count")) == (12, 1)
    assert read("exits_total", layer="4", reason="final") == 6
    assert [read("layer_executions_total", layer=str(k)) for k in (1, 2, 3, 4)] == [12, 12, 6, 6]
    assert read("tokens_total", kind="real") == 12 * 3
    assert (read("queue_requests"), read("queue_tokens"), batcher.unanswered) == (0, 0, 0)
    assert read("shadow_dropped_total") == 0


async def test_shadow_texts_without_room_are_dropped_and_never_refuse_anybody(
    metrics: Metrics, served: Serve, read: Read
) -> None:
    """All early leavers of one batch come at once, more than may wait; limits are those of one
    request, and the next request fits all the same."""
    count = 2 * (MOST_SHADOWS + 6)
    shadow, engine = ShadowWatch(1.0, FULL_DEPTH), ShadowedEngine()
    limits = {"max_batch_texts": count, "max_texts": count, "max_queued_tokens": 3 * count}
    batcher = served(fakes.batcher_of(engine, metrics, shadow=shadow, **limits))
    for _ in range(2):
        await fakes.ask(batcher, [fakes.job(number) for number in range(1, count + 1)])
    await until(lambda: read("shadow_layer_executions_total") >= MOST_SHADOWS * fakes.LAYERS)
    await until(lambda: not batcher.busy and not batcher.scheduler.shadows)
    compared = agreement(read, "true") + agreement(read, "false")
    assert read("shadow_dropped_total") >= 6
    assert compared + read("shadow_dropped_total") == count


async def test_a_shadow_batch_that_fails_is_nobodys_trouble(
    metrics: Metrics, served: Serve, read: Read, caplog: pytest.LogCaptureFixture
) -> None:
    engine = ShadowedEngine(poison={-1})
    batcher = served(fakes.batcher_of(engine, metrics, shadow=ShadowWatch(1.0, FULL_DEPTH)))
    assert labels(await fakes.ask(batcher, [fakes.job(1)])) == [1]
    await until(lambda: read("shadow_dropped_total") == 1)
    assert labels(await fakes.ask(batcher, [fakes.job(5)])) == [5]
    await until(lambda: agreement(read, "true") == 1)
    assert "a shadow batch of 1 texts failed" in caplog.text


async def test_a_closed_service_runs_no_more_shadow_texts(metrics: Metrics, read: Read) -> None:
    batcher = fakes.batcher_of(ShadowedEngine(), metrics, shadow=ShadowWatch(1.0, FULL_DEPTH))
    thread = threading.Thread(target=batcher.serve, daemon=True)
    request = asyncio.create_task(fakes.ask(batcher, [fakes.job(n) for n in range(1, 41)]))
    await asyncio.sleep(0)
    batcher._shadow.closed = True  # as `close` says it, at a moment that a test can choose
    thread.start()
    await request
    await until(lambda: not batcher.busy and not batcher.scheduler.shadows)
    batcher.close()
    await asyncio.to_thread(thread.join, 10)
    assert not thread.is_alive()
    assert agreement(read, "true") + agreement(read, "false") == 0


@pytest.mark.parametrize("rate", [0.0, 0.03, 0.5, 1.0])
def test_the_share_that_is_run_again_is_the_rate(rate: float) -> None:
    watch, job = ShadowWatch(rate, FULL_DEPTH, seed=5), fakes.job(1)
    early = fakes.answer_to(job, 2)
    chosen = [watch.choose(job, early, 1.0) for _ in range(20_000)]
    drawn = [one for one in chosen if one is not None]
    assert len(drawn) / 20_000 == pytest.approx(rate, abs=0.012)
    assert all(one.ids is job.ids and one.controls is FULL_DEPTH for one in drawn)
    again = ShadowWatch(rate, FULL_DEPTH, seed=5)
    assert [again.choose(job, early, 1.0) is None for _ in range(100)] == [
        one is None for one in chosen[:100]
    ]
    for reason in ("final", "forced"):
        assert watch.choose(job, replace(early, reason=reason), 1.0) is None


async def test_only_texts_that_calibration_spoke_for_are_watched(
    metrics: Metrics, served: Serve
) -> None:
    exits = ExitWatch(fakes.LAYERS)
    batcher = served(fakes.batcher_of(fakes.FakeEngine(), metrics, exits=exits))
    jobs = [fakes.job(number) for number in range(1, 7)]
    expected = Depth.of((0, 1, 0, 1), 1, 4)
    for job in jobs[2:]:
        job.controls = replace(job.controls, expected=expected)
    await fakes.ask(batcher, jobs)
    assert (exits.texts, exits.speedup_drift) == (4, 1.0)
    assert exits.share_drift == pytest.approx(0, abs=1e-9)
