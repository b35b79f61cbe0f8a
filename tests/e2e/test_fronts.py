"""`offramp-serve --http-workers 2` as a command: several processes that behave as one."""

import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from loading import load

_serve = load("tests/e2e/test_serve.py")
until, Server = _serve.until, _serve.Server
start: "pytest.FixtureDef[Callable[..., Server]]" = _serve.start
support = load("tests/unit/service/support.py")


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return support.write_tiny_checkpoint(tmp_path / "tiny")


def fronts(server: Server) -> list[psutil.Process]:
    children = psutil.Process(server.process.pid).children()
    alive = [one for one in children if one.status() != psutil.STATUS_ZOMBIE]
    return [one for one in alive if "offramp_service.fronts.front" in one.cmdline()]


class Clients:
    """Three that ask one thing after the other until they are told to stop."""

    def __init__(self, server: Server) -> None:
        self.statuses: list[int] = []
        self._server, self._stop = server, threading.Event()
        self._threads = [threading.Thread(target=self._ask) for _ in range(3)]

    def __enter__(self) -> "Clients":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(30)

    def _ask(self) -> None:
        while not self._stop.is_set():
            try:
                self.statuses.append(self._server.classify(input="w1 w2", speedup=2)[0])
            except OSError:
                self.statuses.append(0)


def test_two_fronts_are_one_server_until_it_drains(start: Callable[..., Server]) -> None:
    server = start("--http-workers", "2", "--drain-seconds", "1", batch_takes_s=0.3)
    assert len(fronts(server)) == 2
    assert {server.classify(input="w1")[0] for _ in range(6)} == {200}
    assert server.classify(input="w1", speedup=99)[0] == 422
    time.sleep(0.2)  # counts come from the fronts every 50 ms
    metrics = server.ask("GET", "/metrics")[2]
    assert b"offramp_samples_total" in metrics
    assert server.inflight() == 0
    answers: list[int] = []
    clients = [
        threading.Thread(target=lambda: answers.append(server.classify(input="w1 w2")[0]))
        for _ in range(4)
    ]
    for client in clients:
        client.start()
    until(lambda: server.inflight() == 4)
    processes = fronts(server)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: server.phase() == "draining")
    assert server.status("/readyz") == 503
    assert server.wait() == 0
    for client in clients:
        client.join(20)
    assert answers == [200] * 4
    assert psutil.wait_procs(processes, 5)[1] == []
    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()


def test_a_front_that_dies_is_replaced(start: Callable[..., Server]) -> None:
    server = start("--http-workers", "2", "--drain-seconds", "0")
    victim, other = fronts(server)
    victim.kill()
    until(lambda: len(fronts(server)) == 2 and victim.pid not in {p.pid for p in fronts(server)})
    assert other.is_running()
    assert {server.classify(input="w1")[0] for _ in range(10)} == {200}
    left = fronts(server)
    server.process.kill()  # fronts alone are of no use to anybody
    assert psutil.wait_procs(left, 10)[1] == []


def test_an_exchange_fails_nobody(
    start: Callable[..., Server], directory: Path, tmp_path: Path
) -> None:
    other = support.write_tiny_checkpoint(tmp_path / "other", width=32)
    server = start("--http-workers", "2", "--drain-seconds", "0")
    before = server.ask("GET", "/info")[2]
    with Clients(server) as clients:
        until(lambda: len(clients.statuses) > 20)
        shutil.rmtree(directory)
        shutil.copytree(other, directory)
        server.process.send_signal(signal.SIGHUP)
        until(lambda: server.ask("GET", "/info")[2] != before)
        seen = len(clients.statuses)
        until(lambda: len(clients.statuses) > seen + 100)
    assert set(clients.statuses) == {200}
    server.process.send_signal(signal.SIGTERM)
    assert server.wait() == 0
