"""Looks now and then whether a checkpoint directory holds another checkpoint, and has it loaded.

A checkpoint is told by its manifest, which is written last: a directory that is being filled has
the old one, or none. What cannot be loaded is not tried again until it changes.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from offramp_model.checkpoint import MANIFEST
from offramp_service.models import Models

log = logging.getLogger(__name__)

Stamp = tuple[int, int, int] | None


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
        try:
            await models.load(name)
        except Exception:
            log.exception("%s was not loaded anew, the old one is still served", name)


async def _watch(models: Models, every_s: float) -> None:
    names = models.settings.model_names
    seen = {name: await _stamp(models, name) for name in names}
    while True:
        await asyncio.sleep(every_s)
        for name in names:
            stamp = await _stamp(models, name)
            if stamp is None or stamp == seen[name]:
                continue
            seen[name] = stamp
            try:
                await models.load(name)
            except Exception:
                log.exception("%s was not loaded anew, the old one is still served", name)


async def _stamp(models: Models, name: str) -> Stamp:
    directory = models.settings.of_model(name).directory
    return await asyncio.to_thread(_read_stamp, directory / MANIFEST)


def _read_stamp(path: Path) -> Stamp:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
