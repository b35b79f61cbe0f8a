"""The engine's threads: what becomes of them, and of the engine, when a worker crashes."""

import asyncio
import threading
import time
from collections.abc import Callable

import pytest

from loading import load
from offramp_service.batcher import Batcher
from offramp_service.engine_thread import EngineThreads
from offramp_service.errors import EngineFailed, NotReady
from offramp_service.jobs import Job, Left

fakes = load("tests/unit/service/conftest.py")

MakeBatcher = Callable[..., Batcher]


class Brittle:
    """Brings down the worker that computes a text with one of these numbers; `meet` has all of them
    crash at the same time."""

    def __init__(self, deadly: set[int], meet: int = 1) -> None:
        self._deadly, self._barrier = deadly, threading.Barrier(meet)

    def __call__(self, jobs: list[Job]):
        if self._deadly & {job.ids[0] for job in jobs}:
            self._barrier.wait(20)
            raise SystemExit("out of luck")
        yield Left(4, len(jobs), [(index, fakes.answer_to(job)) for index, job in enumerate(jobs)])


def threads_of(
    batcher: Batcher, workers: int, rebuilt: list[int], died: asyncio.Event
) -> EngineThreads:
    def rebuild() -> Brittle:
        rebuilt.append(1)
        time.sleep(0.2)  # as long as it takes the others to crash as well
        return Brittle({7})

    def over() -> None:
        batcher.close("the engine has stopped")
        died.set()

    return EngineThreads(*(batcher, workers), prepare=lambda _: None, rebuild=rebuild, died=over)


async def test_workers_that_crash_together_are_one_crash(make_batcher: MakeBatcher) -> None:
    """The second one's was of the engine that has been built anew meanwhile."""
    batcher = make_batcher(Brittle({1, 2}, meet=2), workers=2, max_batch_texts=1)
    rebuilt: list[int] = []
    threads = threads_of(batcher, 2, rebuilt, asyncio.Event())
    await threads.warm()
    doomed = [asyncio.create_task(fakes.ask(batcher, [fakes.job(number)])) for number in (1, 2)]
    results = await asyncio.gather(*doomed, return_exceptions=True)
    assert [type(one) for one in results] == [EngineFailed] * 2
    answers = await asyncio.gather(*(fakes.ask(batcher, [fakes.job(n)]) for n in (3, 4, 5)))
    assert [one.answer.label for (one,) in answers] == [3, 4, 5]
    assert rebuilt == [1]
    assert threads.alive
    assert not threads.rebuilding
    batcher.close()
    await asyncio.to_thread(threads.join, 10)
    assert not threads.alive


async def test_the_second_engine_that_crashes_is_the_last(make_batcher: MakeBatcher) -> None:
    batcher = make_batcher(Brittle({1}), workers=2, max_batch_texts=1)
    rebuilt: list[int] = []
    died = asyncio.Event()
    threads = threads_of(batcher, 2, rebuilt, died)
    await threads.warm()
    with pytest.raises(EngineFailed):
        await fakes.ask(batcher, [fakes.job(1)])
    async with asyncio.timeout(10):
        while threads.rebuilding:  # noqa: ASYNC110 - what is awaited lies in a thread
            await asyncio.sleep(0.001)
    with pytest.raises((EngineFailed, NotReady)):
        await fakes.ask(batcher, [fakes.job(7)])
    async with asyncio.timeout(10):
        await died.wait()
    await asyncio.to_thread(threads.join, 10)
    assert rebuilt == [1]
    assert not threads.alive
