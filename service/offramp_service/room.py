"""A room: one model, ready to answer. Its engine and the threads that run it, its queue, its doors'
pipeline.

A server has a room for each model that it serves; when a checkpoint is loaded anew, a new room is
opened beside the old one, and the old one is closed when it is empty. It knows nothing about HTTP,
nor about other rooms.
"""

import asyncio
import logging
from collections.abc import Callable

from offramp_model.cost import StepTable
from offramp_service.batcher import Batcher, Limits
from offramp_service.controls import full_depth
from offramp_service.engine import Engine
from offramp_service.engine_thread import EngineThreads
from offramp_service.errors import InvalidInput
from offramp_service.jobs import Engine as Computes
from offramp_service.lifecycle import Lifecycle
from offramp_service.metrics import Families, Metrics, QualityView
from offramp_service.pipeline import RoomPipeline
from offramp_service.quality import ExitWatch, SpeedupCorrection
from offramp_service.scheduler import Plan, Scheduler
from offramp_service.served_model import ServedModel
from offramp_service.settings import Settings
from offramp_service.shadow import ShadowWatch
from offramp_service.slo_watch import SloWatch
from offramp_service.turns import Device

log = logging.getLogger(__name__)

TYPICAL_SPEEDUP = 2.0
"""At which the device lane expects texts to leave, unless the default is faster: how often it moves
the survivors goes by that, never who leaves."""

# A batch that still runs when everybody has been answered gets so long to end by itself.
_JOIN_S = 1.0


class Room:
    """One model and all that answers for it. `died` is called on the event loop when its engine can
    answer no more. `computes` answers batches in place of the engine, so that all the rest can be
    measured."""

    def __init__(
        self,
        settings: Settings,
        model: ServedModel,
        families: Families,
        lifecycle: Lifecycle,
        device: Device,
        *,
        died: Callable[["Room"], None],
        computes: Computes | None = None,
    ) -> None:
        self._settings, self.model, self._lifecycle = settings, model, lifecycle
        workers = model.engine_workers
        self._turns = [device.turn(sharing=workers) for _ in range(workers)]
        self._tell_of_death = died
        self._engine = self._make_engine()
        self._metrics = Metrics(
            families,
            model_name=model.name,
            model_version=model.version,
            num_layers=model.num_layers,
        )
        correction = SpeedupCorrection() if settings.speedup_correction else None
        self._exits, self._correction = ExitWatch(model.num_layers, correction), correction
        rate = settings.shadow_rate
        self.batcher = Batcher(
            computes or self._engine,
            Scheduler(_plan(settings, model)),
            Limits(settings.max_concurrent_requests, settings.max_queued_tokens),
            self._metrics,
            exits=self._exits,
            shadow=ShadowWatch(rate, full_depth(model)) if rate else None,
            turns=self._turns,
        )
        batcher = self.batcher
        slo = SloWatch(settings, model, lambda: batcher.load, self._metrics)
        self.pipeline = RoomPipeline(settings, model, batcher, self._metrics, slo, correction)
        self.policy_at_start = self.pipeline.policy
        self._threads = EngineThreads(
            *(self.batcher, workers),
            prepare=self._prepare,
            rebuild=self._rebuild,
            died=self._died,
        )

    @property
    def alive(self) -> bool:
        """The engine runs and is not stuck."""
        return self._threads.alive and not self.batcher.stuck

    @property
    def ready(self) -> bool:
        return self.alive and not self._threads.rebuilding

    async def warm(self) -> None:
        """Start, and come back when the first text can be answered.

        Raises:
            Exception: whatever the model's first passes raise.
        """
        await self._threads.warm()

    def show(self, before: "Room | None" = None) -> None:
        """From now on the metrics' gauges are of this room, which takes over what the one before
        had found out about the traffic."""
        if before is not None and before._correction is not None and self._correction is not None:
            self._correction.factor = before._correction.factor
        self.batcher.show()
        self.pipeline.slo.show(before.pipeline.slo if before is not None else None)
        self._metrics.watch_service(
            ready=lambda: self._lifecycle.ready and self.ready,
            alive=lambda: self.alive,
            inflight=lambda: self._lifecycle.inflight,
        )
        exits, correction = self._exits, self._correction
        self._metrics.watch_quality(
            QualityView(
                texts=lambda: exits.texts,
                share_drift=lambda: exits.share_drift,
                speedup_drift=lambda: exits.speedup_drift,
                correction=lambda: correction.factor if correction is not None else 1.0,
            )
        )
        self._metrics.describe_model(
            default_speedup=self.model.default_speedup,
            facts={
                "model_sha": self.model.sha,
                "dtype": self.model.dtype,
                "device": self.model.device,
                "exit_policy": self.model.policy.name,
                "num_layers": str(self.model.num_layers),
            },
        )
        if before is not None:
            self._go_on_from(before)

    def _go_on_from(self, before: "Room") -> None:
        """Keep what an operator has changed, if this checkpoint can."""
        if before.pipeline.policy == before.policy_at_start:
            return
        try:
            self.pipeline.follow(before.pipeline.policy)
        except InvalidInput as error:
            log.warning("the policy is that of the settings again: %s", error)

    async def close(self, farewell: str = "the server is shutting down") -> None:
        """Let go of whoever is still waiting, and end the engine's threads."""
        self.batcher.close(farewell)
        self.pipeline.close()
        await asyncio.to_thread(self._threads.join, _JOIN_S)

    # -- engine threads ----------------------------------------------------------------------

    def _make_engine(self) -> Engine:
        model = self.model
        return Engine(model.stack, model.policy, torch_threads=model.torch_threads)

    def _prepare(self, worker: int) -> None:
        engine, settings, model = self._engine, self._settings, self.model
        costs = _warm(engine, settings, model)
        if worker > 0:
            return  # what the first has found out holds for all
        if costs is None and settings.warmup:
            costs = engine.measure(
                settings.max_batch_tokens, model.max_input_length, turn=self._turns[0]
            )
        if costs is not None:
            # A batch in the device lane runs to its end as one graph.
            self.batcher.scheduler.learn(costs, can_join=not engine.has_lane)
            _log_costs(costs, self.batcher.scheduler)

    def _rebuild(self) -> Engine:
        self._engine = self._make_engine()
        _warm(self._engine, self._settings, self.model)  # what layers cost is known
        self._metrics.engine_rebuilt()
        return self._engine

    def _died(self) -> None:
        self.batcher.close("the engine has stopped")
        self._tell_of_death(self)


def _plan(settings: Settings, model: ServedModel) -> Plan:
    return Plan(
        max_batch_tokens=settings.max_batch_tokens,
        max_batch_texts=model.max_batch_texts,
        workers=model.engine_workers,
        group_alike=settings.group_batches,
        merge_backlog=settings.backlog_merging,
        layers_per_step=model.num_layers / len(model.config.exit_layers),
    )


def _warm(engine: Engine, settings: Settings, model: ServedModel) -> StepTable | None:
    """What a layer costs, where the device lane had to find out."""
    engine.warm_up(model.max_input_length)
    return _open_lane(engine, settings, model) if model.tensor_device == "cuda" else None


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
