"""What is counted, what is left out, and that parts add up to the whole."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.http_client import LEFT, Leave, Reply
from offramp_loadtest.question import Kind, Outcome, Question
from offramp_loadtest.recorder import MOST_SLOTS, Recorder, Timeline

SINGLE, FOUR = Kind("vllm", "speedup 2", 0), Kind("v2", "speedup 2", 4)


def reply(status: int = 200, body: object = None, **headers: str) -> Reply:
    lines = [f"HTTP/1.1 {status} OK", *(f"x-{name}: {value}" for name, value in headers.items())]
    head = "\r\n".join(lines).replace("_", "-") + "\r\n"
    return Reply(status, head.encode(), json.dumps(body).encode())


def outcome(
    question: Question | None = None,
    answer: Reply | None = None,
    *,
    due: float = 0.0,
    took: float = 0.1,
) -> Outcome:
    asked = question or Question((b"",), SINGLE)
    return Outcome(asked, 0, 100 + due, 100 + due + 0.001, 100 + due + took, answer)


def recorded(*outcomes: Outcome, warm_up_s: float = 0.0) -> Recorder:
    recorder = Recorder(start=100, warm_up_s=warm_up_s)
    for one in outcomes:
        recorder.note(one)
    return recorder


def test_answers_are_counted_and_timed() -> None:
    recorder = recorded(
        outcome(answer=reply(exit_layer="3"), took=0.1),
        outcome(answer=reply(exit_layer="6", speedup_effective="2"), took=0.3),
        outcome(answer=reply(429)),
        outcome(answer=None, took=60),
    )
    total = recorder.total()
    assert total.statuses == {"200": 2, "429": 1, "no answer": 1}
    assert total.exit_layers == {3: 1, 6: 1}
    assert (total.texts, total.layers_run, total.raised) == (2, 9, 1)
    assert total.latency.count == 2
    assert total.latency.quantile(1.0) == pytest.approx(0.3, rel=0.001)
    assert total.service.quantile(1.0) == pytest.approx(0.299, rel=0.001)
    assert recorder.lateness.quantile(0.5) == pytest.approx(0.001, rel=0.01)
    assert recorder.last_answer_s == pytest.approx(0.3)


def test_the_warm_up_is_left_out() -> None:
    recorder = recorded(
        outcome(answer=reply(), due=0.5), outcome(answer=reply(), due=1.0), warm_up_s=1.0
    )
    assert (recorder.warm_up, recorder.total().statuses["200"]) == (1, 1)
    assert recorder.lateness.count == 1
    assert sum(one.due for one in recorder.timeline.slots) == 1


def test_clients_that_leave_and_nonsense_are_counted_apart() -> None:
    leaver = Question((b"",), SINGLE, leave=Leave(0.1))
    nonsense = Question((b"",), SINGLE, malformed="not JSON", right_statuses=frozenset((400,)))
    recorder = recorded(
        outcome(leaver, LEFT),
        outcome(leaver, reply(exit_layer="1")),  # it was faster
        outcome(nonsense, reply(400)),
        outcome(nonsense, reply(500)),
    )
    assert recorder.tallies == {}
    assert recorder.leavers == {"left": 1, "200": 1}
    assert recorder.malformed == {"not JSON": {"400": 1, "500": 1}}
    assert recorder.wrongly_answered == 1


def v2(labels: list[str], layers: list[int]) -> dict[str, Any]:
    return {
        "outputs": [
            {"name": "label", "datatype": "BYTES", "data": labels},
            {"name": "exit_layer", "datatype": "INT32", "data": layers},
        ]
    }


def test_lists_are_told_text_by_text_where_the_answer_does() -> None:
    four = Question((b"",), FOUR, labels=("a", "b", "a", "a"))
    answer = reply(body=v2(["a", "b", "b", "a"], [1, 2, 2, 6]), exit_layer_mean="2.75")
    total = recorded(outcome(four, answer)).total()
    assert (total.texts, total.layers_run) == (4, 11)
    assert total.exit_layers == {1: 1, 2: 2, 6: 1}
    assert (total.graded, total.right) == (4, 3)
    mean_only = Question((b"",), Kind("tei", "", 4))
    total = recorded(outcome(mean_only, reply(exit_layer_mean="2.75"))).total()
    assert (total.texts, total.layers_run, total.exit_layers) == (4, 11, {})
    one = Question((b"",), Kind("v2", "", 0))
    assert recorded(outcome(one, reply(exit_layer_mean="3.00"))).total().exit_layers == {3: 1}


def test_an_answer_that_is_none_is_told() -> None:
    graded = Question((b"",), SINGLE, labels=("a",))
    total = recorded(outcome(graded, reply(body={"nothing": 1}))).total()
    assert (total.unreadable, total.graded) == (1, 0)


outcomes = st.lists(
    st.builds(
        outcome,
        question=st.sampled_from(
            [
                Question((b"",), SINGLE),
                Question((b"",), FOUR),
                Question((b"",), SINGLE, leave=Leave(0.1)),
                Question((b"",), SINGLE, malformed="not JSON", right_statuses=frozenset((400,))),
            ]
        ),
        answer=st.sampled_from([None, reply(), reply(exit_layer="2"), reply(400), LEFT]),
        due=st.floats(0, 200),
        took=st.floats(0.001, 50),
    ),
    max_size=40,
)


@given(outcomes, st.integers(0, 40))
def test_parts_add_up_and_go_through_json(them: list[Outcome], at: int) -> None:
    whole = recorded(*them, warm_up_s=5.0)
    parts = Recorder()
    for part in (them[:at], them[at:]):
        found = recorded(*part, warm_up_s=5.0).to_json()
        parts.add(Recorder.from_json(json.loads(json.dumps(found))))
    first, second = parts.to_json(), whole.to_json()
    for one in (first, second):
        one["tallies"].sort(key=lambda tally: tally["kind"])
        for tally in one["tallies"]:
            tally["layers_run"] = round(tally["layers_run"], 6)
    assert first["tallies"] == second["tallies"]
    for name in ("lateness", "warm_up", "leavers", "malformed", "wrongly_answered"):
        assert first[name] == second[name]
    for name in ("due", "answered", "refused"):
        counts = [sum(slot[name] for slot in one["timeline"]["slots"]) for one in (first, second)]
        assert counts[0] == counts[1]
    kept = [one for one in them if one.due - 100 >= 5.0]
    total = sum(sum(one.statuses.values()) for one in whole.tallies.values())
    apart = sum(whole.leavers.values()) + sum(sum(n.values()) for n in whole.malformed.values())
    assert total + apart == len(kept)


@given(st.lists(st.floats(0, 100_000), min_size=1, max_size=50))
def test_slots_never_become_too_many(times: list[float]) -> None:
    timeline = Timeline()
    for at in times:
        timeline.at(at).due += 1
    assert len(timeline.slots) <= MOST_SLOTS
    assert sum(one.due for one in timeline.slots) == len(times)
    last = max(place for place, one in enumerate(timeline.slots) if one.due)
    assert last == int(max(times) / timeline.slot_s)
    fewer = timeline.at_most(7)
    assert len(fewer.slots) <= 7
    assert sum(one.due for one in fewer.slots) == len(times)
