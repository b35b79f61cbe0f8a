"""What a request came to, told to whoever listens once its answer is sent: the log, the traces.

ASGI middleware around everything else, there only if somebody listens: without it a request costs
nothing more. What is told are numbers and names; texts, labels and keys are not among them.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_service.routes.door import CALL, Call, Outcome


@dataclass(frozen=True, slots=True)
class Record:
    """A finished request of a door. Times are `time.perf_counter`'s."""

    call: Call
    method: str
    status: int
    headers: Headers  # the request's
    started: float
    ended: float

    @property
    def outcome(self) -> Outcome | None:
        """None: its texts were not answered."""
        return self.call.outcome

    @property
    def failure(self) -> str | None:
        """The kind of error that it got instead of answers."""
        return self.call.failure


def exit_layers(outcome: Outcome) -> dict[int, int]:
    """How many texts left after which layer, in the order of the layers."""
    return dict(sorted(Counter(one.answer.exit_layer for one in outcome.answers).items()))


def speedup_asked(outcome: Outcome) -> float | None:
    """None: a raw threshold was asked for, or not the same for all texts."""
    asked = {one.speedup for one in outcome.controls}
    return asked.pop() if len(asked) == 1 else None


class Witness:
    """The middleware; `listeners` are called in turn, on the event loop, and must not wait."""

    def __init__(self, app: ASGIApp, listeners: Sequence[Callable[[Record], None]]) -> None:
        self._app, self._listeners = app, listeners

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started, status = time.perf_counter(), 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        await self._app(scope, receive, send_on)
        call: Call | None = scope.get(CALL)
        if call is not None:
            headers = Headers(scope=scope)
            ended = time.perf_counter()
            record = Record(call, scope["method"], status, headers, started, ended)
            for listen in self._listeners:
                listen(record)
