"""A server command as a process: started, watched from outside, ended by SIGTERM."""

import re
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection

import psutil

from offramp_loadtest.http_client import Address

_GREETING = re.compile(r"http://127\.0\.0\.1:(\d+)")
_SERIES = re.compile(r"^(\w+)(\{.*\})? (\S+)$", re.MULTILINE)


def machine_cpu_s() -> float:
    """Processor time that everybody on this machine has used, in seconds of one core."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - times.iowait - times.guest - times.guest_nice)


class ServerProcess:
    """A running server that greeted with its address on loopback; `ready_s` after its start."""

    def __init__(self, command: Sequence[str]) -> None:
        """Start it.

        Raises:
            RuntimeError: it ended, or said something else.
        """
        started = time.perf_counter()
        self._process = subprocess.Popen(list(command), stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        greeting = self._process.stdout.readline()
        found = _GREETING.search(greeting)
        if found is None:
            self._process.kill()
            raise RuntimeError(f"the server said {greeting!r} and no address")
        self.address = Address("127.0.0.1", int(found[1]))
        self.ready_s = time.perf_counter() - started
        self._outside = psutil.Process(self._process.pid)

    def cpu_s(self) -> float:
        """Processor time that it has used."""
        times = self._outside.cpu_times()
        return times.user + times.system

    def resident_mib(self) -> float:
        return self._outside.memory_info().rss / 2**20

    def threads(self) -> int:
        return self._outside.num_threads()

    def get(self, path: str) -> bytes:
        """The body at a path, whatever the status."""
        connection = HTTPConnection(self.address.host, self.address.port, timeout=30)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def metric(self, name: str, *labels: str) -> float:
        """The sum of a metric's series that carry these labels, as `code="200"`.

        Raises:
            RuntimeError: there is none.
        """
        values = [
            float(value)
            for series, labelled, value in _SERIES.findall(self.get("/metrics").decode())
            if series == name and all(label in labelled for label in labels)
        ]
        if not values:
            raise RuntimeError(f"the server has no series {name} {labels}")
        return sum(values)

    def terminate(self) -> None:
        """Ask it to drain and end."""
        self._process.send_signal(signal.SIGTERM)

    def wait(self, timeout_s: float) -> int:
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it goes on.
        """
        return self._process.wait(timeout_s)

    def end(self) -> None:
        """By force, if it has not ended."""
        self._process.kill()
        self._process.communicate()


@contextmanager
def serving(command: Sequence[str]) -> Iterator[ServerProcess]:
    """A server for the length of the block."""
    server = ServerProcess(command)
    try:
        yield server
    finally:
        server.end()
