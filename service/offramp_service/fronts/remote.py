"""What the pipelines of a front ask instead of a queue, metrics and an SLO watch of their own.

The queue admits at once, within the bound that the whole server has, and asks the process with the
engine when the texts are tokens; that one admits or refuses in earnest, for all fronts together. An
error comes back as the one that was raised there.
"""

import asyncio
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.responses import Response

from offramp_service import errors
from offramp_service.errors import NotReady, Overloaded, Reason, ServiceError
from offramp_service.fronts.link import (
    Answered,
    Ask,
    Cancel,
    Counted,
    Failed,
    Fetch,
    Fetched,
    Headers,
    Link,
)
from offramp_service.jobs import Job, TimedAnswer

Reply = Answered | Failed | Fetched

_TYPES = {
    one.__name__: one
    for one in vars(errors).values()
    if isinstance(one, type) and issubclass(one, ServiceError)
}


@dataclass(slots=True)
class Admitted:
    """A request that this front lets in."""

    request_id: str
    admitted_at: float


class Exchange:
    """Questions to the process with the engine, and their replies."""

    def __init__(self) -> None:
        self.link: Link | None = None
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}

    async def ask(
        self, model: str, sha: str, batch: Admitted, jobs: Sequence[Job]
    ) -> list[TimedAnswer]:
        """The answers to the texts of one request."""
        controls = [job.controls for job in jobs]
        if all(one is controls[0] for one in controls):
            del controls[1:]
        reply = await self._put(
            lambda number: Ask(
                *(number, model, sha, batch.request_id, batch.admitted_at),
                [(job.ids, job.type_ids) for job in jobs],
                controls,
            )
        )
        assert isinstance(reply, Answered)
        return reply.answers

    async def fetch(
        self, method: str, path: str, query: bytes, headers: Headers, body: bytes
    ) -> Response:
        """The response to a request that no door takes."""
        reply = await self._put(lambda number: Fetch(number, method, path, query, headers, body))
        assert isinstance(reply, Fetched)
        response = Response(reply.body, reply.status)
        # As they are: names may repeat, and the length of an answer to HEAD is not its body's.
        response.raw_headers = reply.headers
        return response

    def replied(self, reply: Reply) -> None:
        """Hand a reply to whoever waits for it."""
        future = self._waiting.get(reply.number)
        if future is None or future.done():
            return  # nobody does any more
        if isinstance(reply, Failed):
            future.set_exception(as_error(reply))
        else:
            future.set_result(reply)

    async def _put(self, make: Callable[[int], Ask | Fetch]) -> Reply:
        link = self.link
        if link is None or not link.alive:
            raise NotReady("the server is shutting down")
        number = next(self._numbers)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[number] = future
        link.send(make(number))
        try:
            return await future
        except asyncio.CancelledError:
            link.send(Cancel(number))
            raise
        finally:
            del self._waiting[number]


class RemoteQueue:
    """In place of a `Batcher`; of one checkpoint of one model."""

    def __init__(self, exchange: Exchange, model: str, sha: str, max_texts: int) -> None:
        self._exchange, self._model, self._sha = exchange, model, sha
        self._max_texts, self.unanswered = max_texts, 0

    @contextmanager
    def admit(self, texts: int, request_id: str) -> Iterator[Admitted]:
        """Room for the texts of a request until the block is left, as far as this front knows.

        Raises:
            Overloaded: not even here.
        """
        if self.unanswered + texts > self._max_texts:
            raise Overloaded(f"queue is full ({self._max_texts} requests)")
        self.unanswered += texts
        try:
            yield Admitted(request_id, time.perf_counter())
        finally:
            self.unanswered -= texts

    async def submit(self, batch: Admitted, jobs: Sequence[Job]) -> list[TimedAnswer]:
        """See `Batcher.submit`."""
        return await self._exchange.ask(self._model, self._sha, batch, jobs)


class RemoteCounts:
    """In place of the `Metrics` of one model: what was counted waits in `told` for the link to
    send it."""

    def __init__(self, model: str, told: list[tuple[str, str, list[object]]]) -> None:
        self._model, self._told = model, told

    def request_done(self, route: str, code: int, seconds: float) -> None:
        self._told.append((self._model, "request_done", [route, code, seconds]))

    def request_failed(self, reason: Reason) -> None:
        self._told.append((self._model, "request_failed", [reason]))

    def tokenized(self, seconds: float) -> None:
        self._told.append((self._model, "tokenized", [seconds]))

    def speedup_given(self, requested: float, texts: int, layers_run: int) -> None:
        self._told.append((self._model, "speedup_given", [requested, texts, layers_run]))


class RemoteFloor:
    """In place of an `SloWatch`: what the other process has last said. That one sees for itself
    how long its texts take."""

    def __init__(self) -> None:
        self.value = 1.0

    def floor(self) -> float:
        return self.value

    def ended(self, admitted_at: float, *, answered: bool) -> None:
        pass


def as_failed(number: int, error: ServiceError) -> Failed:
    """An error, to be sent."""
    return Failed(
        *(number, type(error).__name__, error.message, error.param),
        *(error.status, error.kind, error.reason, error.retry_after_s),
    )


def as_error(failed: Failed) -> ServiceError:
    """The error that was sent."""
    type_ = _TYPES[failed.error]
    error = type_.__new__(type_)  # whose own constructor takes other arguments
    ServiceError.__init__(error, failed.message, param=failed.param)
    error.status, error.kind, error.reason = failed.status, failed.kind, failed.reason
    error.retry_after_s = failed.retry_after_s
    return error


def counted(inflight: int, told: list[tuple[str, str, list[object]]]) -> Counted:
    """What was counted, to be sent; `told` is empty afterwards."""
    events, told[:] = told[:], []
    return Counted(inflight, events)  # type: ignore[arg-type]
