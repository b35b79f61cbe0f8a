"""Probes: is the process alive, has it started, should it get traffic? They never touch a model.

`/livez` fails only when a restart would help: an engine thread is gone or stuck. `/readyz` (and
TEI's `/health` and `/ping`) is loaded, warm and not draining; `/startupz` is loaded and warm.
"""

from fastapi import APIRouter
from starlette.responses import JSONResponse, Response

from offramp_service.lifecycle import Lifecycle
from offramp_service.models import Models

READY_PATHS = ("/readyz", "/health", "/ping")
PATHS = ("/livez", "/startupz", *READY_PATHS)


def router(models: Models) -> APIRouter:
    """The probes' routes."""
    lifecycle = models.lifecycle
    routes = APIRouter(tags=["probes"])

    async def livez() -> Response:
        return _probe(models.alive or not lifecycle.started, lifecycle)

    async def readyz() -> Response:
        return _probe(models.ready, lifecycle)

    async def startupz() -> Response:
        return _probe(lifecycle.started, lifecycle)

    endpoints = {"/livez": livez, "/startupz": startupz} | dict.fromkeys(READY_PATHS, readyz)
    for path, endpoint in endpoints.items():
        name = path.strip("/")
        routes.add_api_route(path, endpoint, methods=["GET"], name=name, response_model=None)
        # Balancers ask with HEAD; the document need not say everything twice.
        routes.add_api_route(
            path, endpoint, methods=["HEAD"], include_in_schema=False, response_model=None
        )
    return routes


def _probe(good: bool, lifecycle: Lifecycle) -> Response:
    content = {"status": "ok" if good else "unavailable", "phase": lifecycle.phase}
    return JSONResponse(content, status_code=200 if good else 503)
