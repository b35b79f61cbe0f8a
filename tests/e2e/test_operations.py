"""The real command as an operator uses it: what a careless or hostile client sends, and what the
logs come to."""

import socket
import threading
from pathlib import Path
from typing import Any

import pytest

from loading import load

_serve = load("tests/e2e/test_serve.py")

directory: pytest.FixtureDef[Path] = _serve.directory
start: Any = _serve.start
until = _serve.until

POST = b"POST /classify HTTP/1.1\r\nhost: x\r\n"
CHUNKED = POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n0\r\n"


def send(port: int, *parts: bytes) -> bytes:
    """What comes back until the server closes the connection."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        try:
            for part in parts:
                connection.sendall(part)
            while piece := connection.recv(65536):
                received += piece
        except (BrokenPipeError, ConnectionResetError):
            pass  # closed on bytes that were still on their way
    return received


def test_a_head_that_is_too_large_ends_its_connection_only(start: Any) -> None:
    server = start("--drain-seconds", "0", batch_takes_s=1)
    answers: list[int] = []
    neighbour = threading.Thread(target=lambda: answers.append(server.classify(input="w1")[0]))
    neighbour.start()
    until(lambda: server.inflight() == 1)
    long = b"x-long: " + b"y" * 70_000 + b"\r\n\r\n"
    many = b"".join(b"x-%d: 1\r\n" % number for number in range(101)) + b"\r\n"
    endless = [b"y" * 1000] * 2000
    for parts in (
        [POST + long],
        [POST + many],
        [b"GET /" + b"y" * 70_000 + b" HTTP/1.1\r\n\r\n"],
        [POST + b"x-long: ", *endless],
        [POST, b"x-long", *endless],
        [b"GET /", *endless],
        [CHUNKED + b"x-trailer: ", *endless],
        [CHUNKED.replace(b"\r\n0\r\n", b"\r\n1;"), *endless],
    ):
        received = send(server.port, *parts)
        # The first answer may have been to the body, before its trailers.
        assert b"HTTP/1.1 431 " in received or not received, received[:300]
    neighbour.join(20)
    assert answers == [200]
    # What people send is far from the limits; and uvicorn's own refusal is still there.
    fits = (
        POST + b"x-long: " + b"y" * 60_000 + b"\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    )
    assert send(server.port, fits).startswith(b"HTTP/1.1 400 ")
    assert send(server.port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    large = {"input": ["w1 " * 9 + "w2"] * 32, "user": "y" * 500_000}
    assert server.classify(**large)[0] == 200
