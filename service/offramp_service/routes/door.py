"""What every door does around its own format: room, body, clock, request id, error style, headers.

It knows HTTP and the pipeline's life cycle, and nothing of any door's bodies.
"""

import asyncio
import logging
import math
import random
import re
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import attrgetter
from types import TracebackType
from typing import Any, Protocol, Self

from fastapi import Request
from fastapi.routing import APIRoute
from starlette.responses import Response
from starlette.types import Receive

from offramp_model.rows import Encoding
from offramp_service.errors import ClientGone, DeadlineExceeded, InvalidInput, ServiceError
from offramp_service.jobs import Controls, TimedAnswer
from offramp_service.lifecycle import Lifecycle
from offramp_service.pipeline import Counts, Pipeline, Place
from offramp_service.schemas.shared import Details, ExitSignal, Timings
from offramp_service.settings import Settings

log = logging.getLogger(__name__)

CALL = "offramp.call"  # key of the Call in the ASGI scope
WORDING = "offramp.wording"  # of the door's, for routes that only tell

_SPEAKABLE = re.compile(r"[\w.-]{1,60}", re.ASCII)
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class Served(Protocol):
    """The models that a door leads to; see `Models`."""

    settings: Settings
    lifecycle: Lifecycle

    @property
    def default(self) -> Pipeline: ...

    def of(self, name: str | None, version: str | None = None) -> Pipeline: ...

    @property
    def served(self) -> Mapping[str, Sequence[str]]: ...


@dataclass(frozen=True, slots=True)
class Wording:
    """How a door speaks of errors: their body, and their status code."""

    body: Callable[[ServiceError], bytes]
    status: Callable[[ServiceError], int] = attrgetter("status")


@dataclass(slots=True)
class Call:
    """One request at a door, for whoever words its error."""

    route: str
    request_id: str
    wording: Wording
    started: float
    patience: "Patience"
    # Of the model that was asked for, or else the default. Not its pipeline: connections keep their
    # last request, and would keep a model with it that is no longer served.
    metrics: Counts
    # Filled when it is over, one of them:
    outcome: "Outcome | None" = None
    failure: str | None = None  # the kind of error

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.started

    def within(self, deadline_s: float) -> None:
        """The client wants no answer later than so long after it asked."""
        self.patience.shorten(deadline_s, deadline_s - self.seconds)


# A door reads the body itself and keeps no reference: it may be large, and the wait long.
ReadBody = Callable[[], Awaitable[bytes]]
Handler = Callable[[Request, ReadBody, Call], Awaitable[Response]]


class LeanRoute(APIRoute):
    """A documented route whose endpoint is a plain `Request -> Response`.

    FastAPI's dependency solving and response validation have nothing to do here and would halve
    the requests per second.
    """

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        endpoint: Callable[[Request], Coroutine[Any, Any, Response]] = self.endpoint
        return endpoint


def door(
    models: Served, route: str, handle: Handler, wording: Wording
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """The endpoint around a door's handler. Errors pass through to the app's one handler."""
    settings, lifecycle = models.settings, models.lifecycle
    limit, timeout_s = settings.payload_limit, settings.request_timeout_ms / 1000

    async def read(request: Request, patience: Patience) -> bytes:
        body = await read_body(request, limit)
        patience.until(departure(request.receive))
        return body

    async def endpoint(request: Request) -> Response:
        patience = Patience(timeout_s)
        now, metrics = time.perf_counter(), models.default.metrics
        call = Call(route, request_id(request), wording, now, patience, metrics)
        request.scope[CALL] = call
        lifecycle.enter()
        try:
            async with patience:
                response = await handle(request, partial(read, request, patience), call)
        except ServiceError:
            raise
        except Exception as error:
            log.exception("%s failed, request %s", route, call.request_id)
            raise ServiceError("internal error") from error
        finally:
            lifecycle.leave()
        call.metrics.request_done(route, 200, call.seconds)
        return response

    return endpoint


def teller(
    tell: Callable[[Request], Awaitable[Response]], wording: Wording
) -> Callable[[Request], Coroutine[Any, Any, Response]]:
    """The endpoint around a route that only tells, and costs nothing to speak of."""

    async def endpoint(request: Request) -> Response:
        request.scope[WORDING] = wording
        return await tell(request)

    return endpoint


async def classify(
    pipeline: Pipeline,
    call: Call,
    place: Place,
    controls: Sequence[Controls],
    encode: Callable[[], Awaitable[Sequence[Encoding]]],
) -> "Outcome":
    """What every door asks of the pipeline: room for the texts, one `Controls` each; their tokens,
    from `encode`; their answers.

    Raises:
        ServiceError: see `Pipeline`.
    """
    deadlines = [one.deadline_s for one in controls if one.deadline_s is not None]
    if deadlines:
        call.within(min(deadlines))
    with pipeline.admit(len(controls), place.field, call.request_id) as batch:
        started = time.perf_counter()
        encodings = await encode()
        tokenization_s = time.perf_counter() - started
        answers = await pipeline.answer(batch, encodings, controls)
    tokens = sum(len(one) for one in encodings)
    call.outcome = Outcome(*(answers, controls, tokens, tokenization_s, pipeline.model.num_layers))
    return call.outcome


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of the texts of one request."""

    answers: Sequence[TimedAnswer]
    controls: Sequence[Controls]
    tokens: int
    tokenization_s: float
    num_layers: int

    @property
    def layers_run(self) -> int:
        return sum(one.answer.exit_layer for one in self.answers)

    @property
    def speedup_achieved(self) -> float:
        return self.num_layers * len(self.answers) / self.layers_run

    def details(self, index: int) -> Details:
        """How a text left."""
        timed = self.answers[index]
        details = Details(
            exit_layer=timed.answer.exit_layer,
            num_layers=self.num_layers,
            exit_signal=_finite(timed.answer.signal),
            threshold=_finite(self.controls[index].threshold),
            timings_ms=self._timings(timed),
        )
        if (signals := timed.answer.signals) is not None:
            details.signals = [ExitSignal(layer, _finite(signal)) for layer, signal in signals]
        return details

    def _timings(self, timed: TimedAnswer) -> Timings:
        total = self.tokenization_s + timed.queue_s + timed.inference_s
        parts = (self.tokenization_s, timed.queue_s, timed.inference_s, total)
        return Timings(*(round(seconds * 1000, 3) for seconds in parts))

    def _raised(self) -> dict[str, str]:
        """Says so where load has raised a speed-up above what was asked for."""
        raised = [
            one.effective_speedup
            for one in self.controls
            if one.effective_speedup is not None and one.effective_speedup != one.speedup
        ]
        return {"x-speedup-effective": f"{max(raised):.4g}"} if raised else {}

    def headers(self, call: Call, *, is_list: bool, ignored: Sequence[str] = ()) -> dict[str, str]:
        """TEI's timing headers and ours, on every door; a batch gives means. `ignored` are fields
        of the request that nobody knows."""
        count = len(self.answers)
        thresholds = {one.threshold for one in self.controls}
        headers = {
            "x-request-id": call.request_id,
            "x-compute-tokens": str(self.tokens),
            "x-total-time": _milliseconds(call.seconds),
            "x-tokenization-time": _milliseconds(self.tokenization_s),
            "x-queue-time": _milliseconds(sum(one.queue_s for one in self.answers) / count),
            "x-inference-time": _milliseconds(sum(one.inference_s for one in self.answers) / count),
            "x-speedup-achieved": f"{self.speedup_achieved:.2f}",
        }
        if is_list:
            headers["x-exit-layer-mean"] = f"{self.layers_run / count:.2f}"
        else:
            headers["x-exit-layer"] = str(self.layers_run)
        if len(thresholds) == 1:  # texts of one request may differ
            headers["x-exit-threshold"] = f"{thresholds.pop():.6g}"
        headers |= self._raised()
        if ignored:
            headers["x-ignored-fields"] = _names(ignored)
        return headers


class Patience:
    """How long a request is worth any work: until its deadline, or until its client has left.

    Then whatever is awaited inside the block is cancelled, be it the rest of a body, tokenisation
    or answers.
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._timeout = asyncio.timeout(timeout_s)
        self._watcher: asyncio.Task[None] | None = None
        self._client_left = False

    async def __aenter__(self) -> Self:
        await self._timeout.__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._watcher is not None:
            self._watcher.cancel()
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError:
            if self._client_left:
                raise ClientGone("the client has left") from None
            raise DeadlineExceeded(f"no answer within {self._timeout_s * 1000:.0f} ms") from None

    def shorten(self, timeout_s: float, left_s: float) -> None:
        """A sooner deadline, `timeout_s` in all, of which there is so much left."""
        self._timeout_s = timeout_s
        self._timeout.reschedule(asyncio.get_running_loop().time() + max(0.0, left_s))

    def until(self, gone: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Give up as well when `gone` completes."""
        self._watcher = asyncio.get_running_loop().create_task(self._watch(gone))

    async def _watch(self, gone: Callable[[], Coroutine[Any, Any, None]]) -> None:
        await gone()
        if not self._timeout.expired():
            self._client_left = True
            self._timeout.reschedule(asyncio.get_running_loop().time())


def request_id(request: Request) -> str:
    """The client's X-Request-Id if it is printable and short, else a new one."""
    given = request.headers.get("x-request-id", "")
    # Not uuid4: a system call lets go of the GIL, and getting it back from a busy engine thread
    # costs more than the rest of the request (measured: 1.1 ms).
    return given if _REQUEST_ID.fullmatch(given) else f"{random.getrandbits(96):024x}"


def check_request_id(given: str) -> str:
    """A request id from a body; it goes into a header, so it must be fit for one."""
    if not _REQUEST_ID.fullmatch(given):
        raise InvalidInput(
            "request_id may have 1 to 128 printable ASCII characters and no spaces",
            param="request_id",
        )
    return given


async def read_body(request: Request, limit: int) -> bytes:
    """The body, given up as soon as it is known to be too large."""
    too_large = InvalidInput(f"the body is larger than {limit} bytes", status=413)
    announced = request.headers.get("content-length", "")
    if announced.isdecimal() and int(announced) > limit:
        raise too_large
    chunks: list[bytes] = []
    size = 0
    while True:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientGone("the client left while sending")
        chunk: bytes = message.get("body", b"")
        size += len(chunk)
        if size > limit:
            raise too_large
        chunks.append(chunk)
        if not message.get("more_body", False):
            return chunks[0] if len(chunks) == 1 else b"".join(chunks)


def departure(receive: Receive) -> Callable[[], Coroutine[Any, Any, None]]:
    """Completes when the client has closed the connection; for after the body was read."""

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    return gone


def _milliseconds(seconds: float) -> str:
    return str(round(seconds * 1000))


def _finite(number: float) -> float | None:
    """JSON has no infinity: null stands for "never early"."""
    return number if math.isfinite(number) else None


def _names(ignored: Sequence[str]) -> str:
    """Fit for a header: a few names, and only harmless ones."""
    names = [name if _SPEAKABLE.fullmatch(name) else "?" for name in ignored[:10]]
    return ", ".join(names) + (", ..." if len(ignored) > 10 else "")
