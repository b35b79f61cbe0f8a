"""What fronts and the process with the engine say to each other comes over whole, and means the
same there."""

import asyncio
import socket
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_service import errors
from offramp_service.errors import InvalidInput, Overloaded, ServiceError
from offramp_service.fronts.link import (
    Answered,
    Ask,
    Cancel,
    Failed,
    Fetched,
    Holds,
    Leave,
    Link,
    Message,
    ModelState,
    State,
)
from offramp_service.fronts.remote import as_error, as_failed
from offramp_service.jobs import Answer, Controls, Depth, TimedAnswer

CONTROLS = Controls(
    float("inf"), 1, 4, Depth.of((1, 2, 3, 4), 1, 4), speedup=1.5, priority=-3, deadline_s=0.25
)
ANSWER = Answer(1, [0.5, -2.0], [0.9, 0.1], 3, float("nan"), "criterion")

messages = st.one_of(
    st.builds(
        Ask,
        st.integers(0, 2**40),
        st.text(),
        st.text(),
        st.text(),
        st.floats(allow_nan=False),
        st.lists(st.tuples(st.lists(st.integers(0, 30_000)), st.lists(st.integers(0, 1)))),
        st.lists(st.just(CONTROLS), max_size=2),
    ),
    st.builds(Cancel, st.integers(0, 2**40)),
    st.builds(
        Fetched, st.integers(0, 2**40), st.integers(100, 599), st.just([(b"a", b"b")]), st.binary()
    ),
    st.builds(Holds, st.dictionaries(st.text(), st.lists(st.text()))),
    st.builds(Leave, st.floats(allow_nan=False)),
    st.just(State("draining", [ModelState("m", "sha", 7, 2.0, 1.5, 0.9)])),
)


async def carried(sent: list[Message], pieces: int | None = None) -> list[Message]:
    """What arrives of what is sent; in pieces of so many bytes, if that is said."""
    ours, theirs = socket.socketpair()
    received: list[Message] = []
    gone = asyncio.Event()
    other = Link(theirs, received.append, gone.set)
    await other.open()
    if pieces is None:
        link = Link(ours, lambda _: None, lambda: None)
        await link.open()
        for one in sent:
            link.send(one)
        link.close()
    else:
        data = b"".join(frames(sent))
        ours.setblocking(False)
        for start in range(0, len(data), pieces):
            await asyncio.get_running_loop().sock_sendall(ours, data[start : start + pieces])
            await asyncio.sleep(0)
        ours.close()
    async with asyncio.timeout(10):
        await gone.wait()
    return received


def frames(sent: list[Message]) -> list[bytes]:
    import msgspec

    encoded = [msgspec.msgpack.encode(one) for one in sent]
    return [len(one).to_bytes(4, "big") + one for one in encoded]


@given(st.lists(messages, max_size=6), st.none() | st.integers(1, 40))
def test_messages_arrive_whole_and_in_order(sent: list[Message], pieces: int | None) -> None:
    assert asyncio.run(carried(sent, pieces)) == sent


async def test_answers_arrive_as_they_were() -> None:
    answered = Answered(3, [TimedAnswer(ANSWER, 0.1, 0.2, 0.3)])
    (there,) = await carried([answered])
    assert repr(there) == repr(answered)  # a NaN equals nothing


async def test_what_is_added_before_sending_goes_out_too() -> None:
    ours, theirs = socket.socketpair()
    received: list[Message] = []
    gone = asyncio.Event()
    link, other = Link(ours, print, lambda: None), Link(theirs, received.append, gone.set)
    await asyncio.gather(link.open(), other.open())
    once = [Cancel(2)]
    link.before_sending = lambda: link.send(once.pop()) if once else None
    link.send(Cancel(1))
    link.close()
    await gone.wait()
    assert received == [Cancel(1), Cancel(2)]
    assert not link.alive
    link.send(Cancel(3))  # into the void
    await asyncio.sleep(0)


def error_types() -> list[type[ServiceError]]:
    found = [one for one in vars(errors).values() if isinstance(one, type)]
    return [one for one in found if issubclass(one, ServiceError)]


@pytest.mark.parametrize("kind", error_types())
def test_errors_mean_the_same_there(kind: type[ServiceError]) -> None:
    check(kind("no, because", param="input[3]"))


def test_errors_keep_what_was_said_of_them() -> None:
    check(Overloaded("full", retry_after_s=17))
    check(InvalidInput("too large", status=413))
    check(InvalidInput("no tokens", reason="tokenization"))


def check(error: ServiceError) -> None:
    failed = as_failed(5, error)
    assert isinstance(failed, Failed)
    other = as_error(failed)
    assert type(other) is type(error)
    for name in ("message", "param", "status", "kind", "reason", "retry_after_s"):
        assert of(other, name) == of(error, name), name
    assert str(other) == str(error)


def of(error: ServiceError, name: str) -> Any:
    return getattr(error, name)
