"""Everything that can go wrong with a request, as one tree. It knows no web framework.

    ServiceError
    ├── Unauthorized        401                     no valid API key
    ├── InvalidInput        400 · 404 · 413 · 422   the client has to change the request
    │   └── EmptyInput      400                     there is nothing to classify
    ├── ClientGone          499                     counted, never sent
    ├── EngineFailed        500                     the model broke on this batch
    ├── Overloaded          429 + Retry-After       load: the same request may fit in a moment
    ├── NotReady            503 + Retry-After       starting or draining: another replica may answer
    └── DeadlineExceeded    504                     the answer would come too late

Raised where the trouble is found, turned into a response once, in `app.py`; each door words the
body its own way.
"""

from typing import ClassVar, Literal

Reason = Literal[
    "overloaded",
    "deadline",
    "unauthorized",
    "validation",
    "tokenization",
    "backend",
    "disconnected",
    "draining",
]


class ServiceError(Exception):
    """A request that gets no answer. `param` names the offending field or header, if any."""

    status: int = 500
    kind: str = "internal_error"
    reason: Reason = "backend"  # label of offramp_request_failures_total
    retry_after_s: int | None = None  # header Retry-After, in whole seconds

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param


class Unauthorized(ServiceError):
    """The client has shown no API key, or one that is not valid here."""

    status = 401
    kind = "unauthorized"
    reason: Reason = "unauthorized"


class InvalidInput(ServiceError):
    """The request itself is wrong, and sending it again will not help."""

    reason: Reason = "validation"
    _kinds: ClassVar[dict[int, str]] = {
        400: "malformed_request",
        404: "not_found",
        413: "request_too_large",
        422: "invalid_value",
    }

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        status: Literal[400, 404, 413, 422] = 422,
        reason: Reason = "validation",
    ) -> None:
        super().__init__(message, param=param)
        self.status = status
        self.kind = self._kinds[status]
        self.reason = reason


class EmptyInput(InvalidInput):
    """There is nothing to classify."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        super().__init__(message, param=param, status=400)


class ClientGone(ServiceError):
    """The client closed its connection before the answer was ready."""

    status = 499
    kind = "client_closed_request"
    reason: Reason = "disconnected"


class EngineFailed(ServiceError):
    """The model could not answer: a fault of ours, not of the request."""

    status = 500
    kind = "engine_failed"


class Overloaded(ServiceError):
    """No room in the queue right now, in requests or in tokens."""

    status = 429
    kind = "overloaded"
    reason: Reason = "overloaded"

    def __init__(self, message: str, *, param: str | None = None, retry_after_s: int = 1) -> None:
        super().__init__(message, param=param)
        self.retry_after_s = retry_after_s


class NotReady(ServiceError):
    """This replica is not taking requests: not yet, or not any more."""

    status = 503
    kind = "not_ready"
    reason: Reason = "draining"
    retry_after_s = 5


class DeadlineExceeded(ServiceError):
    """The time allowed for the request ran out."""

    status = 504
    kind = "deadline_exceeded"
    reason: Reason = "deadline"
