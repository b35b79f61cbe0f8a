"""Looks now and then whether a checkpoint directory holds another checkpoint, and has it loaded.

What cannot be loaded is not tried again until it changes.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from offramp_service.errors import ServiceError
from offramp_service.models import Models


@asynccontextmanager
async def watching(models: Models) -> AsyncIterator[None]:
    """Watch the directories while the block runs, if the settings say so."""
    every_s = models.settings.watch_seconds
    if not every_s:
        yield
        return
    task = asyncio.create_task(_watch(models, every_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def load_all(models: Models) -> None:
    """Have every model loaded anew; what cannot be is logged, and the old one served on."""
    for name in models.settings.model_names:
        await _load(models, name)


async def _watch(models: Models, every_s: float) -> None:
    while True:
        await asyncio.sleep(every_s)
        for name in models.settings.model_names:
            if await asyncio.to_thread(models.changed, name):
                await _load(models, name)


async def _load(models: Models, name: str) -> None:
    with suppress(ServiceError):  # it is in the log
        await models.load(name)
