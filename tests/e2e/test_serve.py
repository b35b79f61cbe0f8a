"""The real command as a process on a loopback port: start, answer, refuse, drain."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import psutil
import pytest

from loading import load


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    support = load("tests/unit/service/support.py")
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("serve") / "tiny")


@dataclass
class Server:
    """A running `offramp-serve`, and what it printed."""

    process: subprocess.Popen[str]
    port: int
    greeting: str

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, dict, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()
        finally:
            connection.close()

    def classify(self, **body: Any) -> tuple[int, dict, dict]:
        status, headers, content = self.ask("POST", "/classify", json.dumps(body).encode())
        return status, headers, json.loads(content)

    def status(self, path: str) -> int:
        return self.ask("GET", path)[0]

    def phase(self) -> str:
        return json.loads(self.ask("GET", "/livez")[2])["phase"]

    def inflight(self) -> int:
        found = re.search(rb"offramp_inflight_requests\{.*\} (.*)", self.ask("GET", "/metrics")[2])
        assert found is not None
        return round(float(found[1]))

    def wait(self) -> int:
        return self.process.wait(30)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.02)


# A batch that takes its time, so that there is something in flight to look at.
SLOW = """
import sys, time
from offramp_service.__main__ import main
from offramp_service.engine import Engine
delay, call = float(sys.argv[1]), Engine.__call__
def slow(self, jobs):
    time.sleep(delay)
    yield from call(self, jobs)
Engine.__call__ = slow
sys.exit(main(sys.argv[2:]))
"""

NEVER_WARM = """
import os, signal, sys, time
from offramp_service.__main__ import main
from offramp_service.engine import Engine
def warm_up(self, max_length):
    {}
Engine.warm_up = warm_up
sys.exit(main(sys.argv[1:]))
"""

Start = Callable[..., Server]


@pytest.fixture
def start(directory: Path) -> Iterator[Start]:
    processes: list[subprocess.Popen[str]] = []

    def run(*flags: str, batch_takes_s: float | None = None) -> Server:
        command = [sys.executable, "-m", "offramp_service"]
        if batch_takes_s is not None:
            command = [sys.executable, "-c", SLOW, str(batch_takes_s)]
        process = subprocess.Popen(
            [*command, "--model-id", str(directory), "--port", "0", "--threads", "1", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != "PORT"},
        )
        processes.append(process)
        assert process.stdout is not None
        greeting = process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)/classify", greeting)
        assert found is not None, process.communicate(timeout=10)
        return Server(process, int(found[1]), greeting)

    yield run
    for process in processes:
        process.kill()
        process.communicate(timeout=10)


def test_it_starts_answers_refuses_and_ends(start: Start) -> None:
    began = time.monotonic()
    server = start("--drain-seconds", "0")
    assert time.monotonic() - began < 20  # 10 s is the promise; test machines are shared
    assert "curl -i http://127.0.0.1" in server.greeting
    assert server.status("/readyz") == 200

    pasted = re.search(r"-d '(.*)'", server.greeting)
    assert pasted is not None
    assert server.ask("POST", "/classify", pasted[1].encode())[0] == 200
    status, headers, content = server.classify(input=["w1 w2", "w3"], speedup=2.0)
    assert status == 200
    assert [item["index"] for item in content["data"]] == [0, 1]
    assert float(headers["x-speedup-achieved"]) >= 1.0
    assert server.ask("POST", "/classify", b"{")[0] == 400
    assert server.classify(input="w1", speedup=99)[0] == 422
    assert server.classify(input="w1", model="other")[0] == 404
    assert b'offramp_requests_total{code="200"' in server.ask("GET", "/metrics")[2]
    assert b"_created" not in server.ask("GET", "/metrics")[2]
    assert psutil.Process(server.process.pid).memory_info().rss < 1.2 * 2**30

    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
    assert server.process.stderr is not None
    log = server.process.stderr.read()
    assert "limits: 32 tokens a text" in log
    assert "w1" not in log
    assert "Traceback" not in log


def test_sigterm_drains(start: Start) -> None:
    server = start("--drain-seconds", "2", "--shutdown-timeout", "20", batch_takes_s=2)
    kept = HTTPConnection("127.0.0.1", server.port, timeout=30)
    kept.connect()
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.phase() == "draining")
    assert server.status("/readyz") == 503  # unready at once …
    assert server.status("/livez") == 200
    answers: list[tuple[int, str]] = []

    def ask() -> None:
        status, headers, _ = server.classify(input="w1 w2")
        answers.append((status, headers["connection"]))

    clients = [threading.Thread(target=ask) for _ in range(3)]
    for client in clients:  # … but still serving
        client.start()
    until(lambda: server.inflight() == 3)
    until(lambda: server.phase() == "closed")
    kept.request("POST", "/classify", b'{"input": "w1"}')  # after the drain window
    response = kept.getresponse()
    assert (response.status, response.headers["retry-after"]) == (503, "5")
    assert response.headers["connection"] == "close"
    response.read()
    kept.close()
    for client in clients:
        client.join(20)
    assert answers == [(200, "close")] * 3
    assert server.wait() == 0
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=5)


def test_the_last_that_connected_are_answered(start: Start) -> None:
    """Those whose request is still on its way when the listener closes."""
    server = start("--drain-seconds", "0")
    address = ("127.0.0.1", server.port)

    def nobody_listens() -> bool:
        try:
            socket.create_connection(address, timeout=5).close()
        except ConnectionRefusedError:
            return True
        return False

    with socket.create_connection(address, timeout=5) as connection:
        server.process.send_signal(signal.SIGTERM)
        until(nobody_listens)
        time.sleep(0.2)
        body = b'{"input": "w1"}'
        connection.sendall(
            b"POST /classify HTTP/1.1\r\nhost: x\r\ncontent-length: 15\r\n\r\n" + body
        )
        assert connection.recv(65536).startswith(b"HTTP/1.1 503 ")
    assert server.wait() == 0


def test_what_takes_longer_than_the_shutdown_timeout_is_told(start: Start) -> None:
    server = start("--drain-seconds", "0", "--shutdown-timeout", "0.3", batch_takes_s=30)
    answers: list[int] = []
    client = threading.Thread(target=lambda: answers.append(server.classify(input="w1")[0]))
    client.start()
    until(lambda: server.inflight() == 1)
    server.process.send_signal(signal.SIGTERM)
    client.join(20)
    assert answers == [503]
    assert server.wait() == 0
    assert server.process.stderr is not None
    assert "1 requests are not finished in time" in server.process.stderr.read()


@pytest.mark.parametrize(
    ("in_warm_up", "code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGTERM); time.sleep(30)", 128 + signal.SIGTERM, ""),
        ("raise RuntimeError('cold')", 3, "cold"),
    ],
)
def test_a_start_that_does_not_come_to_its_end(
    directory: Path, in_warm_up: str, code: int, said: str
) -> None:
    began = time.monotonic()
    program = NEVER_WARM.format(in_warm_up)
    result = subprocess.run(
        [sys.executable, "-c", program, "--model-id", directory, "--port", "0"],
        capture_output=True,
        text=True,
        timeout=50,
    )
    assert result.returncode == code
    assert said in result.stderr
    assert "is ready" not in result.stdout
    assert time.monotonic() - began < 30


def test_a_second_signal_ends_at_once(start: Start) -> None:
    server = start("--drain-seconds", "30")
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.phase() == "draining")
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 128 + signal.SIGTERM


def test_a_taken_port_is_an_error_not_a_success(start: Start, directory: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = subprocess.run(
            [sys.executable, "-m", "offramp_service", "--model-id", directory, "--port", port],
            capture_output=True,
            text=True,
            timeout=50,
        )
    assert result.returncode == 3
    assert "address already in use" in result.stderr
    assert "Traceback" not in result.stderr


def test_sighup_loads_the_checkpoint_anew(start: Start, directory: Path, tmp_path: Path) -> None:
    """While requests go on: none fails, and in the end the other checkpoint answers."""
    support = load("tests/unit/service/support.py")
    served, other = tmp_path / "served", tmp_path / "other"
    shutil.copytree(directory, served)
    support.write_tiny_checkpoint(other, exit_layers=(2, 4), width=32)
    server = start("--model-id", str(served))
    before = json.loads(server.ask("GET", "/info")[2])["model_sha"]
    served.rename(tmp_path / "old")
    other.rename(served)
    server.process.send_signal(signal.SIGHUP)

    def exchanged() -> bool:
        status, _, _ = server.classify(input="w1 w2")
        assert status == 200
        return json.loads(server.ask("GET", "/info")[2])["model_sha"] != before

    until(exchanged)
    server.process.terminate()
    assert server.wait() == 0
