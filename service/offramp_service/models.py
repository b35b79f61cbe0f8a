"""The models of one server: which rooms there are, who asks for which, and how one is exchanged.

A checkpoint is loaded anew in a room of its own, while the old one goes on answering: it is
verified, warmed, and has to answer a text before anybody is led to it. Whatever fails on the way,
the old room stays. Requests that are inside the old room are answered there; each request has one
room from its admission to its answer, so no answer mixes two checkpoints.

It knows settings, rooms and the life cycle, and nothing about HTTP.
"""

import asyncio
import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry

from offramp_model.checkpoint import MANIFEST
from offramp_service.background import in_daemon_thread
from offramp_service.choice import choose
from offramp_service.errors import InvalidInput, NotReady
from offramp_service.garbage import collect_what_stayed
from offramp_service.jobs import Engine as Computes
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Families
from offramp_service.pipeline import RoomPipeline
from offramp_service.rehearsal import rehearse
from offramp_service.room import Room
from offramp_service.served_model import ServedModel, load_model
from offramp_service.settings import Settings
from offramp_service.turns import Device

log = logging.getLogger(__name__)

# How often an old room is asked whether it is empty.
_LOOK_S = 0.02
# Whoever had a hand in the exchange lets go soon.
_SETTLING_S = (1.0, 5.0, 30.0)


class Models:
    """All rooms of a server; event loop only.

    Args:
        settings: of the server.
        opened: models that are loaded already, by name; the others are loaded here.
        routes: that requests are counted by.
        computes: see `Room`.

    Raises:
        CheckpointError, SettingsError: see `load_model`.
    """

    def __init__(
        self,
        settings: Settings,
        opened: Mapping[str, ServedModel],
        routes: Sequence[str],
        *,
        computes: Computes | None = None,
    ) -> None:
        self.settings, self.lifecycle = settings, Lifecycle()
        self._computes = computes
        self._leaving: dict[Room, asyncio.Task[None]] = {}  # old rooms that are being emptied
        self._forgetting: asyncio.Task[None] | None = None  # the last of them, its memory
        # Who asks for checkpoints by name and sha, from other processes, says so.
        self.still_asked: Callable[[str, str], bool] = lambda _name, _sha: False
        self._devices: dict[str, Device] = {}
        self._loading = asyncio.Lock()
        own = {name: settings.of_model(name) for name in settings.model_names}
        self._stamps = {name: _stamp(one) for name, one in own.items()}
        models = {name: opened.get(name) or load_model(own[name]) for name in own}
        deepest = max(model.num_layers for model in models.values())
        self.families = Families(CollectorRegistry(), deepest, routes)
        self._rooms = {name: self._room(own[name], model) for name, model in models.items()}
        for room in self._rooms.values():
            room.show()

    def __iter__(self) -> Iterator[RoomPipeline]:
        """The pipelines, the default first."""
        return (room.pipeline for room in self._rooms.values())

    @property
    def default(self) -> RoomPipeline:
        """For who names no model."""
        return next(iter(self._rooms.values())).pipeline

    def of(self, name: str | None, version: str | None = None) -> RoomPipeline:
        """The pipeline of the model that was asked for; None is the default.

        Raises:
            InvalidInput: it is not served here.
        """
        return choose(self._rooms, name, version).pipeline

    def inside(self, name: str, sha: str) -> RoomPipeline | None:
        """The pipeline of a model's checkpoint, which may be on its way out; None: it is closed."""
        for room in self._all():
            if (room.model.name, room.model.sha) == (name, sha):
                return room.pipeline
        return None

    @property
    def served(self) -> dict[str, list[str]]:
        """Names and versions that a path may hold."""
        versions = dict.fromkeys(room.model.version for room in self._rooms.values())
        return {"model": list(self._rooms), "version": list(versions)}

    @property
    def alive(self) -> bool:
        """Every engine runs and is not stuck."""
        return all(room.alive for room in self._rooms.values())

    @property
    def ready(self) -> bool:
        return self.lifecycle.ready and all(room.ready for room in self._rooms.values())

    def ready_for(self, pipeline: RoomPipeline) -> bool:
        """Can that model answer now?"""
        room = self._rooms[pipeline.model.name]
        return self.lifecycle.ready and room.ready

    @property
    def busy(self) -> bool:
        """A batch is being computed."""
        return any(room.batcher.busy for room in self._all())

    def _all(self) -> list[Room]:
        return [*self._rooms.values(), *self._leaving]

    def look(self) -> None:
        """Whoever asks for figures wants them of now."""
        for pipeline in self:
            pipeline.slo.look()

    # -- from start to end -------------------------------------------------------------------

    async def warm(self) -> None:
        """Make all models ready, one after the other."""
        for room in self._rooms.values():
            await room.warm()
        self.lifecycle.warmed()

    def let_go(self) -> None:
        """Whoever still waits is told that the server ends."""
        for room in self._all():
            room.batcher.close()

    async def close(self) -> None:
        self.lifecycle.phase = "closed"
        rooms = self._all()
        for task in (*self._leaving.values(), self._forgetting):
            if task is not None:
                task.cancel()
        for room in rooms:
            await room.close()

    # -- exchanging a model ------------------------------------------------------------------

    def changed(self, name: str) -> bool:
        """Does the model's directory hold another checkpoint than when it was last opened, in vain
        or not? Looks at the disk; safe in any thread.

        A checkpoint is told by its manifest, which is written last: a directory that is being
        filled has the old one, or none.
        """
        stamp = _stamp(self.settings.of_model(name))
        return stamp is not None and stamp != self._stamps[name]

    async def load(self, name: str) -> ServedModel:
        """Open the checkpoint of a model anew, and serve it from then on; one at a time.

        Comes back when it is served; the old room is emptied behind it.

        Raises:
            InvalidInput: no such model; or it cannot be served, and the old one still is.
            NotReady: the server is starting or ending.
        """
        self.of(name)
        async with self._loading:
            self._check_ready()
            if self._leaving:  # so that there are never more than two checkpoints of a model
                await asyncio.wait(self._leaving.values())
            try:
                room = await self._open_anew(name)
            except Exception as error:
                log.exception("%s was not loaded anew, the old one is still served", name)
                raise InvalidInput(
                    f"not loaded, the old one is still served: {error}", param="model"
                ) from error
            if not self.lifecycle.ready:  # any more
                await room.close()
                self._check_ready()
            old, self._rooms[name] = self._rooms[name], room
            room.show(old)
            log.info("%s: %s is served from now on, after %s", name, room.model.sha, old.model.sha)
            self._leaving[old] = asyncio.create_task(self._empty(old))
            return room.model

    async def _open_anew(self, name: str) -> Room:
        """A room with the checkpoint that is there now: verified, warm, and it has answered."""
        settings = self.settings.of_model(name)
        self._stamps[name] = _stamp(settings)
        model = await in_daemon_thread(lambda: load_model(settings))
        self._check_depth(model)
        room = self._room(settings, model)
        try:
            await room.warm()
            await rehearse(room.pipeline)
        except BaseException:
            await room.close()
            raise
        return room

    def _check_ready(self) -> None:
        if not self.lifecycle.ready:
            raise NotReady("the server is starting or shutting down")

    def _died(self, room: Room) -> None:
        """An engine can answer no more. The server ends, unless nobody is led to it."""
        if self._rooms.get(room.model.name) is room:
            self.lifecycle.died.set()

    async def _empty(self, room: Room) -> None:
        """Close a room when nobody is inside any more."""
        try:
            while self._wanted(room):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(_LOOK_S)
            await room.close("another checkpoint is served")
            log.info("%s: %s is closed", room.model.name, room.model.sha)
        finally:
            del self._leaving[room]
        # A task of its own: the next exchange waits until a room is empty, no longer.
        self._forgetting = asyncio.create_task(_forget(weakref.ref(room.pipeline)))

    def _wanted(self, room: Room) -> bool:
        """Somebody is inside an old room, or may come."""
        model = room.model
        served = self._rooms[model.name].model.sha
        may_come = model.sha != served and self.still_asked(model.name, model.sha)
        return may_come or bool(room.batcher.unanswered)

    def _check_depth(self, model: ServedModel) -> None:
        if model.num_layers > self.families.most_layers:
            raise ValueError(
                f"{model.sha} has {model.num_layers} layers, the metrics are made for "
                f"{self.families.most_layers}: a deeper model wants a new server"
            )

    def _room(self, settings: Settings, model: ServedModel) -> Room:
        device = self._devices.setdefault(model.device, Device())
        return Room(
            *(settings, model, self.families, self.lifecycle, device),
            died=self._died,
            computes=self._computes,
        )


async def _forget(gone: "weakref.ref[RoomPipeline]") -> None:
    """Have the memory of an old checkpoint handed back, once nobody holds it any more."""
    for settling_s in _SETTLING_S:
        await asyncio.sleep(settling_s)
        await asyncio.to_thread(collect_what_stayed)
        if gone() is None:
            return
    log.warning("an old checkpoint is still held by somebody; its memory is not given back")


def _stamp(settings: Settings) -> tuple[int, int, int] | None:
    """Of the manifest; None if there is none."""
    try:
        status = (settings.directory / MANIFEST).stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
