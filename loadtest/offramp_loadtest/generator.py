"""Sends requests when they are due, whatever the servers do, and tells what came of each.

An open loop: a request is never held back because a server is slow, and its latency counts from
when it was *due*, so that a stall of the server is seen by everybody who would have met it. What
the generator itself adds, its lateness, is noted beside it. The closed loop (so many requests in
flight, always) is for finding out how much a server can do, and for nothing else.

It knows nothing about what is asked.
"""

import asyncio
import gc
import signal
import ssl
import time
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import uvloop

from offramp_loadtest.http_client import Address, Connections, Reply
from offramp_loadtest.question import Outcome, Question
from offramp_loadtest.timer import Timer

START_S = 0.2
"""From planning to the first request of a benchmark."""
PATIENCE_S = 60.0
"""After the last request was due, for answers still to come."""

Note = Callable[[Outcome], None]
Planned = tuple[float, Question]
"""When a request is due, in seconds from the start, and the request."""


class Targets:
    """Connections to one server or several, and which of them is next."""

    def __init__(
        self,
        addresses: Sequence[Address],
        max_connections: int,
        *,
        least_outstanding: bool = False,
        trust: ssl.SSLContext | None = None,
    ) -> None:
        share = max(1, max_connections // len(addresses))
        self._pools = [Connections(one, share, trust=trust) for one in addresses]
        self._turns = cycle(range(len(addresses)))
        self._least = least_outstanding

    def choose(self) -> int:
        """In turn; or whoever has the fewest requests to answer, in turn where they are equal."""
        place = next(self._turns)
        if not self._least:
            return place
        count = len(self._pools)
        places = ((place + step) % count for step in range(count))
        return min(places, key=lambda one: self._pools[one].outstanding)

    def ask(self, place: int, question: Question, done: Callable[[Reply | None], None]) -> None:
        self._pools[place].ask(question.wires[place], done, question.leave)

    def close(self) -> None:
        for one in self._pools:
            one.close()

    @property
    def largest(self) -> int:
        return sum(one.largest for one in self._pools)

    @property
    def waited(self) -> int:
        return sum(one.waited for one in self._pools)


@dataclass(frozen=True)
class Effort:
    """What a loop took."""

    seconds: float
    cpu_s: float
    connections: int  # open at a time
    waited: int  # requests that found no connection, for there may be no more


class OpenLoop:
    """One request whenever one is due."""

    def __init__(
        self,
        targets: Callable[[], Targets],
        planned: Iterable[Planned],
        note: Note,
        *,
        start: float,
        patience_s: float = PATIENCE_S,
        each_second: Callable[[], None] | None = None,
    ) -> None:
        """`planned` rises in time and is drawn as it is needed; `start` is a value of
        `time.perf_counter`."""
        self._make_targets, self._planned, self._note = targets, iter(planned), note
        self._start, self._patience_s, self._each_second = start, patience_s, each_second
        self._stopped = False
        self._unanswered: dict[int, tuple[Question, int, float, float]] = {}
        self._count = 0
        self._next: Planned | None = None
        self._last_due = start

    def run(self) -> Effort:
        return _run(self._run, self._stop, self._each_second)

    async def _run(self) -> Effort:
        self._targets = self._make_targets()
        self._all_sent, self._all_done = asyncio.Event(), asyncio.Event()
        self._timer = Timer(asyncio.get_running_loop(), self._send_what_is_due)
        effort = _Watch()
        self._draw()
        self._send_what_is_due()
        await self._all_sent.wait()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._last_due + self._patience_s - time.perf_counter()):
                await self._all_done.wait()
        self._timer.close()
        self._targets.close()
        for number in list(self._unanswered):
            self._done(number, None)
        return effort.of(self._targets)

    def _stop(self) -> None:
        self._stopped = True
        self._send_what_is_due()

    def _draw(self) -> None:
        self._next = next(self._planned, None)

    def _send_what_is_due(self) -> None:
        while self._next is not None and not self._stopped:
            at, question = self._next
            due = self._start + at
            if due > time.perf_counter():
                self._timer.set(due)
                return
            self._send(due, question)
            self._draw()
        self._all_sent.set()
        if not self._unanswered:
            self._all_done.set()

    def _send(self, due: float, question: Question) -> None:
        number, place = self._count, self._targets.choose()
        self._count += 1
        self._last_due = due
        self._unanswered[number] = (question, place, due, time.perf_counter())
        self._targets.ask(place, question, partial(self._done, number))

    def _done(self, number: int, reply: Reply | None) -> None:
        one = self._unanswered.pop(number, None)
        if one is None:
            return  # given up meanwhile
        self._note(Outcome(*one, time.perf_counter(), reply))
        if not self._unanswered and self._all_sent.is_set():
            self._all_done.set()


class ClosedLoop:
    """So many requests in flight, the next one when one is answered."""

    def __init__(
        self,
        targets: Callable[[], Targets],
        questions: Iterator[Question],
        note: Note,
        *,
        in_flight: int,
        start: float,
        seconds: float,
        patience_s: float = PATIENCE_S,
        each_second: Callable[[], None] | None = None,
    ) -> None:
        self._make_targets, self._questions, self._note = targets, questions, note
        self._wanted, self._in_flight = in_flight, 0
        self._start, self._ends, self._patience_s = start, start + seconds, patience_s
        self._each_second = each_second

    def run(self) -> Effort:
        return _run(self._run, self._stop, self._each_second)

    async def _run(self) -> Effort:
        self._targets = self._make_targets()
        self._all_done = asyncio.Event()
        await asyncio.sleep(max(0.0, self._start - time.perf_counter()))
        # However long it took to come here: a closed loop has no schedule to be late for.
        self._ends += max(0.0, time.perf_counter() - self._start)
        effort = _Watch()
        for _ in range(self._wanted):
            self._send()
        with suppress(TimeoutError):
            async with asyncio.timeout(self._ends + self._patience_s - time.perf_counter()):
                await self._all_done.wait()
        self._targets.close()
        return effort.of(self._targets)

    def _stop(self) -> None:
        self._ends = time.perf_counter()

    def _send(self) -> None:
        question, place, now = next(self._questions), self._targets.choose(), time.perf_counter()
        self._in_flight += 1
        self._targets.ask(place, question, partial(self._done, question, place, now))

    def _done(self, question: Question, place: int, sent: float, reply: Reply | None) -> None:
        self._in_flight -= 1
        done = time.perf_counter()
        self._note(Outcome(question, place, sent, sent, done, reply))
        if done < self._ends:
            self._send()
        elif not self._in_flight:
            self._all_done.set()


class _Watch:
    """Time and processor time from now on."""

    def __init__(self) -> None:
        self._began, self._began_cpu = time.perf_counter(), time.process_time()

    def of(self, targets: Targets) -> Effort:
        return Effort(
            time.perf_counter() - self._began,
            time.process_time() - self._began_cpu,
            targets.largest,
            targets.waited,
        )


def _run(
    run: Callable[[], Coroutine[Any, Any, Effort]],
    stop: Callable[[], None],
    each_second: Callable[[], None] | None,
) -> Effort:
    """To its end; SIGINT and SIGTERM end the sending, and what is under way is waited for.

    Without garbage collections: what a loop makes is let go of as it goes, and a collection over
    all that was prepared would hold up whatever is due meanwhile.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_attended(run, stop, each_second))
    finally:
        if collecting:
            gc.enable()


async def _attended(
    run: Callable[[], Coroutine[Any, Any, Effort]],
    stop: Callable[[], None],
    each_second: Callable[[], None] | None,
) -> Effort:
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)
    for one in signals:
        loop.add_signal_handler(one, stop)
    ticking = loop.create_task(_tick(each_second)) if each_second else None
    try:
        return await run()
    finally:
        for one in signals:
            loop.remove_signal_handler(one)
        if ticking:
            ticking.cancel()


async def _tick(each_second: Callable[[], None]) -> None:
    while True:
        await asyncio.sleep(1.0)
        each_second()


# -- for benchmarks that look at each request ----------------------------------------------------


@dataclass(frozen=True)
class Load:
    """To whom, what, over how many connections. The requests are sent in turn, again and again."""

    address: Address
    requests: Sequence[bytes]
    max_connections: int
    patience_s: float = PATIENCE_S

    def questions(self) -> Iterator[Question]:
        return cycle([Question((one,)) for one in self.requests])

    def targets(self) -> Targets:
        return Targets([self.address], self.max_connections)


@dataclass(frozen=True)
class Result:
    """What a run saw, request by request."""

    outcomes: list[Outcome]
    cpu_s: float  # that the generator used
    connections: int
    waited: int


def send_when_due(load: Load, due: Sequence[float]) -> Result:
    """An open loop: one request at each of `due`, in seconds from now on, rising."""
    outcomes: list[Outcome] = []
    loop = OpenLoop(
        load.targets,
        zip(due, load.questions(), strict=False),
        outcomes.append,
        start=time.perf_counter() + START_S,
        patience_s=load.patience_s,
    )
    effort = loop.run()
    return Result(outcomes, effort.cpu_s, effort.connections, effort.waited)


def keep_in_flight(load: Load, seconds: float) -> Result:
    """A closed loop: a request on each connection, the next one when it is answered."""
    outcomes: list[Outcome] = []
    loop = ClosedLoop(
        load.targets,
        load.questions(),
        outcomes.append,
        in_flight=load.max_connections,
        start=time.perf_counter(),
        seconds=seconds,
        patience_s=load.patience_s,
    )
    effort = loop.run()
    return Result(outcomes, effort.cpu_s, effort.connections, effort.waited)
