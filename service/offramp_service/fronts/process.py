"""The life of the process with the engine where fronts speak HTTP: open, serve, drain, end.

What `Server` in `__main__` is for a process that does both. Unready first; then the fronts take
nothing more and finish what is inside; then it ends.
"""

import asyncio
import logging
import os
import signal
import socket
from types import FrameType

from fastapi import FastAPI

from offramp_service.fronts.keeper import Keeper
from offramp_service.garbage import leave_alone_what_stays
from offramp_service.greeting import greet
from offramp_service.models import Models
from offramp_service.settings import Settings
from offramp_service.watched import load_all

log = logging.getLogger(__name__)

_BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it


async def serve_behind_fronts(app: FastAPI) -> bool:
    """Serve until a signal or a dead engine ends it; says whether it has come so far as to serve.

    A second signal ends the process at once.
    """
    models: Models = app.state.models
    settings = models.settings
    # Until there is something to drain.
    for one in (signal.SIGTERM, signal.SIGINT):
        signal.signal(one, _exit_at_once)
    try:
        async with app.router.lifespan_context(app):
            with _listen(settings) as listener:
                keeper = Keeper(app, settings, listener)
                try:
                    await keeper.open()
                    leave_alone_what_stays()
                    ending = _Ending(models, keeper)
                    greet(models.default, listener.getsockname())
                    await ending.wait()
                finally:
                    keeper.close()
    except OSError as error:
        log.error("the server cannot serve: %s", error)
        return False
    except Exception:
        log.exception("the server cannot serve")
        return False
    return True


class _Ending:
    """Waits for what ends the process: signals, or an engine that answers no more."""

    def __init__(self, models: Models, keeper: Keeper) -> None:
        self._models, self._keeper = models, keeper
        self._loop = asyncio.get_running_loop()
        self._drain: asyncio.Task[None] | None = None
        self._load: asyncio.Task[None] | None = None
        for one in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(one, self._signalled, one)
        self._loop.add_signal_handler(signal.SIGHUP, self._load_anew)
        self._drained = asyncio.Event()

    async def wait(self) -> None:
        died = asyncio.create_task(self._models.lifecycle.died.wait())
        drained = asyncio.create_task(self._drained.wait())
        await asyncio.wait((died, drained), return_when=asyncio.FIRST_COMPLETED)
        if died.done():
            log.critical("nothing more can be answered: the process ends")
        for task in (died, drained):
            task.cancel()

    def _signalled(self, sig: signal.Signals) -> None:
        if self._drain is not None:
            os._exit(128 + sig)
        self._drain = self._loop.create_task(self._end(sig))

    def _load_anew(self) -> None:
        self._load = self._loop.create_task(load_all(self._models))

    async def _end(self, sig: signal.Signals) -> None:
        settings, lifecycle = self._models.settings, self._models.lifecycle
        log.info("%s: shutting down", sig.name)
        # Ctrl-C comes from a person, not from an orchestrator that watches readiness.
        serve_on_s = 0.0 if sig == signal.SIGINT else settings.drain_seconds
        await lifecycle.serve_on(serve_on_s)  # the fronts are told of the phase
        await self._keeper.finish(settings.shutdown_timeout)
        lifecycle.phase = "closed"
        self._models.let_go()
        self._drained.set()


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.hostname else socket.AF_INET
    address = (settings.hostname, settings.port)
    return socket.create_server(address, family=family, backlog=_BACKLOG)


def _exit_at_once(sig: int, _: FrameType | None) -> None:
    os._exit(128 + sig)
