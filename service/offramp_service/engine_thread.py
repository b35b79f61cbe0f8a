"""The one thread that computes: prepares the engine, then serves batches until closed.

A batch that fails is the batcher's matter. Here it is about an error that nobody caught, which ends
the serving: once, the engine is built anew and goes on with those who wait; the second time it is
over, and whoever owns the process is told. It knows engine and batcher, and no HTTP.
"""

import asyncio
import logging
import threading
from collections.abc import Callable

from offramp_service.batcher import Batcher
from offramp_service.engine import Engine

log = logging.getLogger(__name__)


class EngineThread(threading.Thread):
    """A daemon, so that a batch that never ends cannot keep the process alive.

    `prepare` makes the first engine ready, in this thread; `rebuild` makes another one that is;
    `died` is called on the event loop when there will be none any more.
    """

    def __init__(
        self,
        batcher: Batcher,
        *,
        prepare: Callable[[], None],
        rebuild: Callable[[], Engine],
        died: Callable[[], None],
    ) -> None:
        super().__init__(name="engine", daemon=True)
        self._batcher = batcher
        self._prepare, self._rebuild, self._died = prepare, rebuild, died
        self.rebuilding = False

    async def warm(self) -> None:
        """Start, and come back when the engine is warm."""
        self._loop = asyncio.get_running_loop()
        self._warm: asyncio.Future[None] = self._loop.create_future()
        self.start()
        await self._warm

    def run(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            self._loop.call_soon_threadsafe(self._warm.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._warm.set_result, None)
        try:
            self._serve()
        except BaseException:
            log.critical("the engine thread died", exc_info=True)
            self._loop.call_soon_threadsafe(self._died)

    def _serve(self) -> None:
        try:
            return self._batcher.serve()
        except BaseException:
            log.critical("the engine crashed, and is built anew once", exc_info=True)
        self.rebuilding = True
        self._batcher.let_go()
        self._batcher.go_on_with(self._rebuild())
        self.rebuilding = False
        return self._batcher.serve()
