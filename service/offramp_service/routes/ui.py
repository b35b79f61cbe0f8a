"""`GET /ui`: a page for people who want to try a model and see after which layer their texts leave.

The page is files of `offramp_service/ui`, read once at start: the same for everybody, and open to
everybody as it says nothing of the models. What it shows it asks of `/classify`, `/info`,
`/v1/models` and `/ui/exits`, with a key where the server wants one. Its addresses are relative, so
that it works under any path that a proxy puts in front. None of this is in the OpenAPI document or
counted in metrics: it is not what programs ask.
"""

import hashlib
from collections.abc import Awaitable, Callable
from importlib.resources import files

from fastapi import Request
from starlette.responses import Response
from starlette.routing import Route

from offramp_service.models import Models
from offramp_service.schemas.reading import encode_json

_FILES = {
    "/ui": ("index.html", "text/html; charset=utf-8"),
    "/ui/app.js": ("app.js", "text/javascript; charset=utf-8"),
    "/ui/style.css": ("style.css", "text/css; charset=utf-8"),
    "/ui/icon.svg": ("icon.svg", "image/svg+xml"),
}
PATHS = (*_FILES, "/ui/")
"""What is open to everybody."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
"""Content-Security-Policy: nothing from elsewhere, nothing inline, and no text becomes markup."""

_HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    # Kept, and asked for anew with its tag: a server that was replaced shows its own page.
    "cache-control": "no-cache",
}


def routes(models: Models) -> list[Route]:
    """The page's routes, plain ones: there is nothing to document or to resolve."""
    folder = files("offramp_service") / "ui"
    found = [
        Route(path, _file((folder / name).read_bytes(), media_type))
        for path, (name, media_type) in _FILES.items()
    ]
    return [*found, Route("/ui/", _to_page), Route("/ui/exits", _exits(models))]


def _file(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    tag = f'"{hashlib.sha256(content).hexdigest()[:24]}"'
    headers = _HEADERS | {"etag": tag}

    async def send(request: Request) -> Response:
        if _knows(request.headers.get("if-none-match", ""), tag):
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return send


def _knows(tags: str, tag: str) -> bool:
    """Is it one of those that a client has? Proxies that compress make weak ones of them."""
    known = (one.strip().removeprefix("W/") for one in tags.split(","))
    return any(one in (tag, "*") for one in known)


async def _to_page(_: Request) -> Response:
    # Relative: what stands in front of it is a proxy's business.
    return Response(status_code=308, headers={"location": "../ui"})


def _exits(models: Models) -> Callable[[Request], Awaitable[Response]]:
    async def tell(request: Request) -> Response:
        """How many texts of a model have left after each layer, since the server was started. Far
        less work than `/metrics`, so that a page may look often."""
        pipeline = models.of(request.query_params.get("model"))
        content = {
            "model": pipeline.model.name,
            "ready": models.ready_for(pipeline),
            "exit_counts": pipeline.metrics.exit_counts,
        }
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        return Response(encode_json(content), headers=headers, media_type="application/json")

    return tell
