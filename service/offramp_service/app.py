"""`create_app(settings)`: wiring and lifespan only.

Life of a request: a door in `routes/` reads it → `batcher` admits it → `pipeline` tokenises →
`batcher` queues it → `scheduler` says when, and with whom → `engine`, in its own thread, runs the
layers and answers each text where it leaves → the door words the response.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_model.cost import StepTable
from offramp_service.api_keys import Keyring
from offramp_service.batcher import Batcher, Limits
from offramp_service.controls import full_depth
from offramp_service.engine import Engine
from offramp_service.engine_thread import EngineThread
from offramp_service.errors import NotReady, ServiceError, Unauthorized
from offramp_service.gate import Gate
from offramp_service.jobs import Engine as Computes
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Metrics, QualityView
from offramp_service.pipeline import Pipeline
from offramp_service.quality import ExitWatch, SpeedupCorrection
from offramp_service.request_log import RequestLog
from offramp_service.routes import classify, infer, info, predict, probes, v2
from offramp_service.routes.door import CALL, WORDING, Call
from offramp_service.scheduler import Plan, Scheduler
from offramp_service.served_model import ServedModel, SettingsError, load_model
from offramp_service.settings import Settings
from offramp_service.shadow import ShadowWatch
from offramp_service.witness import Record, Witness

if TYPE_CHECKING:
    from offramp_service.tracing import Tracer

log = logging.getLogger(__name__)

DOORS = (predict, classify, infer)

TYPICAL_SPEEDUP = 2.0
"""At which the device lane expects texts to leave, unless the default is faster: how often it moves
the survivors goes by that, never who leaves."""

# A batch that still runs when everybody has been answered gets so long to end by itself.
_JOIN_S = 1.0


def create_app(
    settings: Settings, model: ServedModel | None = None, *, computes: Computes | None = None
) -> FastAPI:
    """The application for one model; loads it unless an opened one is given. `computes` answers
    batches in place of the model's engine, so that all the rest can be measured.

    Raises:
        CheckpointError, SettingsError: see `load_model`; the latter also where traces are asked
            for and the extra for them is not installed.
        KeyFileError: see `Keyring`.
    """
    keys, tracer = _keyring(settings), _tracer(settings)
    model = model or load_model(settings)
    metrics = Metrics(
        CollectorRegistry(),
        model_name=model.name,
        model_version=model.version,
        num_layers=model.num_layers,
        routes=[path for one in DOORS for path in one.PATHS],
    )

    def make_engine() -> Engine:
        return Engine(
            model.stack, model.policy, device=model.tensor_device, threads=model.torch_threads
        )

    engine = make_engine()
    limits = Limits(settings.max_concurrent_requests, settings.max_queued_tokens)
    correction = SpeedupCorrection() if settings.speedup_correction else None
    exits, shadow = ExitWatch(model.num_layers, correction), _shadow(settings, model)
    scheduler = Scheduler(_plan(settings, model))
    batcher = Batcher(computes or engine, scheduler, limits, metrics, exits=exits, shadow=shadow)
    lifecycle = Lifecycle()
    pipeline = Pipeline(settings, model, batcher, metrics, lifecycle, correction)

    def prepare() -> None:
        costs = _warm(engine, settings, model)
        if costs is None and settings.warmup:
            costs = engine.measure(settings.max_batch_tokens, model.max_input_length)
        if costs is not None:
            # A batch in the device lane runs to its end as one graph.
            batcher.scheduler.learn(costs, can_join=not engine.has_lane)
            _log_costs(costs, batcher.scheduler)

    def rebuild() -> Engine:
        another = make_engine()
        _warm(another, settings, model)  # what layers cost is known
        metrics.engine_rebuilt()
        return another

    def died() -> None:
        batcher.close("the engine has stopped")
        lifecycle.died.set()

    thread = EngineThread(batcher, prepare=prepare, rebuild=rebuild, died=died)

    def engine_alive() -> bool:
        return thread.is_alive() and not batcher.stuck

    def ready() -> bool:
        return lifecycle.ready and engine_alive() and not thread.rebuilding

    metrics.watch_service(ready=ready, inflight=lambda: lifecycle.inflight)
    _watch(metrics, exits, correction)
    _describe(metrics, model)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await thread.warm()
        lifecycle.warmed()
        try:
            yield
        finally:
            lifecycle.phase = "closed"
            batcher.close()
            pipeline.close()
            await asyncio.to_thread(thread.join, _JOIN_S)
            if tracer is not None:
                await asyncio.to_thread(tracer.close)

    app = FastAPI(
        title="offramp",
        version=version("offramp"),
        summary="Text classification that answers as soon as it is sure.",
        lifespan=lifespan,
    )
    for one in DOORS:
        # Not `include_router`: it would look every request's path up twice more (0.04 ms).
        app.router.routes.extend(one.router(pipeline).routes)
    app.include_router(v2.router(pipeline, live=engine_alive, ready=ready))
    app.include_router(probes.router(lifecycle, engine_alive=engine_alive, ready=ready))
    app.include_router(info.router(pipeline))
    respond = _map_errors(app, metrics)
    # The one added last is the first that a request meets.
    if keys is not None:
        wordings = {path: one.wording(settings) for one in DOORS for path in one.PATHS}
        app.add_middleware(Gate, keys=keys, doors=wordings, refuse=respond)
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
    app.add_middleware(_Farewell, lifecycle=lifecycle)
    if listeners := _listeners(settings, tracer):
        app.add_middleware(Witness, listeners=listeners)
    app.state.pipeline = pipeline
    return app


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


def _keyring(settings: Settings) -> Keyring | None:
    """None: everybody may ask."""
    key, path = settings.api_key, settings.api_key_file
    if key is None and path is None:
        return None
    return Keyring(key.get_secret_value() if key is not None else None, path)


def _tracer(settings: Settings) -> "Tracer | None":
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


def _plan(settings: Settings, model: ServedModel) -> Plan:
    return Plan(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_texts=model.max_batch_texts,
        group_alike=settings.group_batches,
        merge_backlog=settings.backlog_merging,
        layers_per_step=model.num_layers / len(model.config.exit_layers),
    )


def _warm(engine: Engine, settings: Settings, model: ServedModel) -> StepTable | None:
    """What a layer costs, where the device lane had to find out."""
    engine.warm_up(model.max_input_length)
    return _open_lane(engine, settings, model) if model.tensor_device == "cuda" else None


def _shadow(settings: Settings, model: ServedModel) -> ShadowWatch | None:
    rate = settings.shadow_rate
    return ShadowWatch(rate, full_depth(model)) if rate else None


def _open_lane(engine: Engine, settings: Settings, model: ServedModel) -> StepTable | None:
    """Run batches on the device without the host in between, where the lane covers the model."""
    try:
        return engine.open_lane(
            max_tokens=settings.max_batch_tokens,
            max_rows=model.max_batch_texts,
            survival=model.survival(max(model.default_speedup, TYPICAL_SPEEDUP)),
        )
    except ValueError as error:
        log.warning("the host counts survivors at every exit: %s", error)
        return None


def _log_costs(costs: StepTable, scheduler: Scheduler) -> None:
    log.info(
        "a layer takes %.3g ms for %d tokens, %.3g ms for %d; the knee is at %d tokens",
        *(costs.seconds[0] * 1000, costs.tokens[0], costs.seconds[-1] * 1000, costs.tokens[-1]),
        costs.knee,
    )
    if scheduler.plan.merge_backlog and (reason := scheduler.why_not_merging):
        log.warning("--backlog-merging stays off: %s", reason)


def _watch(metrics: Metrics, exits: ExitWatch, correction: SpeedupCorrection | None) -> None:
    metrics.watch_quality(
        QualityView(
            texts=lambda: exits.texts,
            share_drift=lambda: exits.share_drift,
            speedup_drift=lambda: exits.speedup_drift,
            correction=lambda: correction.factor if correction is not None else 1.0,
        )
    )


def _describe(metrics: Metrics, model: ServedModel) -> None:
    metrics.describe_model(
        default_speedup=model.default_speedup,
        facts={
            "model_sha": model.sha,
            "dtype": model.dtype,
            "device": model.device,
            "exit_policy": model.policy.name,
            "num_layers": str(model.num_layers),
        },
    )


def _map_errors(
    app: FastAPI, metrics: Metrics
) -> Callable[[Request, Exception], Awaitable[Response]]:
    """The one place where errors become responses; the wording is the door's. Returns what makes
    them, for who stands before the routes."""

    async def service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        call: Call | None = request.scope.get(CALL)
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
