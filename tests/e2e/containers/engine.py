"""A Docker engine of a test's own, and a network to run it in.

The engine keeps everything under one directory and goes with it. Outside a network of its own it
touches nothing of the machine's: no bridge, no rules; builds share the machine's network and so
reach package indexes. Inside `own_network`, where there is only loopback, it has bridges, names and
published ports as any engine, and nobody else sees them. Knows nothing about what is built or run.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)

# Debian's client; another `docker` on the path may lack BuildKit.
DOCKER = "/usr/bin/docker"
DOCKERD = "/usr/sbin/dockerd"

_ALWAYS = (
    "--storage-driver=overlay2",
    "--exec-opt=native.cgroupdriver=cgroupfs",
    # A container has less than a machine: it may not raise these.
    "--oom-score-adjust=0",
    "--default-ulimit=nofile=4096:4096",
)
_WITHOUT_NETWORK = (
    "--bridge=none",
    "--iptables=false",
    "--ip6tables=false",
    "--ip-masq=false",
    "--ip-forward=false",
)
# A name that no container has is refused at once: there is nobody else to ask.
_NO_RESOLVER = ("--dns=127.0.0.1",)


class CommandFailed(Exception):
    """A command ended with another code than 0; the message has the end of what it said."""


def run(words: Sequence[str | Path], *, seconds: float, **options: Any) -> str:
    """What a command prints on standard output; what it says otherwise is in the error.

    Raises:
        CommandFailed: it did not end with 0, or not in time.
    """
    line = " ".join(map(str, words))
    try:
        done = subprocess.run(
            words, capture_output=True, text=True, timeout=seconds, check=False, **options
        )
    except subprocess.TimeoutExpired as error:
        said = (error.stderr or b"") if isinstance(error.stderr, bytes) else b""
        raise CommandFailed(
            f"{line}: not done after {seconds:g} s\n{said.decode(errors='replace')[-3000:]}"
        ) from None
    if done.returncode:
        raise CommandFailed(
            f"{line}: exit {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return done.stdout


class Docker:
    """The client of one engine."""

    def __init__(self, socket: Path, config: Path) -> None:
        self.environment = {
            name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ
        }
        self.environment |= {
            "DOCKER_HOST": f"unix://{socket}",
            "DOCKER_CONFIG": str(config),
            "DOCKER_BUILDKIT": "1",
        }

    def __call__(self, *words: str | Path, seconds: float = 60, cwd: Path | None = None) -> str:
        return run([DOCKER, *words], seconds=seconds, env=self.environment, cwd=cwd)

    def build(self, folder: Path, tag: str, *words: str, seconds: float = 900) -> float:
        """Build an image with the machine's network; the seconds it took."""
        began = time.perf_counter()
        self("build", "--network=host", f"--tag={tag}", *words, folder, seconds=seconds)
        return time.perf_counter() - began

    def inspect(self, what: str) -> dict[str, Any]:
        found: list[dict[str, Any]] = json.loads(self("inspect", what))
        return found[0]


@contextlib.contextmanager
def engine(directory: Path, config: Path, *, networks: bool) -> Iterator[Docker]:
    """A running engine on that directory. At the end its containers are removed and it is stopped;
    the images stay until the directory goes."""
    directory.mkdir(exist_ok=True)
    # Not `run`: paths of sockets are short.
    socket, log = directory / "s", directory / "dockerd.log"
    words = [
        *(DOCKERD, f"--host=unix://{socket}", f"--data-root={directory / 'data'}"),
        *(f"--exec-root={directory / 'exec'}", f"--pidfile={directory / 'pid'}"),
        *_ALWAYS,
        *(_NO_RESOLVER if networks else _WITHOUT_NETWORK),
    ]
    (directory / "pid").unlink(missing_ok=True)
    docker = Docker(socket, config)
    with log.open("ab") as output:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        _wait_until_it_answers(docker, process, log)
        yield docker
    finally:
        with contextlib.suppress(CommandFailed):
            if containers := docker("ps", "--all", "--quiet").split():
                docker("rm", "--force", "--volumes", *containers, seconds=120)
        _stop(process)
        _unmount_below(directory)


def _wait_until_it_answers(docker: Docker, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        said = log.read_text(errors="replace")[-3000:]
        if process.poll() is not None:
            raise CommandFailed(f"dockerd ended with {process.returncode}\n{said}")
        with contextlib.suppress(CommandFailed):
            docker("version")
            return
        if time.monotonic() > deadline:
            raise CommandFailed(f"dockerd does not answer\n{said}")
        time.sleep(0.1)


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(40)
    except subprocess.TimeoutExpired:
        # With containerd and whatever else it started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10)


def _unmount_below(directory: Path) -> None:
    mounts = [line.split()[1] for line in Path("/proc/mounts").read_text().splitlines()]
    for mount in sorted((one for one in mounts if one.startswith(f"{directory}/")), reverse=True):
        with contextlib.suppress(CommandFailed):
            run(["umount", "--lazy", mount], seconds=20)


@contextlib.contextmanager
def own_network() -> Iterator[None]:
    """This thread, and what it starts, in a network with loopback and nothing else; then back."""
    with Path("/proc/thread-self/ns/net").open() as home:
        _check(_libc.unshare(_CLONE_NEWNET))
        try:
            run(["ip", "link", "set", "lo", "up"], seconds=10)
            yield
        finally:
            _check(_libc.setns(home.fileno(), _CLONE_NEWNET))


def _check(code: int) -> None:
    if code:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def remove(directory: Path) -> None:
    """All of it; engines leave folders that only their owner may enter."""
    shutil.rmtree(directory, ignore_errors=False)


def _try() -> None:
    """Start an engine and end it: can one run here?"""
    with tempfile.TemporaryDirectory(prefix="e2e-", ignore_cleanup_errors=True) as folder:
        directory = Path(folder)
        with own_network(), engine(directory / "e", directory / "c", networks=True) as docker:
            docker("info")


if __name__ == "__main__":
    _try()
