"""`/info`, `/v1/models` and `/metrics`: what is served, with which limits, and how it goes.

`/info` has TEI's fields under TEI's names, then ours: exits, calibration, limits in effect.
"""

import asyncio
import time
from importlib.metadata import version
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from offramp_model.calibration import CalibrationTable, reachable_speedups
from offramp_model.cost import StepTable
from offramp_model.policies import threshold_range
from offramp_service.models import Models
from offramp_service.pipeline import RoomPipeline
from offramp_service.scheduler import Scheduler
from offramp_service.schemas.reading import encode_json


def router(models: Models) -> APIRouter:
    """The routes that only tell."""
    routes = APIRouter(tags=["info"])
    started = int(time.time())

    async def get_info(request: Request) -> Response:
        """Of the default model, or of the one that is named."""
        models.look()
        content = describe(pipeline := models.of(request.query_params.get("model")))
        if (table := pipeline.model.table) is not None:
            # All of it, for whoever draws it: a request gets the first point that is fast enough.
            curve = [[point.speedup, point.accuracy] for point in table.points]
            content["calibration"]["curve"] = curve
        if len(others := [one.model.name for one in models]) > 1:
            content["models"] = others
        return Response(encode_json(content), media_type="application/json")

    async def get_models() -> Response:
        return Response(encode_json(_cards(models, started)), media_type="application/json")

    async def get_metrics() -> Response:
        models.look()
        # Milliseconds of text formatting: not on the event loop.
        text = await asyncio.to_thread(generate_latest, models.families.registry)
        return Response(text, media_type=CONTENT_TYPE_LATEST)

    routes.add_api_route(
        "/info",
        get_info,
        methods=["GET"],
        response_model=None,
        responses={404: {"description": "Unknown model"}},
        openapi_extra={
            "parameters": [{"name": "model", "in": "query", "schema": {"type": "string"}}]
        },
    )
    routes.add_api_route("/v1/models", get_models, methods=["GET"], response_model=None)
    routes.add_api_route(
        "/metrics",
        get_metrics,
        methods=["GET"],
        response_model=None,
        response_class=PlainTextResponse,
    )
    return routes


def describe(pipeline: RoomPipeline) -> dict[str, Any]:
    """The content of `/info`."""
    settings, model = pipeline.settings, pipeline.model
    ids = dict(enumerate(model.config.labels))
    least, most = threshold_range(model.policy, model.config)
    return {
        "model_id": str(settings.model_id),
        "model_sha": model.sha,
        "model_dtype": model.dtype,
        "served_model_name": model.name,
        "model_type": {
            "classifier": {
                "id2label": {str(index): label for index, label in ids.items()},
                "label2id": {label: index for index, label in ids.items()},
            }
        },
        "max_concurrent_requests": settings.max_concurrent_requests,
        "max_input_length": model.max_input_length,
        "max_batch_tokens": settings.max_batch_tokens,
        "tokenization_workers": settings.tokenization_workers,
        "max_batch_requests": model.max_batch_texts,
        "max_client_batch_size": settings.max_client_batch_size,
        "auto_truncate": settings.auto_truncate,
        "version": version("offramp"),
        "sha": None,
        "docker_label": None,
        # ours
        "model_version": model.version,
        "device": model.device,
        "backend": model.backend,
        "threads": settings.engine_threads,
        "engine_workers": model.engine_workers,
        "max_queued_tokens": settings.max_queued_tokens,
        "max_queued_characters": settings.max_queued_characters,
        "payload_limit": settings.payload_limit,
        "request_timeout_ms": settings.request_timeout_ms,
        "drain_seconds": settings.drain_seconds,
        "shutdown_timeout": settings.shutdown_timeout,
        "problem_type": model.config.problem_type,
        "num_layers": model.num_layers,
        "exit_layers": model.config.exit_layers,
        "exit_policy": model.policy.name,
        "speedup": {
            "default": pipeline.controls.default_speedup,
            "min": model.min_speedup,
            "max": model.max_speedup,
        },
        "slo": pipeline.slo.describe(),
        # The operator's bounds are of `speedup` only; a raw threshold is the client's own.
        "threshold": {"min": least, "max": most, "direction": model.policy.direction},
        "calibration": _calibration(model.table) if model.table else None,
        "layer_cost": _costs(costs) if (costs := pipeline.batcher.scheduler.costs) else None,
        "tei_strict": settings.tei_strict,
        "group_batches": settings.group_batches,
        "backlog_merging": _merging(pipeline.batcher.scheduler),
        "shadow_rate": settings.shadow_rate,
        "speedup_correction": settings.speedup_correction,
    }


def _merging(scheduler: Scheduler) -> str:
    """Asked for or not; and if it stays off all the same, why."""
    if not scheduler.plan.merge_backlog:
        return "off"
    reason = scheduler.why_not_merging
    return "on" if reason is None else f"off: {reason}"


def _costs(table: StepTable) -> dict[str, Any]:
    """Milliseconds of a layer by the tokens of a batch, as measured at start."""
    return {
        "tokens": table.tokens,
        "milliseconds": [round(seconds * 1000, 4) for seconds in table.seconds],
        "knee": table.knee,
    }


def _calibration(table: CalibrationTable) -> dict[str, Any]:
    """The table at the speed-ups that people name, and at its end."""
    named = [table.point_for(speedup) for speedup in reachable_speedups(table.points)]
    points = {point.speedup: point for point in (*named, table.points[-1])}
    return {
        "policy": table.policy,
        "backend": table.backend,
        "dtype": table.dtype,
        "split": table.split,
        "rows": table.rows,
        "max_speedup": table.max_speedup,
        "points": [
            {
                "speedup": point.speedup,
                "accuracy": point.accuracy,
                # JSON has no infinity; null is "never early".
                "threshold": point.threshold if abs(point.threshold) != float("inf") else None,
                "mean_exit_layer": point.mean_exit_layer,
                # After each layer, from 1 on.
                "exit_shares": [round(count / table.rows, 6) for count in point.exit_counts],
            }
            for point in points.values()
        ],
    }


def _cards(models: Models, created: int) -> dict[str, Any]:
    cards = [
        {
            "id": one.model.name,
            "object": "model",
            "created": created,
            "owned_by": "offramp",
            "max_model_len": one.model.max_input_length,
        }
        for one in models
    ]
    return {"object": "list", "data": cards}
