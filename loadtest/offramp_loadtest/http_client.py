"""A lean HTTP/1.1 client for load: requests are ready bytes, a reply is cut out, not interpreted.

A general client costs more than the server that it is to measure. This one knows what load needs
and nothing else: keep-alive connections with one request at a time, replies with a Content-Length,
clients that leave before they have their answer. It knows nothing about schedules or about what is
asked.
"""

import asyncio
import json
import re
import ssl
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close", re.IGNORECASE)


@dataclass(frozen=True)
class Reply:
    """A whole response. `head` ends with the last header's line end."""

    status: int
    head: bytes
    body: bytes

    def header(self, name: str) -> str | None:
        """A header's value, by its name in lower case."""
        return self._headers.get(name)

    def json(self) -> Any:
        return json.loads(self.body)

    @cached_property
    def _headers(self) -> dict[str, str]:
        lines = self.head.decode("latin-1").split("\r\n")[1:]
        pairs = (line.partition(":") for line in lines if line)
        return {name.lower(): value.strip() for name, _, value in pairs}


Done = Callable[[Reply | None], None]
"""Told once what came of a request; None: the connection ended without a whole response."""

LEFT = Reply(-1, b"", b"")
"""What a client has that went away itself."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a server listens; `prefix` is what all its paths begin with."""

    host: str
    port: int
    tls: bool = False
    prefix: str = ""

    @property
    def authority(self) -> str:
        """Host and port, as a request names them."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.authority}{self.prefix}"


@dataclass(frozen=True, slots=True)
class Leave:
    """When a client goes away: so long after it has sent so large a part of its request."""

    after_s: float
    part: float = 1.0


def post(
    address: Address,
    path: str,
    body: bytes,
    *headers: str,
    content_type: str = "application/json",
) -> bytes:
    """A request with a body, ready to be sent."""
    lines = (
        f"POST {address.prefix}{path} HTTP/1.1",
        f"host: {address.authority}",
        f"content-type: {content_type}",
        f"content-length: {len(body)}",
        *headers,
    )
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def get(address: Address, path: str) -> bytes:
    """A request without a body, ready to be sent."""
    return (f"GET {address.prefix}{path} HTTP/1.1\r\nhost: {address.authority}\r\n\r\n").encode(
        "latin-1"
    )


class Connection(asyncio.Protocol):
    """One connection. `usable` says if another request may be sent on it."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._body_at = 0  # where the response under way has its body; 0: the head is not whole
        self._ends_at = 0
        self._status = 0
        self._done: Done | None = None
        self._leaving = False
        self.unasked = b""  # came with no request under way: a server must not do that

    @classmethod
    async def open(cls, address: Address, trust: ssl.SSLContext | None = None) -> "Connection":
        """Connect; over TLS where the address says so, trusting the machine's authorities or those
        given.

        Raises:
            OSError: nobody listens there, or nobody who is trusted.
        """
        loop = asyncio.get_running_loop()
        context = (trust or ssl.create_default_context()) if address.tls else None
        _, connection = await loop.create_connection(cls, address.host, address.port, ssl=context)
        return connection

    @property
    def usable(self) -> bool:
        return self._transport is not None and self._done is None and not self._leaving

    def ask(self, request: bytes, done: Done) -> None:
        """Send a request; one at a time."""
        if not self.usable or self._transport is None:
            raise RuntimeError("the connection is closed or has a request under way")
        self._done = done
        self._transport.write(request)

    async def exchange(self, request: bytes) -> Reply | None:
        """Send a request and wait for its response."""
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()

        def settle(reply: Reply | None) -> None:
            if not future.done():
                future.set_result(reply)

        self.ask(request, settle)
        return await future

    def close(self) -> None:
        """End the connection, whatever is under way on it."""
        self._leaving = True
        if self._transport is not None:
            self._transport.abort()

    def leave(self) -> None:
        """End the connection; a request under way is told that its client has left."""
        done, self._done = self._done, None
        self.close()
        if done is not None:
            done(LEFT)

    # -- called by the event loop ------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's are not of that class

    def data_received(self, data: bytes) -> None:
        if self._done is None:
            if not self._leaving:
                self.unasked += data
            return
        self._received = self._received + data if self._received else data
        if not self._body_at and not self._read_head():
            return
        if len(self._received) >= self._ends_at:
            self._finish()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if (done := self._done) is not None:
            self._done = None
            done(None)

    def _read_head(self) -> bool:
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return False
        head = self._received[: end + 2]
        length = _LENGTH.search(head)
        if length is None:  # chunked, or until the connection ends: nothing for this client
            self.close()
            return False
        self._status = int(head[9:12])
        self._leaving = _CLOSES.search(head) is not None
        self._body_at = end + 4
        self._ends_at = self._body_at + int(length[1])
        return True

    def _finish(self) -> None:
        received, done = self._received, self._done
        reply = Reply(
            self._status, received[: self._body_at - 2], received[self._body_at : self._ends_at]
        )
        self.unasked += received[self._ends_at :]
        self._received, self._body_at, self._done = b"", 0, None
        if self._leaving:
            self.close()
        assert done is not None
        done(reply)


class Connections:
    """Up to `most` connections to one server, opened when none is free.

    Beyond that, requests wait in their order; `waited` counts them.
    """

    def __init__(self, address: Address, most: int, *, trust: ssl.SSLContext | None = None) -> None:
        self._address, self._most = address, most
        # Made once: it reads all the machine's authorities.
        self._trust = (trust or ssl.create_default_context()) if address.tls else None
        self._free: list[Connection] = []
        self._busy: set[Connection] = set()
        self._opening: set[asyncio.Task[None]] = set()
        self._waiting: deque[tuple[bytes, Done, Leave | None]] = deque()
        self.largest = 0  # open at a time
        self.waited = 0

    @property
    def open(self) -> int:
        return len(self._free) + len(self._busy) + len(self._opening)

    @property
    def outstanding(self) -> int:
        """Requests without an answer yet."""
        return len(self._busy) + len(self._opening) + len(self._waiting)

    def ask(self, request: bytes, done: Done, leave: Leave | None = None) -> None:
        """Send a request as soon as a connection is there for it."""
        while self._free:
            connection = self._free.pop()
            if connection.usable:
                self._send(connection, request, done, leave)
                return
        if self.open < self._most:
            opening = self._open(request, done, leave)
            self._opening.add(asyncio.get_running_loop().create_task(opening))
            self.largest = max(self.largest, self.open)
        else:
            self.waited += 1
            self._waiting.append((request, done, leave))

    def close(self) -> None:
        """End all connections, whatever is under way on them."""
        self._waiting.clear()
        for task in self._opening:
            task.cancel()
        for connection in [*self._free, *self._busy]:
            connection.close()

    async def _open(self, request: bytes, done: Done, leave: Leave | None) -> None:
        try:
            connection = await Connection.open(self._address, self._trust)
        except OSError:
            connection = None
        # Counted from now on as busy, or not at all.
        task = asyncio.current_task()
        assert task is not None
        self._opening.discard(task)
        if connection is None or not connection.usable:
            self._ask_next()
            done(None)
        else:
            self._send(connection, request, done, leave)

    def _send(
        self, connection: Connection, request: bytes, done: Done, leave: Leave | None
    ) -> None:
        self._busy.add(connection)

        def answered(reply: Reply | None) -> None:
            self._busy.discard(connection)
            if connection.usable:
                self._free.append(connection)
            self._ask_next()
            done(reply)

        if leave is None:
            connection.ask(request, answered)
        else:
            self._send_and_leave(connection, request, answered, leave)

    def _send_and_leave(
        self, connection: Connection, request: bytes, answered: Done, leave: Leave
    ) -> None:
        loop = asyncio.get_running_loop()

        def answered_before(reply: Reply | None) -> None:
            departure.cancel()
            answered(reply)

        departure = loop.call_later(leave.after_s, connection.leave)
        connection.ask(request[: max(1, int(leave.part * len(request)))], answered_before)

    def _ask_next(self) -> None:
        """Room has been made for one more."""
        if self._waiting:
            self.ask(*self._waiting.popleft())
