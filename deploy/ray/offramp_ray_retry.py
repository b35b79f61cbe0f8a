"""In Ray's HTTP proxies: a request whose replica died is sent to another one.

An ASGI middleware. It knows how Ray says that it has no answer, and nothing about what is asked.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware import Middleware

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Scope, Receive, Send], Awaitable[None]]

log = logging.getLogger("ray.serve")

REPLICA = "x-offramp-replica"
"""On every answer of a replica; what lacks it comes from Ray itself."""
ATTEMPTS = "x-offramp-attempts"
"""On answers that needed more than one."""
OWN = "/-/"
"""Paths that a proxy answers itself; a probe wants its answer now."""
TRIES, FIRST_PAUSE_S, LONGEST_PAUSE_S = 8, 0.05, 2.0
"""Of one request: about five seconds in all, in which Ray notices that a node is gone."""
MOST_KEPT = 4_000_000
"""Bytes of a request body that the proxy keeps for another try; twice the service's own limit."""


def proxy_middlewares() -> list[Middleware]:
    """For RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH."""
    return [Middleware(Retry)]


class Retry:
    """Sends a request again when Ray lost the replica that had it. Ray itself tries another replica
    only as long as none has taken the request. A classification changes nothing, so it may run
    twice; of an answer that has begun, nothing is repeated.
    """

    def __init__(self, app: Asgi) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(OWN):
            await self._app(scope, receive, send)
            return
        client = _Client(receive)
        await client.read()
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, TRIES + 1):
            answer = _Answer(send, attempt, is_last=attempt == TRIES or not client.can_repeat)
            # Each try gets headers of its own: who is inside adds some.
            own = {**scope, "headers": list(scope["headers"])}
            await self._app(own, client.from_the_start(), answer)
            if answer.begun or client.gone or not client.can_repeat:
                return
            log.warning("no answer from a replica, attempt %d of %d", attempt, TRIES)
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class _Client:
    """What came of a client, for as many who want to read it."""

    def __init__(self, receive: Receive) -> None:
        self._receive, self._messages = receive, list[Message]()
        self.gone = False
        self.can_repeat = False  # its whole body is here

    async def read(self) -> None:
        """The body, or as much of it as is kept."""
        size = 0
        while not self.gone and size <= MOST_KEPT:
            message = await self._next()
            self._messages.append(message)
            size += len(message.get("body", b""))
            if not self.gone and not message.get("more_body", False):
                self.can_repeat = True
                return

    def from_the_start(self) -> Receive:
        left = iter(self._messages)

        async def receive() -> Message:
            message = next(left, None)
            return message if message is not None else await self._next()

        return receive

    async def _next(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        return message


class _Answer:
    """Passes an answer on, unless it is Ray's own regret."""

    def __init__(self, send: Send, attempt: int, *, is_last: bool) -> None:
        self._send, self._attempt, self._is_last = send, attempt, is_last
        self.begun = False

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            regret = message["status"] in (500, 503) and REPLICA not in headers
            self.begun = self._is_last or not regret
            if self._attempt > 1:
                headers[ATTEMPTS] = str(self._attempt)
        if self.begun:
            await self._send(message)
