"""The generator against a made-up server: on time, never skipping, honest about what it met."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from loading import load as load_module
from offramp_loadtest.generator import (
    ClosedLoop,
    Load,
    OpenLoop,
    Targets,
    keep_in_flight,
    send_when_due,
)
from offramp_loadtest.http_client import (
    Address,
    Connection,
    Connections,
    Leave,
    Reply,
    get,
    post,
)
from offramp_loadtest.question import LEFT, Outcome, Question

support = load_module("tests/unit/loadtest/server.py")
Server, OK = support.Server, support.OK
Serve = Any


@pytest.fixture
def serve() -> Iterator[Serve]:
    with support.running() as start:
        yield start


def load(server: Any, most: int = 50, patience_s: float = 10.0) -> Load:
    requests = [post(server.address, "/", b"%d" % number) for number in range(3)]
    return Load(server.address, requests, most, patience_s)


def test_every_request_is_sent_in_its_turn_and_counted(serve: Serve) -> None:
    server = serve(Server())
    result = send_when_due(load(server), [0.002 * at for at in range(50)])
    assert len(result.outcomes) == len(server.requests) == 50
    assert {request[-1:] for request in server.requests} == {b"0", b"1", b"2"}
    assert {one.status for one in result.outcomes} == {200}
    assert all(one.due <= one.sent <= one.done for one in result.outcomes)
    due = sorted(one.due for one in result.outcomes)
    assert due[-1] - due[0] == pytest.approx(49 * 0.002)
    assert result.cpu_s > 0


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
    assert latencies[2] > 0.28
    assert latencies[2] - latencies[0] > 0.15
    assert [request[-1:] for request in server.requests] == [b"0", b"1", b"2"]


def test_a_closed_loop_keeps_so_many_in_flight(serve: Serve) -> None:
    server = serve(Server(delay_s=0.02))
    result = keep_in_flight(load(server, most=4), seconds=0.3)
    assert server.most_inside == 4
    assert len(result.outcomes) == len(server.requests) > 4  # who is answered asks again
    assert all(one.status == 200 for one in result.outcomes)


@pytest.mark.parametrize(
    "server",
    [
        Server(hang_up=True),
        Server(reply=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ],
)
def test_no_answer_is_an_outcome(serve: Serve, server: Any) -> None:
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


# -- several targets, clients that leave, an early end --------------------------------------------


def ask_all(
    servers: list[Any], questions: list[Question], *, gap_s: float = 0.005
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    loop = OpenLoop(
        lambda: Targets([one.address for one in servers], 50),
        ((gap_s * at, one) for at, one in enumerate(questions)),
        outcomes.append,
        start=time.perf_counter() + 0.05,
        patience_s=10,
    )
    loop.run()
    return outcomes


def question(servers: list[Any], leave: Leave | None = None) -> Question:
    return Question([post(one.address, "/", b"body" * 100) for one in servers], leave=leave)


def test_targets_take_turns(serve: Serve) -> None:
    servers = [serve(Server()), serve(Server()), serve(Server())]
    outcomes = ask_all(servers, [question(servers)] * 12)
    assert [len(one.requests) for one in servers] == [4, 4, 4]
    assert [one.target for one in outcomes].count(1) == 4
    for server in servers:
        port = b"host: 127.0.0.1:%d\r\n" % server.address.port
        assert all(port in request for request in server.requests)


async def test_whoever_has_least_to_answer_is_asked(serve: Serve) -> None:
    servers = [serve(Server(delay_s=30)), serve(Server(delay_s=30))]
    targets = Targets([one.address for one in servers], 50, least_outstanding=True)

    def ask(place: int) -> None:
        targets.ask(place, question(servers), lambda _: None)

    for _ in range(3):
        ask(0)
    chosen = []
    for _ in range(5):  # the last two find both with as many
        chosen.append(targets.choose())
        ask(chosen[-1])
    assert chosen[:3] == [1, 1, 1]
    assert sorted(chosen[3:]) == [0, 1]
    targets.close()


def test_clients_leave_while_they_wait(serve: Serve) -> None:
    servers = [serve(Server(delay_s=1.0))]
    outcomes = ask_all(servers, [question(servers, Leave(0.02))] * 5)
    assert [one.status for one in outcomes] == [LEFT] * 5
    assert all(0.01 < one.latency_s < 0.9 for one in outcomes)
    assert len(servers[0].requests) == 5


def test_clients_leave_while_they_send(serve: Serve) -> None:
    servers = [serve(Server())]
    outcomes = ask_all(servers, [question(servers, Leave(0.05, 0.5))] * 5)
    assert [one.status for one in outcomes] == [LEFT] * 5
    assert servers[0].requests == []
    deadline = time.monotonic() + 5
    while servers[0].cut_off < 5:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_who_is_answered_before_does_not_leave(serve: Serve) -> None:
    servers = [serve(Server())]
    outcomes = ask_all(servers, [question(servers, Leave(5.0)), question(servers)], gap_s=0.1)
    assert [one.status for one in outcomes] == [200, 200]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_sending_and_what_is_under_way_is_waited_for(
    serve: Serve, number: signal.Signals
) -> None:
    servers = [serve(Server(delay_s=0.3))]

    def kill() -> None:  # once there is something to end: before, it would end the tests
        while len(servers[0].requests) < 6:
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    killer = threading.Thread(target=kill)
    killer.start()
    outcomes = ask_all(servers, [question(servers)] * 10_000, gap_s=0.01)
    killer.join()
    assert 5 < len(outcomes) < 5000
    assert {one.status for one in outcomes} == {200}


def test_each_second_is_told_of(serve: Serve) -> None:
    server = serve(Server())
    ticks: list[float] = []
    ClosedLoop(
        lambda: Targets([server.address], 1),
        iter(lambda: question([server]), None),
        lambda _: None,
        in_flight=1,
        start=time.perf_counter(),
        seconds=1.6,
        each_second=lambda: ticks.append(time.perf_counter()),
    ).run()
    assert len(ticks) in (1, 2)  # after a second, if the machine is not busy


def test_nothing_is_due() -> None:
    assert send_when_due(Load(Address("127.0.0.1", 1), [b""], 1), []).outcomes == []
