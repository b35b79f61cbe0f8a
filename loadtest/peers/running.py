"""A server of any make as a process on given cores: started, watched from outside, ended.

The peers do not greet with an address, so a port is chosen for them and asked until it answers.
"""

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import psutil

from offramp_loadtest.http_client import Address, Connection, Reply

START_S = 180.0
ANSWER_S = 30.0
END_S = 15.0


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


async def ask_once(address: Address, request: bytes) -> Reply | None:
    """One request on a connection of its own.

    Raises:
        OSError, TimeoutError: nobody answers.
    """
    connection = await Connection.open(address)
    try:
        async with asyncio.timeout(ANSWER_S):
            return await connection.exchange(request)
    finally:
        connection.close()


class RunningServer:
    """A command and all the processes it has started."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        port: int,
        cores: Sequence[int],
        environment: Mapping[str, str],
        log: Path,
    ) -> None:
        self.address = Address("127.0.0.1", port)
        self._log = log
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                ["taskset", "-c", ",".join(map(str, cores)), *command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._outside = psutil.Process(self._process.pid)

    def wait_until_it_answers(self, request: bytes) -> None:
        """Until a request gets 200.

        Raises:
            RuntimeError: it ended before, or it takes too long; with the end of its log.
        """
        gives_up = time.monotonic() + START_S
        while time.monotonic() < gives_up:
            if self._process.poll() is not None:
                raise RuntimeError(f"the server ended before it answered\n{self._last_words()}")
            with suppress(OSError, TimeoutError):
                reply = asyncio.run(ask_once(self.address, request))
                if reply is not None and reply.status == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"no answer in {START_S:g} s\n{self._last_words()}")

    def cpu_s(self) -> float:
        """Processor time of all its processes."""
        total = 0.0
        for one in self._family():
            with suppress(psutil.Error):
                times = one.cpu_times()
                total += times.user + times.system
        return total

    def resident_mib(self) -> float:
        """Memory of all its processes; what they share counts once for each."""
        total = 0.0
        for one in self._family():
            with suppress(psutil.Error):
                total += one.memory_info().rss / 2**20
        return total

    def end(self) -> None:
        """Ask, then force, all of its processes and those only."""
        family = self._family()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGTERM)
        _, left = psutil.wait_procs(family, timeout=END_S)
        for one in left:
            with suppress(psutil.Error):
                one.kill()
        psutil.wait_procs(left, timeout=END_S)
        self._process.wait()

    def _family(self) -> list[psutil.Process]:
        with suppress(psutil.Error):
            return [self._outside, *self._outside.children(recursive=True)]
        return []

    def _last_words(self) -> str:
        return self._log.read_text(errors="replace")[-2000:]
