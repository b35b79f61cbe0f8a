"""The generator against a made-up server: on time, never skipping, honest about what it met."""

import asyncio
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from offramp_loadtest.generator import Load, keep_in_flight, send_when_due
from offramp_loadtest.http_client import Address, Connection, Connections, Reply, get, post
from offramp_loadtest.report import summary

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nx-exit-layer: 3\r\n\r\n{}"


@dataclass
class Server:
    """Answers each request with what `reply` says, `delay_s` after it came."""

    reply: bytes = OK
    delay_s: float = 0.0
    pieces: int = 1
    hang_up: bool = False
    requests: list[bytes] = field(default_factory=list)
    most_inside: int = 0
    address: Address = field(init=False)
    _inside: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
                self.requests.append(head + await reader.readexactly(int(length or 0)))
                self._inside += 1
                self.most_inside = max(self.most_inside, self._inside)
                await asyncio.sleep(self.delay_s)
                self._inside -= 1
                if self.hang_up:
                    return
                size = max(1, len(self.reply) // self.pieces)
                for start in range(0, len(self.reply), size):
                    writer.write(self.reply[start : start + size])
                    await writer.drain()
                    if self.pieces > 1:
                        await asyncio.sleep(0.001)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
def serve() -> Iterator[Callable[[Server], Server]]:
    """Servers in a thread of their own, ended with the test."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    listening: list[asyncio.Server] = []

    def start(server: Server) -> Server:
        made = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(server.serve, "127.0.0.1", 0), loop
        ).result(10)
        listening.append(made)
        server.address = Address("127.0.0.1", made.sockets[0].getsockname()[1])
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


Serve = Callable[[Server], Server]


def load(server: Server, most: int = 50, patience_s: float = 10.0) -> Load:
    requests = [post(server.address, "/", b"%d" % number) for number in range(3)]
    return Load(server.address, requests, most, patience_s)


def test_every_request_is_sent_in_its_turn_and_counted(serve: Serve) -> None:
    server = serve(Server())
    result = send_when_due(load(server), [0.002 * at for at in range(50)])
    assert len(result.outcomes) == len(server.requests) == 50
    assert {request[-1:] for request in server.requests} == {b"0", b"1", b"2"}
    assert {(one.status, one.exit_layer) for one in result.outcomes} == {(200, 3)}
    assert all(one.due <= one.sent <= one.done for one in result.outcomes)
    report = summary(result, seconds=0.1, max_connections=50)
    assert report["status"] == {"200": 50}
    assert report["exit_layers"] == {"3": 50}
    assert report["rate_due"] == pytest.approx(500)


def test_a_slow_server_is_not_waited_for(serve: Serve) -> None:
    server = serve(Server(delay_s=0.4))
    result = send_when_due(load(server), [0.01 * at for at in range(20)])
    assert server.most_inside == 20  # all were sent before the first was answered
    assert result.connections == 20
    assert result.waited == 0
    assert all(one.latency_s > 0.39 for one in result.outcomes)


def test_who_finds_no_connection_waits_and_that_counts(serve: Serve) -> None:
    server = serve(Server(delay_s=0.1))
    result = send_when_due(load(server, most=1), [0.0, 0.001, 0.002])
    assert server.most_inside == 1
    assert (result.connections, result.waited) == (1, 2)
    # One after the other, but due together: the last one's latency is that of three.
    latencies = sorted(one.latency_s for one in result.outcomes)
    assert latencies[0] < 0.2
    assert latencies[2] > 0.28
    assert [request[-1:] for request in server.requests] == [b"0", b"1", b"2"]


def test_processes_share_an_open_loop(serve: Serve) -> None:
    server = serve(Server())
    result = send_when_due(load(server), [0.01 * at for at in range(20)], processes=2)
    assert len(result.outcomes) == len(server.requests) == 20
    due = [one.due for one in result.outcomes]
    assert due == sorted(due)
    assert due[-1] - due[0] == pytest.approx(0.19)


def test_a_closed_loop_keeps_so_many_in_flight(serve: Serve) -> None:
    server = serve(Server(delay_s=0.02))
    result = keep_in_flight(load(server, most=4), seconds=0.3)
    assert server.most_inside == 4
    assert len(result.outcomes) == len(server.requests) >= 8
    assert all(one.status == 200 for one in result.outcomes)


@pytest.mark.parametrize(
    "server",
    [
        Server(hang_up=True),
        Server(reply=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)
def test_no_answer_is_an_outcome(serve: Serve, server: Server) -> None:
    result = send_when_due(load(serve(server), most=1), [0.0, 0.001])
    assert [one.status for one in result.outcomes] == [0, 0]


def test_nobody_listens(serve: Serve) -> None:
    address = Address("127.0.0.1", 1)
    result = send_when_due(Load(address, [get(address, "/")], 1), [0.0, 0.001])
    assert [one.status for one in result.outcomes] == [0, 0]


def test_patience_ends(serve: Serve) -> None:
    server = serve(Server(delay_s=30))
    result = send_when_due(load(server, patience_s=0.3), [0.0, 0.001])
    assert [one.status for one in result.outcomes] == [0, 0]
    assert all(0.2 < one.latency_s < 5 for one in result.outcomes)


async def ask(address: Address, *requests: bytes) -> tuple[list[Reply | None], Connection]:
    connection = await Connection.open(address)
    replies = [await connection.exchange(request) for request in requests]
    return replies, connection


async def test_a_reply_in_many_pieces(serve: Serve) -> None:
    body = b'{"a": 1}'
    head = b"HTTP/1.1 422 No\r\ncontent-length: %d\r\nX-Name: value \r\n\r\n" % len(body)
    server = serve(Server(reply=head + body, pieces=20))
    (first, second), connection = await ask(server.address, *[get(server.address, "/")] * 2)
    assert first == second
    assert first is not None
    assert (first.status, first.json(), first.header("x-name")) == (422, {"a": 1}, "value")
    assert connection.usable
    assert connection.unasked == b""
    connection.close()


async def test_what_nobody_asked_for_is_kept(serve: Serve) -> None:
    server = serve(Server(reply=OK + OK))
    _, connection = await ask(server.address, get(server.address, "/"))
    assert connection.unasked == OK
    connection.close()


async def test_a_connection_that_the_server_leaves_is_not_used_again(serve: Serve) -> None:
    leaving = b"HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    server = serve(Server(reply=leaving))
    (reply,), connection = await ask(server.address, get(server.address, "/"))
    assert reply is not None
    assert not connection.usable
    with pytest.raises(RuntimeError, match="closed"):
        connection.ask(b"", lambda _: None)

    connections = Connections(server.address, most=1)
    replies = []
    for _ in range(3):
        future: asyncio.Future[Reply | None] = asyncio.get_running_loop().create_future()
        connections.ask(get(server.address, "/"), future.set_result)
        replies.append(await future)
    assert all(reply is not None for reply in replies)
    assert (connections.largest, connections.waited) == (1, 0)
    connections.close()
