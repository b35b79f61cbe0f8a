"""Quantiles and summaries; texts from files and the requests that carry them."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.generator import Outcome, Result
from offramp_loadtest.http_client import Address
from offramp_loadtest.report import milliseconds, quantile, summary
from offramp_loadtest.texts import classify_requests, read_texts

ADDRESS = Address("127.0.0.1", 1)


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


def test_a_summary_counts_what_was_due_and_what_was_answered() -> None:
    outcomes = [
        Outcome(due=10.0, sent=10.001, done=10.101, status=200, exit_layer=2),
        Outcome(due=10.5, sent=10.5, done=12.0, status=200, exit_layer=None),
        Outcome(due=10.9, sent=10.9, done=10.95, status=429, exit_layer=None),
        Outcome(due=10.9, sent=10.9, done=19.0, status=0, exit_layer=None),
    ]
    report = summary(Result(outcomes, 0.1, 3, 1), seconds=1.0, max_connections=3)
    assert report["status"] == {"0": 1, "200": 2, "429": 1}
    assert report["rate_due"] == 4
    assert report["rate_answered"] == pytest.approx(1.0)  # the second came two seconds in
    assert report["latency_ms"]["max"] == pytest.approx(1500)
    assert report["exit_layers"] == {"2": 1}
    generator = report["generator"]
    assert generator["lateness_ms"]["max"] == pytest.approx(1.0)
    assert generator["requests_that_waited_for_a_connection"] == 1
    nothing = summary(Result([], 0.1, 0, 0), seconds=1.0, max_connections=3)
    assert nothing["rate_answered"] == 0
    json.dumps([report, nothing])


def test_texts_come_from_lines(tmp_path: Path) -> None:
    plain = tmp_path / "texts.txt"
    plain.write_text("one\n\ntwo\n")
    assert read_texts(plain) == ["one", "two"]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "one", "label": 1}\n{"text": "\xc3\xa9"}\n'))
    assert read_texts(packed) == ["one", "é"]
    plain.write_text("\n")
    with pytest.raises(ValueError, match=r"texts\.txt holds no text"):
        read_texts(plain)


def test_requests_carry_texts_and_lists_of_them() -> None:
    texts = ["a", "bé", "c", "d", "e"]
    single = classify_requests(ADDRESS, texts)
    assert len(single) == 5
    head, body = single[1].split(b"\r\n\r\n")
    assert json.loads(body) == {"input": "bé"}
    assert b"content-length: %d" % len(body) in head
    assert head.startswith(b"POST /classify HTTP/1.1\r\n")
    lists = classify_requests(ADDRESS, texts, batch=2, speedup=2.0)
    bodies = [json.loads(request.split(b"\r\n\r\n")[1]) for request in lists]
    assert bodies == [{"input": ["a", "bé"], "speedup": 2.0}, {"input": ["c", "d"], "speedup": 2.0}]
    with pytest.raises(ValueError, match="lists of 6 cannot be made of 5 texts"):
        classify_requests(ADDRESS, texts, batch=6)
