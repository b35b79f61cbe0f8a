"""A server that costs as little as one can: every request gets the same answer.

    python loadtest/bench/null_server.py [PORT]

It takes requests apart as far as it must to know where each ends, and says that each text left
after layer 3. For measuring a load generator; it measures nothing itself.
"""

import asyncio
import re
import sys

import uvloop

_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_BODY = b'{"data": [{"index": 0, "label": "positive", "probs": [0.1, 0.9], "num_classes": 2}]}'
_REPLY = (
    b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nx-exit-layer: 3\r\n"
    b"x-speedup-achieved: 2.00\r\ncontent-length: %d\r\n\r\n" % len(_BODY)
) + _BODY


class NullProtocol(asyncio.Protocol):
    """One connection."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._rest = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment]

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        data = self._rest + data
        while (ends := self._end(data)) and ends <= len(data):
            data = data[ends:]
            self._transport.write(_REPLY)
        self._rest = data

    def _end(self, data: bytes) -> int:
        """Of the first request; 0: not to be seen yet."""
        head = data.find(b"\r\n\r\n")
        if head < 0:
            return 0
        length = _LENGTH.search(data, 0, head)
        return head + 4 + (int(length[1]) if length else 0)


async def serve(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(NullProtocol, "127.0.0.1", port)
    host, found = server.sockets[0].getsockname()
    print(f"http://{host}:{found}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(int(sys.argv[1]) if len(sys.argv) > 1 else 0))
