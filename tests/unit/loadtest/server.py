"""A made-up server for tests of the generator, in a thread of its own. Loaded by path, as test
folders are not packages."""

import asyncio
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from offramp_loadtest.http_client import Address

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-exit-layer: 3\r\n\r\n{}"


@dataclass
class Server:
    """Answers each request with what `reply` says, or `answer` makes of it, `delay_s` after it
    came."""

    reply: bytes = OK
    answer: Callable[[bytes], bytes] | None = None
    delay_s: float = 0.0
    pieces: int = 1
    hang_up: bool = False
    tls: ssl.SSLContext | None = None
    requests: list[bytes] = field(default_factory=list)
    cut_off: int = 0  # requests whose client left while it sent them
    most_inside: int = 0
    address: Address = field(init=False)
    _inside: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await self._one(reader, writer):
                pass
        except asyncio.IncompleteReadError as error:
            self.cut_off += bool(error.partial)
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = await reader.readuntil(b"\r\n\r\n")
        length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
        try:
            request = head + await reader.readexactly(int(length or 0))
        except asyncio.IncompleteReadError:
            self.cut_off += 1
            return False
        self.requests.append(request)
        self._inside += 1
        self.most_inside = max(self.most_inside, self._inside)
        await asyncio.sleep(self.delay_s)
        self._inside -= 1
        if self.hang_up:
            return False
        reply = self.answer(request) if self.answer else self.reply
        size = max(1, len(reply) // self.pieces)
        for start in range(0, len(reply), size):
            writer.write(reply[start : start + size])
            await writer.drain()
            if self.pieces > 1:
                await asyncio.sleep(0.001)
        return True


Serve = Callable[[Server], Server]


@contextmanager
def running() -> Iterator[Serve]:
    """Starts servers, and ends them with the block."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening: list[asyncio.Server] = []

    def start(server: Server) -> Server:
        made = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(server.serve, "127.0.0.1", 0, ssl=server.tls), loop
        ).result(10)
        listening.append(made)
        server.address = Address(
            "127.0.0.1", made.sockets[0].getsockname()[1], server.tls is not None
        )
        return server

    yield start

    async def end() -> None:
        for one in listening:
            one.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run_coroutine_threadsafe(end(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()
