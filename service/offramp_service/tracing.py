"""Traces of finished requests, sent to an OpenTelemetry collector over OTLP/HTTP.

Spans are made from the times that a request left behind, once its answer is sent: request, and
inside it tokenise, queue, inference. Texts of one request may run in several batches; queue then
ends where the last text's batch began, inference begins where the first one's did. They are sent
from a thread of the library's own, and let go where the collector does not keep up.

What spans carry are numbers and names; texts, labels and keys are not among them. Importing this
module needs the extra `otel`.
"""

import threading
import time
from importlib.metadata import version
from urllib.parse import urlsplit

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from opentelemetry.util.types import Attributes

from offramp_service.routes.door import Outcome
from offramp_service.witness import Record, speedup_asked

TRACES_PATH = "/v1/traces"
# For what is still unsent when the server ends.
_GOODBYE_S = 2.0


class Tracer:
    """A listener of `Witness`, until `close`."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        resource = Resource.create(
            {"service.name": service_name, "service.version": version("offramp")}
        )
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=traces_url(endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("offramp_service", version("offramp"))
        self._propagator = TraceContextTextMapPropagator()

    def __call__(self, record: Record) -> None:
        clock = _Clock()
        span = self._tracer.start_span(
            f"{record.method} {record.call.route}",
            context=self._propagator.extract(record.headers),
            kind=SpanKind.SERVER,
            start_time=clock.epoch_ns(record.started),
            attributes=_attributes(record),
        )
        if span.is_recording():  # or somebody upstream has decided against this trace
            if record.status >= 500:
                span.set_status(Status(StatusCode.ERROR))
            if record.outcome is not None:
                self._stages(span, record.outcome, clock)
        span.end(clock.epoch_ns(record.ended))

    def _stages(self, request: Span, outcome: Outcome, clock: "_Clock") -> None:
        context = set_span_in_context(request)
        for name, (start, end) in stages(outcome).items():
            span = self._tracer.start_span(name, context, start_time=clock.epoch_ns(start))
            span.end(clock.epoch_ns(end))

    def close(self) -> None:
        """Send what is unsent, for no longer than a moment; a collector that does not answer must
        not keep the process alive."""
        farewell = threading.Thread(target=self._provider.shutdown, daemon=True)
        farewell.start()
        farewell.join(_GOODBYE_S)
        if farewell.is_alive():
            # Ends the waiting between its tries.
            self._exporter.shutdown()  # type: ignore[no-untyped-call]


class _Clock:
    """From the process's clock to that of the world, as they stand now."""

    def __init__(self) -> None:
        self._offset = time.time_ns() - time.perf_counter_ns()

    def epoch_ns(self, moment: float) -> int:
        return int(moment * 1e9) + self._offset


def stages(outcome: Outcome) -> dict[str, tuple[float, float]]:
    """Beginning and end of each stage, in `time.perf_counter`'s seconds."""
    answers = outcome.answers
    queued = min(one.started_at - one.queue_s for one in answers)
    starts = [one.started_at for one in answers]
    return {
        "tokenise": (queued - outcome.tokenization_s, queued),
        "queue": (queued, max(starts)),
        "inference": (min(starts), max(one.started_at + one.inference_s for one in answers)),
    }


def traces_url(endpoint: str) -> str:
    """A collector's address as people give it; a path of its own is taken as it is."""
    return endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + TRACES_PATH


def _attributes(record: Record) -> Attributes:
    attributes: dict[str, str | int | float | list[int]] = {
        "http.request.method": record.method,
        "http.route": record.call.route,
        "http.response.status_code": record.status,
        "offramp.request_id": record.call.request_id,
    }
    if record.failure is not None:
        attributes["error.type"] = record.failure
    if (outcome := record.outcome) is None:
        return attributes
    attributes["offramp.texts"] = len(outcome.answers)
    attributes["offramp.tokens"] = outcome.tokens
    attributes["offramp.exit_layers"] = [one.answer.exit_layer for one in outcome.answers]
    attributes["offramp.speedup.achieved"] = outcome.speedup_achieved
    asked = speedup_asked(outcome)
    if asked is not None:
        attributes["offramp.speedup.asked"] = asked
    return attributes
