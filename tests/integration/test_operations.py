"""What operators switch on around the doors, over HTTP without sockets: keys, origins,
logs, and an engine that crashes."""

import asyncio
import json
import logging
import socket
import threading
from pathlib import Path
from typing import Any

import httpx
import pytest

from loading import load
from offramp_service.engine import Engine
from offramp_service.logs import JsonLines

_service = load("tests/integration/test_service.py")

post, series, sample, until = _service.post, _service.series, _service.sample, _service.until

KEY = {"Authorization": "Bearer sesame"}
PROBES = ("/livez", "/readyz", "/startupz", "/health", "/ping")


# -- keys ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "shown", [{}, {"Authorization": "Bearer sesame2"}, {"Authorization": "Basic sesame"}]
)
async def test_without_a_key_nothing_but_probes(running: Any, shown: dict[str, str]) -> None:
    async with running(api_key="sesame") as client:
        for path in PROBES:
            assert (await client.get(path)).status_code == 200
        for path in (
            "/metrics",
            "/info",
            "/docs",
            "/openapi.json",
            "/nope",
            "/livez/",
            "/v1/models",
        ):
            refused = await client.get(path, headers=shown)
            assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
            assert refused.json()["error"]["type"] == "unauthorized"
            assert "sesame" not in refused.text
        for path in PROBES:
            assert (await client.post(path, headers=shown)).status_code == 405  # open, but no POST


async def test_a_refusal_at_a_door_is_counted_and_named_there(running: Any) -> None:
    async with running(api_key="sesame") as client:
        before = (await client.get("/metrics", headers=KEY)).text.count("\n")
        refused = await client.post(
            "/classify", json={"input": "w1"}, headers={"X-Request-Id": "mine"}
        )
        assert refused.json()["error"] == {
            "message": "an API key is required, as Authorization: Bearer KEY",
            "type": "unauthorized",
            "param": None,
            "code": 401,
        }
        assert refused.headers["x-request-id"] == "mine"
        client.headers.update(KEY)
        assert (await post(client, input="w1")).status_code == 200
        values = await series(client)
        assert (await client.get("/metrics")).text.count("\n") == before
        assert sample(values, "requests_total", 'code="401"', 'route="/classify"') == 1
        assert sample(values, "requests_total", 'code="401"', 'route="/v1/classify"') == 0
        assert sample(values, "request_failures_total", "unauthorized") == 1
        assert sample(values, "samples_total") == 1
        assert "sesame" not in (await client.get("/info")).text


async def test_every_door_words_its_own_refusal(running: Any) -> None:
    async with running(api_key="sesame") as client:
        for path in ("/v2/health/live", "/v2/health/ready"):
            assert (await client.get(path)).status_code == 200
        assert (await client.get("/v2")).status_code == 401
        tei = await client.post("/predict", json={"inputs": "w1"})
        assert (tei.status_code, tei.json().keys()) == (401, {"error", "error_type"})
        v2 = await client.post("/v2/models/tiny/versions/1/infer", json={})
        assert (v2.status_code, v2.json().keys()) == (401, {"error"})
        values = await client.get("/metrics", headers=KEY)
        route = "/v2/models/{model}/versions/{version}/infer"
        assert (
            f'code="401",model_name="tiny",model_version="1",route="{route}"}} 1.0' in values.text
        )


async def test_the_body_of_who_has_no_key_is_not_read(running: Any) -> None:
    async with running(api_key="sesame") as client:
        sent: list[Any] = []

        async def receive() -> Any:
            raise AssertionError("the body was asked for")

        async def send(message: Any) -> None:
            sent.append(message)

        await client.app(dict(_service.CLASSIFY), receive, send)
        assert sent[0]["status"] == 401


async def test_keys_of_a_file_and_one_of_its_own(running: Any, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# clients\nalpha\nbeta\n")
    async with running(api_key="sesame", api_key_file=path) as client:
        for key in ("alpha", "beta", "sesame"):
            response = await client.get("/info", headers={"Authorization": f"bearer {key}"})
            assert response.status_code == 200
        assert (await client.get("/info", headers={"X-API-Key": "alpha"})).status_code == 401


async def test_without_the_setting_everybody_may_ask(running: Any) -> None:
    async with running() as client:
        assert (await post(client, input="w1")).status_code == 200
        assert (await client.get("/info", headers={"Authorization": "Bearer x"})).is_success


async def test_keys_are_in_no_log(running: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    async with running(api_key="sesame") as client:
        await client.post("/classify", json={}, headers={"Authorization": "Bearer pumpkin"})
        await client.post("/classify", json={}, headers=KEY)
    assert "sesame" not in caplog.text
    assert "pumpkin" not in caplog.text


async def test_a_refusal_during_the_drain_still_ends_the_connection(running: Any) -> None:
    async with running(api_key="sesame") as client:
        client.app.state.models.lifecycle.phase = "draining"
        response: httpx.Response = await client.get("/info")
        assert (response.status_code, response.headers["connection"]) == (401, "close")


# -- browsers --------------------------------------------------------------------------------

PAGE = "https://app.example"
ASKING = {
    "Origin": PAGE,
    "Access-Control-Request-Method": "POST",
    "Access-Control-Request-Headers": "authorization, content-type, x-speedup",
}


async def test_other_origins_are_closed_out_by_default(running: Any) -> None:
    async with running() as client:
        answered = await client.post("/classify", json={"input": "w1"}, headers={"Origin": PAGE})
        assert answered.status_code == 200
        asked = await client.options("/classify", headers=ASKING)
        assert asked.status_code == 405
        for response in (answered, asked):
            assert not [name for name in response.headers if name.startswith("access-control")]


async def test_named_origins_may_ask_and_read_everything(running: Any) -> None:
    origins = (PAGE, "http://localhost:8080")
    async with running(cors_allow_origin=origins, api_key="sesame") as client:
        asked = await client.options("/classify", headers=ASKING)  # as browsers do: without a key
        assert asked.status_code == 200
        assert asked.headers["access-control-allow-origin"] == PAGE
        allowed = asked.headers["access-control-allow-headers"].lower()
        assert {"authorization", "content-type", "x-speedup"} <= set(allowed.split(", "))
        for key, status in ((KEY, 200), ({}, 401)):
            response = await client.post(
                "/classify", json={"input": "w1"}, headers={"Origin": PAGE} | key
            )
            assert response.status_code == status
            assert response.headers["access-control-allow-origin"] == PAGE
            assert response.headers["access-control-expose-headers"] == "*"
            assert "access-control-allow-credentials" not in response.headers
        stranger = {"Origin": "https://evil.example"}
        assert (await client.options("/classify", headers=ASKING | stranger)).status_code == 400
        response = await client.post("/classify", json={"input": "w1"}, headers=stranger | KEY)
        assert "access-control-allow-origin" not in response.headers


# -- the log ---------------------------------------------------------------------------------

FIELDS = {
    *("time", "level", "logger", "message", "request_id", "route", "status", "error", "total_ms"),
    *("texts", "tokens", "tokenization_ms", "queue_ms", "inference_ms", "exit_layers"),
    *("speedup_asked", "speedup_achieved"),
}


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    """Of requests, as they would be written."""
    records = [one for one in caplog.records if one.name == "offramp_service.request_log"]
    return [json.loads(JsonLines().format(one)) for one in records]


async def test_each_request_is_a_line_of_numbers(
    running: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    async with running(json_output=True, api_key="sesame") as client:
        client.headers.update(KEY)
        asked = {"input": ["w1 w2", "w3"], "speedup": 2.0, "return_details": True}
        answered = await client.post("/classify", json=asked, headers={"X-Request-Id": "mine"})
        layers = [one["details"]["exit_layer"] for one in answered.json()["data"]]
        await client.post("/predict", json={"inputs": "w1", "parameters": {"threshold": 0.5}})
        await post(client, input="w1", speedup="secret")
        await client.post("/classify", json={}, headers={"Authorization": "Bearer pumpkin"})
        await client.get("/info")
        await client.get("/livez")
    good, raw, refused, shut_out = found = lines(caplog)
    assert all(one.keys() == FIELDS and one["level"] == "info" for one in found)
    assert (good["request_id"], good["route"], good["status"], good["error"]) == (
        *("mine", "/classify", 200, None),
    )
    assert (good["texts"], good["tokens"], good["speedup_asked"]) == (2, 7, 2.0)
    assert good["exit_layers"] == {str(one): layers.count(one) for one in sorted(set(layers))}
    assert good["speedup_achieved"] == pytest.approx(8 / sum(layers), abs=1e-3)
    parts = good["tokenization_ms"] + good["queue_ms"] + good["inference_ms"]
    assert 0 < parts <= good["total_ms"]
    assert (raw["route"], raw["status"], raw["speedup_asked"]) == ("/predict", 200, None)
    assert (refused["status"], refused["error"], refused["texts"]) == (422, "invalid_value", None)
    assert (shut_out["status"], shut_out["error"]) == (401, "unauthorized")
    for secret in ("secret", "w1", "w3", "sesame", "pumpkin", "negative", "positive", "neutral"):
        assert secret not in str(found)


async def test_a_client_that_left_is_a_line_too(
    running: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    gate = _service.Gate()
    async with running(gate.around, json_output=True) as client:
        body = b'{"input": "w1"}'
        receive, send, _ = _service.hang_up_after(body, entered=gate.entered)
        await client.app(dict(_service.CLASSIFY), receive, send)
        gate.opened.set()
    (line,) = lines(caplog)
    assert (line["status"], line["error"]) == (499, "client_closed_request")


async def test_people_are_not_told_of_requests_unless_they_look(
    running: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    async with running() as client:
        await post(client, input="w1")
        assert lines(caplog) == []
    async with running(log_level="debug") as client:
        await post(client, input="w1", request_id="mine")
    (line,) = lines(caplog)
    assert (line["level"], line["message"]) == ("debug", "request mine: 200 ok")


# -- an engine that crashes --------------------------------------------------------------------


async def test_a_crashed_engine_is_built_anew_and_who_waits_is_served(
    running: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gate = _service.Gate()
    building, built = threading.Event(), threading.Event()
    async with running(gate.around, max_batch_requests=2, engine_workers=1) as client:
        app = client.app
        batcher = app.state.models.default.batcher
        hand_out = batcher._hand_out

        def crash(*_: Any) -> None:
            batcher._hand_out = hand_out
            raise SystemExit("out of luck")

        batcher._hand_out = crash
        warm_up = Engine.warm_up

        def slowly(self: Engine, longest: int) -> None:
            building.set()
            assert built.wait(20)
            warm_up(self, longest)

        monkeypatch.setattr(Engine, "warm_up", slowly)
        # Two of three are taken; the third's request goes down with them, the others wait.
        asked = [["w1", "w2", "w3"], ["w4"], ["w5", "w6", "w7"]]
        requests = [asyncio.create_task(post(client, input=asked[0]))]
        await asyncio.to_thread(gate.entered.wait, 20)  # else a smaller one might pass it
        requests += [asyncio.create_task(post(client, input=texts)) for texts in asked[1:]]
        await until(lambda: batcher.unanswered == 7)
        gate.opened.set()
        await asyncio.to_thread(building.wait, 20)
        first = await requests[0]  # told at once, not after the building
        assert (first.status_code, first.json()["error"]["type"]) == (500, "engine_failed")
        assert not requests[1].done()
        assert (await client.get("/livez")).status_code == 200
        assert (await client.get("/readyz")).status_code == 503
        late = asyncio.create_task(post(client, input="w8"))
        built.set()
        assert [(await one).status_code for one in (*requests[1:], late)] == [200] * 3
        assert (await client.get("/readyz")).status_code == 200
        values = await series(client)
        assert sample(values, "engine_rebuilds_total") == 1
        assert sample(values, "samples_total") == 5
        assert sample(values, "queue_requests") == batcher.unanswered == 0
    assert "the engine crashed, and is built anew once" in caplog.text


async def test_an_engine_that_cannot_be_built_anew_is_dead(
    running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Engine, _: Any) -> Any:
        raise SystemExit

    async with running() as client:
        lifecycle = client.app.state.models.lifecycle
        monkeypatch.setattr(Engine, "warm_up", broken)
        monkeypatch.setattr(Engine, "__call__", broken)
        assert (await post(client, input="w1")).status_code == 500
        await lifecycle.died.wait()
        assert (await post(client, input="w1")).status_code == 503
        await until(lambda: not any("engine" in one.name for one in threading.enumerate()))
        assert (await client.get("/livez")).status_code == 503
        assert sample(await series(client), "engine_rebuilds_total") == 0


async def test_a_crash_among_second_runs_costs_nobody_an_answer(running: Any) -> None:
    async with running(shadow_rate=1.0) as client:
        batcher = client.app.state.models.default.batcher
        compare = batcher._compare

        def crash(*_: Any) -> None:
            batcher._compare = compare
            raise SystemExit("out of luck")

        batcher._compare = crash
        assert (await post(client, input=["w1", "w2"], speedup=4.0)).status_code == 200
        await until(lambda: batcher._compare is not crash)
        assert (await post(client, input=["w3", "w4"], speedup=4.0)).status_code == 200
        async with asyncio.timeout(10):
            values = await series(client)
            while sample(values, "shadow_agreement_total") < 2:
                values = await series(client)
    assert sample(values, "engine_rebuilds_total") == 1
    assert sample(values, "shadow_dropped_total") == 2
    assert sample(values, "request_failures_total") == 0


async def test_metrics_at_a_port_of_their_own(running: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    url = f"http://127.0.0.1:{port}/metrics"
    async with running(prometheus_port=port, api_key="k") as client, httpx.AsyncClient() as scraper:
        there = (await scraper.get(url)).text
        assert 'offramp_ready{model_name="tiny",model_version="1"} 1.0' in there
        key = {"authorization": "Bearer k"}
        here = (await client.get("/metrics", headers=key)).text
        assert names(there) == names(here)
    async with httpx.AsyncClient() as scraper:
        with pytest.raises(httpx.ConnectError):
            await scraper.get(url)


def names(exposition: str) -> set[str]:
    """Of the series, values left out."""
    lines = exposition.splitlines()
    return {line.rsplit(" ", 1)[0] for line in lines if not line.startswith("#")}
