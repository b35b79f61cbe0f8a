"""`/metrics` at a port of its own, for networks where whoever scrapes has no business at the doors.

The client library's own server, in a thread of its own. It asks for no key: who may reach the port
is the network's to say.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from prometheus_client import start_http_server
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from offramp_service.models import Models

log = logging.getLogger(__name__)

# A scraper has given up by then.
_LOOK_S = 5.0


@asynccontextmanager
async def metrics_port(models: Models) -> AsyncIterator[None]:
    """Serve the metrics while the block runs, if the settings say where.

    Raises:
        OSError: the port cannot be had.
    """
    settings = models.settings
    if not settings.prometheus_port:
        yield
        return
    registry = _Looking(models, asyncio.get_running_loop())
    server, thread = start_http_server(settings.prometheus_port, settings.hostname, registry)
    log.info("metrics at http://%s:%d/metrics", settings.hostname, settings.prometheus_port)
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        thread.join()


class _Looking(Collector):
    """The models' registry, which has them look at how things stand before it tells."""

    def __init__(self, models: Models, loop: asyncio.AbstractEventLoop) -> None:
        self._models, self._loop = models, loop

    def collect(self) -> Iterable[Metric]:
        self._look()
        return self._models.families.registry.collect()

    def restricted_registry(self, names: Iterable[str]) -> Collector:
        """Only those, as `?name[]=` asks for."""
        self._look()
        only: Collector = self._models.families.registry.restricted_registry(names)
        return only

    def _look(self) -> None:
        async def look() -> None:
            self._models.look()

        asyncio.run_coroutine_threadsafe(look(), self._loop).result(_LOOK_S)
