"""The dashboards as files: what the program writes, of Grafana's schema, each panel with a
question, each name one that exists. Whether the answers are numbers, `test_monitoring.py` asks
Prometheus."""

import json
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.cog.plugins import register_default_plugins
from grafana_foundation_sdk.models.dashboard import Dashboard

from loading import ROOT, load

promql, described = load("tests/deploy/promql.py"), load("tests/deploy/described.py")
GRAFANA = ROOT / "deploy/grafana"
UIDS = ("offramp-overview", "offramp-early-exit", "offramp-slo", "offramp-host")

register_default_plugins()


def board(uid: str) -> dict[str, Any]:
    return json.loads((GRAFANA / f"dashboards/{uid}.json").read_text())


def test_the_committed_files_are_what_the_program_writes(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "offramp_dashboards", str(tmp_path)]
    subprocess.run(command, check=True, timeout=50, cwd=GRAFANA)
    written = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert written == {path.name: path.read_text() for path in promql.BOARDS}
    assert set(written) == {f"{uid}.json" for uid in UIDS}


@pytest.mark.parametrize("uid", UIDS)
def test_nothing_in_it_is_unknown_to_grafana(uid: str) -> None:
    """A key that the schema does not have is lost on the way in, and missed on the way out."""
    given = board(uid)
    assert json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder)) == given
    given["panels"][1]["noSuchKey"] = 1
    assert json.loads(json.dumps(Dashboard.from_json(given), cls=JSONEncoder)) != given


@pytest.mark.parametrize("uid", UIDS)
def test_a_board_can_be_read_and_chosen_from(uid: str) -> None:
    given = board(uid)
    assert given["uid"] == uid
    assert given["refresh"] == "30s"
    assert given["tags"] == ["offramp"]
    assert given["links"][0]["type"] == "dashboards"
    assert given["links"][0]["tags"] == ["offramp"]
    assert given["links"][0]["includeVars"]
    choices = [choice["name"] for choice in given["templating"]["list"]]
    assert choices[:4] == ["datasource", "model_name", "model_version", "instance"]
    for panel in promql.panels(given):
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert panel["title"]
        assert "?" in panel["description"], f"{panel['title']} states no question"
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["targets"]


@pytest.mark.parametrize("uid", UIDS)
def test_panels_stand_beside_each_other(uid: str) -> None:
    given = board(uid)
    assert len({panel["id"] for panel in given["panels"]}) == len(given["panels"])
    places = [panel["gridPos"] for panel in given["panels"]]
    assert all(place["x"] + place["w"] <= 24 for place in places)
    for one, other in combinations(places, 2):
        apart = (
            one["x"] + one["w"] <= other["x"]
            or other["x"] + other["w"] <= one["x"]
            or one["y"] + one["h"] <= other["y"]
            or other["y"] + other["h"] <= one["y"]
        )
        assert apart, (one, other)


def test_every_query_asks_for_what_there_is() -> None:
    """Metric names, and the labels that series are chosen by; so do the rules."""
    known = described.series_of(described.families())
    recorded = {rule["record"] for rule in promql.rules() if "record" in rule}
    others = recorded | described.NODE | described.DCGM | described.PROMETHEUS
    exprs = {one.where: promql.fill(one.expr) for one in promql.asked()}
    exprs |= {rule.get("record") or rule["alert"]: rule["expr"] for rule in promql.rules()}
    for uid in UIDS:
        for choice in board(uid)["templating"]["list"]:
            if choice["type"] == "query":
                inner = choice["query"]["query"].removeprefix("label_values(").rpartition(",")[0]
                exprs[f"{uid} / ${choice['name']}"] = promql.fill(inner)
    for where, expr in exprs.items():
        for selector in promql.selectors(expr):
            if selector.metric in known:
                assert selector.labels <= known[selector.metric], (where, selector)
            else:
                assert selector.metric in others, (where, selector)


def test_every_metric_is_looked_at() -> None:
    used = {
        selector.metric
        for expr in (
            *(promql.fill(one.expr) for one in promql.asked()),
            *(rule["expr"] for rule in promql.rules()),
        )
        for selector in promql.selectors(expr)
    }
    unused = {
        described.documented(family)
        for family in described.families()
        if not {sample.name for sample in family.samples} & used
    }
    assert unused == set(described.UNUSED)
    # What is recorded is of use, too.
    assert {rule["record"] for rule in promql.rules() if "record" in rule} <= used


def test_limits_of_alerts_are_drawn() -> None:
    """As series, so that a board never shows another limit than the one that rings."""
    drawn = {one.expr for one in promql.asked()}
    for limit in ("agreement_floor", "share_drift_limit", "queue_seconds_limit"):
        assert f"offramp:{limit}" in drawn
    assert {"1 + offramp:speedup_drift_limit", "1 - offramp:speedup_drift_limit"} <= drawn


def test_provisioning_points_at_the_files() -> None:
    (source,) = yaml.safe_load((GRAFANA / "provisioning/datasources/prometheus.yml").read_text())[
        "datasources"
    ]
    assert (source["type"], source["url"]) == ("prometheus", "http://prometheus:9090")
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert source["jsonData"]["timeInterval"] == scraped["global"]["scrape_interval"]
    (provider,) = yaml.safe_load((GRAFANA / "provisioning/dashboards/offramp.yml").read_text())[
        "providers"
    ]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
