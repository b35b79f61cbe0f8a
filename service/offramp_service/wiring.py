"""What stands around the doors in every process that has them: doors, keys, origins, errors, and
whoever is told of finished requests. Where the models are, it does not know.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_service.api_keys import Keyring
from offramp_service.errors import NotReady, ServiceError, Unauthorized
from offramp_service.gate import Gate
from offramp_service.lifecycle import Lifecycle
from offramp_service.request_log import RequestLog
from offramp_service.routes import classify, infer, predict
from offramp_service.routes.door import CALL, WORDING, Call, Served
from offramp_service.served_model import SettingsError
from offramp_service.settings import Settings
from offramp_service.witness import Record, Witness

if TYPE_CHECKING:
    from offramp_service.tracing import Tracer

_DOORS = (predict, classify, infer)

DOOR_PATHS = tuple(path for one in _DOORS for path in one.PATHS)


@dataclass(frozen=True)
class Keys:
    """Those of clients, and those of who may change how it is served; None: nobody is asked."""

    clients: Keyring | None
    admin: Keyring | None

    @property
    def any(self) -> bool:
        return self.clients is not None or self.admin is not None


def add_doors(app: FastAPI, models: Served) -> None:
    """The routes that classify."""
    for one in _DOORS:
        # Not `include_router`: it would look every request's path up twice more (0.04 ms).
        app.router.routes.extend(one.router(models).routes)


def surround(app: FastAPI, models: Served, keys: Keys, tracer: "Tracer | None") -> None:
    """All that a request passes on its way to a route, and its answer on its way back."""
    settings = models.settings
    respond = _map_errors(app, models)
    # The one added last is the first that a request meets.
    if keys.any:
        wordings = {path: one.wording(settings) for one in _DOORS for path in one.PATHS}
        app.add_middleware(
            Gate,
            keys=keys.clients,
            admin_keys=keys.admin,
            doors=wordings,
            models=models,
            refuse=respond,
        )
    if settings.cors_allow_origin:
        # Before the gate: a browser asks for leave without a key. No cookies, so that "*" in what
        # is exposed means all headers; and whatever a page sends is checked where it is read.
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_allow_origin,
            allow_methods=("GET", "POST"),
            allow_headers=("*",),
            expose_headers=("*",),
        )
    app.add_middleware(_Farewell, lifecycle=models.lifecycle)
    if listeners := _listeners(settings, tracer):
        app.add_middleware(Witness, listeners=listeners)
    if settings.root_path:
        app.add_middleware(_Under, root_path=settings.root_path)


class _Farewell:
    """Once the service is leaving, every answer ends its connection.

    The client's next request opens another one, which a balancer leads to another replica.
    """

    def __init__(self, app: ASGIApp, lifecycle: Lifecycle) -> None:
        self._app, self._lifecycle = app, lifecycle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_on(message: Message) -> None:
            if self._lifecycle.leaving and message["type"] == "http.response.start":
                MutableHeaders(scope=message)["connection"] = "close"
            await send(message)

        await self._app(scope, receive, send_on)


class _Under:
    """A path that a proxy has put in front of ours, whether it takes it away again or not.

    The server's own setting is for proxies that do.
    """

    def __init__(self, app: ASGIApp, root_path: str) -> None:
        self._app, self._root_path = app, root_path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            root, path = self._root_path, scope["path"]
            full = path if path.startswith(f"{root}/") else root + path
            scope = {**scope, "root_path": root, "path": full}
        await self._app(scope, receive, send)


def open_keys(settings: Settings) -> Keys:
    """Read the keys.

    Raises:
        KeyFileError: see `Keyring`.
    """
    key, path, admin = settings.api_key, settings.api_key_file, settings.admin_key_file
    clients = None
    if key is not None or path is not None:
        clients = Keyring(key.get_secret_value() if key is not None else None, path)
    return Keys(clients, Keyring(None, admin) if admin is not None else None)


def open_tracer(settings: Settings) -> "Tracer | None":
    if settings.otlp_endpoint is None:
        return None
    try:
        from offramp_service.tracing import Tracer
    except ImportError as error:
        raise SettingsError(
            f"--otlp-endpoint needs the extra otel, pip install 'offramp[otel]': {error}"
        ) from None
    return Tracer(settings.otlp_endpoint, settings.otlp_service_name)


def _listeners(settings: Settings, tracer: "Tracer | None") -> list[Callable[[Record], None]]:
    """Who is told of each request. People are not, unless they look for something."""
    listeners: list[Callable[[Record], None]] = [] if tracer is None else [tracer]
    if settings.json_output:
        listeners.append(RequestLog(logging.INFO))
    elif settings.log_level == "debug":
        listeners.append(RequestLog(logging.DEBUG))
    return listeners


def _map_errors(
    app: FastAPI, models: Served
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """The one place where errors become responses; the wording is the door's. Returns what makes
    them, for who stands before the routes."""

    async def service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        call: Call | None = request.scope.get(CALL)
        metrics = call.metrics if call else models.default.metrics
        headers = {}
        wording = call.wording if call else request.scope.get(WORDING, classify.WORDING)
        status = wording.status(error)
        if call is not None:
            metrics.request_done(call.route, status, call.seconds)
            headers["x-request-id"] = call.request_id
            call.failure = error.kind  # not the message, which may repeat a piece of a text
        metrics.request_failed(error.reason)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, NotReady):
            headers["connection"] = "close"  # the next try should reach another replica
        if isinstance(error, Unauthorized):
            headers["www-authenticate"] = "Bearer"
        return Response(wording.body(error), status, headers, "application/json")

    async def no_such_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        failure = ServiceError(error.detail)
        failure.status = error.status_code
        failure.kind = HTTPStatus(error.status_code).name.lower()
        return Response(
            classify.WORDING.body(failure), error.status_code, error.headers, "application/json"
        )

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(HTTPException, no_such_route)
    return service_error
