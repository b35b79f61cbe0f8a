"""uvicorn's HTTP/1.1 over httptools, with limits on what comes before and around a body.

httptools has none of its own: a request line, a header or a trailer that never ends would be kept
in memory as it comes. Here the connection gets 431 and is closed instead. It knows bytes and
headers, and nothing of what the application does with them.
"""

import asyncio
import os
import socket
from http import HTTPStatus
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

# For connections whose last answer is still being written when the drain is over.
_GOODBYE_S = 2
# For connections that wait in the listener's queue to be taken.
_LAST_CONNECTIONS_S = 0.1
# Between the last connection that is taken and the end: what it asks may still be on its way.
_LAST_WORDS_S = 0.5
KEEP_ALIVE_S = 75
"""Longer than balancers keep an idle connection (60 s is common): whoever closes first must be the
one who also sends, or requests meet a closed connection."""

MAX_HEADERS = 100
MAX_HEAD_BYTES = 65_536
"""Of request line and headers, trailers included; what a single read brings beyond it, at most
256 KiB, is received and let go."""


class BoundedHttp(HttpToolsProtocol):
    """One connection."""

    _head_bytes = _headers = 0  # of the request that is being received
    _unfinished = 0  # bytes since something was complete
    _too_large = False

    def data_received(self, data: bytes) -> None:
        self._unfinished += len(data)
        super().data_received(data)
        if self._unfinished > MAX_HEAD_BYTES and not self.transport.is_closing():
            self._too_large = True
            self.send_400_response("")

    def on_message_begin(self) -> None:
        self._head_bytes = self._headers = self._unfinished = 0
        super().on_message_begin()

    def on_url(self, url: bytes) -> None:
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._unfinished = 0
        self._headers += 1
        self._count(len(name) + len(value))
        super().on_header(name, value)

    def on_body(self, body: bytes) -> None:
        self._unfinished = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._unfinished = 0
        super().on_message_complete()

    def _count(self, size: int) -> None:
        self._head_bytes += size
        if self._head_bytes > MAX_HEAD_BYTES or self._headers > MAX_HEADERS:
            self._too_large = True
            # The parser stops at an exception and has uvicorn send its 400.
            raise ValueError("the request's head is too large")

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to bytes that are no request; ours has another status."""
        if not self._too_large:
            return super().send_400_response(msg)
        status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
        head = b"content-length: 0\r\nconnection: close\r\n\r\n"
        self.transport.write(STATUS_LINE[status] + head)
        return self.transport.close()


def http_options() -> dict[str, Any]:
    """How uvicorn serves HTTP here."""
    return {
        "http": BoundedHttp,
        "ws": "none",
        "log_config": None,
        "access_log": False,
        "server_header": False,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": _GOODBYE_S,
    }


async def stop_listening(server: uvicorn.Server) -> None:
    """Take no new connection, and let those who have one ask and be answered, if only with 503.

    Closing a listener resets connections that wait in its queue, and uvicorn closes, with the
    listener, those on which nothing has come yet. So first the queue gets no longer, then what is
    in it is taken, and only then is it closed.
    """
    for listener in server.servers:
        for one in listener.sockets:
            with socket.socket(fileno=os.dup(one.fileno())) as queue:
                queue.listen(0)
    await asyncio.sleep(_LAST_CONNECTIONS_S)
    for listener in server.servers:
        listener.close()
    await asyncio.sleep(_LAST_WORDS_S)
