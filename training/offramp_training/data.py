"""Labelled rows from a directory, a file or a hub, checked row by row.

A wrong row is refused with its file and line; nothing is repaired or dropped silently. Knows
nothing about tokens, batches or models.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp_training.errors import DataError

SPLITS = ("train", "validation", "test")
# One file has no splits of its own: a fixed seed, so that `evaluate` finds the rows `fit` left out.
FILE_SPLIT_SEED = 20_240_229
FILE_SPLIT_SHARE = 0.1  # validation and test, each
DEFAULT_HELD_OUT_SHARE, DEFAULT_HELD_OUT_MOST = 0.1, 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text, or pair of texts. `id` is its place in its split."""

    id: int
    text: str
    text_pair: str | None
    label: int

    @property
    def model_input(self) -> str | tuple[str, str]:
        return self.text if self.text_pair is None else (self.text, self.text_pair)


@dataclass(frozen=True)
class Dataset:
    """The rows of one split."""

    split: str
    rows: tuple[Row, ...]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int]:
        return [row.label for row in self.rows]

    @property
    def inputs(self) -> list[str | tuple[str, str]]:
        return [row.model_input for row in self.rows]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the rows whatever their order: the same rows shuffled are the same rows."""
        digests = sorted(_digest(row, self.label_names) for row in self.rows)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def ordered_fingerprint(self) -> str:
        """sha256 over the rows in order: what a resumed run must find unchanged."""
        digests = [_digest(row, self.label_names) for row in self.rows]
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def take(self, places: Iterable[int], split: str | None = None) -> Dataset:
        """Some of the rows; they keep their ids."""
        rows = tuple(self.rows[place] for place in places)
        return replace(self, rows=rows, split=split or self.split)


@dataclass(frozen=True)
class Columns:
    """Names of the columns."""

    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"


@dataclass(frozen=True)
class RawRow:
    """A row as read, with the place to name when it is wrong."""

    place: str
    values: dict[str, Any]


def load_splits(
    source: str, columns: Columns | None = None, label_names: Sequence[str] | None = None
) -> dict[str, Dataset]:
    """Every split of a data source by name.

    `label_names` are those of a checkpoint, when there is one: the data must then use them.
    """
    columns = columns or Columns()
    raw, declared = _read_source(source)
    names = _label_names(raw, columns, declared, label_names)
    splits = {
        split: Dataset(split, tuple(_check_rows(rows, columns, names)), names)
        for split, rows in raw.items()
    }
    _check_pairs(splits, raw)
    return splits


def load_split(
    source: str,
    split: str,
    columns: Columns | None = None,
    label_names: Sequence[str] | None = None,
) -> Dataset:
    """One split of a data source."""
    splits = load_splits(source, columns, label_names)
    if split not in splits:
        raise DataError(f"{source}: no split {split!r}; it has: {', '.join(splits)}")
    return splits[split]


def hold_out(train: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """(train without them, held-out rows): a seeded sample of `count` rows.

    A text that occurs twice stays in train whole: a held-out copy would be a training row in
    disguise, and thresholds tuned on it would be too bold.
    """
    counts: dict[str, int] = {}
    keys = [_folded(row) for row in train.rows]
    for key in keys:
        counts[key] = counts.get(key, 0) + 1
    single = [place for place, key in enumerate(keys) if counts[key] == 1]
    if count > len(single) or count >= len(train):
        raise DataError(
            f"data.held_out = {count}; the train split has {len(train)} rows, {len(single)} of "
            "them with a text that occurs once; allowed: fewer than that"
        )
    chosen = set(random.Random(seed).sample(single, count))
    rest = [place for place in range(len(train)) if place not in chosen]
    return train.take(rest), train.take(sorted(chosen), "held_out")


def default_held_out(train: Dataset) -> int:
    """How many rows to keep back when there is no validation split and no wish."""
    return max(1, min(DEFAULT_HELD_OUT_MOST, int(len(train) * DEFAULT_HELD_OUT_SHARE)))


def sample(train: Dataset, count: int | None, seed: int) -> Dataset:
    """A seeded sample of `count` rows in their own order; all rows when there are no more."""
    if count is None or count >= len(train):
        return train
    return train.take(sorted(random.Random(seed).sample(range(len(train)), count)))


# ---- reading -------------------------------------------------------------------------------------


def _read_source(source: str) -> tuple[dict[str, list[RawRow]], tuple[str, ...] | None]:
    """Rows by split, and the label names the source declares, if it does."""
    path = Path(source)
    if path.is_dir():
        return _read_directory(path)
    if path.is_file():
        return _split_file(list(_read_file(path))), None
    if path.suffix or source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise DataError(
            f"{source}: no such file or directory; allowed: a directory of "
            "train/validation/test.jsonl[.gz], a .jsonl[.gz], .csv or .parquet file, a hub name"
        )
    return _read_hub(source)


def _read_directory(
    directory: Path,
) -> tuple[dict[str, list[RawRow]], tuple[str, ...] | None]:
    raw: dict[str, list[RawRow]] = {}
    for split in SPLITS:
        found = [directory / f"{split}{end}" for end in (".jsonl", ".jsonl.gz")]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise DataError(f"{directory}: both {found[0].name} and {found[1].name}; keep one")
        if found:
            raw[split] = list(_read_file(found[0]))
    if not raw:
        raise DataError(f"{directory}: none of train, validation, test as .jsonl or .jsonl.gz")
    return raw, _declared_labels(directory / "dataset_info.json")


def _declared_labels(path: Path) -> tuple[str, ...] | None:
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8")).get("label_names")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object: {error}") from None
    if names is None:
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{path}: label_names must be a list of strings, got {names!r}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise DataError(f"{path}: label_names must be two or more different names, got {names!r}")
    return tuple(names)


def _read_file(path: Path) -> Iterator[RawRow]:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return _read_json_lines(path)
    if name.endswith(".csv"):
        return _read_csv(path)
    if name.endswith(".parquet"):
        return _read_parquet(path)
    raise DataError(f"{path}: unknown kind of file; allowed: .jsonl, .jsonl.gz, .csv, .parquet")


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    opener = gzip.open if path.name.endswith(".gz") else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, start=1):
                yield RawRow(f"{path}:{number}", _json_object(f"{path}:{number}", line))
    except (UnicodeDecodeError, gzip.BadGzipFile, EOFError) as error:
        raise DataError(f"{path}: not readable as UTF-8 text: {error}") from None


def _json_object(place: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON object is needed, got {type(value).__name__}")
    return value


def _read_csv(path: Path) -> Iterator[RawRow]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, strict=True)
            for values in reader:
                place = f"{path}:{reader.line_num}"
                if None in values:
                    raise DataError(f"{place}: more fields than the header has columns")
                # CSV cannot tell a missing value from an empty one: both are missing.
                yield RawRow(place, {key: value or None for key, value in values.items()})
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as UTF-8 CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as arrow  # heavy, and only for this kind of file
    import pyarrow.parquet as parquet

    try:
        table = parquet.read_table(path)
    except arrow.ArrowException as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from None
    for number, values in enumerate(table.to_pylist(), start=1):
        yield RawRow(f"{path}: row {number}", values)


def _read_hub(name: str) -> tuple[dict[str, list[RawRow]], tuple[str, ...] | None]:
    import datasets  # heavy, and only for hub names

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client has no common base for what can go wrong
        raise DataError(
            f"{name}: no such path here, and the hub did not give it: {error}"
        ) from None
    declared = None
    raw = {}
    for split, rows in loaded.items():
        feature = rows.features.get("label")
        declared = declared or tuple(getattr(feature, "names", None) or ()) or None
        raw[str(split)] = [
            RawRow(f"{name} {split}: row {number}", dict(values))
            for number, values in enumerate(rows, start=1)
        ]
    return raw, declared


def _split_file(rows: list[RawRow]) -> dict[str, list[RawRow]]:
    """One file as train, validation and test, always the same way."""
    if len(rows) < 10:
        raise DataError(f"a single file needs 10 rows or more to be split, got {len(rows)}")
    order = list(range(len(rows)))
    random.Random(FILE_SPLIT_SEED).shuffle(order)
    part = max(1, int(len(rows) * FILE_SPLIT_SHARE))
    places = {
        "train": sorted(order[2 * part :]),
        "validation": sorted(order[:part]),
        "test": sorted(order[part : 2 * part]),
    }
    return {split: [rows[place] for place in chosen] for split, chosen in places.items()}


# ---- checking ------------------------------------------------------------------------------------


def _label_names(
    raw: dict[str, list[RawRow]],
    columns: Columns,
    declared: tuple[str, ...] | None,
    wanted: Sequence[str] | None,
) -> tuple[str, ...]:
    """Declared names, else the text labels sorted, else "0", "1", ... up to the largest."""
    if declared is not None:
        if wanted is not None and tuple(wanted) != declared:
            raise DataError(
                f"the data's labels are {', '.join(declared)}; "
                f"the checkpoint's are {', '.join(wanted)}"
            )
        return declared
    if wanted is not None:
        return tuple(wanted)
    values = [row.values.get(columns.label) for rows in raw.values() for row in rows]
    texts = {value for value in values if isinstance(value, str)}
    if texts and not all(text.isdecimal() for text in texts):
        return tuple(sorted(texts))
    numbers = [int(value) for value in values if isinstance(value, (int, str))]
    return tuple(str(number) for number in range(max([1, *numbers]) + 1))


def _check_rows(rows: list[RawRow], columns: Columns, names: tuple[str, ...]) -> Iterator[Row]:
    by_name = {name: number for number, name in enumerate(names)}
    for number, row in enumerate(rows):
        pair = row.values.get(columns.text_pair)
        yield Row(
            id=number,
            text=_text(row, columns.text),
            text_pair=None if pair is None else _text(row, columns.text_pair),
            label=_label(row, columns.label, names, by_name),
        )


def _text(row: RawRow, column: str) -> str:
    value = row.values.get(column)
    if value is None:
        have = ", ".join(str(key) for key in row.values)
        raise DataError(f"{row.place}: no {column!r}; the row has: {have}")
    if not isinstance(value, str):
        raise DataError(f"{row.place}: {column!r} must be text, got {type(value).__name__}")
    if not value.strip():
        raise DataError(f"{row.place}: {column!r} is empty")
    return value


def _label(row: RawRow, column: str, names: tuple[str, ...], by_name: dict[str, int]) -> int:
    value = row.values.get(column)
    if value is None:
        have = ", ".join(str(key) for key in row.values)
        raise DataError(f"{row.place}: no {column!r}; the row has: {have}")
    if isinstance(value, str):
        if value in by_name:
            return by_name[value]
        if not value.isdecimal():
            raise DataError(
                f"{row.place}: {column!r} = {value!r} is not a label; known: {_some(names)}"
            )
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise DataError(f"{row.place}: {column!r} = {value!r} is not an integer or a label name")
    if not 0 <= value < len(names):
        raise DataError(f"{row.place}: {column!r} = {value} is out of range 0..{len(names) - 1}")
    return value


def _check_pairs(splits: dict[str, Dataset], raw: dict[str, list[RawRow]]) -> None:
    """All rows have a second text or none has."""
    first: bool | None = None
    for split, dataset in splits.items():
        for row in dataset.rows:
            paired = row.text_pair is not None
            first = paired if first is None else first
            if paired != first:
                place = raw[split][row.id].place
                had, has = ("a second text", "none") if first else ("one text", "a pair")
                raise DataError(f"{place}: earlier rows have {had}, this row has {has}")


def _some(names: Sequence[str], most: int = 10) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _folded(row: Row) -> str:
    texts = (row.text, row.text_pair or "")
    return "\x00".join(" ".join(text.casefold().split()) for text in texts)


def _digest(row: Row, label_names: Sequence[str]) -> str:
    line = json.dumps([row.text, row.text_pair, label_names[row.label]])
    return hashlib.sha256(line.encode()).hexdigest()
