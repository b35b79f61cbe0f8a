"""Sends requests when they are due, whatever the server does, and notes what came of each.

An open loop: a request is never held back because the server is slow, and its latency counts from
when it was *due*, so that a stall of the server is seen by everybody who would have met it. What
the generator itself adds, its lateness, is noted beside it. The closed loop (so many requests in
flight, always) is for finding out how much a server can do, and for nothing else.

It knows nothing about what is asked.
"""

import asyncio
import re
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from typing import Any

import uvloop

from offramp_loadtest.http_client import Address, Connections, Reply

_EXIT_LAYER = re.compile(rb"\r\nx-exit-layer: *(\d+)", re.IGNORECASE)

_START_S = 1.0
"""From planning to the first request: processes start, and begin together."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of one request; times in seconds on the machine's monotonic clock."""

    due: float
    sent: float
    done: float
    status: int  # 0: no answer
    exit_layer: int | None

    @property
    def latency_s(self) -> float:
        return self.done - self.due

    @property
    def lateness_s(self) -> float:
        """The generator's share of the latency."""
        return self.sent - self.due


@dataclass(frozen=True)
class Result:
    """What a run saw, over all its processes."""

    outcomes: list[Outcome]
    cpu_s: float  # that the generator used
    connections: int  # open at a time
    waited: int  # requests that found no connection, for there may be no more


@dataclass(frozen=True)
class Load:
    """To whom, what, over how many connections. The requests are sent in turn, again and again."""

    address: Address
    requests: Sequence[bytes]
    max_connections: int
    patience_s: float = 60.0  # after the last request was due, for answers still to come


def send_when_due(load: Load, due: Sequence[float], *, processes: int = 1) -> Result:
    """An open loop: one request at each of `due`, in seconds from now on, rising.

    With several processes each takes an equal share in turn, on a share of the connections.
    """
    start = time.perf_counter() + _START_S
    if processes == 1:
        return _run(_OpenLoop(load, [start + at for at in due]).run)
    shares = [
        _OpenLoop(
            Load(
                load.address,
                [*load.requests[place::processes]] or load.requests,
                max(1, load.max_connections // processes),
                load.patience_s,
            ),
            [start + at for at in due[place::processes]],
        )
        for place in range(processes)
    ]
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        results = list(pool.map(_run_open_loop, shares))
    return Result(
        sorted((one for result in results for one in result.outcomes), key=lambda one: one.due),
        sum(result.cpu_s for result in results),
        sum(result.connections for result in results),
        sum(result.waited for result in results),
    )


def keep_in_flight(load: Load, seconds: float) -> Result:
    """A closed loop: a request on each connection, the next one when it is answered."""
    return _run(_ClosedLoop(load, seconds).run)


def _run_open_loop(loop: "_OpenLoop") -> Result:
    return _run(loop.run)


def _run(run: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(run())


class _OpenLoop:
    """One process's share of an open loop."""

    def __init__(self, load: Load, due: Sequence[float]) -> None:
        self._load, self._due = load, due
        self._outcomes: list[Outcome] = []
        self._sent: dict[int, float] = {}  # without an answer yet: when they were sent

    async def run(self) -> Result:
        began_cpu = time.process_time()
        self._connections = Connections(self._load.address, self._load.max_connections)
        self._all_done = asyncio.Event()
        # The event loop's timers count whole milliseconds; a sleeping thread is woken on time.
        loop = asyncio.get_running_loop()
        pacer = threading.Thread(target=self._pace, args=(loop,), name="pacer", daemon=True)
        pacer.start()
        patience_s = self._due[-1] - time.perf_counter() + self._load.patience_s
        with suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                await self._all_done.wait()
        self._connections.close()
        for place in list(self._sent):
            self._note(place, None)
        cpu_s = time.process_time() - began_cpu
        return Result(self._outcomes, cpu_s, self._connections.largest, self._connections.waited)

    def _pace(self, loop: asyncio.AbstractEventLoop) -> None:
        place = 0
        while place < len(self._due):
            if (wait_s := self._due[place] - time.perf_counter()) > 0:
                time.sleep(wait_s)
            now, first = time.perf_counter(), place
            while place < len(self._due) and self._due[place] <= now:
                place += 1
            loop.call_soon_threadsafe(self._send, range(first, place))

    def _send(self, places: range) -> None:
        for place in places:
            self._sent[place] = time.perf_counter()
            request = self._load.requests[place % len(self._load.requests)]
            self._connections.ask(request, partial(self._note, place))

    def _note(self, place: int, reply: Reply | None) -> None:
        sent = self._sent.pop(place, None)
        if sent is None:
            return  # given up meanwhile
        self._outcomes.append(_outcome(self._due[place], sent, reply))
        if len(self._outcomes) == len(self._due):
            self._all_done.set()


class _ClosedLoop:
    def __init__(self, load: Load, seconds: float) -> None:
        self._load, self._seconds = load, seconds
        self._outcomes: list[Outcome] = []
        self._next = self._in_flight = 0

    async def run(self) -> Result:
        began_cpu = time.process_time()
        self._connections = Connections(self._load.address, self._load.max_connections)
        self._all_done = asyncio.Event()
        self._ends = time.perf_counter() + self._seconds
        for _ in range(self._load.max_connections):
            self._send()
        async with asyncio.timeout(self._seconds + self._load.patience_s):
            await self._all_done.wait()
        self._connections.close()
        cpu_s = time.process_time() - began_cpu
        return Result(self._outcomes, cpu_s, self._connections.largest, self._connections.waited)

    def _send(self) -> None:
        request = self._load.requests[self._next % len(self._load.requests)]
        self._next += 1
        self._in_flight += 1
        self._connections.ask(request, partial(self._note, time.perf_counter()))

    def _note(self, sent: float, reply: Reply | None) -> None:
        self._in_flight -= 1
        outcome = _outcome(sent, sent, reply)
        self._outcomes.append(outcome)
        if outcome.done < self._ends:
            self._send()
        elif not self._in_flight:
            self._all_done.set()


def _outcome(due: float, sent: float, reply: Reply | None) -> Outcome:
    done = time.perf_counter()
    if reply is None:
        return Outcome(due, sent, done, 0, None)
    layer = _EXIT_LAYER.search(reply.head)
    return Outcome(due, sent, done, reply.status, int(layer[1]) if layer else None)
