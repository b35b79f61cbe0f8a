"""A real Prometheus, Alertmanager and node_exporter on loopback, with the repository's own
configuration, hurried: other addresses, a second for each interval, and one alert that does not
wait for minutes. Queries and thresholds are as committed. Knows no metric."""

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import urlencode
from urllib.request import urlopen

import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
TOOLS = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter")


def missing_tools() -> list[str]:
    """Debian packages that would have to be installed; each has a command of its name."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def until(condition: Callable[[], Any], what: str, seconds: float = 30) -> Any:
    """What the condition came to, once it is true."""
    deadline = time.monotonic() + seconds
    while True:
        with suppress(URLError, ConnectionError):
            if result := condition():
                return result
        assert time.monotonic() < deadline, f"after {seconds:g} s still not: {what}"
        time.sleep(0.1)


def get(url: str, **query: Any) -> Any:
    """The JSON at an address; errors too are JSON."""
    with urlopen(f"{url}?{urlencode(query)}", timeout=20) as response:
        return json.loads(response.read())


@dataclass
class Pager:
    """Where Alertmanager sends to: keeps what it gets."""

    port: int
    heard: list[tuple[str, str]] = field(default_factory=list)  # alert, firing or resolved


@dataclass
class Stack:
    """The running tools; `service_port` is where they look for the service."""

    service_port: int
    prometheus: str
    alertmanager: str
    pager: Pager

    def query(self, expr: str, at: float | None = None) -> list[dict[str, Any]]:
        """An instant query's result."""
        when = {} if at is None else {"time": f"{at:.3f}"}
        return get(f"{self.prometheus}/api/v1/query", query=expr, **when)["data"]["result"]

    def query_range(self, expr: str, start: float, end: float) -> list[dict[str, Any]]:
        """A range query's, a point each second."""
        at = {"start": f"{start:.3f}", "end": f"{end:.3f}", "step": "1"}
        return get(f"{self.prometheus}/api/v1/query_range", query=expr, **at)["data"]["result"]

    def value(self, expr: str, at: float | None = None) -> float | None:
        """Of a query with one series or none."""
        result = self.query(expr, at)
        assert len(result) <= 1
        return float(result[0]["value"][1]) if result else None

    def alerts(self, name: str) -> list[dict[str, Any]]:
        """Those of a name that Alertmanager holds."""
        alerts = get(f"{self.alertmanager}/api/v2/alerts")
        return [one for one in alerts if one["labels"]["alertname"] == name]

    def is_firing(self, name: str) -> bool:
        """For Prometheus, for Alertmanager, or for all that the pager knows."""
        heard = [status for alert, status in self.pager.heard if alert == name]
        return bool(
            self.query(f'ALERTS{{alertname="{name}"}}')
            or self.alerts(name)
            or (heard and heard[-1] == "firing")
        )

    def rules(self) -> list[dict[str, Any]]:
        """All rules, as Prometheus has evaluated them."""
        groups = get(f"{self.prometheus}/api/v1/rules")["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextmanager
def running(folder: Path, *, at_once: str) -> Iterator[Stack]:
    """The stack for the length of the block; the alert `at_once` fires after a second."""
    service, prometheus, alertmanager, node = (free_port() for _ in range(4))
    with ExitStack() as everything:
        pager = everything.enter_context(_pager())
        targets = {
            "offramp": service,
            "node": node,
            "prometheus": prometheus,
            "alertmanager": alertmanager,
        }
        _configure(folder, targets, pager.port, at_once)
        for command, port in (
            (
                [
                    "prometheus",
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/prometheus",
                    f"--web.listen-address=127.0.0.1:{prometheus}",
                    "--rules.alert.resend-delay=1s",
                ],
                prometheus,
            ),
            (
                [
                    "prometheus-alertmanager",
                    f"--config.file={folder}/alertmanager.yml",
                    f"--storage.path={folder}/alertmanager",
                    f"--web.listen-address=127.0.0.1:{alertmanager}",
                    "--cluster.listen-address=",  # alone; else it listens on every address
                ],
                alertmanager,
            ),
            (["prometheus-node-exporter", f"--web.listen-address=127.0.0.1:{node}"], node),
        ):
            everything.enter_context(_tool(command, folder))
            until(lambda port=port: _listens(port), f"{command[0]} listens")
        yield Stack(
            service, f"http://127.0.0.1:{prometheus}", f"http://127.0.0.1:{alertmanager}", pager
        )


def _configure(folder: Path, targets: dict[str, int], pager: int, at_once: str) -> None:
    def at(port: int) -> list[dict[str, list[str]]]:
        return [{"targets": [f"127.0.0.1:{port}"]}]

    config = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], "1s")
    config["alerting"]["alertmanagers"] = [{"static_configs": at(targets["alertmanager"])}]
    for job in config["scrape_configs"]:
        job.pop("dns_sd_configs", None)
        # A job without a target here is one whose exporter nobody runs.
        job["static_configs"] = at(targets[job["job_name"]]) if job["job_name"] in targets else []
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))

    (folder / "rules").mkdir()
    for path in (DEPLOY / "prometheus/rules").glob("*.yml"):
        rules = yaml.safe_load(path.read_text())
        for group in rules["groups"]:
            for rule in group["rules"]:
                if rule.get("alert") == at_once:
                    rule["for"] = "1s"
        (folder / "rules" / path.name).write_text(yaml.safe_dump(rules))

    routing = yaml.safe_load((DEPLOY / "alertmanager/alertmanager.yml").read_text())
    for route in (routing["route"], *routing["route"]["routes"]):
        route.update(group_wait="1s", group_interval="1s")
    for receiver in routing["receivers"]:
        receiver["webhook_configs"] = [{"url": f"http://127.0.0.1:{pager}/"}]
    (folder / "alertmanager.yml").write_text(yaml.safe_dump(routing))


@contextmanager
def _tool(command: list[str], folder: Path) -> Iterator[None]:
    with (folder / f"{command[0]}.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(10)


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def _pager() -> Iterator[Pager]:
    pager = Pager(0)

    class Hear(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = json.loads(self.rfile.read(int(self.headers["content-length"])))
            for alert in message["alerts"]:
                pager.heard.append((alert["labels"]["alertname"], alert["status"]))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Hear) as server:
        pager.port = server.server_port
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield pager
        finally:
            server.shutdown()
            thread.join()
