"""In the process with the engine: answers what one front asks, and keeps count of what it tells.

It knows the application and the models, and not what the front runs in.
"""

import asyncio
import dataclasses
import logging
import socket
from collections.abc import Callable, Coroutine
from functools import lru_cache
from typing import Any

from fastapi import FastAPI
from starlette.types import Message as AsgiMessage

from offramp_service.errors import NotReady, ServiceError
from offramp_service.fronts.link import (
    Answered,
    Ask,
    Cancel,
    Counted,
    Fetch,
    Fetched,
    Finished,
    Holds,
    Link,
    Message,
    ModelState,
    State,
)
from offramp_service.fronts.remote import as_failed
from offramp_service.jobs import Controls, Depth, Job, TimedAnswer
from offramp_service.models import Models

log = logging.getLogger(__name__)


class Counterpart:
    """One front, as it is seen from the process with the engine; event loop only.

    Args:
        end: leads to the front.
        app: answers what no door takes; its models answer the rest.
        state: says how things stand.
    """

    def __init__(self, end: socket.socket, app: FastAPI, state: Callable[[], State]) -> None:
        self._app, self._state = app, state
        self._models: Models = app.state.models
        self.opened = asyncio.Event()  # it takes requests
        self.holds: dict[str, list[str]] = {}
        self.inflight = 0
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self.link = Link(end, self._received, self.forget)

    async def open(self) -> None:
        """Begin to answer."""
        await self.link.open()
        self.link.send(self._state())

    def forget(self) -> None:
        """It is gone: whatever it has asked for is not wanted any more."""
        for task in tuple(self._tasks.values()):
            task.cancel()
        self.holds, self.inflight = {}, 0
        self.link.close()

    def _received(self, message: Message) -> None:
        match message:
            case Ask():
                self._start(message.number, self._answer(message))
            case Cancel():
                if (task := self._tasks.get(message.number)) is not None:
                    task.cancel()
            case Counted():
                self.inflight = message.inflight
                self._count(message)
            case Fetch():
                self._start(message.number, self._fetch(message))
            case Holds():
                self.holds = message.shas
                self.opened.set()
                self.link.send(self._state())
            case Finished():
                self.holds, self.inflight = {}, 0
            case _:
                raise AssertionError(message)

    def _start(self, number: int, work: Coroutine[Any, Any, None]) -> None:
        self._tasks[number] = task = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, ask: Ask) -> None:
        try:
            answers = await self._classify(ask)
        except ServiceError as error:
            self.link.send(as_failed(ask.number, error))
        except Exception:
            log.exception("request %s failed", ask.request_id)
            self.link.send(as_failed(ask.number, ServiceError("internal error")))
        else:
            self.link.send(Answered(ask.number, answers))

    async def _classify(self, ask: Ask) -> list[TimedAnswer]:
        pipeline = self._models.inside(ask.model, ask.sha)
        if pipeline is None:
            raise NotReady("this checkpoint is not served any more")
        with pipeline.admit(len(ask.texts), "texts", ask.request_id) as batch:
            batch.admitted_at = ask.admitted_at
            controls = [_shared(one) for one in ask.controls]
            if len(controls) == 1:
                controls *= len(ask.texts)
            jobs = [
                Job(ids, type_ids, asked)
                for (ids, type_ids), asked in zip(ask.texts, controls, strict=True)
            ]
            return await pipeline.batcher.submit(batch, jobs)

    def _count(self, message: Counted) -> None:
        for model, method, arguments in message.events:
            getattr(self._models.of(model).metrics, method)(*arguments)

    async def _fetch(self, asked: Fetch) -> None:
        try:
            reply = await call(self._app, asked)
        except Exception:
            log.exception("%s %s failed", asked.method, asked.path)
            self.link.send(as_failed(asked.number, ServiceError("internal error")))
        else:
            self.link.send(reply)


def state_of(models: Models) -> State:
    """How things stand."""
    return State(
        models.lifecycle.phase,
        [
            ModelState(
                *(one.model.name, one.model.sha, one.model.vocab_size),
                default_speedup=one.controls.default_speedup,
                floor=one.slo.floor(),
                correction=one.controls.correction,
            )
            for one in models
        ],
    )


async def call(app: FastAPI, asked: Fetch) -> Fetched:
    """The application's response to a request that came in elsewhere."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": asked.method,
        "path": asked.path,
        "raw_path": asked.path.encode(),
        "root_path": "",
        "scheme": "http",
        "query_string": asked.query,
        "headers": asked.headers,
    }
    unread = [asked.body]
    status, headers = 500, list[tuple[bytes, bytes]]()
    chunks: list[bytes] = []

    async def receive() -> AsgiMessage:
        if unread:
            return {"type": "http.request", "body": unread.pop()}
        await asyncio.Event().wait()  # whoever leaves cancels this
        raise AssertionError

    async def send(message: AsgiMessage) -> None:
        nonlocal status, headers
        if message["type"] == "http.response.start":
            status, headers = message["status"], list(message["headers"])
        else:
            chunks.append(message.get("body", b""))

    await app(scope, receive, send)
    return Fetched(asked.number, status, headers, b"".join(chunks))


def _shared(controls: Controls) -> Controls:
    """With depths that are one object for each class, because their sums are kept in them."""
    depth = _depth(controls.depth.inside)
    expected = _depth(controls.expected.inside) if controls.expected is not None else None
    return dataclasses.replace(controls, depth=depth, expected=expected)


@lru_cache(maxsize=1024)
def _depth(inside: tuple[float, ...]) -> Depth:
    return Depth(inside)
