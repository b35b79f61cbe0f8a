"""Configuration, rules and their unit tests, through Prometheus's and Alertmanager's own tools; and
what every alert owes to whoever it wakes."""

import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from loading import ROOT, load

promql, described = load("tests/deploy/promql.py"), load("tests/deploy/described.py")
PROMETHEUS = ROOT / "deploy/prometheus"
UNIT_TESTS = sorted((PROMETHEUS / "tests").glob("*.yml"))
ALERTS = [rule for rule in promql.rules() if "alert" in rule]


def run(tool: str, *arguments: object) -> str:
    """Runs a tool of the Debian packages prometheus and prometheus-alertmanager."""
    if shutil.which(tool) is None:
        pytest.skip(f"{tool} is not installed (apt-get install prometheus prometheus-alertmanager)")
    command = [tool, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=50)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_promtool_accepts_the_configuration() -> None:
    assert "2 rule files found" in run("promtool", "check", "config", PROMETHEUS / "prometheus.yml")


@pytest.mark.parametrize("path", promql.RULES, ids=lambda path: path.name)
def test_promtool_accepts_the_rules(path: Any) -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", "--lint-fatal", path)


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.name)
def test_the_rules_do_what_their_tests_say(path: Any) -> None:
    assert "SUCCESS" in run("promtool", "test", "rules", path)


def test_amtool_accepts_the_configuration() -> None:
    path = ROOT / "deploy/alertmanager/alertmanager.yml"
    assert "SUCCESS" in run("amtool", "check-config", path)


def test_every_alert_is_tested_to_fire_and_to_keep_quiet() -> None:
    fires: set[str] = set()
    quiet: set[str] = set()
    for path in UNIT_TESTS:
        for test in yaml.safe_load(path.read_text())["tests"]:
            for case in test.get("alert_rule_test", []):
                (fires if case.get("exp_alerts") else quiet).add(case["alertname"])
    names = {rule["alert"] for rule in ALERTS}
    assert fires == names
    assert quiet == names


@pytest.mark.parametrize("rule", ALERTS, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_where_and_what_to_do(rule: dict[str, Any]) -> None:
    notes = rule["annotations"]
    assert rule["labels"]["severity"] in {"critical", "warning", "info"}
    # A crash is over when it is seen: there is nothing to wait for.
    assert "for" in rule or rule["alert"] == "OfframpEngineRebuilt"
    assert "$labels.model_name" in notes["summary"] + notes["description"]
    assert "$value" in notes["description"]
    page, _, anchor = notes["runbook_url"].partition("#")
    headings = re.findall(r"^## (.+)$", (ROOT / page).read_text(), re.MULTILINE)
    assert rule["alert"] in headings
    assert anchor == rule["alert"].lower()
    uid = notes["dashboard"].removeprefix("/d/")
    assert (ROOT / f"deploy/grafana/dashboards/{uid}.json").exists()


def test_the_runbook_has_no_alert_that_is_no_more() -> None:
    text = (ROOT / "docs/runbook.md").read_text()
    sections = re.split(r"^## ", text, flags=re.MULTILINE)
    named = {section.split("\n", 1)[0]: section for section in sections[1:]}
    alerts = {name: section for name, section in named.items() if name.startswith("Offramp")}
    assert set(alerts) == {rule["alert"] for rule in ALERTS}
    for name, section in alerts.items():
        for part in ("Means", "Users see", "Check", "Do", "Silence"):
            assert f"**{part}**" in section, (name, part)


def test_every_query_of_the_runbook_asks_for_what_there_is() -> None:
    known = set(described.series_of(described.families()))
    known |= {rule["record"] for rule in promql.rules() if "record" in rule}
    known |= described.PROMETHEUS
    blocks = re.findall(r"```promql\n(.*?)```", (ROOT / "docs/runbook.md").read_text(), re.DOTALL)
    assert len(blocks) >= len(ALERTS) // 2
    for block in blocks:
        for line in re.sub(r"#.*", "", block).split("\n\n"):
            if line.strip():
                assert {one.metric for one in promql.selectors(line)} <= known, line


def test_the_documentation_has_every_metric_and_no_other() -> None:
    text = (ROOT / "docs/monitoring.md").read_text()
    rows = re.findall(
        r"^\| `((?:offramp|process)_\w+)` \| (\w+) \| *(.*?) *\| .+ \|$", text, re.MULTILINE
    )
    families = {described.documented(one): one for one in described.families()}
    assert len({name for name, _, _ in rows}) == len(rows)
    assert {name for name, _, _ in rows} == set(families)
    for name, kind, labels in rows:
        family = families[name]
        assert kind == family.type, name
        said = set(re.findall(r"`(\w+)`", labels))
        own = {label for sample in family.samples for label in sample.labels}
        assert said == own - {"model_name", "model_version", "le"}, name


def test_the_documentation_has_every_recorded_series() -> None:
    text = (ROOT / "docs/monitoring.md").read_text()
    recorded = {rule["record"] for rule in promql.rules() if "record" in rule}
    rows = re.findall(r"^\| `([\w:]*:[\w:]+)` \|", text, re.MULTILINE)
    assert set(rows) == recorded
