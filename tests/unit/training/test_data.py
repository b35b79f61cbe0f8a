"""Rows from files: what is read, what is refused and where."""

import csv
import gzip
import json
import re
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from offramp_training.data import Columns, hold_out, load_split, load_splits, sample
from offramp_training.errors import DataError

GOOD = {"text": "a calm sea", "label": 0}


def directory_with(tmp_path: Path, *lines: str, names: list[str] | None = None) -> Path:
    (tmp_path / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if names:
        info = json.dumps({"label_names": names})
        (tmp_path / "dataset_info.json").write_text(info, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        ("{not json", "not JSON"),
        ("[1]", "a JSON object is needed, got list"),
        ('{"label": 0}', "no 'text'; the row has: label"),
        ('{"text": "  ", "label": 0}', "'text' is empty"),
        ('{"text": 3, "label": 0}', "'text' must be text, got int"),
        ('{"text": "x"}', "no 'label'; the row has: text"),
        (
            '{"text": "x", "label": 2}',
            "'label' = 2; allowed: a whole number from 0 to 1, or a name: down, up",
        ),
        ('{"text": "x", "label": -1}', "'label' = -1; allowed: a whole number from 0 to 1"),
        ('{"text": "x", "label": true}', "'label' = True; allowed"),
        ('{"text": "x", "label": 0.5}', "'label' = 0.5; allowed"),
        (
            '{"text": "x", "label": "meh"}',
            "'meh'; allowed: a whole number from 0 to 1, or a name: down, up",
        ),
        ('{"text": "x", "text_pair": "y", "label": 1}', "earlier rows have one text"),
        ('{"text": "x", "text_pair": "", "label": 1}', "'text_pair' is empty"),
        (r'{"text": "half \ud800", "label": 1}', "'text' is not Unicode at character 6"),
        (r'{"text": "x", "label": "\udfff"}', "'label' is not Unicode at character 1"),
        (f'{{"text": "x", "label": {"9" * 5000}}}', "not JSON: Exceeds the limit"),
        (f'{{"text": "x", "label": "{"9" * 5000}"}}', "999...; allowed: "),
    ],
)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, bad: str, what: str) -> None:
    source = directory_with(tmp_path, json.dumps(GOOD), bad, names=["down", "up"])
    with pytest.raises(DataError) as caught:
        load_splits(str(source))
    assert f"{source / 'train.jsonl'}:2: " in str(caught.value)
    assert what in str(caught.value)


def test_compressed_and_plain_splits_read_alike(tmp_path: Path) -> None:
    line = json.dumps(GOOD) + "\n" + json.dumps({"text": "ß and 海", "label": 1}) + "\n"
    (tmp_path / "train.jsonl").write_text(line, encoding="utf-8")
    with gzip.open(tmp_path / "test.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(line)
    splits = load_splits(str(tmp_path))
    assert splits["train"].rows == splits["test"].rows
    assert splits["train"].label_names == ("0", "1")
    assert splits["train"].fingerprint == splits["test"].fingerprint


def test_text_labels_are_sorted_and_integers_count_up(tmp_path: Path) -> None:
    rows = [{"text": name, "label": name} for name in ("wolf", "ant", "cow", "ant")]
    source = directory_with(tmp_path, *(json.dumps(row) for row in rows))
    train = load_split(str(source), "train")
    assert train.label_names == ("ant", "cow", "wolf")
    assert train.labels == [2, 0, 1, 0]


def test_labels_must_be_those_of_the_checkpoint(tmp_path: Path) -> None:
    source = directory_with(tmp_path, json.dumps(GOOD), names=["down", "up"])
    with pytest.raises(DataError, match="the checkpoint's are no, yes"):
        load_split(str(source), "train", label_names=["no", "yes"])


def test_fingerprint_ignores_order_but_not_content(tmp_path: Path) -> None:
    lines = [json.dumps({"text": word, "label": i % 2}) for i, word in enumerate("abcd")]
    one = load_split(str(directory_with(tmp_path, *lines)), "train")
    two = one.take([3, 1, 0, 2])
    assert one.fingerprint == two.fingerprint
    assert one.ordered_fingerprint != two.ordered_fingerprint
    assert one.take([0, 1, 2]).fingerprint != one.fingerprint


def test_held_out_rows_are_seeded_disjoint_and_never_copies(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(30)] + ["Twice  told", "twice told"]
    lines = [json.dumps({"text": text, "label": i % 2}) for i, text in enumerate(texts)]
    train = load_split(str(directory_with(tmp_path, *lines)), "train")
    rest, held = hold_out(train, 10, seed=3)
    assert len(held) == 10
    assert {row.id for row in held.rows} | {row.id for row in rest.rows} == set(range(32))
    assert not {30, 31} & {row.id for row in held.rows}
    assert hold_out(train, 10, seed=3)[1].rows == held.rows
    assert hold_out(train, 10, seed=4)[1].rows != held.rows
    with pytest.raises(DataError, match="30 of them"):
        hold_out(train, 31, seed=3)


def test_sample_is_seeded_and_keeps_order(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": i % 2}) for i in range(20)]
    train = load_split(str(directory_with(tmp_path, *lines)), "train")
    ids = [row.id for row in sample(train, 7, seed=1).rows]
    assert ids == sorted(ids)
    assert len(ids) == 7
    assert sample(train, 20, seed=1) is train


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_one_file_is_split_the_same_way_every_time(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"utterance": f'say "{i}", please', "intent": "ab"[i % 2]} for i in range(40)]
    columns = Columns(text="utterance", label="intent")
    from_csv = load_splits(str(write_csv(tmp_path / "rows.csv", rows)), columns)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    from_parquet = load_splits(str(tmp_path / "rows.parquet"), columns)
    assert {name: len(split) for name, split in from_csv.items()} == {
        "train": 32,
        "validation": 4,
        "test": 4,
    }
    for name, split in from_csv.items():
        assert split.rows == from_parquet[name].rows
    texts = [row.text for split in from_csv.values() for row in split.rows]
    assert len(set(texts)) == 40


def test_one_file_never_puts_a_text_into_two_splits(tmp_path: Path) -> None:
    rows = [{"text": f"text {i % 25}" + " " * (i % 2), "label": i % 3} for i in range(100)]
    rows += [{"text": f"Once {i}", "label": i % 3} for i in range(60)]
    splits = load_splits(str(write_csv(tmp_path / "rows.csv", rows)))
    assert {name: len(split) for name, split in splits.items()} == {
        "train": 128,
        "validation": 16,
        "test": 16,
    }
    seen = {
        name: {" ".join(row.text.casefold().split()) for row in split.rows}
        for name, split in splits.items()
    }
    assert sum(Counter(name for texts in seen.values() for name in texts).values()) == 85


def test_csv_errors_name_the_line(tmp_path: Path) -> None:
    rows = [{"text": f"row {i}", "label": 0} for i in range(12)]
    rows[5]["label"] = ""
    with pytest.raises(DataError, match=r"rows\.csv:7: no 'label'"):
        load_splits(str(write_csv(tmp_path / "rows.csv", rows)))
    (tmp_path / "rows.csv").write_text('text,label\na,0\n"b"x,1\nc,0\n')
    with pytest.raises(DataError, match=r"rows\.csv:3: not CSV"):
        load_splits(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_bytes(b"text,label\na,0\nb,1\n\xff,1\n")
    with pytest.raises(DataError, match=r"rows\.csv:4: not UTF-8"):
        load_splits(str(tmp_path / "rows.csv"))
    (tmp_path / "rows.csv").write_text("text,label\na,0\nb,1\n")
    with pytest.raises(DataError, match=r"rows\.csv: a single file needs 10 rows"):
        load_splits(str(tmp_path / "rows.csv"))


def test_sources_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file or directory"):
        load_splits(str(tmp_path / "nowhere"))
    with pytest.raises(DataError, match="none of train, validation, test"):
        load_splits(str(tmp_path))
    (tmp_path / "rows.xlsx").write_bytes(b"PK")
    with pytest.raises(DataError, match=r"allowed: \.jsonl, \.jsonl\.gz, \.csv, \.parquet"):
        load_splits(str(tmp_path / "rows.xlsx"))
    source = directory_with(tmp_path, json.dumps(GOOD))
    with pytest.raises(DataError, match="no split 'test'; it has: train"):
        load_split(str(source), "test")


@pytest.mark.parametrize("damage", ["no gzip", "cut", "flipped"])
def test_damaged_gzip_is_a_data_error(tmp_path: Path, damage: str) -> None:
    lines = "".join(json.dumps({"text": f"{i * i}", "label": i % 2}) + "\n" for i in range(5000))
    good = gzip.compress(lines.encode())
    half = len(good) // 2
    flipped = good[:half] + bytes(255 - byte for byte in good[half : half + 40]) + good[half + 40 :]
    bad = {"no gzip": b"not gzip at all", "cut": good[:half], "flipped": flipped}[damage]
    (tmp_path / "train.jsonl.gz").write_bytes(bad)
    what = "train.jsonl.gz:" if damage == "flipped" else "train.jsonl.gz: not readable after line"
    with pytest.raises(DataError, match=re.escape(what)):
        load_splits(str(tmp_path))


def test_bytes_that_are_not_utf8_are_named_by_line(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode() + b"\n"
    (tmp_path / "train.jsonl").write_bytes(good * 20_000 + b'{"text": "\xe9", "label": 0}\n')
    with pytest.raises(DataError, match=r"train\.jsonl:20001: not UTF-8"):
        load_splits(str(tmp_path))


def test_damaged_parquet_is_a_data_error(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "rows.parquet"
    rows = [{"text": f"a longer text, number {i}", "label": i % 2} for i in range(500)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    whole = path.read_bytes()
    for bad in (b"PAR1", whole[: len(whole) // 2], whole[:4] + b"\xff" * 400 + whole[404:]):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"rows\.parquet: not readable as Parquet"):
            load_splits(str(path))


def test_labels_that_cannot_be_learnt_are_refused(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"t{i}", "label": "spam"}) for i in range(4)]
    with pytest.raises(DataError, match="'spam' is the only label; two or more are needed"):
        load_splits(str(directory_with(tmp_path, *lines)))
    lines[2] = json.dumps({"text": "t", "label": 10**12})
    lines = [line.replace('"spam"', "0") for line in lines]
    with pytest.raises(DataError, match=r"largest label is 1000000000000, for 4 rows; .*label_nam"):
        load_splits(str(directory_with(tmp_path, *lines)))


def test_only_the_splits_asked_for_are_looked_at(tmp_path: Path) -> None:
    source = str(directory_with(tmp_path, json.dumps(GOOD), json.dumps({"text": "x", "label": 1})))
    (tmp_path / "test.jsonl").write_text('{"text": "nobody labelled this", "label": -1}\n')
    assert load_splits(source, splits=("train", "validation")).keys() == {"train"}
    assert len(load_split(source, "train")) == 2
    with pytest.raises(
        DataError, match=r"test\.jsonl:1: 'label' = -1; allowed: a whole number from 0 to 1"
    ):
        load_splits(source)


def hub(monkeypatch: pytest.MonkeyPatch, column: str, names: list[str] | None) -> None:
    """A hub with one data set, whose test split is unlabelled, as benchmarks have it."""

    class Split(list[dict[str, Any]]):
        @property
        def features(self) -> dict[str, Any]:
            return {"sentence": object(), column: SimpleNamespace(names=names)}

    def rows(labels: list[int]) -> Split:
        return Split({"sentence": f"say {i}", column: label} for i, label in enumerate(labels))

    def load_dataset(name: str) -> dict[str, Split]:
        if name != "u/data-v1.5":
            raise ConnectionError("no route")
        return {"train": rows([0, 1, 0]), "validation": rows([1, 0]), "test": rows([-1, -1])}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_hub_data_with_dots_in_the_name_and_an_unlabelled_split(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub(monkeypatch, "polarity", ["bad", "good"])
    columns = Columns(text="sentence", label="polarity")
    splits = load_splits("u/data-v1.5", columns, splits=("train", "validation"))
    assert splits["train"].label_names == ("bad", "good")
    assert splits["train"].labels == [0, 1, 0]
    assert splits["validation"].inputs == ["say 0", "say 1"]
    with pytest.raises(DataError, match=r"u/data-v1\.5 test: row 1: 'polarity' = -1"):
        load_split("u/data-v1.5", "test", columns)
    with pytest.raises(DataError, match="no split 'dev'; it has: train, validation, test"):
        load_split("u/data-v1.5", "dev", columns)
    with pytest.raises(DataError, match=r"the hub did not give it: no route"):
        load_splits("u/other")
