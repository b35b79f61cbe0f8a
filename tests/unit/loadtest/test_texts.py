"""Texts from files and made up, and the requests that carry them."""

import gzip
import json
import statistics
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.http_client import Address
from offramp_loadtest.texts import (
    Text,
    always,
    classify_requests,
    lognormal,
    make_text,
    read_rows,
    read_texts,
    uniform,
)

ADDRESS = Address("127.0.0.1", 1)


def test_texts_come_from_lines(tmp_path: Path) -> None:
    plain = tmp_path / "texts.txt"
    plain.write_text("one\n\ntwo\n")
    assert read_texts(plain) == ["one", "two"]
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(b'{"text": "one", "label": 1}\n{"text": "\xc3\xa9"}\n'))
    assert read_texts(packed) == ["one", "é"]
    assert read_rows(packed) == [Text("one", 1), Text("é")]
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


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2 is not JSON"),
        ("[]", 'line 2 has no "text"'),
        ('{"text": 3}', 'line 2 has no "text"'),
        ('{"text": "a", "label": 1.5}', "line 2 has a label that is neither"),
        ('{"text": "a", "label": true}', "line 2 has a label that is neither"),
    ],
)
def test_lines_that_are_none(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"rows.jsonl, {said}"):
        read_rows(path)


@given(
    median=st.floats(1, 300),
    factor=st.floats(1, 8),
    most=st.integers(1, 2000),
    seed=st.integers(0, 1000),
)
def test_made_up_lengths_stay_within_bounds(
    median: float, factor: float, most: int, seed: int
) -> None:
    draw = lognormal(median, median * factor, most)
    random = Random(seed)
    assert all(1 <= draw(random) <= most for _ in range(50))


def test_made_up_lengths_are_as_asked() -> None:
    random = Random(1)
    draw = lognormal(20, 60, 10_000)
    lengths = sorted(draw(random) for _ in range(20_000))
    assert statistics.median(lengths) == pytest.approx(20, rel=0.05)
    assert lengths[19_000] == pytest.approx(60, rel=0.08)
    assert {uniform(3, 5)(random) for _ in range(100)} == {3, 4, 5}
    assert always(7)(random) == 7
    assert len(make_text(7, random).split()) == 7
