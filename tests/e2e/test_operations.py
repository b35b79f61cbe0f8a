"""The real command as an operator uses it: what a careless or hostile client sends, and what the
logs come to."""

import json
import os
import signal
import socket
import subprocess
import sys
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


def run(*flags: str | Path, program: str | None = None, **environment: str) -> tuple[int, str, str]:
    """The command, until it ends by itself: exit code, stdout, stderr."""
    how = ["-m", "offramp_service"] if program is None else ["-c", program]
    result = subprocess.run(
        [sys.executable, *how, *flags],
        capture_output=True,
        text=True,
        timeout=50,
        env={name: value for name, value in os.environ.items() if name != "PORT"} | environment,
    )
    return result.returncode, result.stdout, result.stderr


LISTENING_IS_AN_ERROR = """
import socket, sys
def listen(*_):
    raise AssertionError("it listens")
socket.socket.bind = socket.socket.listen = listen
from offramp_service.engine import Engine
if "--dry-run" in sys.argv:
    Engine.warm_up = Engine.__call__ = listen
from offramp_service.__main__ import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_dry_run_says_what_would_be_served(directory: Path, tmp_path: Path) -> None:
    config = tmp_path / "offramp.yaml"
    config.write_text(f"model_id: {directory}\nmax_batch_tokens: 640\n")
    code, out, err = run(
        *("--config", config, "--dry-run", "--port", "81"),
        program=LISTENING_IS_AN_ERROR,
        API_KEY="sesame",
        MAX_QUEUED_TOKENS="6400",
    )
    assert code == 0, err
    plan = json.loads(out)
    settings, (serves,) = plan["settings"], plan["serves"]
    assert (settings["port"], settings["max_queued_tokens"], settings["max_batch_tokens"]) == (
        *(81, 6400, 640),
    )
    assert settings["api_key"] == "**********"
    assert "sesame" not in out + err
    assert (serves["served_model_name"], serves["num_layers"], serves["max_batch_tokens"]) == (
        *("tiny", 4, 640),
    )
    assert serves["calibration"]["max_speedup"] == 4.0


def test_a_dry_run_refuses_what_a_start_would(directory: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    for flags, said in (
        (["--model-id", damaged], "damaged"),
        (["--model-id", directory, "--default-speedup", "9"], "--default-speedup"),
        (["--model-id", directory, "--api-key-file", tmp_path / "none"], "No such file"),
        (["--model-id", directory, "--preload-only"], "allowed is one of them"),
    ):
        code, out, err = run(*flags, "--dry-run")
        assert (code, out) == (2, "")
        (line,) = err.splitlines()
        assert line.startswith("offramp-serve: ")
        assert said in line


COLD = """
import sys
from offramp_service.__main__ import main
from offramp_service.engine import Engine
def broken(self, jobs):
    raise RuntimeError("out of luck")
Engine.__call__ = broken
sys.exit(main(sys.argv[1:]))
"""


def test_preloading_answers_one_text_and_ends(directory: Path) -> None:
    flags = ["--model-id", str(directory), "--preload-only", "--threads", "1"]
    code, out, err = run(*flags, "--warmup", program=LISTENING_IS_AN_ERROR)
    assert (code, out) == (0, ""), err
    assert "preloaded tiny: a text left after layer 4" in err
    code, _, err = run(*flags, program=COLD)
    assert code == 3
    assert "tiny does not answer" in err
    assert "out of luck" in err


@pytest.mark.parametrize("form", [["--json-output"], ["--log-level", "debug"]])
def test_a_full_disk_for_the_log_disturbs_nobody(directory: Path, form: list[str]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with Path("/dev/full").open("w") as full:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "offramp_service", "--model-id", str(directory)),
                *("--port", str(port), "--threads", "1", "--drain-seconds", "0", *form),
            ],
            stdout=full,
            stderr=full,
        )
    try:
        server = _serve.Server(process, port, "")

        def ready() -> bool:
            assert process.poll() is None
            try:
                return server.status("/readyz") == 200
            except ConnectionRefusedError:
                return False

        until(ready)
        # More than any buffer holds, so that nothing is merely put off.
        for _ in range(200):
            assert server.classify(input=["w1", "w2"], speedup=2.0)[0] == 200
            assert server.classify(input="w1", speedup=99)[0] == 422
        assert server.ask("GET", "/info")[0] == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait(10)


MORTAL = """
import sys
from offramp_service.__main__ import main
from offramp_service.engine import Engine
call = Engine.__call__
def mortal(self, jobs):
    if len(jobs[0].ids) > 10:
        raise SystemExit
    return call(self, jobs)
Engine.__call__ = mortal
sys.exit(main(sys.argv[1:]))
"""


def test_the_second_crash_ends_the_process(directory: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--model-id", str(directory), "--port", str(port), "--threads", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", MORTAL, *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        server = _serve.Server(process, port, "")
        deadly = "w1 " * 12
        assert server.classify(input=deadly)[0] == 500
        assert server.classify(input="w1")[0] == 200
        assert server.classify(input=deadly)[0] == 503
        _, err = process.communicate(timeout=30)
        assert process.returncode == 4
        assert "an engine thread died" in err
        assert "nothing more can be answered" in err
    finally:
        process.kill()
        process.communicate(timeout=10)
