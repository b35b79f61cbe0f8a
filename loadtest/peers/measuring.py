"""Load on one server and what it showed: saturated, under arrivals, and whether it was right.

Knows addresses and ready requests, and nothing of who is behind them.
"""

import asyncio
import time
from collections.abc import Sequence
from typing import Any

from adapters import Adapter
from running import RunningServer

from offramp_loadtest.arrivals import schedule
from offramp_loadtest.generator import Load, Result, keep_in_flight, send_when_due
from offramp_loadtest.http_client import Connection
from offramp_loadtest.report import milliseconds
from offramp_loadtest.server_process import machine_cpu_s

CONNECTIONS = 64
"""Clients with one text each: what is in flight when saturated."""
MAX_CONNECTIONS = 512
PATIENCE_S = 20.0

Figures = dict[str, Any]


class Watch:
    """Processor time while something runs: of a server, of this process, of everybody else."""

    def __init__(self, server: RunningServer) -> None:
        self._server = server
        self._began = self._now()

    def figures(self) -> Figures:
        server, ours, everybody = (
            now - before for now, before in zip(self._now(), self._began, strict=True)
        )
        others = max(0.0, everybody - server - ours)
        return {"server_cpu_s": server, "generator_cpu_s": ours, "others_cpu_s": others}

    def _now(self) -> tuple[float, float, float]:
        return self._server.cpu_s(), time.process_time(), machine_cpu_s()


def saturated(server: RunningServer, requests: Sequence[bytes], seconds: float) -> Figures:
    """A closed loop: the next text on each connection when the one before is answered."""
    load = Load(server.address, requests, CONNECTIONS, PATIENCE_S)
    watch = Watch(server)
    result = keep_in_flight(load, seconds)
    return _figures(result, seconds, watch)


def under_arrivals(
    server: RunningServer, requests: Sequence[bytes], rate: float, seconds: float, seed: int
) -> Figures:
    """An open loop: texts that come when they are due, as a Poisson stream."""
    load = Load(server.address, requests, MAX_CONNECTIONS, PATIENCE_S)
    watch = Watch(server)
    result = send_when_due(load, schedule("poisson", rate, seconds, seed))
    return _figures(result, seconds, watch)


def _figures(result: Result, seconds: float, watch: Watch) -> Figures:
    """Latencies are of requests answered with 200, from when they were due."""
    outcomes = result.outcomes
    answered = [one for one in outcomes if one.status == 200]
    began = min((one.due for one in outcomes), default=0.0)
    ended = max((one.done for one in answered), default=began)
    return {
        # Answers that came after the last request was due, counted into the time they took.
        "rows_per_s": len(answered) / max(seconds, ended - began),
        "rate_due": len(outcomes) / seconds,
        "answered": len(answered),
        "not_answered": len(outcomes) - len(answered),
        "latency_ms": milliseconds([one.latency_s for one in answered]),
        "lateness_p99_ms": milliseconds([one.lateness_s for one in outcomes]).get("p99"),
        **watch.figures(),
    }


def labels(server: RunningServer, adapter: Adapter, texts: Sequence[str]) -> list[str]:
    """What the server says of each text, when as many are asked at a time as under load.

    Raises:
        ValueError: something was not answered.
    """
    return asyncio.run(_labels(server, adapter, texts))


async def _labels(server: RunningServer, adapter: Adapter, texts: Sequence[str]) -> list[str]:
    found = [""] * len(texts)
    waiting = iter(enumerate(texts))

    async def client() -> None:
        connection = await Connection.open(server.address)
        try:
            for place, text in waiting:
                reply = await connection.exchange(adapter.request(server.address, text))
                if reply is None:
                    raise ValueError(f"text {place} was not answered")
                found[place] = adapter.read(reply)
        finally:
            connection.close()

    async with asyncio.timeout(60 + len(texts)):
        await asyncio.gather(*(client() for _ in range(CONNECTIONS)))
    return found
