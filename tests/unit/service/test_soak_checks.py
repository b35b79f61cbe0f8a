"""The soak's checks notice what they are there for."""

import json
from types import ModuleType
from typing import Any

import pytest

from loading import load
from offramp_loadtest.http_client import Address, Reply


@pytest.fixture(scope="module")
def soak() -> ModuleType:
    return load("service/bench/soak.py")


def item(index: int, label: str = "yes", layer: int = 2) -> dict[str, Any]:
    return {"index": index, "label": label, "probs": [0.2, 0.8], "details": {"exit_layer": layer}}


@pytest.fixture
def world(soak: ModuleType) -> Any:
    expected = {
        ("a", 2.0): soak.Outcome("yes", 2, [0.2, 0.8]),
        ("b", 2.0): soak.Outcome("no", 3, [0.2, 0.8]),
    }
    return soak.World(Address("127.0.0.1", 1), ["a", "b"], [2.0], "tiny", expected)


def reply(*items: dict[str, Any], name: str = "mine") -> Reply:
    head = f"HTTP/1.1 200 OK\r\nx-request-id: {name}\r\n".encode()
    return Reply(200, head, json.dumps({"data": items}).encode())


def test_right_answers_are_no_violation(soak: ModuleType, world: Any) -> None:
    soak._compare_items(world, reply(item(0), item(1, "no", 3)), ["a", "b"], 2.0, "mine")
    assert (world.violations, world.answered, world.texts_compared) == ([], 1, 2)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (reply(item(0, "no"), item(1, "no", 3)), "no after layer 2, alone yes after layer 2"),
        (reply(item(0, layer=4), item(1, "no", 3)), "yes after layer 4, alone yes after layer 2"),
        (reply(item(0, "no", 3), item(1)), "no after layer 3"),  # somebody else's
        (reply(item(0)), "2 texts got 1 answers"),
        (reply(item(1, "no", 3), item(0)), "answers out of order"),
        (reply(item(0), item(1, "no", 3), name="other"), "to other came to mine"),
    ],
)
def test_wrong_answers_are(soak: ModuleType, world: Any, given: Reply, said: str) -> None:
    soak._compare_items(world, given, ["a", "b"], 2.0, "mine")
    assert said in world.violations[0]


def test_what_is_left_behind_is(soak: ModuleType, world: Any) -> None:
    rest = {**dict.fromkeys(soak.GAUGES, 0.0), "tasks": 3, "threads": 9}
    soak._check_rest(world, rest, rest)
    soak._check_memory(world, soak._memory([100.0] * 50 + [104.0] * 50))
    assert world.violations == []
    soak._check_rest(world, rest, rest | {"queue_tokens": 7.0, "tasks": 4, "threads": 10})
    soak._check_memory(world, soak._memory([100.0] * 50 + [106.0] * 50))
    assert [violation.split()[0] for violation in world.violations] == [
        *("queue_tokens", "3", "9", "memory")
    ]


@pytest.mark.parametrize(("counted", "violations"), [(9, 1), (10, 0), (12, 0), (13, 1)])
def test_the_servers_count_must_be_the_clients(
    soak: ModuleType, world: Any, counted: int, violations: int
) -> None:
    class Server:
        def metric(self, name: str, code: str) -> float:
            return counted + len(world.expected) if "200" in code else 0

    world.answered, world.given_up = 10, 2
    soak._check_counts(world, Server())
    assert len(world.violations) == violations


async def test_who_gets_no_answer_says_so(soak: ModuleType, world: Any) -> None:
    client = soak.Client(world, "seed")
    assert await client.ask("single", b"{}") is None  # nobody listens
    assert world.violations == ["single: no answer"]
    world.closed_at = 0.0  # the server has said that it is over
    assert await client.ask("single", b"{}") is None
    assert world.violations == ["single: no answer"]
