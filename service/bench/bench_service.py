"""200 concurrent clients against a real server: throughput, latency, and every answer checked.

Starts `offramp-serve` as a process on a loopback port. Each text is first sent alone at each
speed-up; that answer is the reference. Then the clients send random (text, speed-up) pairs for a
while, each with one request in flight, and every answer is compared with its reference. Reported:
answers that differ in label or exit layer (flips), status codes, requests per second, latencies,
achieved against requested speed-up, and the server's peak memory.

The clients share the machine with the server, so requests per second are a floor.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from offramp_training.data import load_split

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
Question = tuple[str, float]


class Client:
    """A lean HTTP/1.1 client: one connection, one request at a time."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def connect(self) -> None:
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)

    async def ask(self, question: Question) -> tuple[int, dict[str, Any]]:
        text, speedup = question
        payload = {"input": text, "speedup": speedup, "return_details": True}
        body = json.dumps(payload).encode()
        self._writer.write(
            b"POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(body), body)
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        status = int(head.split(b" ", 2)[1])
        length = next(
            int(line.split(b":")[1])
            for line in head.split(b"\r\n")
            if line.lower().startswith(b"content-length:")
        )
        return status, json.loads(await self._reader.readexactly(length))

    def close(self) -> None:
        self._writer.close()


@dataclass
class Tally:
    """What the clients saw."""

    status: Counter[int] = field(default_factory=Counter)
    answers: int = 0
    flips: list[dict[str, Any]] = field(default_factory=list)
    largest_difference: float = 0.0  # of a probability, among answers that did not flip
    latencies_ms: list[float] = field(default_factory=list)
    layers: dict[float, list[int]] = field(default_factory=lambda: {s: [] for s in SPEEDUPS})


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def start(checkpoint: Path, port: int) -> subprocess.Popen[bytes]:
    """The real command as a process."""
    command = [str(Path(sys.executable).parent / "offramp-serve"), "--model-id", str(checkpoint)]
    return subprocess.Popen(
        [*command, "--hostname", "127.0.0.1", "--port", str(port)], stdout=subprocess.DEVNULL
    )


async def until_ready(server: subprocess.Popen[bytes], port: int) -> float:
    """Seconds until /readyz says yes."""
    started = time.perf_counter()
    while time.perf_counter() - started < 60:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with {server.returncode}")
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            if b" 200 " in await reader.readline():
                return time.perf_counter() - started
        except OSError:
            pass
        await asyncio.sleep(0.05)
    raise SystemExit("the server did not get ready within 60 s")


async def references(port: int, questions: list[Question]) -> dict[Question, dict[str, Any]]:
    """Each question's answer when it is alone in the server."""
    client, found = Client(port), {}
    await client.connect()
    for question in questions:
        status, answer = await client.ask(question)
        if status != 200:
            raise SystemExit(f"alone, {question} was answered with {status}: {answer}")
        found[question] = answer["data"][0]
    client.close()
    return found


async def load(
    port: int, clients: int, seconds: float, expected: dict[Question, dict[str, Any]]
) -> tuple[Tally, float]:
    tally, questions = Tally(), list(expected)
    connections = [Client(port) for _ in range(clients)]
    await asyncio.gather(*(client.connect() for client in connections))
    started = time.perf_counter()

    async def one(client: Client, seed: int) -> None:
        rng = random.Random(seed)
        while time.perf_counter() - started < seconds:
            question = rng.choice(questions)
            sent = time.perf_counter()
            status, answer = await client.ask(question)
            tally.latencies_ms.append((time.perf_counter() - sent) * 1000)
            tally.status[status] += 1
            if status == 200:
                compare(tally, question, answer["data"][0], expected[question])

    await asyncio.gather(*(one(client, seed) for seed, client in enumerate(connections)))
    elapsed = time.perf_counter() - started
    for client in connections:
        client.close()
    return tally, elapsed


def compare(
    tally: Tally, question: Question, answer: dict[str, Any], expected: dict[str, Any]
) -> None:
    tally.answers += 1
    layer, expected_layer = answer["details"]["exit_layer"], expected["details"]["exit_layer"]
    tally.layers[question[1]].append(layer)
    if (answer["label"], layer) != (expected["label"], expected_layer):
        signals = [one["details"]["exit_signal"] for one in (answer, expected)]
        tally.flips.append(
            {
                "speedup": question[1],
                "layers": [layer, expected_layer],
                "signals": signals,
                "threshold": expected["details"]["threshold"],
            }
        )
        return
    for ours, theirs in zip(answer["probs"], expected["probs"], strict=True):
        tally.largest_difference = max(tally.largest_difference, abs(ours - theirs))


def peak_memory_mib(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("no VmHWM in /proc")


def summary(tally: Tally, elapsed: float, num_layers: int) -> dict[str, Any]:
    if not tally.answers:
        raise SystemExit(f"no request was answered with 200: {dict(tally.status)}")
    cuts = statistics.quantiles(tally.latencies_ms, n=100)
    return {
        "requests": sum(tally.status.values()),
        "requests_per_second": sum(tally.status.values()) / elapsed,
        "status": dict(tally.status),
        "latency_ms": {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98]},
        "answers_compared": tally.answers,
        "flips": len(tally.flips),
        "flip_rate": len(tally.flips) / tally.answers,
        "flip_examples": tally.flips[:5],
        "largest_probability_difference": tally.largest_difference,
        "achieved_speedup": {
            str(s): num_layers * len(layers) / sum(layers)
            for s, layers in tally.layers.items()
            if layers
        },
    }


async def measure(
    server: subprocess.Popen[bytes], port: int, arguments: argparse.Namespace
) -> dict[str, Any]:
    texts = [row.text for row in load_split(arguments.data, arguments.split).rows]
    questions = [(text, s) for text in texts[: arguments.texts] for s in SPEEDUPS]
    ready_s = await until_ready(server, port)
    expected = await references(port, questions)
    tally, elapsed = await load(port, arguments.clients, arguments.seconds, expected)
    num_layers = next(iter(expected.values()))["details"]["num_layers"]
    return {
        "clients": arguments.clients,
        "seconds": arguments.seconds,
        "texts": min(arguments.texts, len(texts)),
        "ready_s": ready_s,
        "peak_memory_mib": peak_memory_mib(server.pid),
        **summary(tally, elapsed, num_layers),
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    port = free_port()
    server = start(arguments.checkpoint, port)
    try:
        result = asyncio.run(measure(server, port, arguments))
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(timeout=60)
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "cores": len(os.sched_getaffinity(0)),
            **{name: version(name) for name in ("offramp", "torch", "fastapi", "uvicorn")},
        },
        **result,
        "exit_code_after_sigterm": code,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--texts", type=int, default=300, help="distinct texts")
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = run(arguments)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    if result["flip_rate"] > 0.001 or any(code >= 500 for code in result["status"]):
        raise SystemExit("more than 0.1 % of the answers flipped, or a 5xx was seen")


if __name__ == "__main__":
    main()
