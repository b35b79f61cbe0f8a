"""The service's Prometheus metrics: names, labels, buckets, and one method per event.

Made once per app on the app's own registry, so that two apps in one process do not collide. Every
series exists from the start and no label takes a value that a client chose, so the number of
series is fixed. Gauges of the queue are read from the queue when somebody scrapes.

It knows nothing about HTTP, threads or tensors; whoever sees an event calls the method.
"""

import math
import threading
import time
from bisect import bisect_right
from collections import Counter as Tally
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from offramp_service.errors import Reason
from offramp_service.jobs import DispatchReason, ExitReason
from offramp_service.slo import Direction

Passed = Literal["unchanged", "shrunk", "ended"]
"""What an exit did to a batch: nobody left, some did and the rest ran on, or the last ones did."""

CODES = (200, 400, 401, 404, 413, 422, 424, 429, 499, 500, 503, 504)
SECONDS = (
    *(0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05),
    *(0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS = (16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)
SPEEDUPS = (1.0, 1.1, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0, 8.0, 12.0)

_TASKS = Path("/proc/self/task")


@dataclass(frozen=True, slots=True)
class QueueView:
    """What a scrape reads from the queue."""

    requests: Callable[[], float]
    tokens: Callable[[], float]
    layer_work: Callable[[], float]


@dataclass(slots=True)
class Outcomes:
    """Requests by how they ended, with their seconds; `last_good` in seconds since the epoch."""

    good: int = 0
    good_s: float = 0.0
    bad: int = 0
    bad_s: float = 0.0
    last_good: float = 0.0

    def add(self, *, good: bool, seconds: float) -> None:
        if good:
            self.good += 1
            self.good_s += seconds
            self.last_good = time.time()
        else:
            self.bad += 1
            self.bad_s += seconds


@dataclass(frozen=True, slots=True)
class QualityView:
    """What a scrape reads from the quality watch."""

    texts: Callable[[], float]
    share_drift: Callable[[], float]
    speedup_drift: Callable[[], float]
    correction: Callable[[], float]


Kind = TypeVar("Kind", Counter, Gauge, Histogram)


class Families:
    """The metrics of one registry, each registered once; models share them and are told apart by
    their labels. Exit layers are counted up to `most_layers`, requests by `routes`."""

    def __init__(
        self, registry: CollectorRegistry, most_layers: int, routes: Sequence[str]
    ) -> None:
        self.registry, self.most_layers, self.routes = registry, most_layers, routes
        self.outcomes: dict[tuple[str, str], Outcomes] = {}
        self.exit_counts: dict[tuple[str, str], list[int]] = {}
        self.counting = threading.Lock()  # of what is not prometheus_client's
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        _describe_process(registry)

    def get(
        self, kind: type[Kind], name: str, text: str, labels: Sequence[str], **how: Any
    ) -> Kind:
        """The family of that name."""
        if name not in self._made:
            self._made[name] = kind(name, text, labels, registry=self.registry, **how)
        family = self._made[name]
        assert isinstance(family, kind)
        return family


class Metrics:
    """All metrics of one served model. Made again for the same name and version, it goes on with
    the same series."""

    def __init__(
        self, families: Families, *, model_name: str, model_version: str, num_layers: int
    ) -> None:
        self._families, self.registry = families, families.registry
        self._num_layers = num_layers
        self._outcomes = families.outcomes.setdefault((model_name, model_version), Outcomes())
        self._exit_counts = families.exit_counts.setdefault(
            (model_name, model_version), [0] * families.most_layers
        )
        self._model = {"model_name": model_name, "model_version": model_version}
        self._make_request_metrics(families.routes)
        self._make_exit_metrics()
        self._make_batch_metrics()
        self._make_shadow_metrics()
        self._make_gauges()
        self._make_slo_metrics()

    # -- the series --------------------------------------------------------------------------

    def _make_request_metrics(self, routes: Sequence[str]) -> None:
        requests = self._counter("requests_total", "Requests answered", "route", "code")
        self._requests = {
            (route, code): self._child(requests, route=route, code=str(code))
            for route in routes
            for code in CODES
        }
        failures = self._counter("request_failures_total", "Requests that failed", "reason")
        self._failures = {
            reason: self._child(failures, reason=reason) for reason in get_args(Reason)
        }
        self._request_s = self._seconds("request_duration_seconds", "From request to answer")
        self._tokenization_s = self._seconds("tokenization_duration_seconds", "Text to tokens")
        self._speedup_requested = self._histogram(
            "speedup_requested", "Speed-up that an answered request asked for, in layers", SPEEDUPS
        )
        self._speedup_achieved = self._histogram(
            "speedup_achieved",
            "Speed-up that such a request got, in layers. The mean over requests is not the "
            "speed-up of the traffic, see offramp_speedup_layers_total",
            SPEEDUPS,
        )
        layers = self._counter(
            "speedup_layers_total",
            "Text-layers of answered requests by the speed-up that they asked for, rounded down to "
            "a class. What a class got is all kinds over kind run, a ratio of sums",
            *("speedup", "kind"),
        )
        self._speedup_layers = [
            tuple(self._child(layers, speedup=f"{least:g}", kind=k) for k in ("run", "saved"))
            for least in SPEEDUPS
        ]

    def _make_exit_metrics(self) -> None:
        layers = range(1, self._num_layers + 1)
        self._samples = self._child(self._counter("samples_total", "Texts answered"))
        exits = self._counter("exits_total", "Texts that left after a layer", "layer", "reason")
        self._exits = {
            (layer, reason): self._child(exits, layer=str(layer), reason=reason)
            for layer in layers
            for reason in get_args(ExitReason)
        }
        runs = self._counter(
            "layer_executions_total", "Texts that ran a layer, answered in the end or not", "layer"
        )
        self._runs = [self._child(runs, layer=str(layer)) for layer in layers]
        self._saved = self._child(
            self._counter("layers_saved_total", "Text-layers that answered texts did not run")
        )
        self._exit_layer = self._histogram(
            "exit_layer",
            "Layer after which a text left",
            tuple(range(1, self._families.most_layers + 1)),
        )
        passed = self._counter(
            "batch_exits_total",
            "Exits that batches came to: nobody left (unchanged), some did and the others ran on "
            "without them (shrunk), or the last ones did (ended)",
            "outcome",
        )
        self._passed = {
            outcome: self._child(passed, outcome=outcome) for outcome in get_args(Passed)
        }
        survivors = self._histogram_family(
            "layer_batch_size", "Texts of a batch that ran a layer", SIZES, "layer"
        )
        self._survivors = [self._child(survivors, layer=str(layer)) for layer in layers]

    def _make_shadow_metrics(self) -> None:
        compared = self._counter(
            "shadow_agreement_total",
            "Texts that left early and were run again to the end, by where they had left: is the "
            "last exit's label the same?",
            *("layer", "agree"),
        )
        self._agreement = {
            (layer, agrees): self._child(compared, layer=str(layer), agree=str(agrees).lower())
            for layer in range(1, self._num_layers)
            for agrees in (True, False)
        }
        self._shadows_dropped = self._child(
            self._counter(
                "shadow_dropped_total",
                "Texts drawn for a second run that were not compared: no room, or it failed",
            )
        )
        self._shadow_runs = self._child(
            self._counter(
                "shadow_layer_executions_total",
                "Text-layers of second runs; in no other series of texts, layers, batches or time",
            )
        )

    def _make_batch_metrics(self) -> None:
        tokens = self._counter("tokens_total", "Tokens computed", "kind")
        self._real_tokens = self._child(tokens, kind="real")
        self._child(tokens, kind="padding")  # stays 0: batches are packed
        self._queue_s = self._seconds("queue_duration_seconds", "From admission to batch")
        self._inference_s = self._seconds(
            "inference_duration_seconds", "From batch to exit, of answered texts"
        )
        self._busy_s = self._child(
            self._counter(
                "engine_busy_seconds_total",
                "Time spent on batches, whatever became of them; a second is one of all workers",
            )
        )
        self._rebuilds = self._child(
            self._counter("engine_rebuilds_total", "Times that a crashed engine was built anew")
        )
        self._oldest_s = self._seconds("oldest_wait_seconds", "Longest wait in a batch")
        self._batch_size = self._histogram("batch_size", "Texts in a batch", SIZES)
        self._batch_tokens = self._histogram("batch_tokens", "Tokens in a batch", TOKENS)
        dispatched = self._counter(
            "batch_dispatch_total", "Batches, by what ended their forming", "reason"
        )
        self._dispatched = {
            reason: self._child(dispatched, reason=reason) for reason in get_args(DispatchReason)
        }

    def _make_gauges(self) -> None:
        self._queue_requests = self._gauge("queue_requests", "Texts waiting for the engine")
        self._queue_tokens = self._gauge("queue_tokens", "Tokens waiting for the engine")
        self._queue_work = self._gauge(
            "queue_layer_work", "Layer executions that the waiting texts are expected to need"
        )
        self._inflight = self._gauge("inflight_requests", "Requests being answered")
        self._default_speedup = self._gauge("default_speedup", "For requests that name none")
        self._ready = self._gauge("ready", "1 while /readyz says yes")
        self._alive = self._gauge("alive", "1 while the engine runs and is not stuck, as in /livez")
        self._watched_texts = self._gauge(
            "drift_texts", "Last texts that asked for a speed-up; what drift is computed from"
        )
        self._share_drift = self._gauge(
            "exit_share_drift",
            "Population stability index of where these texts left against calibration, for the "
            "speed-ups they asked for: 0 is none, above 0.25 is a shift",
        )
        self._speedup_drift = self._gauge(
            "speedup_drift",
            "Speed-up that these texts achieved over what calibration gives for what they asked",
        )
        self._correction = self._gauge(
            "speedup_correction", "What requested speed-ups are multiplied with; 1 is as asked"
        )
        self._speedup_drift.set(1)
        self._correction.set(1)

    def _make_slo_metrics(self) -> None:
        adjustments = self._counter(
            "controller_adjustments_total", "Moves of the speed-up floor", "direction"
        )
        self._adjustments = {
            direction: self._child(adjustments, direction=direction)
            for direction in get_args(Direction)
        }
        self._slo_target = self._gauge("slo_target_seconds", "p95 to keep; NaN: no target")
        self._slo_p95 = self._gauge(
            "slo_p95_seconds", "p95 as the controller sees it; NaN: too few requests"
        )
        self._speedup_floor = self._gauge(
            "speedup_floor",
            "Speed-up to which the controller raises requests, or would if it only observes",
        )
        self._expected_accuracy = self._gauge(
            "expected_accuracy",
            "Calibrated accuracy at the default speed-up, raised to the floor; NaN: no calibration",
        )
        self._slo_target.set(math.nan)

    # -- events ------------------------------------------------------------------------------

    def request_done(self, route: str, code: int, seconds: float) -> None:
        self._requests[route, code].inc()
        self._request_s.observe(seconds)
        self._outcomes.add(good=code == 200, seconds=seconds)

    def request_failed(self, reason: Reason) -> None:
        self._failures[reason].inc()

    def tokenized(self, seconds: float) -> None:
        self._tokenization_s.observe(seconds)

    def speedup_given(self, requested: float, texts: int, layers_run: int) -> None:
        """A request that asked for a speed-up was answered."""
        full = texts * self._num_layers
        self._speedup_requested.observe(requested)
        self._speedup_achieved.observe(full / layers_run)
        run, saved = self._speedup_layers[bisect_right(SPEEDUPS, requested) - 1]
        run.inc(layers_run)
        saved.inc(full - layers_run)

    def batch_formed(self, reason: DispatchReason, tokens: int, waits_s: Sequence[float]) -> None:
        self._dispatched[reason].inc()
        self._batch_size.observe(len(waits_s))
        self._batch_tokens.observe(tokens)
        self._real_tokens.inc(tokens)
        self._oldest_s.observe(max(waits_s))
        for wait in waits_s:
            self._queue_s.observe(wait)

    def texts_left(self, layer: int, exits: Sequence[tuple[ExitReason, float]]) -> None:
        """Texts that left together after a layer: why, and seconds since their batch was formed."""
        for reason, count in Tally(reason for reason, _ in exits).items():
            self._exits[layer, reason].inc(count)
        with self._families.counting:  # workers count at the same time
            self._exit_counts[layer - 1] += len(exits)
        self._samples.inc(len(exits))
        self._saved.inc(len(exits) * (self._num_layers - layer))
        for _, inference_s in exits:
            self._exit_layer.observe(layer)
            self._inference_s.observe(inference_s)

    def layers_ran(self, layers: range, texts: int, leaving: int) -> None:
        """So many texts of one batch ran these layers to an exit, where so many of them left,
        whatever becomes of their answers."""
        for layer in layers:
            self._runs[layer - 1].inc(texts)
            self._survivors[layer - 1].observe(texts)
        outcome: Passed = "ended" if leaving == texts else "shrunk" if leaving else "unchanged"
        self._passed[outcome].inc()

    def engine_worked(self, seconds: float) -> None:
        self._busy_s.inc(seconds)

    def engine_rebuilt(self) -> None:
        self._rebuilds.inc()

    def shadow_compared(self, layer: int, *, agrees: bool) -> None:
        """A text that had left after a layer came out of its second run."""
        self._agreement[layer, agrees].inc()

    def shadows_dropped(self, texts: int) -> None:
        self._shadows_dropped.inc(texts)

    def shadow_layers_ran(self, layers: range, texts: int) -> None:
        """So many texts of a shadow batch ran these layers."""
        self._shadow_runs.inc(len(layers) * texts)

    def floor_moved(self, direction: Direction) -> None:
        self._adjustments[direction].inc()

    @property
    def exit_counts(self) -> list[int]:
        """Texts that have left after each layer, for whoever looks too often for a scrape."""
        return self._exit_counts[: self._num_layers]

    # -- Triton's statistics -----------------------------------------------------------------

    def statistics(self) -> dict[str, Any]:
        """The same counts under the names of the Open Inference Protocol's extension: requests
        that succeeded and failed; texts that waited and were computed; batches. Durations are
        sums, in nanoseconds."""
        nothing = {"count": 0, "ns": 0}
        return {
            "last_inference": int(self._outcomes.last_good * 1000),
            "inference_count": int(self._total("samples_total")),
            "execution_count": int(self._total("batch_size_count")),
            "inference_stats": {
                "success": _count(self._outcomes.good, self._outcomes.good_s),
                "fail": _count(self._outcomes.bad, self._outcomes.bad_s),
                "queue": self._durations("queue_duration_seconds"),
                "compute_input": self._durations("tokenization_duration_seconds"),
                "compute_infer": self._durations("inference_duration_seconds"),
                "compute_output": nothing,
                "cache_hit": nothing,
                "cache_miss": nothing,
            },
            "batch_stats": [],
        }

    def _durations(self, name: str) -> dict[str, int]:
        return _count(self._total(f"{name}_count"), self._total(f"{name}_sum"))

    def _total(self, name: str) -> float:
        return self.registry.get_sample_value(f"offramp_{name}", self._model) or 0.0

    # -- gauges ------------------------------------------------------------------------------

    def slo_set(self, target_s: float) -> None:
        self._slo_target.set(target_s)

    def slo_seen(self, *, p95_s: float, floor: float, expected_accuracy: float) -> None:
        self._slo_p95.set(p95_s)
        self._speedup_floor.set(floor)
        self._expected_accuracy.set(expected_accuracy)

    def watch_queue(self, queue: QueueView) -> None:
        self._queue_requests.set_function(queue.requests)
        self._queue_tokens.set_function(queue.tokens)
        self._queue_work.set_function(queue.layer_work)

    def watch_quality(self, quality: QualityView) -> None:
        self._watched_texts.set_function(quality.texts)
        self._share_drift.set_function(quality.share_drift)
        self._speedup_drift.set_function(quality.speedup_drift)
        self._correction.set_function(quality.correction)

    def watch_service(
        self,
        *,
        ready: Callable[[], float],
        alive: Callable[[], float],
        inflight: Callable[[], float],
    ) -> None:
        self._ready.set_function(ready)
        self._alive.set_function(alive)
        self._inflight.set_function(inflight)

    def default_speedup_set(self, speedup: float) -> None:
        self._default_speedup.set(speedup)

    def describe_model(self, *, default_speedup: float, facts: dict[str, str]) -> None:
        self._default_speedup.set(default_speedup)
        info = self._gauge_family("model_info", "1; what is served", *facts)
        info.remove_by_labels(self._model)  # of the checkpoint before
        self._child(info, **facts).set(1)

    # -- construction ------------------------------------------------------------------------

    def _child(self, family: Any, **labels: str) -> Any:
        return family.labels(**self._model, **labels)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return self._family(Counter, name, text, labels)

    def _gauge_family(self, name: str, text: str, *labels: str) -> Gauge:
        return self._family(Gauge, name, text, labels)

    def _gauge(self, name: str, text: str) -> Any:
        return self._child(self._gauge_family(name, text))

    def _histogram_family(
        self, name: str, text: str, buckets: Sequence[float], *labels: str
    ) -> Histogram:
        return self._family(Histogram, name, text, labels, buckets=tuple(buckets))

    def _family(
        self, kind: type[Kind], name: str, text: str, labels: Sequence[str], **how: Any
    ) -> Kind:
        return self._families.get(kind, f"offramp_{name}", text, (*self._model, *labels), **how)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Any:
        return self._child(self._histogram_family(name, text, buckets))

    def _seconds(self, name: str, text: str) -> Any:
        return self._histogram(name, text, SECONDS)


def _describe_process(registry: CollectorRegistry) -> None:
    """Processor time, memory, open files and threads, under the names that all exporters use; where
    the operating system does not tell, there are none."""
    ProcessCollector(registry=registry)
    if _TASKS.is_dir():
        threads = Gauge("process_threads", "Threads, the libraries' own too", registry=registry)
        threads.set_function(lambda: sum(1 for _ in _TASKS.iterdir()))


def _count(count: float, seconds: float) -> dict[str, int]:
    return {"count": int(count), "ns": int(seconds * 1e9)}
