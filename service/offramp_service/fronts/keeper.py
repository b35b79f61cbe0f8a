"""In the process with the engine: starts fronts, tells them how things stand, replaces the dead.

A front that dies takes the connections with it that it had, and nothing else: what it had asked for
is cancelled, and another one is started. What fronts ask it leaves to their counterparts; of
signals and terminals it knows nothing.
"""

import asyncio
import logging
import socket
import sys
import time
from asyncio import FIRST_COMPLETED

from fastapi import FastAPI

from offramp_service.fronts.counterpart import Counterpart, state_of
from offramp_service.fronts.link import Leave, State
from offramp_service.models import Models
from offramp_service.settings import Settings

log = logging.getLogger(__name__)

# How often fronts are told how things stand, if they have changed.
_TELL_S = 0.05
# Before a front is started in place of one that did not live for long.
_RESPITE_S, _LONG_ENOUGH_S = 1.0, 10.0
# A front that does not let go of an old checkpoint for so long is ended, or nobody could exchange
# another one.
_LONGEST_HOLD_S = 90.0
# Beyond the time that fronts have to finish.
_GRACE_S = 3.0


class Keeper:
    """All fronts of a server; event loop only.

    Args:
        app: the application that answers what no door takes; its models answer the rest.
        listener: where connections come from.
    """

    def __init__(self, app: FastAPI, settings: Settings, listener: socket.socket) -> None:
        self._app, self._settings, self._listener = app, settings, listener
        self._models: Models = app.state.models
        self._models.still_asked = self._still_asked
        self._fronts: set[_Front] = set()
        self._keeping: list[asyncio.Task[None]] = []
        self._leaving = False
        self._told = self._state()

    async def open(self) -> None:
        """Start the fronts; comes back when all of them take requests.

        Raises:
            RuntimeError: one of them cannot.
        """
        for _ in range(self._settings.http_workers):
            self._fronts.add(await self._start())
        await asyncio.gather(*(one.ready() for one in self._fronts))
        for front in tuple(self._fronts):
            self._keeping.append(asyncio.create_task(self._keep(front)))
        self._keeping.append(asyncio.create_task(self._keep_telling()))

    async def finish(self, within_s: float) -> None:
        """Have all fronts finish what is inside, and end."""
        self._leaving = True
        for front in self._fronts:
            front.counterpart.link.send(Leave(within_s))
        ends = [asyncio.create_task(one.process.wait()) for one in self._fronts]
        if ends:
            _, late = await asyncio.wait(ends, timeout=within_s + _GRACE_S)
            if late:
                log.warning("%d front processes have not ended in time", len(late))

    def close(self) -> None:
        """End whatever is left."""
        self._leaving = True
        for task in self._keeping:
            task.cancel()
        for front in self._fronts:
            front.end()

    @property
    def inflight(self) -> int:
        """Requests inside the fronts."""
        return sum(front.counterpart.inflight for front in self._fronts)

    async def _start(self) -> "_Front":
        ours, theirs = socket.socketpair()
        with theirs:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-m", "offramp_service.fronts.front"),
                *(str(self._listener.fileno()), str(theirs.fileno())),
                pass_fds=(self._listener.fileno(), theirs.fileno()),
                stdin=asyncio.subprocess.PIPE,
            )
        assert process.stdin is not None
        process.stdin.write(self._settings.with_secrets())
        process.stdin.close()
        counterpart = Counterpart(ours, self._app, self._state)
        await counterpart.open()
        return _Front(process, counterpart)

    async def _keep(self, front: "_Front") -> None:
        """Replace a front when it ends."""
        while True:
            began = time.monotonic()
            code = await front.process.wait()
            self._fronts.discard(front)
            front.end()
            if self._leaving:
                return
            log.error("a front process ended with code %s, another one is started", code)
            if time.monotonic() - began < _LONG_ENOUGH_S:
                await asyncio.sleep(_RESPITE_S)
            front = await self._start_at_last()
            self._fronts.add(front)

    async def _start_at_last(self) -> "_Front":
        """Where the machine has no process to give, until it has."""
        while True:
            try:
                return await self._start()
            except OSError:
                log.exception("no front process can be started")
                await asyncio.sleep(_RESPITE_S)

    async def _keep_telling(self) -> None:
        while True:
            await asyncio.sleep(_TELL_S)
            self.tell()
            for front in self._fronts:
                front.check_holds(self._told)

    def tell(self) -> None:
        """Tell the fronts how things stand, if that has changed."""
        self._models.lifecycle.inflight = self.inflight
        state = self._state()
        if state != self._told:
            self._told = state
            for front in self._fronts:
                front.counterpart.link.send(state)

    def _state(self) -> State:
        return state_of(self._models)

    def _still_asked(self, name: str, sha: str) -> bool:
        return any(sha in front.counterpart.holds.get(name, ()) for front in self._fronts)


class _Front:
    """A front process."""

    def __init__(self, process: asyncio.subprocess.Process, counterpart: Counterpart) -> None:
        self.process, self.counterpart = process, counterpart
        self._holding_since: float | None = None  # an old checkpoint

    async def ready(self) -> None:
        """Comes back when it takes requests.

        Raises:
            RuntimeError: it cannot.
        """
        opened = asyncio.create_task(self.counterpart.opened.wait())
        ended = asyncio.create_task(self.process.wait())
        done, pending = await asyncio.wait((opened, ended), return_when=FIRST_COMPLETED)
        for task in pending:
            task.cancel()
        if opened not in done:
            raise RuntimeError(f"a front process ended with code {self.process.returncode}")

    def end(self) -> None:
        self.counterpart.forget()
        if self.process.returncode is None:
            self.process.kill()

    def check_holds(self, state: State) -> None:
        """End it if it does not come away from an old checkpoint."""
        holds, now = self.counterpart.holds, time.monotonic()
        if not holds or holds == {one.name: [one.sha] for one in state.models}:
            self._holding_since = None
            return
        self._holding_since = self._holding_since or now
        if now - self._holding_since > _LONGEST_HOLD_S:
            log.error("a front process holds on to an old checkpoint, and is ended")
            self.process.kill()
