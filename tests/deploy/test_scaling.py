"""What autoscalers ask for, asked of a real Prometheus that scrapes a real server: the numbers rise
when more comes than a pod can do, and fall when nobody asks. What Kubernetes makes of them is not
tried here."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest
import yaml

from loading import ROOT, load

kube = load("tests/deploy/kube.py")
stack_of = load("tests/deploy/stack.py")
release = load("tests/deploy/test_release.py")
support = load("tests/unit/service/support.py")

start = release.start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

POD = "offramp-7d9f8b6c5d-x2k4j"
CLIENTS = 12


@dataclass
class Signals:
    """The two numbers of one pod, as KEDA and prometheus-adapter compute them; but of the last five
    seconds, not of minutes."""

    url: str
    queries: list[str]

    def values(self) -> list[float | None]:
        return [self._value(re.sub(r"\[[12]m\]", "[5s]", query)) for query in self.queries]

    def _value(self, query: str) -> float | None:
        series = stack_of.get(f"{self.url}/api/v1/query", query=query)["data"]["result"]
        assert len(series) <= 1
        return float(series[0]["value"][1]) if series else None


def queries(rendered: dict[str, Any]) -> list[str]:
    """Queue and engine, as KEDA asks; then as prometheus-adapter does."""
    triggers = kube.only(rendered["keda"], "ScaledObject")["spec"]["triggers"]
    found = [one["metadata"]["query"] for one in triggers]
    path = ROOT / "deploy/helm/prometheus-adapter-values.yaml"
    for rule in yaml.safe_load(path.read_text(encoding="utf-8"))["rules"]["custom"]:
        query = rule["metricsQuery"].replace("<<.Series>>", rule["seriesQuery"].split("{")[0])
        query = query.replace("<<.LabelMatchers>>", f'namespace="offramp",pod=~"{POD}"')
        found.append(query.replace("<<.GroupBy>>", "pod"))
    return found


@pytest.fixture
def signals(rendered: dict[str, Any], tmp_path: Path) -> Iterator[tuple[Signals, int]]:
    """A Prometheus that looks every second, as if at a pod; and the port it looks at."""
    if missing := [tool for tool in stack_of.missing_tools() if tool == "prometheus"]:
        pytest.skip(f"apt-get install {' '.join(missing)}")
    port, own = stack_of.free_port(), stack_of.free_port()
    target = {
        "targets": [f"127.0.0.1:{port}"],
        "labels": {"namespace": "offramp", "pod": POD},
    }
    config = {
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s"},
        "scrape_configs": [{"job_name": "offramp", "static_configs": [target]}],
    }
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={tmp_path}/prometheus.yml",
        f"--storage.tsdb.path={tmp_path}/prometheus",
        f"--web.listen-address=127.0.0.1:{own}",
    ]
    with (tmp_path / "prometheus.log").open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        yield Signals(f"http://127.0.0.1:{own}", queries(rendered)), port
    finally:
        process.terminate()
        process.wait(20)


def overload(port: int, stop: threading.Event) -> None:
    """Keep asking with as many texts as one request may have."""
    texts = support.random_texts(32, seed=1)
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    while not stop.is_set():
        connection.request("POST", "/classify", json.dumps({"input": texts}))
        response = connection.getresponse()
        response.read()
        assert response.status in (200, 429)
    connection.close()


def test_the_signals_follow_the_load(
    signals: tuple[Signals, int], start: Any, tmp_path: Path
) -> None:
    asked, port = signals
    directory = support.write_tiny_checkpoint(tmp_path / "wide", width=512)
    start(
        [
            *(sys.executable, "-m", "offramp_service", "--model-id", str(directory)),
            *("--port", str(port), "--threads", "1", "--drain-seconds", "0"),
        ],
        {"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path)},
    )
    stack_of.until(lambda: set(asked.values()) == {0.0}, "an idle pod", 60)

    stop = threading.Event()
    clients = [threading.Thread(target=overload, args=(port, stop)) for _ in range(CLIENTS)]
    for client in clients:
        client.start()
    try:
        time.sleep(10)
        queue, busy, adapter_queue, adapter_busy = (value or 0.0 for value in asked.values())
    finally:
        stop.set()
        for client in clients:
            client.join(30)
    # A second pod would be asked for on either account, and whoever asks.
    assert min(queue, adapter_queue) > 450
    assert min(busy, adapter_busy) > 0.75
    stack_of.until(lambda: set(asked.values()) == {0.0}, "an idle pod again")
