"""`offramp-serve plan` as it is typed: what it reads, what it prints, what it refuses."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from loading import load
from offramp_service.__main__ import main

write_tiny_checkpoint = load("tests/unit/service/support.py").write_tiny_checkpoint

ROOT = Path(__file__).parents[3]
SCHEDULER = ROOT / "docs" / "results" / "scheduler.json"
INFO: dict[str, Any] = {
    "served_model_name": "clf",
    "max_batch_tokens": 1024,
    "max_batch_requests": 32,
    "layer_cost": {"tokens": [16, 64, 256, 1024], "milliseconds": [0.7, 1.2, 4.0, 16.0]},
    "calibration": {
        "points": [
            {"speedup": 1.0, "accuracy": 0.91, "exit_shares": [0.0, 0.0, 1.0]},
            {"speedup": 1.5, "accuracy": 0.90, "exit_shares": [0.25, 0.5, 0.25]},
        ]
    },
}
ASK = ["--rate", "5000", "--slo", "60", "--front-ms", "0", "--tokens", "24"]


@pytest.fixture
def info(tmp_path: Path) -> Path:
    file = tmp_path / "info.json"
    file.write_text(json.dumps(INFO))
    return file


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["plan", *arguments])
    out, err = capsys.readouterr()
    return code, out, err


def asked(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    code, out, err = ask(capsys, *arguments, "--json")
    assert (code, err) == (0, "")
    report: dict[str, Any] = json.loads(out)
    return report


def test_costs_of_one_of_several_workers(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    several = info.with_name("several.json")
    several.write_text(json.dumps({**INFO, "engine_workers": 3}))
    kinds = ["--costs", f"one={info}", "--costs", f"three={several}"]
    one, three = asked(capsys, *ASK, *kinds, "--speedup", "1.2")["machines"]
    assert three["capacity"] == pytest.approx(3 * one["capacity"])


def test_a_plan_from_the_info_of_a_server(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    report = asked(capsys, *ASK, "--costs", str(info), "--speedup", "1.2")
    (machine,) = report["machines"]
    assert report["cheapest"] == machine["machine"] == "clf"
    assert machine["accuracy"] == 0.90  # of the next larger calibrated speed-up
    assert machine["price"] is None
    assert machine["replicas"] >= 5000 / (0.8 * machine["carries"])
    assert machine["forecast"]["p99_s"] <= 0.06
    assert machine["forecast"]["rate"] == pytest.approx(5000 / machine["replicas"])
    full = asked(capsys, *ASK, "--costs", str(info))["machines"][0]
    assert full["accuracy"] == 0.91
    assert full["replicas"] > machine["replicas"]
    mixed = asked(capsys, *ASK, "--costs", str(info), "--speedup", "1:0.5,1.5:0.5")["machines"][0]
    assert mixed["accuracy"] == pytest.approx(0.905)
    assert machine["replicas"] <= mixed["replicas"] <= full["replicas"]


def test_the_cheapest_of_several_machines(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    slow = {**INFO, "layer_cost": {"tokens": [16, 1024], "milliseconds": [1.5, 40.0]}}
    other = info.with_name("slow.json")
    other.write_text(json.dumps(slow))
    kinds = ["--costs", f"fast={info}", "--costs", f"slow={other}"]
    report = asked(capsys, *ASK, *kinds, "--price", "fast=9", "--price", "slow=1")
    fast, slow_one = report["machines"]
    assert fast["replicas"] < slow_one["replicas"]
    assert fast["price"] == 9 * fast["replicas"]
    assert report["cheapest"] == "slow"
    assert asked(capsys, *ASK, *kinds)["cheapest"] == "fast"


def test_people_get_a_table(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    code, out, _ = ask(capsys, *ASK, "--costs", f"cpu={info}", "--price", "cpu=0.25")
    lines = out.splitlines()
    assert code == 0
    assert lines[0].startswith("5,000 requests a second, p99 within 60 ms, speed-up 1, 20%")
    assert lines[2].split()[:3] == ["machine", "replicas", "price"]
    assert lines[3].startswith("cpu ")
    assert lines[-1] == "Cheapest: cpu."


def test_what_no_number_can_do_is_said(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    code, out, _ = ask(capsys, "--rate", "1", "--slo", "1", "--tokens", "24", "--costs", str(info))
    assert code == 1
    assert "not even an empty replica is fast enough" in out
    assert "No number of replicas is enough" in out


def test_lists_cost_more_than_single_texts(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    single, lists = (
        asked(capsys, *ASK, "--costs", str(info), "--batch-mix", mix)["machines"][0]["replicas"]
        for mix in ("1", "1:0.9,8:0.1")
    )
    assert lists > single


def test_the_costs_of_the_benchmark(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    """With the lengths that it was measured with, and the exits of a checkpoint."""
    code, _, err = ask(capsys, "--rate", "9", "--slo", "99", "--costs", f"{SCHEDULER}#h200-32")
    assert code == 2
    assert "--model-id" in err
    code, _, err = ask(capsys, "--rate", "9", "--slo", "99", "--costs", f"{SCHEDULER}#nothing")
    assert code == 2
    assert "h200-256" in err  # one of those that there are
    code, _, err = ask(capsys, "--rate", "9", "--slo", "99", "--costs", f"gpu={SCHEDULER}")
    assert "FILE#SETTING" in err


def test_the_calibration_of_a_checkpoint(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    checkpoint = write_tiny_checkpoint(tmp_path / "tiny")
    capsys.readouterr()  # it shows its progress
    report = asked(
        capsys, "--rate", "900", "--slo", "99", "--model-id", str(checkpoint),
        "--costs", f"{SCHEDULER}#sst2-joint-int8", "--speedup", "1.5",
    )  # fmt: skip
    (machine,) = report["machines"]
    assert machine["machine"] == "sst2-joint-int8"
    assert 0 < machine["accuracy"] < 1


@contextmanager
def server(content: bytes) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/info" else 404)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as it:
        thread = Thread(target=it.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{it.server_address[1]}"
        finally:
            it.shutdown()
            thread.join()


def test_a_live_server_is_asked(capsys: pytest.CaptureFixture[str]) -> None:
    with server(json.dumps(INFO).encode()) as url:
        report = asked(capsys, *ASK, "--costs", f"here={url}")
        assert report["machines"][0]["machine"] == "here"
        assert asked(capsys, *ASK, "--costs", f"{url}/info")["machines"][0]["machine"] == "clf"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("not json", "cannot be read"),
        ("[1]", "a JSON object"),
        (json.dumps({**INFO, "layer_cost": None}), "--warmup"),
        (json.dumps({"layer_cost": {"tokens": [16]}}), "not the content of /info"),
        (json.dumps({**INFO, "layer_cost": {"tokens": [16, 8], "milliseconds": [1, 2]}}), "ascend"),
        (json.dumps({**INFO, "calibration": None}), "--model-id"),
        (json.dumps({"settings": [{"name": "x"}]}), "bench_scheduler"),
    ],
)
def test_files_that_say_too_little(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: str, says: str
) -> None:
    (tmp_path / "costs.json").write_text(content)
    code, out, err = ask(capsys, *ASK, "--costs", str(tmp_path / "costs.json"))
    assert (code, out) == (2, "")
    assert says in err


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--speedup", "3"), "allowed is 1 to 1.5"),
        (("--price", "nobody=1"), "no machine 'nobody'"),
        (("--price", "clf=dear"), "NAME=NUMBER"),
        (("--price", "clf=-1"), "at least 0"),
    ],
)
def test_what_does_not_fit_the_machines(
    capsys: pytest.CaptureFixture[str], info: Path, more: tuple[str, ...], says: str
) -> None:
    code, _, err = ask(capsys, *ASK, "--costs", str(info), *more)
    assert code == 2
    assert says in err


def test_machines_need_names_of_their_own(capsys: pytest.CaptureFixture[str], info: Path) -> None:
    code, _, err = ask(capsys, *ASK, "--costs", str(info), "--costs", str(info))
    assert code == 2
    assert "different names" in err


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--rate", "0", "above 0"),
        ("--rate", "inf", "above 0"),
        ("--slo", "-5", "above 0"),
        ("--speedup", "0.5", "at least 1"),
        ("--tokens", "1.5", "whole numbers"),
        ("--batch-mix", "1:0.5,8:0.6", "add up to 1"),
        ("--batch-mix", "many", "N:SHARE"),
        ("--headroom", "1", "below 1"),
        ("--front-ms", "-1", "0 or more"),
        ("--percentile", "90", "invalid choice"),
    ],
)
def test_values_that_make_no_sense(
    capsys: pytest.CaptureFixture[str], info: Path, flag: str, value: str, says: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["plan", *ASK, "--costs", str(info), flag, value])
    assert ended.value.code == 2
    assert says in capsys.readouterr().err
