"""The threads that compute: they prepare the engine, then serve batches until closed.

As a rule one, or a few workers, each with a batch of its own. A batch that fails is the batcher's
matter. Here it is about an error that nobody caught, which ends the serving: once, the engine is
built anew and goes on with those who wait; the second time it is over, and whoever owns the process
is told. It knows engine and batcher, and no HTTP.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Callable

from offramp_service.batcher import Batcher
from offramp_service.engine import Engine

log = logging.getLogger(__name__)


class EngineThreads:
    """Daemons, so that a batch that never ends cannot keep the process alive.

    `prepare` makes the engine ready for a worker, in its thread; `rebuild` makes another one that
    is; `died` is called on the event loop when there will be none any more.
    """

    def __init__(
        self,
        batcher: Batcher,
        workers: int,
        *,
        prepare: Callable[[int], None],
        rebuild: Callable[[], Engine],
        died: Callable[[], None],
    ) -> None:
        self._batcher = batcher
        self._prepare, self._rebuild, self._died = prepare, rebuild, died
        self._threads = [
            threading.Thread(target=self._run, args=(worker,), name=f"engine-{worker}", daemon=True)
            for worker in range(workers)
        ]
        self._crash = threading.Lock()  # one at a time
        self._rebuilds = 0
        self.rebuilding = False

    @property
    def alive(self) -> bool:
        """All of them."""
        return all(thread.is_alive() for thread in self._threads)

    async def warm(self) -> None:
        """Start, and come back when the engine is warm. One after the other: what the first one
        measures is not disturbed by the next."""
        self._loop = asyncio.get_running_loop()
        for thread in self._threads:
            self._warm: asyncio.Future[None] = self._loop.create_future()
            thread.start()
            await self._warm

    def join(self, timeout_s: float) -> None:
        """Wait for their end, so long for all."""
        until = time.monotonic() + timeout_s
        for thread in self._threads:
            if thread.ident is not None:
                thread.join(max(0.0, until - time.monotonic()))

    def _run(self, worker: int) -> None:
        try:
            self._prepare(worker)
        except Exception as error:
            self._loop.call_soon_threadsafe(self._warm.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._warm.set_result, None)
        try:
            self._serve(worker)
        except BaseException:
            log.critical("an engine thread died", exc_info=True)
            self._loop.call_soon_threadsafe(self._died)

    def _serve(self, worker: int) -> None:
        while True:
            try:
                return self._batcher.serve(worker)
            except BaseException:
                rebuilds = self._rebuilds
                with self._crash:
                    if rebuilds < self._rebuilds:  # while another worker's crash was dealt with
                        log.critical("it crashed another worker as well", exc_info=True)
                        self._batcher.let_go(worker)
                    elif rebuilds > 0:
                        raise
                    else:
                        log.critical("the engine crashed, and is built anew once", exc_info=True)
                        self._build_anew(worker)

    def _build_anew(self, worker: int) -> None:
        self.rebuilding = True
        self._batcher.let_go(worker)
        self._batcher.go_on_with(self._rebuild())
        self._rebuilds += 1
        self.rebuilding = False
