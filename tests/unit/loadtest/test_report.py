"""Reports of made-up runs: rates, shares, warnings, and what must hold."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.generator import Effort
from offramp_loadtest.html_report import page
from offramp_loadtest.http_client import LEFT, Leave, Reply
from offramp_loadtest.planning import Server
from offramp_loadtest.question import Kind, Outcome, Question
from offramp_loadtest.recorder import Recorder
from offramp_loadtest.report import (
    as_text,
    latency,
    make_report,
    merge,
    milliseconds,
    quantile,
)
from offramp_loadtest.running import Measured
from offramp_loadtest.scenario import make_scenario


@given(st.lists(st.floats(0, 10), min_size=1), st.floats(0, 1))
def test_a_quantile_is_a_value_that_enough_do_not_exceed(values: list[float], share: float) -> None:
    ordered = sorted(values)
    found = quantile(ordered, share)
    assert found in ordered
    assert sum(value <= found for value in ordered) >= share * len(ordered) - 1e-9
    assert sum(value < found for value in ordered) <= share * len(ordered)


def test_quantiles_by_hand() -> None:
    figures = milliseconds([number / 1000 for number in range(1, 1001)])
    assert [round(figures[name]) for name in ("p50", "p99", "p99.9", "max")] == [
        500,
        990,
        999,
        1000,
    ]
    assert milliseconds([]) == {}
    with pytest.raises(ValueError, match="nothing"):
        quantile([], 0.5)


# -- a run -----------------------------------------------------------------------------------------


def question(speedup: int = 1, **others: Any) -> Question:
    return Question((b"",), Kind("vllm", f"speedup {speedup}", 0), **others)


def reply(status: int = 200, layer: int = 6, label: str = "yes") -> Reply:
    head = f"HTTP/1.1 {status} OK\r\nx-exit-layer: {layer}\r\n".encode()
    return Reply(status, head, json.dumps({"data": [{"label": label}]}).encode())


def measured(
    outcomes: list[Outcome], effort: Effort | None = None, busy: float = 0.3, **changed: Any
) -> Measured:
    scenario = make_scenario(
        {
            "name": "made-up",
            "arrivals": {"pattern": "poisson", "rate": 10, "seconds": 10},
            "texts": [{"words": {"distribution": "always", "words": 3}}],
            "target": {"urls": ["http://a.example"], "headers": ["x-secret: hush"]},
            **changed,
        }
    )
    recorder = Recorder(warm_up_s=scenario.warm_up_s)
    for one in outcomes:
        recorder.note(one)
    server = Server("clf", ("no", "yes"), 6, {"backend": "onnx", "model_dtype": "int8"})
    effort = effort or Effort(10.0, 1.0, 20, 0)
    return Measured(scenario, server, datetime.now(UTC), recorder, [effort], busy)


def answers(
    count: int = 1000, late_s: float = 0.0001, make: Callable[[int], Outcome] | None = None
) -> list[Outcome]:
    """Due over 10 s; at speed-up 1 after 50 ms from the last layer, at 2 after 20 ms from the
    third."""

    def one(at: int) -> Outcome:
        due, fast = 10 * at / count, at % 2
        asked = question(2 if fast else 1, labels=("yes",))
        right = reply(layer=3 if fast else 6, label="no" if at % 10 == 9 else "yes")
        return Outcome(asked, 0, due, due + late_s, due + (0.02 if fast else 0.05), right)

    return [(make or one)(at) for at in range(count)]


def test_a_report_tells_what_was_counted() -> None:
    report = make_report(measured(answers()))
    json.dumps(report)
    assert report["requests"]["statuses"] == {"200": 1000}
    assert report["rate"]["due"] == pytest.approx(100)
    assert report["rate"]["answered"] == pytest.approx(100, rel=0.01)
    assert report["latency_ms"]["max"] == pytest.approx(50, rel=0.001)
    assert report["exits"]["speedup_achieved"] == pytest.approx(6 * 1000 / (500 * 9))
    assert report["accuracy"] == {"texts": 1000, "accuracy": pytest.approx(0.9)}
    parts = report["by"]["controls"]
    assert parts["speedup 2"]["exits"]["speedup_achieved"] == pytest.approx(2)
    assert parts["speedup 2"]["latency_ms"]["p50"] == pytest.approx(20, rel=0.001)
    assert parts["speedup 1"]["accuracy"]["accuracy"] == 1.0
    assert parts["speedup 2"]["accuracy"]["accuracy"] == pytest.approx(0.8)
    assert list(report["by"]) == ["controls"]  # all else was the same
    assert report["target"]["backend"] == "onnx"
    assert latency(report).count == 1000
    due = sum(one["rate_due"] * one["seconds"] for one in report["timeline"])
    assert due == pytest.approx(1000)
    assert report["warnings"] == []
    assert "hush" not in json.dumps(report)
    assert "speedup 2: 500 requests" in as_text(report)


def test_late_answers_lower_the_rate_and_refusals_are_errors() -> None:
    outcomes = [
        Outcome(question(), 0, 0.0, 0.0, 0.1, reply()),
        Outcome(question(), 0, 5.0, 5.0, 20.0, reply()),
        Outcome(question(), 0, 9.0, 9.0, 9.1, reply(429)),
        Outcome(question(), 0, 9.5, 9.5, 69.0, None),
        Outcome(question(leave=Leave(0.1)), 0, 9.5, 9.5, 9.6, LEFT),
        Outcome(
            question(malformed="no text", right_statuses=frozenset((422,))),
            *(0, 9.5, 9.5, 9.6, reply(500)),
        ),
    ]
    report = make_report(measured(outcomes))
    assert report["requests"]["due"] == 6
    assert report["requests"]["error_share"] == 0.5
    assert report["rate"]["answered"] == pytest.approx(2 / 20)
    assert report["requests"]["left"] == {"left": 1}
    assert report["requests"]["malformed"] == {"no text": {"500": 1}}
    assert any("1 malformed requests got another status" in one for one in report["warnings"])


def test_a_run_that_ended_early_is_as_long_as_it_was() -> None:
    report = make_report(measured(answers()[:500]))
    assert report["seconds"] == pytest.approx(5, abs=0.02)
    assert report["rate"]["due"] == pytest.approx(100, rel=0.01)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"outcomes": answers(late_s=0.005)}, "the generator was late: p99 5.0 ms"),
        ({"effort": Effort(10.0, 9.5, 20, 0)}, "used 95% of a core"),
        ({"busy": 0.97}, "was busy to 97%"),
        ({"effort": Effort(10.0, 1.0, 20, 7)}, "7 requests waited for one of 512 connections"),
        ({"outcomes": answers(400)}, "400 answers: a p99 of fewer than 1000"),
        ({"target": {"urls": ["http://127.0.0.1:1"]}}, "share a machine"),
        (
            {"arrivals": {"pattern": "closed", "in_flight": 1, "seconds": 10}},
            "closed loop",
        ),
    ],
)
def test_warnings(given: dict[str, Any], said: str) -> None:
    report = make_report(measured(**{"outcomes": answers(), **given}))
    assert len(report["warnings"]) == 1
    assert said in report["warnings"][0]


@pytest.mark.parametrize(
    ("name", "kept", "missed"),
    [
        ("p50_ms", 51.0, 19.0),
        ("p99_ms", 51.0, 49.0),
        ("p999_ms", 51.0, 49.0),
        ("rate", 98.0, 120.0),
        ("rate_share", 0.98, 1.0),
        ("accuracy", 0.9, 0.91),
        ("speedup", 1.3, 1.4),
    ],
)
def test_what_must_hold(name: str, kept: float, missed: float) -> None:
    for asked, met in ((kept, True), (missed, False)):
        (row,) = make_report(measured(answers(), slo={name: asked}))["slo"]
        assert (row["name"], row["asked"], row["met"]) == (name, asked, met)


def test_what_was_not_found_does_not_hold() -> None:
    slo = {"p99_ms": 1e9, "accuracy": 0.0, "error_share": 1.0}
    rows = make_report(measured([], slo=slo))["slo"]
    assert [row["met"] for row in rows] == [False, False, False]


def test_reports_of_several_machines_are_put_together() -> None:
    everything = answers()
    parts = [make_report(measured(everything[at::2], slo={"p99_ms": 60.0})) for at in (0, 1)]
    both = merge([json.loads(json.dumps(one)) for one in parts])
    whole = make_report(measured(everything))
    for name in ("requests", "rate", "latency_ms", "accuracy", "by", "hdr"):
        assert (
            both[name] == pytest.approx(whole[name])
            if name == "rate"
            else both[name] == whole[name]
        )
    assert both["slo"][0]["met"]
    assert both["generator"]["processes"] == 2
    assert page(both)
    other = make_report(measured(everything, name="another"))
    with pytest.raises(ValueError, match="different scenarios"):
        merge([parts[0], other])
    with pytest.raises(ValueError, match="not a report"):
        merge([{}])


# -- the page --------------------------------------------------------------------------------------


def test_the_page_has_every_plot_and_asks_for_nothing() -> None:
    found = page(make_report(measured(answers(), slo={"p99_ms": 1.0, "error_share": 0.5})))
    for title in (
        "Latency by percentile",
        "Latency over time",
        "Requests over time",
        "Statuses",
        "Exit layers",
        "Speed-up over time",
        "Right labels",
        "By what requests differ in",
    ):
        assert title in found
    assert found.count("<svg") == 7
    assert ">missed<" in found
    assert ">met<" in found
    for asking in ("<script", "<link", "<img", "@import", "url(", 'src="'):
        assert asking not in found


def test_what_a_scenario_says_is_text_on_the_page() -> None:
    nasty = "<script>alert(1)</script>"
    report = make_report(measured(answers(), controls=[{"name": nasty}], description=nasty))
    report["by"]["controls"] = {nasty: report["by"]["controls"]["speedup 1"]}
    found = page(report)
    assert nasty not in found
    assert "&lt;script&gt;" in found


def test_a_run_without_any_answer_has_a_page() -> None:
    report = make_report(measured([Outcome(question(), 0, 0.0, 0.0, 60.0, None)]))
    found = page(report)
    assert "no answer" in found
    assert page(make_report(measured([])))
