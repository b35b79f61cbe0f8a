"""Traces as a collector receives them: a real one, on loopback, that decodes what is sent."""

import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pydantic import ValidationError

from loading import load
from offramp_service.served_model import SettingsError
from offramp_service.settings import Settings, parse_command_line
from offramp_service.tracing import traces_url

_service = load("tests/integration/test_service.py")

post = _service.post

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Collector:
    """Keeps the spans it is sent."""

    def __init__(self) -> None:
        self.requests: list[tuple[str, ExportTraceServiceRequest]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.requests.append((self.path, ExportTraceServiceRequest.FromString(body)))
                self.send_response(503 if self.path == "/broken" else 200)
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def spans(self) -> list[Span]:
        return [
            span
            for _, request in self.requests
            for resource in request.resource_spans
            for scope in resource.scope_spans
            for span in scope.spans
        ]


@pytest.fixture
def collector() -> Iterator[Collector]:
    one = Collector()
    thread = threading.Thread(target=one.server.serve_forever, args=(0.05,))
    thread.start()
    yield one
    one.server.shutdown()
    one.server.server_close()
    thread.join(10)


def attributes(span: Any) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        kind = value.WhichOneof("value")
        if kind == "array_value":
            return [plain(one) for one in value.array_value.values]
        return getattr(value, kind)

    return {one.key: plain(one.value) for one in span.attributes}


async def test_a_request_is_a_span_with_its_stages_inside(
    running: Any, collector: Collector
) -> None:
    before = time.time_ns()
    async with running(otlp_endpoint=collector.url, otlp_service_name="mine") as client:
        asked = {"input": ["w1 w2", "w3"], "speedup": 2.0, "return_details": True}
        answered = await client.post(
            "/classify",
            json=asked,
            headers={"traceparent": f"00-{TRACE}-{PARENT}-01", "X-Request-Id": "r1"},
        )
        layers = [one["details"]["exit_layer"] for one in answered.json()["data"]]
        await client.get("/livez")
    after = time.time_ns()
    assert [path for path, _ in collector.requests] == ["/v1/traces"]
    resource = collector.requests[0][1].resource_spans[0].resource
    assert attributes(resource)["service.name"] == "mine"
    spans = {span.name: span for span in collector.spans()}
    assert spans.keys() == {"POST /classify", "tokenise", "queue", "inference"}
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    request = spans.pop("POST /classify")
    assert (request.kind, request.parent_span_id.hex()) == (Span.SPAN_KIND_SERVER, PARENT)
    assert {span.parent_span_id for span in spans.values()} == {request.span_id}
    assert attributes(request) == {
        "http.request.method": "POST",
        "http.route": "/classify",
        "http.response.status_code": 200,
        "offramp.request_id": "r1",
        "offramp.texts": 2,
        "offramp.tokens": 7,
        "offramp.exit_layers": layers,
        "offramp.speedup.asked": 2.0,
        "offramp.speedup.achieved": 8 / sum(layers),
    }
    moments = [request.start_time_unix_nano]
    for name in ("tokenise", "queue", "inference"):
        moments += [spans[name].start_time_unix_nano, spans[name].end_time_unix_nano]
    moments.append(request.end_time_unix_nano)
    slack = 1_000_000  # the clocks are read one after the other
    assert before - slack <= moments[0] <= moments[-1] <= after + slack
    assert moments == sorted(moments)
    assert moments[2] == pytest.approx(moments[3], abs=1000)  # one stage follows the other


async def test_failures_are_spans_without_stages(running: Any, collector: Collector) -> None:
    def broken(app: Any) -> None:
        def engine(jobs: Any) -> Iterator[Any]:
            raise RuntimeError("out of luck")
            yield

        app.state.models.default.batcher._engine = engine

    async with running(broken, otlp_endpoint=collector.url, api_key="sesame") as client:
        await post(client, input="w1")
        client.headers["authorization"] = "Bearer sesame"
        await post(client, input="w1", speedup="secret")
        await post(client, input="w1")
    shut_out, refused, failed = collector.spans()
    assert attributes(shut_out)["error.type"] == "unauthorized"
    assert attributes(refused)["http.response.status_code"] == 422
    assert attributes(failed)["error.type"] == "engine_failed"
    assert refused.status.code == shut_out.status.code == Status.STATUS_CODE_UNSET
    assert failed.status.code == Status.STATUS_CODE_ERROR
    assert len({span.trace_id for span in (shut_out, refused, failed)}) == 3
    sent = b"".join(request.SerializeToString() for _, request in collector.requests)
    for secret in (b"secret", b"w1", b"sesame", b"luck"):
        assert secret not in sent


async def test_who_decided_against_a_trace_is_honoured(running: Any, collector: Collector) -> None:
    async with running(otlp_endpoint=collector.url) as client:
        quiet = {"traceparent": f"00-{TRACE}-{PARENT}-00"}
        await client.post("/classify", json={"input": "w1"}, headers=quiet)
        nonsense = {"traceparent": "nonsense"}
        await client.post("/classify", json={"input": "w1"}, headers=nonsense)
    assert len(collector.spans()) == 4  # of the second, as the root of a trace of its own
    assert not [span for span in collector.spans() if span.trace_id.hex() == TRACE]


@pytest.mark.parametrize("reachable", [True, False])
async def test_a_collector_that_fails_costs_no_answers(
    running: Any, collector: Collector, reachable: bool
) -> None:
    url = f"{collector.url}/broken" if reachable else "http://127.0.0.1:9"
    began = time.monotonic()
    async with running(otlp_endpoint=url) as client:
        for _ in range(20):
            assert (await post(client, input="w1")).status_code == 200
    assert time.monotonic() - began < 20
    assert bool(collector.requests) == reachable


def test_where_traces_go() -> None:
    assert traces_url("http://c:4318") == traces_url("http://c:4318/") == "http://c:4318/v1/traces"
    assert traces_url("https://c/otlp/v1/traces") == "https://c/otlp/v1/traces"
    for wrong in ("c:4318", "grpc://c:4317", "http://me:secret@c", "http://c?x=1", ""):
        with pytest.raises(ValidationError, match="allowed is http") as refused:
            parse_command_line(["--model-id", "x", f"--otlp-endpoint={wrong}"])
        assert "secret" not in str([one["msg"] for one in refused.value.errors()])


def test_without_the_extra_the_flag_is_refused(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "offramp_service.tracing")
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(SettingsError, match=r"needs the extra otel, pip install 'offramp\[otel\]'"):
        _service.create_app(Settings(model_id=directory, otlp_endpoint="http://127.0.0.1:9"))
    _service.create_app(Settings(model_id=directory))  # the flag alone needs it
