"""`GET` and `PUT /admin/policy`: how speed and accuracy are traded for who does not say, without a
restart.

Only where `--admin-key-file` opens it; the gate asks for one of its keys. A change is for as long
as the server runs, and outlives an exchange of checkpoints. Who is inside keeps what was resolved.
"""

import logging
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Request
from starlette.responses import Response

from offramp_service.errors import InvalidInput
from offramp_service.models import Models
from offramp_service.pipeline import Policy, RoomPipeline
from offramp_service.routes.classify import WORDING
from offramp_service.routes.door import LeanRoute, read_body, teller
from offramp_service.schemas import openapi
from offramp_service.schemas.reading import encode_json

log = logging.getLogger(__name__)

PATH = "/admin/policy"
MOST_BODY = 10_000  # bytes

Milliseconds = Annotated[float, msgspec.Meta(gt=0, le=600_000)]


class PolicyChange(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True):
    """What is to be changed; what is left out stays. Without `model` it is for all of them."""

    model: str | msgspec.UnsetType = msgspec.UNSET
    default_speedup: float | msgspec.UnsetType = msgspec.UNSET
    slo_p95_ms: Milliseconds | msgspec.UnsetType | None = msgspec.UNSET
    slo_controller: Literal["off", "observe", "enforce"] | msgspec.UnsetType = msgspec.UNSET


class PolicyState(msgspec.Struct):
    """Of one model. `speedup_floor` is what the controller raises requests to at this moment."""

    default_speedup: float
    slo_p95_ms: float | None
    slo_controller: Literal["off", "observe", "enforce"]
    speedup_floor: float


class Policies(msgspec.Struct):
    """By the name of the model."""

    models: dict[str, PolicyState]


_decode = msgspec.json.Decoder(PolicyChange).decode


def router(models: Models) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=LeanRoute, tags=["admin"])

    async def read(_: Request) -> Response:
        return _told(models)

    async def change(request: Request) -> Response:
        asked = _read(await read_body(request, MOST_BODY))
        _follow(models, asked)
        return _told(models)

    for method, endpoint, name in (("GET", read, "read_policy"), ("PUT", change, "change_policy")):
        routes.add_api_route(
            PATH,
            teller(endpoint, WORDING),
            methods=[method],
            name=name,
            response_model=None,
            openapi_extra=openapi.of_telling(Policies, PolicyChange if method == "PUT" else None),
        )
    return routes


def _read(body: bytes) -> PolicyChange:
    try:
        return _decode(body)
    except msgspec.ValidationError as error:
        known = ", ".join(PolicyChange.__struct_fields__)
        raise InvalidInput(f"{error}; allowed are {known}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the body is not JSON: {error}", status=400) from None


def _follow(models: Models, asked: PolicyChange) -> None:
    """All of them, or none."""
    chosen = list(models) if asked.model is msgspec.UNSET else [models.of(asked.model)]
    before = [(one, one.policy) for one in chosen]
    try:
        for one in chosen:
            one.follow(_changed(one.policy, asked))
    except InvalidInput:
        for one, policy in before:
            one.follow(policy)
        raise
    for one in chosen:
        log.info("%s is served by %s from now on", one.model.name, one.policy)


def _changed(policy: Policy, asked: PolicyChange) -> Policy:
    def of(given: Any, present: Any) -> Any:
        return present if given is msgspec.UNSET else given

    target = of(asked.slo_p95_ms, policy.slo_p95_ms)
    mode = of(asked.slo_controller, policy.slo_controller)
    if target is None:
        if asked.slo_controller in ("observe", "enforce"):
            raise InvalidInput(
                f"slo_controller {mode} needs a target, slo_p95_ms", param="slo_controller"
            )
        mode = "off"
    elif asked.slo_controller is msgspec.UNSET and policy.slo_p95_ms is None:
        mode = "enforce"  # as where a target is given at start
    return Policy(of(asked.default_speedup, policy.default_speedup), target, mode)


def _told(models: Models) -> Response:
    states = {one.model.name: _state(one) for one in models}
    return Response(encode_json(Policies(states)), media_type="application/json")


def _state(pipeline: RoomPipeline) -> PolicyState:
    policy = pipeline.policy
    return PolicyState(
        *(policy.default_speedup, policy.slo_p95_ms, policy.slo_controller), pipeline.slo.floor()
    )
