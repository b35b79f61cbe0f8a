"""What dashboards and rules ask Prometheus for: their PromQL, taken apart. Knows the files' form,
and no metric."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import promql_parser
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
BOARDS = sorted((DEPLOY / "grafana/dashboards").glob("*.json"))
RULES = sorted((DEPLOY / "prometheus/rules").glob("*.yml"))


@dataclass(frozen=True)
class Selector:
    """Series of one metric; `labels` are those it is chosen by."""

    metric: str
    labels: frozenset[str]


@dataclass(frozen=True)
class Asked:
    """A query of a panel; `where` is for people."""

    where: str
    kind: str  # of the panel
    expr: str
    legend: str


def fill(expr: str, *, window: str = "5m", over: str = "1h") -> str:
    """As Grafana sends it, with everything chosen; `window` is the rate interval, `over` the time
    that the board shows."""
    expr = expr.replace("$__rate_interval", window).replace("$__range", over)
    for choice in ("model_name", "model_version", "instance", "node"):
        expr = expr.replace(f'"${choice}"', '".*"')
    if "$" in expr.replace('"0$1"', ""):
        raise ValueError(f"an unknown variable in {expr}")
    return expr


def selectors(expr: str) -> set[Selector]:
    """What series an expression reads.

    Raises:
        ValueError: it is no PromQL.
    """
    found: set[Selector] = set()

    def note(node: Any) -> None:
        if isinstance(node, promql_parser.VectorSelector):
            labels = frozenset(one.name for one in node.matchers.matchers)
            found.add(Selector(node.name, labels))

    promql_parser.walk(promql_parser.parse(expr), note)
    return found


def panels(board: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """All but the headings, those in folded rows too."""
    for panel in board["panels"]:
        if panel["type"] == "row":
            yield from panels({"panels": panel.get("panels", [])})
        else:
            yield panel


def asked() -> list[Asked]:
    """Every query of every dashboard."""
    return [
        Asked(
            f"{board['title']} / {panel['title']} {target['refId']}",
            panel["type"],
            target["expr"],
            target["legendFormat"],
        )
        for board in (json.loads(path.read_text()) for path in BOARDS)
        for panel in panels(board)
        for target in panel["targets"]
    ]


def rules() -> list[dict[str, Any]]:
    """Every rule, recording or alert."""
    return [
        rule
        for path in RULES
        for group in yaml.safe_load(path.read_text())["groups"]
        for rule in group["rules"]
    ]
