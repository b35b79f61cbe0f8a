"""Minutes of everything at once against a real server, and every promise checked.

Many clients send single texts and lists of texts at mixed speed-ups through all three doors; some
leave in the middle, some send what no server can answer; halfway the checkpoint is loaded anew.
Each text was asked alone at each speed-up beforehand: that is the reference. Checked are

- every request that was not given up is answered once, with its own request id, and every text with
  the label and exit layer of its reference; what cannot be answered is refused with the right code;
- once the clients pause, the server's gauges are back at 0, and it has as many asyncio tasks and
  threads as before; its memory has not grown;
- after SIGTERM under load, all that was accepted is answered, and the exit code is 0.

Prints a JSON report; the exit code is 1 if anything was violated. To add a kind of request, write a
function of a client and list it in `MIX`.
"""

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from offramp_loadtest.http_client import Address, Connection, Reply, post
from offramp_loadtest.server_process import ServerProcess, serving
from offramp_loadtest.texts import read_texts

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
PAYLOAD_LIMIT = 65_536
MOST_TEXTS = 32
GAUGES = ("queue_requests", "queue_tokens", "queue_layer_work", "inflight_requests")
MEMORY_MAY_GROW = 0.05
DRAIN_S, SHUTDOWN_S = 2.0, 30.0
"""Of the server: serving on after SIGTERM, and finishing what is inside."""
SETTLING_S = 45.0
"""For the server to come to rest once nobody asks."""
SHOWN = 20
"""Violations that the report spells out."""

Question = tuple[str, float]
"""A text, a speed-up."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a text; probabilities in label-id order, where the door gives them so."""

    label: str
    layer: int
    probs: Sequence[float] = ()


@dataclass
class World:
    """What the clients know, and what they have seen."""

    address: Address
    texts: Sequence[str]
    speedups: Sequence[float]
    model: str  # its name
    expected: dict[Question, Outcome] = field(default_factory=dict)
    # How things stand:
    pausing: bool = False
    terminated: bool = False  # SIGTERM was sent
    closed_at: float | None = None  # the first 503: from then on nothing is accepted
    # What was seen:
    seen: Counter[str] = field(default_factory=Counter)  # kind and outcome
    answered: int = 0  # requests, with 200
    exchanges: int = 0  # of the checkpoint
    given_up: int = 0  # after the whole request was sent: answered or not, nobody knows
    texts_compared: int = 0
    largest_difference: float = 0.0  # of a probability
    violations: list[str] = field(default_factory=list)

    def violated(self, what: str) -> None:
        self.violations.append(what)

    @property
    def over(self) -> bool:
        return self.pausing or self.closed_at is not None


class Client:
    """Sends one request at a time, on a connection that it keeps while it can."""

    def __init__(self, world: World, seed: str) -> None:
        self.world, self.random = world, random.Random(seed)
        self._connection: Connection | None = None

    async def connection(self) -> Connection:
        """One that a request can be sent on.

        Raises:
            OSError: the server does not listen.
        """
        if self._connection is None or not self._connection.usable:
            self.leave()
            self._connection = await Connection.open(self.world.address)
        return self._connection

    def leave(self) -> None:
        """End the connection; what came on it unasked is a violation."""
        if self._connection is not None:
            if self._connection.unasked:
                self.world.violated(f"came unasked: {self._connection.unasked[:100]!r}")
            self._connection.close()
            self._connection = None

    async def ask(
        self, kind: str, body: bytes, path: str = "/classify", request_id: str = ""
    ) -> Reply | None:
        """Send a request and wait for what comes; None if the server may leave it unanswered."""
        world = self.world
        sent = time.monotonic()
        try:
            headers = [f"x-request-id: {request_id}"] if request_id else []
            request = post(world.address, path, body, *headers)
            reply = await (await self.connection()).exchange(request)
        except OSError:
            reply = None
        if reply is None:
            # Only who asks after the server has begun to refuse may find it gone.
            if world.closed_at is None or sent < world.closed_at:
                world.violated(f"{kind}: no answer")
            world.seen[f"{kind}, unanswered"] += 1
            return None
        world.seen[f"{kind}, {reply.status}"] += 1
        if reply.status == 503:
            if not world.terminated:
                world.violated(f"{kind}: 503 before SIGTERM")
            world.closed_at = world.closed_at or sent
            return None
        if reply.status == 429:
            await asyncio.sleep(0.05)
            return None
        return reply

    def questions(self, count: int) -> tuple[list[str], float]:
        """Texts that share a speed-up."""
        texts = self.random.choices(self.world.texts, k=count)
        return texts, self.random.choice(self.world.speedups)

    def list_size(self) -> int:
        """Small lists more often than large ones."""
        return min(MOST_TEXTS, 1 + int(self.random.expovariate(1 / 6)))

    def request_id(self) -> str:
        return f"soak-{self.random.getrandbits(64):x}"


# -- kinds of requests -----------------------------------------------------------------------------


async def single(client: Client) -> None:
    (text,), speedup = client.questions(1)
    await _ask_and_compare(client, "single", text, speedup)


async def client_batch(client: Client) -> None:
    texts, speedup = client.questions(client.list_size())
    await _ask_and_compare(client, "list", texts, speedup)


async def tei(client: Client) -> None:
    """Lists of one text each, so that none is taken for a pair."""
    texts, speedup = client.questions(client.list_size())
    name = client.request_id()
    controls = {"speedup": speedup}
    body = {"inputs": [[text] for text in texts], "parameters": controls, "return_details": True}
    reply = await client.ask("tei", json.dumps(body).encode(), "/predict", name)
    if reply is None or not _is_good(client.world, "tei", reply):
        return
    found = [
        Outcome(item["scores"][0]["label"], item["details"]["exit_layer"]) for item in reply.json()
    ]
    _compare(client.world, reply, found, [(text, speedup) for text in texts], name)


async def v2(client: Client) -> None:
    """Each text with a speed-up of its own."""
    texts, _ = client.questions(client.list_size())
    speedups = client.random.choices(client.world.speedups, k=len(texts))
    name, shape = client.request_id(), [len(texts)]
    body = {
        "inputs": [
            {"name": "text", "datatype": "BYTES", "shape": shape, "data": texts},
            {"name": "speedup", "datatype": "FP32", "shape": shape, "data": speedups},
        ],
        "outputs": [{"name": "label"}, {"name": "exit_layer"}, {"name": "probabilities"}],
    }
    path = f"/v2/models/{client.world.model}/infer"
    reply = await client.ask("v2", json.dumps(body).encode(), path, name)
    if reply is None or not _is_good(client.world, "v2", reply):
        return
    labels, layers, flat = (one["data"] for one in reply.json()["outputs"])
    width = len(flat) // len(texts)
    found = [
        Outcome(label, layer, flat[row * width : (row + 1) * width])
        for row, (label, layer) in enumerate(zip(labels, layers, strict=True))
    ]
    _compare(client.world, reply, found, list(zip(texts, speedups, strict=True)), name)


async def departure(client: Client) -> None:
    """Leaves at a random moment: in the middle of the request, or while it is being answered."""
    world, chance = client.world, client.random
    texts, speedup = client.questions(client.list_size())
    name = client.request_id()
    request = post(world.address, "/classify", _body(texts, speedup, name))
    part = chance.randrange(1, len(request)) if chance.random() < 0.3 else len(request)
    sent = time.monotonic()
    try:
        connection = await client.connection()
    except OSError:
        if world.closed_at is None or sent < world.closed_at:
            world.violated("departure: nobody listens")
        return
    try:
        async with asyncio.timeout(chance.expovariate(1 / 0.1)):
            reply = await connection.exchange(request[:part])
    except TimeoutError:
        if part == len(request):
            world.given_up += 1
        world.seen["departure, left"] += 1
        client.leave()
        return
    if reply is not None and reply.status == 200:  # it was faster
        world.seen["departure, 200"] += 1
        _compare_items(world, reply, texts, speedup, name)
    elif not world.terminated and (reply is None or reply.status != 429):
        world.violated(f"departure: {'no answer' if reply is None else reply.status}")


async def nonsense(client: Client) -> None:
    """What no server can answer, each with the code that it must get."""
    kind, body, status = client.random.choice(NONSENSE)
    reply = await client.ask(kind, body)
    if reply is None:
        return
    if reply.status != status:
        client.world.violated(f"{kind}: {reply.status}, {status} is right: {reply.body[:200]!r}")
    elif not reply.json()["error"]["message"]:
        client.world.violated(f"{kind}: no message")
    if len(body) > PAYLOAD_LIMIT:
        client.leave()  # its rest may not have been read


NONSENSE: tuple[tuple[str, bytes, int], ...] = (
    ("not JSON", b'{"input": ', 400),
    ("empty text", b'{"input": ""}', 400),
    ("not a text", b'{"input": 3}', 422),
    ("speed-up out of range", b'{"input": "a", "speedup": 1e6}', 422),
    ("other model", b'{"input": "a", "model": "another"}', 404),
    ("too long a text", json.dumps({"input": "a " * 2000}).encode(), 422),
    ("too many texts", json.dumps({"input": ["a"] * (MOST_TEXTS + 1)}).encode(), 413),
    ("oversized body", json.dumps({"input": "a" * PAYLOAD_LIMIT}).encode(), 413),
)


@dataclass(frozen=True)
class Kind:
    """A kind of request and how often it is sent, relative to the others."""

    share: int
    send: Callable[[Client], Awaitable[None]]


MIX = (
    *(Kind(35, single), Kind(20, client_batch), Kind(10, tei), Kind(10, v2)),
    *(Kind(20, departure), Kind(5, nonsense)),
)


# -- answers ---------------------------------------------------------------------------------------


def _body(given: str | list[str], speedup: float, request_id: str) -> bytes:
    controls = {"speedup": speedup, "return_details": True, "request_id": request_id}
    return json.dumps({"input": given, **controls}).encode()


async def _ask_and_compare(
    client: Client, kind: str, given: str | list[str], speedup: float
) -> None:
    name = client.request_id()
    reply = await client.ask(kind, _body(given, speedup, name))
    if reply is None or not _is_good(client.world, kind, reply):
        return
    _compare_items(client.world, reply, [given] if isinstance(given, str) else given, speedup, name)


def _is_good(world: World, kind: str, reply: Reply) -> bool:
    if reply.status != 200:
        world.violated(f"{kind}: {reply.status}: {reply.body[:200]!r}")
    return reply.status == 200


def _compare_items(
    world: World, reply: Reply, texts: Sequence[str], speedup: float, name: str
) -> None:
    """An answer of `/classify` against its references."""
    items = reply.json()["data"]
    if [item["index"] for item in items] != list(range(len(items))):
        world.violated(f"answers out of order: {[item['index'] for item in items]}")
    found = [_outcome(item) for item in items]
    _compare(world, reply, found, [(text, speedup) for text in texts], name)


def _compare(
    world: World,
    reply: Reply,
    found: Sequence[Outcome],
    questions: Sequence[Question],
    name: str,
) -> None:
    """Answers against their references."""
    world.answered += 1
    if reply.header("x-request-id") != name:
        world.violated(f"an answer to {reply.header('x-request-id')} came to {name}")
    if len(found) != len(questions):
        world.violated(f"{len(questions)} texts got {len(found)} answers")
        return
    for question, ours in zip(questions, found, strict=True):
        right = world.expected[question]
        world.texts_compared += 1
        if (ours.label, ours.layer) != (right.label, right.layer):
            world.violated(
                f"at {question[1]:g}: {ours.label} after layer {ours.layer}, "
                f"alone {right.label} after layer {right.layer}"
            )
            continue
        for one, other in zip(ours.probs, right.probs, strict=False):
            world.largest_difference = max(world.largest_difference, abs(one - other))


def _outcome(item: dict[str, Any]) -> Outcome:
    """Of an item of `/classify`."""
    return Outcome(item["label"], item["details"]["exit_layer"], item["probs"])


async def ask_alone(world: World) -> None:
    """Each text at each speed-up when there is nothing else in the server."""
    client = Client(world, "references")
    for text in world.texts:
        for speedup in world.speedups:
            body = _body(text, speedup, client.request_id())
            reply = await (await client.connection()).exchange(
                post(world.address, "/classify", body)
            )
            if reply is None or reply.status != 200:
                raise SystemExit(f"alone, at {speedup:g}, a text was answered with {reply}")
            (item,) = reply.json()["data"]
            world.expected[text, speedup] = _outcome(item)
    client.leave()


# -- phases ----------------------------------------------------------------------------------------


async def run_clients(world: World, count: int, phase: str) -> None:
    """Clients at work until the world says that it is over."""

    async def work(client: Client) -> None:
        while not world.over:
            (kind,) = client.random.choices(MIX, [kind.share for kind in MIX])
            await kind.send(client)
        client.leave()

    await asyncio.gather(*(work(Client(world, f"{phase} {number}")) for number in range(count)))


async def load(world: World, count: int, seconds: float, phase: str) -> None:
    """Clients at work for so long; then nobody asks any more."""
    world.pausing = False
    clients = asyncio.create_task(run_clients(world, count, phase))
    await asyncio.sleep(seconds)
    world.pausing = True
    await clients


async def load_anew(world: World, after_s: float) -> None:
    """The checkpoint, halfway; it answers as it did before."""
    await asyncio.sleep(after_s)
    connection = await Connection.open(world.address)
    path = f"/v2/repository/models/{world.model}/load"
    reply = await connection.exchange(post(world.address, path, b""))
    connection.close()
    if reply is None or reply.status != 200:
        world.violated(f"the checkpoint was not loaded anew: {reply}")
    world.exchanges += 1


async def at_rest(server: ServerProcess, like: dict[str, float] | None = None) -> dict[str, float]:
    """Gauges, tasks and threads when nothing goes on, and no more goes on than before; as they are
    if that does not come about."""
    ends = time.monotonic() + SETTLING_S
    while True:
        rest = {gauge: server.metric(f"offramp_{gauge}") for gauge in GAUGES}
        alive = json.loads(server.get("/soak/alive"))
        rest |= {"tasks": alive["tasks"], "threads": server.threads()}
        quiet = not any(rest[gauge] for gauge in GAUGES)
        if time.monotonic() > ends or (quiet and (not like or rest["tasks"] <= like["tasks"])):
            return rest
        await asyncio.sleep(0.5)  # connections are forgotten, an old checkpoint as well


async def watch_memory(server: ServerProcess, samples: list[float]) -> None:
    while True:
        samples.append(server.resident_mib())
        await asyncio.sleep(0.25)


async def soak(
    server: ServerProcess, world: World, arguments: argparse.Namespace
) -> dict[str, Any]:
    """All phases but the end of the process."""
    await ask_alone(world)
    warm_up_s = min(60.0, 0.3 * arguments.seconds)
    # An exchange needs a thread or two of the event loop's own, which stay.
    exchange = asyncio.create_task(load_anew(world, 0.5 * warm_up_s))
    await load(world, arguments.clients, warm_up_s, f"{arguments.seed} warm-up")
    await exchange
    before = await at_rest(server)
    memory: list[float] = []
    watcher = asyncio.create_task(watch_memory(server, memory))
    exchange = asyncio.create_task(load_anew(world, 0.5 * arguments.seconds))
    await load(world, arguments.clients, arguments.seconds, f"{arguments.seed}")
    await exchange
    watcher.cancel()
    after = await at_rest(server, before)
    figures = {"at_rest": {"before": before, "after": after}, "memory_mib": _memory(memory)}
    _check_rest(world, before, after)
    _check_memory(world, figures["memory_mib"])
    _check_counts(world, server)
    await terminate(server, world, arguments)
    return figures


async def terminate(server: ServerProcess, world: World, arguments: argparse.Namespace) -> None:
    """SIGTERM while the clients are at work, who go on until they are told that it is over."""
    world.pausing = False
    clients = asyncio.create_task(
        run_clients(world, arguments.clients, f"{arguments.seed} at the end")
    )
    await asyncio.sleep(1.0)
    world.terminated = True
    server.terminate()
    try:
        async with asyncio.timeout(DRAIN_S + SHUTDOWN_S + 10):
            await clients
    except TimeoutError:
        world.violated("clients still wait though the server should have ended")
    if world.closed_at is None:
        world.violated("nobody was told that the server ends")


def _memory(samples: list[float]) -> dict[str, Any]:
    """The median of each tenth of the time, and the growth from the first to the last."""
    size = max(1, len(samples) // 10)
    tenths = [statistics.median(samples[at : at + size]) for at in range(0, 10 * size, size)]
    return {"tenths": tenths, "most": max(samples), "growth": tenths[-1] / tenths[0] - 1}


def _check_rest(world: World, before: dict[str, float], after: dict[str, float]) -> None:
    for gauge in GAUGES:
        if after[gauge]:
            world.violated(f"{gauge} is {after[gauge]:g} though nobody asks")
    for name in ("tasks", "threads"):
        if after[name] > before[name]:
            world.violated(f"{before[name]:g} {name} before, {after[name]:g} after")


def _check_memory(world: World, memory: dict[str, Any]) -> None:
    if memory["growth"] > MEMORY_MAY_GROW:
        world.violated(f"memory grew by {memory['growth']:.1%}, allowed is {MEMORY_MAY_GROW:.0%}")


def _check_counts(world: World, server: ServerProcess) -> None:
    """The server's count of answered requests is ours; of those given up it may be either way."""
    counted = server.metric("offramp_requests_total", 'code="200"') - len(world.expected)
    if not world.answered <= counted <= world.answered + world.given_up:
        world.violated(
            f"the server counts {counted:g} answered requests, the clients {world.answered} and "
            f"{world.given_up} given up"
        )
    if failures := server.metric("offramp_requests_total", 'code="500"'):
        world.violated(f"{failures:g} requests failed with 500")


# -- the command -----------------------------------------------------------------------------------


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """A whole soak; `violations` in the report is empty if all is well."""
    flags = {
        "--model-id": arguments.checkpoint,
        "--port": 0,
        "--payload-limit": PAYLOAD_LIMIT,
        "--max-client-batch-size": MOST_TEXTS,
        "--drain-seconds": DRAIN_S,
        "--shutdown-timeout": SHUTDOWN_S,
        "--log-level": "warning",
    }
    server_file = Path(__file__).parent / "watched_server.py"
    command = [sys.executable, str(server_file), "--load-over-http"]
    command += [str(word) for flag in flags.items() for word in flag]
    started = time.perf_counter()
    with serving(command) as server:
        world = _world(server, arguments)
        figures = asyncio.run(soak(server, world, arguments))
        code = server.wait(SHUTDOWN_S)
    if code:
        world.violated(f"the exit code is {code}")
    return {
        "seconds": arguments.seconds,
        "clients": arguments.clients,
        "texts": len(world.texts),
        "speedups": list(world.speedups),
        "ready_s": server.ready_s,
        "requests": dict(sorted(world.seen.items())),
        "requests_answered": world.answered,
        "checkpoint_exchanges": world.exchanges,
        "requests_given_up": world.given_up,
        "texts_compared": world.texts_compared,
        "largest_probability_difference": world.largest_difference,
        **figures,
        "exit_code": code,
        "took_s": time.perf_counter() - started,
        "violations": len(world.violations),
        "violations_shown": world.violations[:SHOWN],
    }


def _world(server: ServerProcess, arguments: argparse.Namespace) -> World:
    info = json.loads(server.get("/info"))
    most = info["speedup"]["max"]
    texts = read_texts(arguments.texts)
    return World(
        server.address,
        random.Random(arguments.seed).sample(texts, min(arguments.count, len(texts))),
        [speedup for speedup in SPEEDUPS if speedup <= most],
        info["served_model_name"],
    )


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--texts", type=Path, required=True, help=".jsonl[.gz], or a text a line")
    parser.add_argument("--count", type=int, default=200, help="texts that are used")
    parser.add_argument("--seconds", type=float, default=300.0, help="after a warm-up")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(words)
    report = run(arguments)
    text = json.dumps(report, indent=1)
    print(text)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    return 1 if report["violations"] else 0


if __name__ == "__main__":
    sys.exit(main())
