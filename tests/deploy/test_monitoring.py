"""The real thing: the service under load, a real Prometheus with the committed rules, every panel
and every rule evaluated; the panels of exit layers against the load generator's own count; an alert
that reaches a pager and is taken back. With --log-cli-level=INFO it says what it counted.

A trained checkpoint in place of the tiny one: MONITORED_CHECKPOINT=DIR MONITORED_TEXTS=FILE.
"""

import logging
import math
import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loading import load
from offramp_loadtest.arrivals import schedule
from offramp_loadtest.generator import Load, Outcome, send_when_due
from offramp_loadtest.http_client import Address
from offramp_loadtest.recorder import exit_layer
from offramp_loadtest.server_process import ServerProcess, serving
from offramp_loadtest.texts import classify_requests, read_texts

promql, described = load("tests/deploy/promql.py"), load("tests/deploy/described.py")
stack_of = load("tests/deploy/stack.py")

log = logging.getLogger(__name__)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(180)]

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
RATE, SECONDS = 110, 8.0
WINDOW = "5m"  # longer than all of it
ALARM = "OfframpNoReadyReplica"

# What has no data here, by nature.
EMPTY = {
    "there is no GPU": described.DCGM,
}


@dataclass(frozen=True)
class Monitored:
    """Tools that watch, and what they watch."""

    stack: Any
    command: list[str]
    texts: list[str]

    @contextmanager
    def serving(self) -> Iterator[ServerProcess]:
        """The service, seen by Prometheus with all its counters at 0."""
        with serving(self.command) as server:
            ready = "min(offramp_ready) == 1 and sum(offramp_samples_total) == 0"
            stack_of.until(lambda: self.stack.query(ready), "Prometheus sees the service")
            # Of a service before: what has not been taken back would not be told again.
            stack_of.until(lambda: not self.stack.is_firing(ALARM), "no alarm")
            yield server


@pytest.fixture(scope="module")
def monitored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Monitored]:
    if missing := stack_of.missing_tools():
        pytest.skip(f"apt-get install {' '.join(missing)}")
    support = load("tests/unit/service/support.py")
    if "MONITORED_CHECKPOINT" in os.environ:
        checkpoint = Path(os.environ["MONITORED_CHECKPOINT"])
        texts = read_texts(Path(os.environ["MONITORED_TEXTS"]))
    else:
        checkpoint = support.write_tiny_checkpoint(tmp_path_factory.mktemp("served") / "tiny")
        texts = support.random_texts(200, seed=5)
    with stack_of.running(tmp_path_factory.mktemp("stack"), at_once=ALARM) as stack:
        command = [sys.executable, "-m", "offramp_service", "--model-id", str(checkpoint)]
        command += ["--served-model-name", "watched", "--port", str(stack.service_port)]
        command += ["--threads", "1", "--drain-seconds", "0", "--warmup"]
        command += ["--shadow-rate", "1", "--slo-p95-ms", "500"]
        yield Monitored(stack, command, texts)


def under_load(monitored: Monitored) -> list[tuple[float, Outcome]]:
    """Single texts at mixed speed-ups: what each asked for, and what came of it."""
    address = Address("127.0.0.1", monitored.stack.service_port)
    by_speedup = [
        classify_requests(address, monitored.texts, speedup=speedup) for speedup in SPEEDUPS
    ]
    requests = [one for mixed in zip(*by_speedup, strict=True) for one in mixed]
    due = schedule("poisson", RATE, SECONDS, seed=1)
    outcomes = sorted(
        send_when_due(Load(address, requests, 64), due).outcomes, key=lambda one: one.due
    )
    assert len(outcomes) == len(due)
    assert {one.status for one in outcomes} == {200}
    return [(SPEEDUPS[place % len(SPEEDUPS)], one) for place, one in enumerate(outcomes)]


def settled(stack: Any, texts: int) -> float:
    """When Prometheus had seen everything, rules included: the very moment of a scrape, so that
    nothing is extrapolated."""
    drawn = 'sum(offramp_exits_total{reason="criterion"})'
    compared = "sum(offramp_shadow_agreement_total) + sum(offramp_shadow_dropped_total)"
    seen = f"sum(offramp_samples_total) == {texts} and {drawn} == {compared}"
    stack_of.until(lambda: stack.query(seen), "all texts and second runs are counted")
    first = stack.value("max(timestamp(offramp_samples_total))")
    later = f"max(timestamp(offramp_samples_total)) > {first + 4}"
    return float(stack_of.until(lambda: stack.query(later), "rules are evaluated")[0]["value"][1])


def finite(series: dict[str, Any]) -> bool:
    points = series["values"] if "values" in series else [series["value"]]
    return bool(points) and all(math.isfinite(float(value)) for _, value in points)


def panel(title: str) -> str:
    """The only query of the panel of that title, as Grafana sends it."""
    (found,) = [one for one in promql.asked() if one.where.endswith(f"/ {title} A")]
    return promql.fill(found.expr, window=WINDOW, over=WINDOW)


def test_every_panel_and_every_rule_has_an_answer(monitored: Monitored) -> None:
    stack = monitored.stack
    with monitored.serving() as server:
        layers = num_layers(server)
        answered = under_load(monitored)
        at = settled(stack, len(answered))
        exposed = text_string_to_metric_families(server.get("/metrics").decode())
    assert described.series_of(exposed).keys() == described.series_of(described.families()).keys()

    _panels_are_filled(stack, at)
    _rules_are_filled(stack, at)
    _exit_layers_are_those_of_the_load(stack, at, answered, layers)


def num_layers(server: ServerProcess) -> int:
    families = text_string_to_metric_families(server.get("/metrics").decode())
    (info,) = [one for one in families if one.name == "offramp_model_info"]
    return int(info.samples[0].labels["num_layers"])


def _panels_are_filled(stack: Any, at: float) -> None:
    queries = promql.asked()
    empty = {
        one.where
        for one in queries
        for names in EMPTY.values()
        if {selector.metric for selector in promql.selectors(promql.fill(one.expr))} <= names
    }
    for one in queries:
        expr = promql.fill(one.expr, window="15s", over=WINDOW)
        # As the panel does: now, or over the last while.
        over_time = one.kind not in ("bargauge", "table")
        result = stack.query_range(expr, at - 5, at) if over_time else stack.query(expr, at)
        if one.where in empty:
            assert not result, f"{one.where} is not empty any more"
        else:
            assert result, f"{one.where} has no data: {expr}"
            assert all(map(finite, result)), f"{one.where} is not a number: {expr}"
    log.info("%d queries of panels, %d of them empty by nature", len(queries), len(empty))


def _rules_are_filled(stack: Any, at: float) -> None:
    rules = stack.rules()
    assert {rule["name"] for rule in rules} == {
        rule.get("record") or rule["alert"] for rule in promql.rules()
    }
    for rule in rules:
        assert rule["health"] == "ok", (rule["name"], rule.get("lastError"))
        if rule["type"] == "recording":
            result = stack.query(rule["name"], at)
            assert result, f"{rule['name']} has no data"
            assert all(map(finite, result)), f"{rule['name']} is not a number"
        else:
            assert rule["state"] != "firing", rule["name"]
    log.info("%d rules", len(rules))


def _exit_layers_are_those_of_the_load(
    stack: Any, at: float, answered: list[tuple[float, Outcome]], layers: int
) -> None:
    left = Counter(exit_layer(one.reply) for _, one in answered)
    assert len(left) > 1
    counted = {layer: left.get(layer, 0) for layer in range(1, layers + 1)}
    log.info("exit layers, by the load generator: %s", counted)

    bars = {
        int(series["metric"]["layer"]): float(series["value"][1])
        for series in stack.query(panel("Texts by exit layer"), at)
    }
    log.info("by the bars: %s", bars)
    assert bars == counted

    # Grafana sorts the buckets and takes from each what is in the one before.
    buckets = sorted(
        (float(series["metric"]["le"]), float(series["value"][1]))
        for series in stack.query(panel("Exit layers over time"), at)
    )
    cells = {
        int(le): upto - before
        for (le, upto), (_, before) in zip(buckets, [(0.0, 0.0), *buckets], strict=False)
    }
    log.info("by the heat-map: %s", cells)
    assert cells == counted

    shares = {
        int(series["metric"]["layer"]): float(series["value"][1])
        for series in stack.query(panel("Share of texts by exit layer"), at)
    }
    texts = len(answered)
    assert {layer: share / sum(shares.values()) for layer, share in shares.items()} == (
        pytest.approx({layer: count / texts for layer, count in counted.items()})
    )
    run = sum(layer * count for layer, count in counted.items())
    assert stack.value(panel("Mean exit layer"), at) == pytest.approx(run / texts)
    (saved,) = [one for one in promql.asked() if "Early exit / Compute saved A" in one.where][:1]
    value = stack.value(promql.fill(saved.expr, window=WINDOW), at)
    assert value == pytest.approx(1 - run / (layers * texts))

    achieved = {
        float(series["metric"]["speedup"]): float(series["value"][1])
        for series in stack.query(panel("Achieved in the time shown"), at)
    }
    assert achieved == pytest.approx(
        {
            speedup: layers * len(ran) / sum(ran)
            for speedup in SPEEDUPS
            if (ran := [exit_layer(one.reply) or 0 for asked, one in answered if asked == speedup])
        }
    )
    log.info("achieved, by what was asked for: %s", achieved)


def test_an_alert_reaches_the_pager_and_is_taken_back(monitored: Monitored) -> None:
    stack = monitored.stack
    with monitored.serving() as server:
        before = len(stack.pager.heard)
        server.terminate()
        assert server.wait(30) == 0
        firing = (ALARM, "firing")
        stack_of.until(lambda: firing in stack.pager.heard[before:], "the pager hears of it")
        (alert,) = stack.alerts(ALARM)
        assert alert["labels"]["severity"] == "critical"
        assert "None of the 1 replicas of model watched" in alert["annotations"]["description"]
    with monitored.serving():
        resolved = (ALARM, "resolved")
        stack_of.until(lambda: resolved in stack.pager.heard[before:], "it is taken back")
