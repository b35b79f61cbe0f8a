"""What every door does: patience with a request, until its deadline or its client's departure."""

import asyncio
import gc
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from offramp_service.errors import ClientGone, DeadlineExceeded
from offramp_service.routes.door import Patience

Gone = Callable[[], Coroutine[Any, Any, None]]


async def for_ever() -> None:
    await asyncio.Event().wait()


async def at_once() -> None:
    pass


async def wait(timeout_s: float, gone: Gone, *, sending_s: float = 0.0) -> None:
    async with Patience(timeout_s) as patience:
        await asyncio.sleep(sending_s)  # a body that trickles in
        patience.until(gone)
        await for_ever()


async def fail(error: BaseException) -> None:
    async with Patience(30.0) as patience:
        patience.until(for_ever)
        raise error


@pytest.mark.looptime
async def test_a_deadline_of_half_a_minute(looptime: float) -> None:
    with pytest.raises(DeadlineExceeded, match="within 30000 ms"):
        await wait(30.0, for_ever, sending_s=20.0)
    assert looptime == 30.0


@pytest.mark.looptime
async def test_a_client_that_leaves(looptime: float) -> None:
    with pytest.raises(ClientGone):
        await wait(30.0, lambda: asyncio.sleep(1))
    assert looptime == 1.0


async def test_both_at_the_same_moment() -> None:
    with pytest.raises((ClientGone, DeadlineExceeded)):
        await wait(0.0, at_once)


async def test_what_is_done_in_time_is_done() -> None:
    async with Patience(30.0) as patience:
        patience.until(at_once)  # it leaves, but there is nothing left to cancel
    async with Patience(30.0) as patience:
        patience.until(at_once)
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    gc.collect()  # a coroutine that was never awaited would complain now


@pytest.mark.parametrize(
    "error", [ValueError("own"), TimeoutError("own"), asyncio.CancelledError("own")]
)
async def test_errors_of_ones_own_pass_through(error: BaseException) -> None:
    with pytest.raises(type(error), match="own"):
        await fail(error)
