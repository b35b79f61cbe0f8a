"""What V2 clients ask beside inference: server, model, statistics, configuration, index, and that a
model be loaded anew; and the two questions of KServe's V1.
"""

from collections.abc import Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from offramp_service.errors import InvalidInput, NotReady
from offramp_service.models import Models
from offramp_service.pipeline import RoomPipeline
from offramp_service.routes.door import LeanRoute, teller
from offramp_service.routes.infer import WORDING
from offramp_service.schemas import openapi
from offramp_service.schemas.reading import encode_json
from offramp_service.served_model import ServedModel

EXTENSIONS = (
    "classification",
    "binary_tensor_data",
    "parameters",
    "statistics",
    "model_configuration",
    "model_repository",
)
PLATFORM = "offramp"

Tell = Callable[[Request], Awaitable[Response]]

_TO_NAME = str.maketrans("/", "_", "{}")

_TRITON_TYPES = {"BYTES": "TYPE_STRING"}


def router(models: Models) -> APIRouter:
    """The routes."""
    routes = APIRouter(route_class=LeanRoute, tags=["v2"])
    told = _Told(models)

    def add(path: str, tell: Tell, *, method: str = "GET") -> None:
        routes.add_api_route(
            path,
            teller(tell, WORDING),
            methods=[method],
            name=path.strip("/").translate(_TO_NAME),
            response_model=None,
            # "/" is TEI's first of all.
            include_in_schema=path != "/",
            openapi_extra={
                "parameters": openapi.path_parameters(path, models.served),
                "responses": {
                    "200": {"description": "Yes, or what was asked for"},
                    "404": {"description": "Unknown model"},
                    "503": {"description": "Not now"},
                },
            },
        )

    add("/v2", told.server)
    add("/v2/health/live", told.live)
    add("/v2/health/ready", told.ready)
    add("/v2/models", told.models)
    add("/v2/models/stats", told.statistics)
    add("/v2/repository/index", told.index, method="POST")
    add("/v2/repository/models/{model}/load", told.load, method="POST")
    for path in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        add(path, told.metadata)
        add(f"{path}/ready", told.model_ready)
        add(f"{path}/stats", told.statistics)
        add(f"{path}/config", told.configuration)
    add("/v1/models/{model}", told.model_v1)
    add("/", told.alive_v1)
    return routes


class _Told:
    def __init__(self, models: Models) -> None:
        self._models = models

    async def server(self, _: Request) -> Response:
        return _json(
            {"name": PLATFORM, "version": version("offramp"), "extensions": list(EXTENSIONS)}
        )

    async def live(self, _: Request) -> Response:
        alive = self._models.alive or not self._models.lifecycle.started
        return _json({"live": alive}, 200 if alive else 503)

    async def ready(self, _: Request) -> Response:
        ready = self._models.ready
        return _json({"ready": ready}, 200 if ready else 503)

    async def models(self, _: Request) -> Response:
        return _json({"models": [one.model.name for one in self._models]})

    async def index(self, _: Request) -> Response:
        return _json(
            [
                {
                    "name": one.model.name,
                    "version": one.model.version,
                    "state": "READY" if self._models.ready_for(one) else "UNAVAILABLE",
                    "reason": f"checkpoint {one.model.sha}",
                }
                for one in self._models
            ]
        )

    async def load(self, request: Request) -> Response:
        """Triton's way to have a model opened anew; comes back when it is served."""
        name = request.path_params["model"]
        if not self._models.settings.load_over_http:
            raise InvalidInput(
                "models are not loaded over HTTP here; --load-over-http allows it", status=404
            )
        model = await self._models.load(name)
        return _json({"name": model.name, "version": model.version, "sha": model.sha})

    async def metadata(self, request: Request) -> Response:
        return _json(metadata(self._of(request).model))

    async def model_ready(self, request: Request) -> Response:
        pipeline = self._of(request)
        ready = self._models.ready_for(pipeline)
        body = {"name": pipeline.model.name, "ready": ready}
        return _json(body, 200 if ready else 503)

    async def statistics(self, request: Request) -> Response:
        asked = [self._of(request)] if request.path_params else list(self._models)
        found = [
            {"name": one.model.name, "version": one.model.version, **one.metrics.statistics()}
            for one in asked
        ]
        return _json({"model_stats": found})

    async def configuration(self, request: Request) -> Response:
        return _json(configuration(self._of(request).model))

    async def model_v1(self, request: Request) -> Response:
        pipeline = self._of(request)
        if not self._models.ready_for(pipeline):
            raise NotReady("the server is starting or shutting down")
        return _json({"name": pipeline.model.name, "ready": True})

    async def alive_v1(self, _: Request) -> Response:
        return _json({"status": "alive"})

    def _of(self, request: Request) -> RoomPipeline:
        return self._models.of(request.path_params["model"], request.path_params.get("version"))


def metadata(model: ServedModel) -> dict[str, Any]:
    """Name, versions and tensors; -1 is a size that varies."""
    return {
        "name": model.name,
        "versions": [model.version],
        "platform": PLATFORM,
        "inputs": [_tensor(*one) for one in _INPUTS],
        "outputs": [_tensor(*one) for one in _outputs(model)],
    }


def configuration(model: ServedModel) -> dict[str, Any]:
    """Triton's model configuration, as far as its tools read it. Batches are formed from single
    texts, so there is no batch dimension to declare."""
    return {
        "name": model.name,
        "platform": PLATFORM,
        "backend": PLATFORM,
        "max_batch_size": 0,
        "input": [_configured(*one) for one in _INPUTS],
        "output": [_configured(*one) for one in _outputs(model)],
        "instance_group": [{"name": f"{model.name}_0", "count": 1, "kind": _KINDS[model.device]}],
        "model_transaction_policy": {"decoupled": False},
    }


_INPUTS = (("text", "BYTES", [-1]), ("speedup", "FP32", [-1]))
_KINDS = {"cpu": "KIND_CPU", "cuda": "KIND_GPU"}


def _outputs(model: ServedModel) -> list[tuple[str, str, list[int]]]:
    labels = len(model.config.labels)
    return [
        ("logits", "FP32", [-1, labels]),
        ("probabilities", "FP32", [-1, labels]),
        ("label", "BYTES", [-1]),
        ("exit_layer", "INT32", [-1]),
    ]


def _tensor(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    return {"name": name, "datatype": datatype, "shape": shape}


def _configured(name: str, datatype: str, shape: list[int]) -> dict[str, Any]:
    kind = _TRITON_TYPES.get(datatype, f"TYPE_{datatype}")
    return {"name": name, "data_type": kind, "dims": shape, "optional": name == "speedup"}


def _json(content: object, status: int = 200) -> Response:
    return Response(encode_json(content), status, media_type="application/json")
