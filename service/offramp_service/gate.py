"""The gate in front of everything but the probes: who shows no valid API key goes no further, where
keys are asked for. What is under `/admin` has keys of its own.

It looks at a request's path and its Authorization header, and refuses before a byte of the body is
read. It knows neither how keys are kept nor how errors are worded; where the path is a door's, it
only says whose request this was, so that the refusal is worded and counted like any other there.
"""

import time
from collections.abc import Awaitable, Callable, Mapping

from fastapi import Request
from starlette.responses import Response
from starlette.routing import compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

from offramp_service.api_keys import Keyring
from offramp_service.errors import Unauthorized
from offramp_service.routes.door import CALL, Call, Patience, Served, Wording, request_id
from offramp_service.routes.probes import PATHS as PROBES
from offramp_service.routes.ui import PATHS as UI

OPEN_PATHS = frozenset((*PROBES, "/v2/health/live", "/v2/health/ready", *UI))
"""An orchestrator asks these, and has no key; nor has a browser that opens a page, which then asks
a person for one."""

ADMIN = "/admin/"


class Gate:
    """ASGI middleware. `doors` says how each door's path words its errors; without `keys` only
    `/admin` is behind it."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keyring | None,
        admin_keys: Keyring | None,
        doors: Mapping[str, Wording],
        models: Served,
        refuse: Callable[[Request, Exception], Awaitable[Response]],
    ) -> None:
        self._app, self._refuse = app, refuse
        self._keys, self._admin_keys = keys, admin_keys
        self._models = models
        self._doors = [(compile_path(path)[0], path, one) for path, one in doors.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (keys := self._keys_of(path_of(scope))) is not None:
            try:
                keys.check(bearer(scope["headers"]))
            except Unauthorized as error:
                request = Request(scope)
                self._name_door(request)
                response = await self._refuse(request, error)
                return await response(scope, receive, send)
        return await self._app(scope, receive, send)

    def _keys_of(self, path: str) -> Keyring | None:
        """Of which one has to be shown; None: none."""
        if self._admin_keys is not None and path.startswith(ADMIN):
            return self._admin_keys
        return None if path in OPEN_PATHS else self._keys

    def _name_door(self, request: Request) -> None:
        """Say whose request it was, where the path is a door's."""
        for pattern, route, wording in self._doors:
            if pattern.match(path_of(request.scope)):
                started = time.perf_counter()
                metrics = self._models.default.metrics
                call = Call(route, request_id(request), wording, started, Patience(0), metrics)
                request.scope[CALL] = call


def path_of(scope: Scope) -> str:
    """A request's path as the routes see it: without the root path, if it came with that."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    return path[len(root) :] if root and path.startswith(f"{root}/") else path


def bearer(headers: list[tuple[bytes, bytes]]) -> bytes | None:
    """What `Authorization: Bearer` carries; None without such a header."""
    for name, value in headers:
        if name == b"authorization":
            scheme, _, credentials = value.partition(b" ")
            return credentials.strip() if scheme.lower() == b"bearer" else None
    return None
