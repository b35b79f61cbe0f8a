"""The load generator against the real `offramp-serve`: every door, every scenario in short; and the
report in a browser, where there is one."""

import json
import random
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import pytest

from loading import load
from offramp_loadtest.__main__ import DONE, MISSED, main
from offramp_loadtest.doors import DOORS
from offramp_loadtest.scenario import shipped
from offramp_loadtest.server_process import ServerProcess, serving

WORDS = [f"w{number}" for number in range(60)]
NEVER_EARLY = ("--speedup", "1")


@dataclass
class Deployment:
    """A server, and texts with the labels that it gives them at full depth."""

    server: ServerProcess
    labelled: Path

    @property
    def port(self) -> str:
        return str(self.server.address.port)


def labelled(server: ServerProcess, path: Path) -> Path:
    chance = random.Random(7)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(1, 20))) for _ in range(60)]
    connection = HTTPConnection(server.address.host, server.address.port, timeout=30)
    rows = []
    for text in texts:
        connection.request("POST", "/classify", json.dumps({"input": text, "speedup": 1.0}))
        label = json.loads(connection.getresponse().read())["data"][0]["label"]
        rows.append(json.dumps({"text": text, "label": label}))
    connection.close()
    path.write_text("\n".join(rows))
    return path


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("load")
    support = load("tests/unit/service/support.py")
    checkpoint = support.write_tiny_checkpoint(folder / "tiny")
    flags = ["--model-id", str(checkpoint), "--port", "0", "--threads", "1"]
    flags += ["--drain-seconds", "0", "--log-level", "warning"]
    with serving([sys.executable, "-m", "offramp_service", *flags]) as server:
        yield Deployment(server, labelled(server, folder / "rows.jsonl"))


def run(deployment: Deployment, out: Path, *words: str, code: int = DONE) -> dict[str, Any]:
    path = out / "report.json"
    assert main([*words, "--port", deployment.port, "--json", str(path), "--quiet"]) == code
    return json.loads(path.read_text())


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("batch", [0, 3])
def test_every_door_is_asked_and_understood(
    deployment: Deployment, tmp_path: Path, door: str, batch: int
) -> None:
    """Labels are the server's own at full depth, so whatever is misread lowers the accuracy."""
    flags = ["--texts", str(deployment.labelled), "--door", door, "--batch", str(batch)]
    flags += ["--pattern", "constant", "--rate", "60", "--seconds", "0.5"]
    report = run(deployment, tmp_path, "run", *flags, *NEVER_EARLY)
    assert report["requests"]["statuses"] == {"200": 30}
    texts = 30 * max(1, batch)
    assert report["accuracy"] == {"texts": texts, "accuracy": 1.0}
    assert report["exits"]["speedup_achieved"] == 1.0
    assert report["exits"]["texts"] == texts
    told = report["exits"]["layers"]
    assert told == ({"4": texts} if batch == 0 or door.startswith("v2") else {})
    early = run(deployment, tmp_path, "run", *flags, "--speedup", "2")
    assert early["exits"]["speedup_achieved"] > 1.3


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_what_is_malformed(
    deployment: Deployment, tmp_path: Path, door: str
) -> None:
    flags = ["--door", door, "--malformed-share", "1", "--rate", "100", "--seconds", "0.6"]
    report = run(deployment, tmp_path, "run", *flags)
    assert report["requests"]["malformed_wrongly_answered"] == 0
    assert len(report["requests"]["malformed"]) >= 4


SHORT = {
    "smoke": (),
    "steady": ("--rate", "60"),
    "burst": ("--rate", "60"),
    "step-overload": (),
    "mixed-speedups": ("--rate", "60"),
    "clients-that-leave": ("--rate", "60"),
    "long-texts": (),
    "soak": (),
}
STEPS = "arrivals.steps=[{rate=30.0, seconds=0.8}, {rate=120.0, seconds=0.8}]"


@pytest.mark.parametrize("name", list(shipped()))
def test_every_scenario_in_short(deployment: Deployment, tmp_path: Path, name: str) -> None:
    """Without its bounds on latency: the machine of a test may be busy with others."""
    length = ("--set", STEPS) if name == "step-overload" else ("--seconds", "1.5")
    report = run(
        *(deployment, tmp_path, "run", name, *length, "--warm-up", "0.2", *SHORT[name]),
        *("--slo-error-share", "0.2", "--slo-p99-ms", "60000"),
    )
    requests = report["requests"]
    assert report["name"] == name
    assert requests["answered"] > 10
    assert requests["malformed_wrongly_answered"] == 0
    assert requests["unreadable_answers"] == 0
    assert report["exits"]["speedup_achieved"] >= 1.0
    if name in ("smoke", "soak", "mixed-speedups"):
        assert len(report["by"]["door"]) >= 3
    if name == "mixed-speedups":
        reached = {
            name: part["exits"]["speedup_achieved"]
            for name, part in report["by"]["controls"].items()
        }
        assert reached["speedup 1"] == 1.0
        assert reached["speedup 2"] > reached["speedup 1"]
    if name == "clients-that-leave":
        assert requests["left"]["left"] > 5
    if name == "step-overload":
        rates = [one["rate_due"] for one in report["timeline"]]
        half = len(rates) // 2
        assert sum(rates[:half]) < sum(rates[half:])
    alive = json.loads(deployment.server.get("/livez"))
    assert alive["phase"] == "ready"


def test_a_bound_that_is_missed_is_the_exit_code(deployment: Deployment, tmp_path: Path) -> None:
    flags = ["run", "--rate", "30", "--seconds", "1", "--slo-rate", "10000"]
    report = run(deployment, tmp_path, *flags, code=MISSED)
    assert [one["met"] for one in report["slo"]] == [False]


@pytest.mark.slow
def test_the_report_in_a_browser(deployment: Deployment, tmp_path: Path) -> None:
    """It draws everything, complains of nothing and asks nobody for anything."""
    playwright = pytest.importorskip("playwright.sync_api")
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("no chromium on this machine")
    page_file = tmp_path / "report.html"
    flags = ["--rate", "60", "--seconds", "2", "--html", str(page_file)]
    run(deployment, tmp_path, "run", "mixed-speedups", *flags, "--warm-up", "0")
    asked, complaints = [], []
    flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-background-networking"]
    with playwright.sync_playwright() as started:
        chromium = started.chromium.launch(executable_path=browser, args=flags)
        page = chromium.new_page(viewport={"width": 900, "height": 1200})
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(page_file.as_uri())
        plots = page.locator("svg")
        boxes = [plots.nth(at).bounding_box() for at in range(plots.count())]
        wide = page.evaluate("document.documentElement.scrollWidth")
        lines = page.locator("polyline").count()
        chromium.close()
    assert asked == [page_file.as_uri()]
    assert complaints == []
    assert len(boxes) == 6
    assert all(box["width"] > 200 and box["height"] > 100 for box in boxes)
    assert wide <= 900
    assert lines >= 8
