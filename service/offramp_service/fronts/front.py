"""A front process: takes connections, does all that a door does, and asks the other process.

It opens the checkpoints' descriptions and tokenizers, and computes nothing. When another checkpoint
is served it goes over to it, and says so when nobody of its own waits for the old one any more.
Without the other process it is of no use to anybody, and ends.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial

import uvicorn
import uvloop
from fastapi import FastAPI, Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_model.memory import keep_freed_memory
from offramp_service.background import in_daemon_thread
from offramp_service.bounded_http import http_options, stop_listening
from offramp_service.choice import choose
from offramp_service.fronts.link import (
    Answered,
    Failed,
    Fetched,
    Finished,
    Holds,
    Leave,
    Link,
    Message,
    ModelState,
    State,
)
from offramp_service.fronts.remote import (
    Exchange,
    RemoteCounts,
    RemoteFloor,
    RemoteQueue,
    counted,
)
from offramp_service.garbage import leave_alone_what_stays
from offramp_service.lifecycle import Lifecycle
from offramp_service.logs import configure_logging, flush_output
from offramp_service.pipeline import Pipeline
from offramp_service.quality import SpeedupCorrection
from offramp_service.routes.door import read_body
from offramp_service.served_model import DescribedModel, describe_model
from offramp_service.settings import Settings
from offramp_service.wiring import add_doors, open_keys, open_tracer, surround

log = logging.getLogger(__name__)

# How often it looks whether nobody waits for an old checkpoint any more, or whether the number of
# requests inside has to be told.
_LOOK_S = 0.05

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS")


class FrontModels:
    """The models as doors see them."""

    def __init__(self, settings: Settings, exchange: Exchange) -> None:
        self.settings, self.lifecycle = settings, Lifecycle()
        self.told: list[tuple[str, str, list[object]]] = []
        self._exchange = exchange
        self._pipelines: dict[str, Pipeline] = {}
        self._floors: dict[str, RemoteFloor] = {}
        self._corrections: dict[str, SpeedupCorrection] = {}

    @property
    def default(self) -> Pipeline:
        return next(iter(self._pipelines.values()))

    def of(self, name: str | None, version: str | None = None) -> Pipeline:
        """See `Models.of`."""
        return choose(self._pipelines, name, version)

    @property
    def served(self) -> Mapping[str, Sequence[str]]:
        versions = dict.fromkeys(one.model.version for one in self._pipelines.values())
        return {"model": list(self._pipelines), "version": list(versions)}

    @property
    def shas(self) -> dict[str, str]:
        """Of the checkpoints that requests are taken for."""
        return {name: one.model.sha for name, one in self._pipelines.items()}

    def learn(self, state: State) -> None:
        """Take over what may change at any moment."""
        self.lifecycle.phase = state.phase
        for one in state.models:
            self._floor(one.name).value = one.floor
            if (pipeline := self._pipelines.get(one.name)) is not None:
                pipeline.controls.default_speedup = one.default_speedup
            if self.settings.speedup_correction:
                self._correction(one.name).factor = one.correction

    def lead_to(self, model: DescribedModel) -> Pipeline | None:
        """Take requests for that checkpoint from now on; returns the pipeline of the one before."""
        name = model.name
        before = self._pipelines.get(name)
        correction = self._correction(name) if self.settings.speedup_correction else None
        self._pipelines[name] = Pipeline(
            self.settings.of_model(name),
            model,
            RemoteQueue(self._exchange, name, model.sha, self.settings.max_concurrent_requests),
            RemoteCounts(name, self.told),
            self._floor(name),
            correction,
        )
        return before

    def _floor(self, name: str) -> RemoteFloor:
        return self._floors.setdefault(name, RemoteFloor())

    def _correction(self, name: str) -> SpeedupCorrection:
        return self._corrections.setdefault(name, SpeedupCorrection())


class Front:
    """All of a front but its HTTP server. `end` leads to the other process; `gone` is called when
    that one is."""

    def __init__(self, settings: Settings, end: socket.socket) -> None:
        self.exchange = Exchange()
        self.models = FrontModels(settings, self.exchange)
        self.leaving = asyncio.Event()
        self.within_s = 0.0
        self.lost = asyncio.Event()
        self._state = State("starting", [])
        self._stated = asyncio.Event()
        self._link = Link(end, self._received, self.lost.set)
        self._link.before_sending = self._tell_counts
        self._inflight_told = 0
        self._old: list[Pipeline] = []  # where somebody may still be inside
        self._tasks: set[asyncio.Task[None]] = set()

    async def open(self) -> None:
        """Connect, and come back when there are models to take requests for.

        Raises:
            CheckpointError, SettingsError: a checkpoint cannot be opened here.
        """
        await self._link.open()
        self.exchange.link = self._link
        await self._stated.wait()
        while self._behind:
            await self._follow()
            self._stated.clear()
            await self._stated.wait()  # they may have been exchanged before they were held
        self._start(self._keep_up())

    async def finish(self) -> None:
        """Take nothing more, wait for those inside, and tell."""
        await self.models.lifecycle.finish(self.within_s)

    def close(self) -> None:
        """Say goodbye."""
        for task in self._tasks:
            task.cancel()
        self._link.send(Finished())
        self._link.close()

    async def fetch(self, request: Request) -> Response:
        """The endpoint of all that no door takes."""
        body = await read_body(request, self.models.settings.payload_limit)
        scope = request.scope
        return await self.exchange.fetch(
            scope["method"], scope["path"], scope["query_string"], scope["headers"], body
        )

    def _received(self, message: Message) -> None:
        match message:
            case Answered() | Failed() | Fetched():
                self.exchange.replied(message)
            case State():
                self._state = message
                if not self.leaving.is_set():
                    self.models.learn(message)
                self._stated.set()
            case Leave():
                self.within_s = message.within_s
                self.leaving.set()
            case _:
                raise AssertionError(message)

    def _tell_counts(self) -> None:
        inflight = self.models.lifecycle.inflight
        if self.models.told or inflight != self._inflight_told:
            self._inflight_told = inflight
            self._link.send(counted(inflight, self.models.told))

    async def _keep_up(self) -> None:
        """Go over to other checkpoints as they are served, and tell what nobody has asked for."""
        while True:
            await asyncio.sleep(_LOOK_S)
            self._link.flush()
            if self._behind:
                with suppress(Exception):  # it is in the log, and the next look tries again
                    await self._follow()

    @property
    def _behind(self) -> list[ModelState]:
        """Of which another checkpoint is served than this front takes requests for."""
        shas = self.models.shas
        return [one for one in self._state.models if shas.get(one.name) != one.sha]

    async def _follow(self) -> None:
        """Take requests for the checkpoints that are served now."""
        for one in self._behind:
            settings = self.models.settings.of_model(one.name)
            try:
                model = await in_daemon_thread(partial(describe_model, settings, one.vocab_size))
            except Exception:
                log.exception("the checkpoint of %s cannot be opened", one.name)
                raise
            if model.sha != one.sha:  # it is being exchanged again
                continue
            before = self.models.lead_to(model)
            if before is not None:
                self._old.append(before)
                self._start(self._let_go(before))
        self.models.learn(self._state)
        self._tell_holds()

    async def _let_go(self, pipeline: Pipeline) -> None:
        """Of a pipeline, when nobody is inside any more."""
        queue = pipeline.batcher
        assert isinstance(queue, RemoteQueue)
        while queue.unanswered:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(_LOOK_S)
        pipeline.close()
        self._old.remove(pipeline)
        self._tell_holds()

    def _tell_holds(self) -> None:
        shas = {name: [sha] for name, sha in self.models.shas.items()}
        for old in self._old:
            shas[old.model.name].append(old.model.sha)
        self._link.send(Holds(shas))

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


class _Server(uvicorn.Server):
    """uvicorn that is told to end, and leaves signals alone."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def create_front(front: Front) -> FastAPI:
    """The application of an open front: the doors, and for everything else the other process.

    Raises:
        KeyFileError, SettingsError: see `create_app`.
    """
    models = front.models
    keys, tracer = open_keys(models.settings), open_tracer(models.settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if tracer is not None:
            await asyncio.to_thread(tracer.close)

    # What there is to read about the routes is the other process's to say.
    app = FastAPI(openapi_url=None, lifespan=lifespan)
    add_doors(app, models)
    app.router.routes.append(Route("/{path:path}", front.fetch, methods=METHODS))
    surround(app, models, keys, tracer)
    return app


def main() -> None:
    """The whole life of a front process. It is handed the settings on standard input; the sockets
    named in its arguments are those that connections come from and that leads to the process with
    the engine."""
    # Who ends this process is the other one, which gets the signals as well.
    for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(one, signal.SIG_IGN)
    settings = Settings.model_validate_json(sys.stdin.buffer.read())
    listener, end = (socket.socket(fileno=int(number)) for number in sys.argv[1:])
    keep_freed_memory()
    configure_logging(settings)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        code = runner.run(_run(settings, listener, end))
    flush_output()
    os._exit(code)  # whoever still tokenises does it for nobody


async def _run(settings: Settings, listener: socket.socket, end: socket.socket) -> int:
    front = Front(settings, end)
    lost = asyncio.create_task(front.lost.wait())
    opening = asyncio.create_task(front.open())
    await asyncio.wait((opening, lost), return_when=FIRST_COMPLETED)
    if not opening.done():
        os._exit(1)
    try:
        await opening
        app = create_front(front)
    except Exception as error:
        log.error("this front process cannot take requests: %s", error)
        return 3
    server = _Server(uvicorn.Config(app, **http_options()))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    leaving = asyncio.create_task(front.leaving.wait())
    leave_alone_what_stays()
    await asyncio.wait((serving, lost, leaving), return_when=FIRST_COMPLETED)
    if not leaving.done():
        os._exit(1)
    finishing = asyncio.create_task(front.finish())
    await asyncio.wait((finishing, lost), return_when=FIRST_COMPLETED)
    await stop_listening(server)
    server.should_exit = True
    await serving
    front.close()
    return 0


if __name__ == "__main__":
    main()
