"""Where the service is in its life, and how many requests are inside. It knows nothing else.

starting → ready → draining (unready, still serving) → closed (finishing what is inside)
"""

import asyncio
import logging
from typing import Literal

from offramp_service.errors import NotReady

log = logging.getLogger(__name__)

Phase = Literal["starting", "ready", "draining", "closed"]


class Lifecycle:
    """Phase and number of requests inside; event loop only."""

    def __init__(self) -> None:
        self.phase: Phase = "starting"
        self.inflight = 0
        self.died = asyncio.Event()  # nothing more can be answered: the process should end
        self._empty = asyncio.Event()
        self._empty.set()

    @property
    def ready(self) -> bool:
        return self.phase == "ready"

    @property
    def started(self) -> bool:
        return self.phase != "starting"

    @property
    def leaving(self) -> bool:
        """Traffic should go elsewhere: the process is about to end."""
        return self.phase in ("draining", "closed")

    def warmed(self) -> None:
        """starting → ready, unless a drain has begun meanwhile."""
        if self.phase == "starting":
            self.phase = "ready"

    def enter(self) -> None:
        """A request comes in.

        Raises:
            NotReady: none may, now.
        """
        if self.phase == "starting":
            raise NotReady("the server is starting")
        if self.phase == "closed":
            raise NotReady("the server is shutting down")
        self.inflight += 1
        self._empty.clear()

    def leave(self) -> None:
        self.inflight -= 1
        if not self.inflight:
            self._empty.set()

    async def drain(self, *, serve_on_s: float, finish_s: float) -> None:
        """Unready first, so that balancers look elsewhere; then refuse; then finish."""
        await self.serve_on(serve_on_s)
        await self.finish(finish_s)

    async def serve_on(self, seconds: float) -> None:
        """Unready, but serving."""
        self.phase = "draining"
        log.info("draining: unready, serving on for %g s", seconds)
        await asyncio.sleep(seconds)

    async def finish(self, within_s: float) -> None:
        """Let nobody in any more, and wait for those inside."""
        self.phase = "closed"
        log.info("draining: %d requests to finish within %g s", self.inflight, within_s)
        try:
            async with asyncio.timeout(within_s):
                await self._empty.wait()
        except TimeoutError:
            log.warning("draining: %d requests are not finished in time", self.inflight)
