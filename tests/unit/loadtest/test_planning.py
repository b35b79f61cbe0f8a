"""From scenarios and traces to requests: shares, labels, lists, clients."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.planning import (
    Maker,
    Server,
    check_trace,
    deck,
    read_trace,
    replayed,
)
from offramp_loadtest.question import Question
from offramp_loadtest.scenario import Replay, Scenario, ScenarioError, make_scenario

SERVER = Server("clf", ("no", "yes"), 6)


def scenario(**changed: Any) -> Scenario:
    return make_scenario(
        {
            "name": "mine",
            "arrivals": {"pattern": "poisson", "rate": 10, "seconds": 5},
            "texts": [{"words": {"distribution": "always", "words": 3}}],
            **changed,
        }
    )


def drawn(count: int = 2000, **changed: Any) -> list[Question]:
    return list(islice(deck(Maker(scenario(**changed), SERVER, Random(1)), count), count))


def body(question: Question) -> Any:
    return json.loads(question.wires[0].partition(b"\r\n\r\n")[2])


def test_mixes_are_kept_to() -> None:
    questions = drawn(
        doors=[{"door": "vllm", "share": 3}, {"door": "tei", "share": 1}],
        controls=[{"speedup": 1.0, "share": 1}, {"speedup": 2.0, "share": 4}],
        batches=[{"texts": 0, "share": 1}, {"texts": 4, "share": 1}],
    )
    count = len(questions)
    doors = Counter(one.kind.door for one in questions)
    assert doors["vllm"] / count == pytest.approx(0.75, abs=0.05)
    controls = Counter(one.kind.controls for one in questions)
    assert controls["speedup 2"] / count == pytest.approx(0.8, abs=0.05)
    assert {one.texts for one in questions} == {1, 4}
    for one in questions[:50]:
        content = body(one)
        given = content["input"] if one.kind.door == "vllm" else content["inputs"]
        assert isinstance(given, str) == (one.kind.texts == 0)
        if one.kind.texts:
            assert len(given) == 4


def test_the_same_seed_draws_the_same() -> None:
    assert drawn(50) == drawn(50)


def test_labels_are_known_by_name_or_number(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": "a", "label": 1}, {"text": "b", "label": "no"}, {"text": "c", "label": 7}]
    path.write_text("\n".join(json.dumps(row) for row in [*rows, {"text": "d"}]))
    questions = drawn(8, texts=[{"file": str(path)}])
    labels = {body(one)["input"]: one.labels for one in questions}
    assert labels == {"a": ("yes",), "b": ("no",), "c": (), "d": ()}
    # Each text as often as any other.
    assert set(Counter(body(one)["input"] for one in questions).values()) == {2}
    own = drawn(8, texts=[{"file": str(path)}], target={"labels": ["nein", "ja"]})
    assert {one.labels for one in own} == {("ja",), ("no",), ()}
    lists = drawn(8, texts=[{"file": str(path)}], batches=[{"texts": 4}])
    assert {one.labels for one in lists} == {()}  # not all of a list are known


def test_clients_leave_and_send_nonsense_as_often_as_asked() -> None:
    questions = drawn(
        clients={
            "leave_share": 0.5,
            "leave_after_ms": 40.0,
            "leave_while_sending_share": 0.25,
            "malformed_share": 0.2,
        }
    )
    wrong = [one for one in questions if one.malformed]
    assert len(wrong) / len(questions) == pytest.approx(0.2, abs=0.04)
    assert all(200 not in one.right_statuses and one.leave is None for one in wrong)
    leaves = [one.leave for one in questions if one.leave is not None]
    assert len(leaves) / (len(questions) - len(wrong)) == pytest.approx(0.5, abs=0.05)
    assert sum(one.after_s for one in leaves) / len(leaves) == pytest.approx(0.04, rel=0.15)
    sending = [one for one in leaves if one.part < 1]
    assert len(sending) / len(leaves) == pytest.approx(0.25, abs=0.05)


def test_every_target_gets_its_own_bytes_and_headers_go_with_them() -> None:
    mine = scenario(target={"urls": ["http://a:1/x", "https://b"]})
    question = Maker(mine, SERVER, Random(0), ["x-tenant: blue"]).draw()
    first, second = question.wires
    assert first.startswith(b"POST /x/classify HTTP/1.1\r\nhost: a:1\r\n")
    assert second.startswith(b"POST /classify HTTP/1.1\r\nhost: b:443\r\n")
    assert b"\r\nx-tenant: blue\r\n\r\n" in first


def test_what_cannot_be_made() -> None:
    with pytest.raises(ScenarioError, match="no server says it; needed by v1, v2"):
        Maker(scenario(doors=[{"door": "v2"}, {"door": "v1"}]), Server(), Random(0))
    with pytest.raises(ScenarioError, match=r"texts\.file: "):
        Maker(scenario(texts=[{"file": "/nowhere.jsonl"}]), SERVER, Random(0))


# -- traces ----------------------------------------------------------------------------------------


def trace(path: Path, *lines: str) -> Replay:
    path.write_text("\n".join(lines))
    return Replay(pattern="replay", file=str(path), speed=2.0)


LINES = (
    '{"at_s": 0, "text": "a", "label": "yes", "speedup": 2}',
    '{"at_s": 1.0, "words": 7, "door": "v1"}',
    "",
    '{"at_s": 1.0, "texts": ["b", "c"], "speedup": 1.5}',
)


def planned(replay: Replay, **among: int) -> list[tuple[float, Question]]:
    mine = scenario()
    maker = Maker(mine, SERVER, Random(0))
    return list(replayed(replay, maker, mine, Random(0), **among))


def test_a_trace_is_replayed_at_its_times(tmp_path: Path) -> None:
    replay = trace(tmp_path / "trace.jsonl", *LINES)
    (first, one), (second, two), (third, three) = planned(replay)
    assert (first, second, third) == (0.0, 0.5, 0.5)
    assert body(one) == {"input": "a", "speedup": 2.0, "model": "clf"}
    assert one.labels == ("yes",)
    assert two.kind.door == "v1"
    assert len(body(two)["instances"][0].split()) == 7
    assert (body(three)["input"], three.kind) == (["b", "c"], ("vllm", "speedup 1.5", 2))
    assert check_trace(replay) == (3, 0.5)


def test_a_trace_ends_where_the_replay_does(tmp_path: Path) -> None:
    trace(tmp_path / "trace.jsonl", *LINES)
    short = Replay(pattern="replay", file=str(tmp_path / "trace.jsonl"), seconds=0.5)
    assert len(planned(short)) == 1
    assert check_trace(short) == (1, 0.0)


@given(processes=st.integers(1, 5))
def test_processes_share_a_trace(tmp_path_factory: Any, processes: int) -> None:
    path = tmp_path_factory.getbasetemp() / "shared.jsonl"
    replay = trace(path, *(json.dumps({"at_s": at, "text": str(at)}) for at in range(11)))
    shares = [planned(replay, place=at, processes=processes) for at in range(processes)]
    texts = [body(question)["input"] for share in shares for _, question in share]
    assert sorted(texts, key=int) == [str(at) for at in range(11)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ('{"at_s": 0.5, "text": "a"}', "line 2: at_s is 0.5, 1 above it"),
        ('{"at_s": 2}', "line 2: one of text, texts and words is wanted"),
        ('{"at_s": 2, "text": "a", "words": 3}', "one of text, texts and words"),
        ('{"at_s": 2, "text": "a", "speed": 3}', "unknown: speed; allowed: at_s, text"),
        ('{"at_s": 2, "text": "a", "door": "grpc"}', "line 2: door Input should be 'vllm'"),
        ('{"at_s": "2", "text": "a"}', "line 2: at_s Input should be a valid number"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, line: str, said: str) -> None:
    trace(tmp_path / "trace.jsonl", '{"at_s": 1, "text": "a"}', line)
    with pytest.raises(ScenarioError) as refused:
        list(read_trace(tmp_path / "trace.jsonl"))
    assert said in str(refused.value)


def test_traces_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"arrivals\.file: "):
        check_trace(Replay(pattern="replay", file=str(tmp_path / "none")))
    with pytest.raises(ScenarioError, match=r"empty\.jsonl holds no request"):
        check_trace(trace(tmp_path / "empty.jsonl", ""))
