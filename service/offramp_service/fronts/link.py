"""What a front and the process with the engine say to each other, and the socket that carries it.

Each message is MessagePack behind its length. Messages that are sent within one turn of the event
loop go out together. Both ends are the same program on the same machine, so the format may change
with any release. It knows nothing of what messages are about.
"""

import asyncio
import logging
import socket
from collections.abc import Callable
from typing import Any, Literal, cast

import msgspec

from offramp_service.errors import Reason
from offramp_service.jobs import Controls, TimedAnswer
from offramp_service.lifecycle import Phase

log = logging.getLogger(__name__)

_LENGTH_BYTES = 4
_READ_BYTES = 262_144

Headers = list[tuple[bytes, bytes]]


class _Message(msgspec.Struct, array_like=True, tag=True):
    """In a list, its name first."""


# -- from a front --------------------------------------------------------------------------------


class Ask(_Message):
    """Classify the texts of one request, which are tokens by now. `controls` are one for all texts
    or one for each; `admitted_at` is of the clock that all processes of a machine share."""

    number: int
    model: str
    sha: str
    request_id: str
    admitted_at: float
    texts: list[tuple[list[int], list[int]]]
    controls: list[Controls]


class Cancel(_Message):
    """Nobody waits for that any more, be it an `Ask` or a `Fetch`."""

    number: int


class Fetch(_Message):
    """A request that no door takes."""

    number: int
    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes


class Counted(_Message):
    """Requests inside this front, and what it has counted since it last told: of which model, which
    method of its metrics, with which arguments."""

    inflight: int
    events: list[
        tuple[
            str,
            Literal["request_done", "request_failed", "tokenized", "speedup_given"],
            list[Any],
        ]
    ]


class Holds(_Message):
    """The checkpoints that may still be asked for, by model: one, or two for a moment. A `State`
    comes back, so that a new front can be sure that its own are not being closed."""

    shas: dict[str, list[str]]


class Finished(_Message):
    """Nobody is inside any more, and nobody will come."""


# -- to a front ----------------------------------------------------------------------------------


class Answered(_Message):
    number: int
    answers: list[TimedAnswer]


class Failed(_Message):
    """An error of the tree in `errors`, by the name of its class, with all that a door may say of
    it."""

    number: int
    error: str
    message: str
    param: str | None
    status: int
    kind: str
    reason: Reason
    retry_after_s: int | None


class Fetched(_Message):
    number: int
    status: int
    headers: Headers
    body: bytes


class ModelState(msgspec.Struct, array_like=True):
    """What a front has to know of a model beside its directory."""

    name: str
    sha: str
    vocab_size: int
    default_speedup: float
    floor: float  # of speed-ups
    correction: float  # of speed-ups


class State(_Message):
    """How things stand; sent when they change. The default model comes first."""

    phase: Phase
    models: list[ModelState]


class Leave(_Message):
    """Take nothing more, finish what is inside within so many seconds, and end."""

    within_s: float


Message = (
    Ask | Cancel | Fetch | Counted | Holds | Finished | Answered | Failed | Fetched | State | Leave
)


class Link:
    """One end of the socket between a front and the process with the engine; event loop only.

    Args:
        end: a connected stream socket, which is the link's from now on.
        received: called with each message.
        lost: called once, when the other end is gone.
    """

    def __init__(
        self,
        end: socket.socket,
        received: Callable[[Message], None],
        lost: Callable[[], None],
    ) -> None:
        self._end, self._received, self._lost = end, received, lost
        self._encode = msgspec.msgpack.Encoder().encode
        self._decode = msgspec.msgpack.Decoder(Message).decode
        self._unsent: list[bytes] = []
        self._transport: asyncio.WriteTransport | None = None
        # Called before what is unsent goes out, so that it may add something.
        self.before_sending: Callable[[], None] = lambda: None

    async def open(self) -> None:
        """Begin to receive."""
        self._end.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: _Receiver(self), sock=self._end)

    @property
    def alive(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send it with whatever else is sent in this turn of the event loop. Into the void, where
        the other end is gone."""
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        data = self._encode(message)
        self._unsent += (len(data).to_bytes(_LENGTH_BYTES, "big"), data)

    def flush(self) -> None:
        """Send what is unsent now."""
        self.before_sending()
        unsent, self._unsent = self._unsent, []
        if self._transport is not None and self.alive and unsent:
            self._transport.write(b"".join(unsent))

    def close(self) -> None:
        """After what is unsent has gone out."""
        self.flush()
        if self._transport is not None:
            self._transport.close()

    def _take(self, data: bytes | memoryview) -> None:
        self._received(self._decode(data))


class _Receiver(asyncio.Protocol):
    """Cuts messages out of what arrives."""

    def __init__(self, link: Link) -> None:
        self._link, self._arrived = link, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none by class.
        self._link._transport = cast(asyncio.WriteTransport, transport)

    def data_received(self, data: bytes) -> None:
        arrived = self._arrived
        arrived += data
        start = 0
        while len(arrived) - start >= _LENGTH_BYTES:
            length = int.from_bytes(arrived[start : start + _LENGTH_BYTES], "big")
            end = start + _LENGTH_BYTES + length
            if len(arrived) < end:
                break
            self._link._take(bytes(arrived[start + _LENGTH_BYTES : end]))
            start = end
        del arrived[:start]

    def connection_lost(self, _: Exception | None) -> None:
        self._link._lost()
