"""`create_app(settings)`: wiring and lifespan only.

Life of a request: a door in `routes/` reads it → `batcher` admits it → `pipeline` tokenises →
`batcher` queues it → `scheduler` says when, and with whom → `engine`, in its own thread, runs the
layers and answers each text where it leaves → the door words the response.
"""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from importlib.metadata import version

from fastapi import FastAPI, Request
from prometheus_client import CollectorRegistry
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from offramp_model.cost import StepTable
from offramp_service.batcher import Batcher, Limits
from offramp_service.engine import Engine
from offramp_service.errors import NotReady, ServiceError
from offramp_service.jobs import Engine as Computes
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Metrics
from offramp_service.pipeline import Pipeline
from offramp_service.routes import classify, info, probes
from offramp_service.routes.door import CALL, Call
from offramp_service.scheduler import Plan, Scheduler
from offramp_service.schemas import error_body
from offramp_service.served_model import ServedModel, load_model
from offramp_service.settings import Settings

log = logging.getLogger(__name__)

DOORS = (classify,)

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
        CheckpointError, SettingsError: see `load_model`.
    """
    model = model or load_model(settings)
    metrics = Metrics(
        CollectorRegistry(),
        model_name=model.name,
        model_version=model.version,
        num_layers=model.num_layers,
        routes=[path for one in DOORS for path in one.PATHS],
    )
    engine = Engine(
        model.stack, model.policy, device=model.tensor_device, threads=model.torch_threads
    )
    limits = Limits(settings.max_concurrent_requests, settings.max_queued_tokens)
    batcher = Batcher(computes or engine, Scheduler(_plan(settings, model)), limits, metrics)
    lifecycle = Lifecycle()
    pipeline = Pipeline(settings, model, batcher, metrics, lifecycle)

    def prepare() -> None:
        engine.warm_up(model.max_input_length)
        costs = _open_lane(engine, settings, model) if model.tensor_device == "cuda" else None
        if costs is None and settings.warmup:
            costs = engine.measure(settings.max_batch_tokens, model.max_input_length)
        if costs is not None:
            # A batch in the device lane runs to its end as one graph.
            batcher.scheduler.learn(costs, can_join=not engine.has_lane)
            _log_costs(costs, batcher.scheduler)

    thread = _EngineThread(prepare, batcher)

    def engine_alive() -> bool:
        return thread.is_alive() and not batcher.stuck

    def ready() -> bool:
        return lifecycle.ready and engine_alive()

    metrics.watch_service(ready=ready, inflight=lambda: lifecycle.inflight)
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

    app = FastAPI(
        title="offramp",
        version=version("offramp"),
        summary="Text classification that answers as soon as it is sure.",
        lifespan=lifespan,
    )
    for one in DOORS:
        # Not `include_router`: it would look every request's path up twice more (0.04 ms).
        app.router.routes.extend(one.router(pipeline).routes)
    app.include_router(probes.router(lifecycle, engine_alive=engine_alive, ready=ready))
    app.include_router(info.router(pipeline))
    _map_errors(app, metrics)
    app.add_middleware(_Farewell, lifecycle=lifecycle)
    app.state.pipeline = pipeline
    return app


class _EngineThread(threading.Thread):
    """The one thread that computes: prepares the engine, then serves batches until closed.

    A daemon, so that a batch that never ends cannot keep the process alive.
    """

    def __init__(self, prepare: Callable[[], None], batcher: Batcher) -> None:
        super().__init__(name="engine", daemon=True)
        self._prepare, self._batcher = prepare, batcher

    async def warm(self) -> None:
        """Start, and come back when the engine is warm."""
        self._loop = asyncio.get_running_loop()
        self._warm: asyncio.Future[None] = self._loop.create_future()
        self.start()
        await self._warm

    def run(self) -> None:
        try:
            self._prepare()
        except Exception as error:
            self._loop.call_soon_threadsafe(self._warm.set_exception, error)
            return
        self._loop.call_soon_threadsafe(self._warm.set_result, None)
        try:
            self._batcher.serve()
        except BaseException:
            log.critical("the engine thread died", exc_info=True)
            self._loop.call_soon_threadsafe(self._batcher.close, "the engine has stopped")


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


def _plan(settings: Settings, model: ServedModel) -> Plan:
    return Plan(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_texts=model.max_batch_texts,
        group_alike=settings.group_batches,
        merge_backlog=settings.backlog_merging,
        layers_per_step=model.num_layers / len(model.config.exit_layers),
    )


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


def _map_errors(app: FastAPI, metrics: Metrics) -> None:
    """The one place where errors become responses; the wording is the door's."""

    async def service_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, ServiceError)
        call: Call | None = request.scope.get(CALL)
        headers = {}
        if call is not None:
            metrics.request_done(call.route, error.status, call.seconds)
            headers["x-request-id"] = call.request_id
            # Without the message, which may repeat a piece of a text.
            log.debug("request %s: %d %s", call.request_id, error.status, error.kind)
        metrics.request_failed(error.reason)
        if error.retry_after_s is not None:
            headers["retry-after"] = str(error.retry_after_s)
        if isinstance(error, NotReady):
            headers["connection"] = "close"  # the next try should reach another replica
        body = (call.error_body if call is not None else error_body)(error)
        return Response(body, error.status, headers, "application/json")

    async def no_such_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        failure = ServiceError(error.detail)
        failure.status = error.status_code
        failure.kind = HTTPStatus(error.status_code).name.lower()
        return Response(error_body(failure), error.status_code, error.headers, "application/json")

    app.add_exception_handler(ServiceError, service_error)
    app.add_exception_handler(HTTPException, no_such_route)
