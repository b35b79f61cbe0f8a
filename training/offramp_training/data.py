"""Labelled rows from a directory, a file or a hub, checked row by row.

A wrong row is refused with its file and line; nothing is repaired or dropped silently. Knows
nothing about tokens, batches or models.

Rows have one label each, or a set of labels each: `"label": [0, 3]`, a list of numbers or names
that may be empty. CSV has no lists, and Parquet need not: a cell of text may hold names with a `|`
between them, and an empty cell is the empty set.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from offramp_model.config import MOST_LABELS_OF_SETS, ProblemType
from offramp_model.labels import bits_of, ids_of
from offramp_training.errors import DataError

SPLITS = ("train", "validation", "test")
JSON_LINES, CSV, PARQUET = (".jsonl", ".jsonl.gz"), ".csv", ".parquet"
# One file has no splits of its own: a fixed seed, so that `evaluate` finds the rows `fit` left out.
FILE_SPLIT_SEED = 20_240_229
FILE_SPLIT_SHARE = 0.1  # validation and test, each
SEPARATOR = "|"  # between the names of a set, in a cell of text
DEFAULT_HELD_OUT_SHARE, DEFAULT_HELD_OUT_MOST = 0.1, 2000


@dataclass(frozen=True, slots=True)
class Row:
    """One labelled text, or pair of texts. `id` is its place in its split; `label` a class, or a
    set of labels as bits (`offramp_model.labels`)."""

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
    problem_type: ProblemType = "single_label_classification"

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def labels(self) -> list[int]:
        return [row.label for row in self.rows]

    @property
    def inputs(self) -> list[str | tuple[str, str]]:
        return [row.model_input for row in self.rows]

    @property
    def is_multi_label(self) -> bool:
        return self.problem_type == "multi_label_classification"

    def ids_of(self, row: Row) -> list[int]:
        """Ids of a row's labels, ascending."""
        return ids_of(row.label) if self.is_multi_label else [row.label]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 over the rows whatever their order: the same rows shuffled are the same rows."""
        digests = sorted(map(self._digest, self.rows))
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    @cached_property
    def ordered_fingerprint(self) -> str:
        """sha256 over the rows in order: what a resumed run must find unchanged."""
        digests = map(self._digest, self.rows)
        return hashlib.sha256("".join(digests).encode()).hexdigest()

    def _digest(self, row: Row) -> str:
        names = [self.label_names[label] for label in self.ids_of(row)]
        label: str | list[str] = names if self.is_multi_label else names[0]
        line = json.dumps([row.text, row.text_pair, label])
        return hashlib.sha256(line.encode()).hexdigest()

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
    """A row as read, with the place to name when it is wrong. `kind` is that of a file whose cells
    may hold sets of names as text: CSV, PARQUET, or neither."""

    place: str
    values: dict[str, Any]
    kind: str = ""


def load_splits(
    source: str,
    columns: Columns | None = None,
    label_names: Sequence[str] | None = None,
    splits: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
) -> dict[str, Dataset]:
    """Every split of a data source by name, or those of `splits` that there are.

    A split that was not asked for is not looked at: a public test split often has no labels.
    `label_names` are those of a checkpoint, when there is one: the data must then use them. So must
    it be of a `problem_type`; without one, rows have sets of labels if any of them has.
    """
    columns = columns or Columns()
    there, declared = _read_source(source, columns)
    raw = {name: list(rows) for name, rows in there.items() if splits is None or name in splits}
    if not raw:
        wanted = " or ".join(map(repr, splits or ()))
        raise DataError(f"{source}: no split {wanted}; it has: {', '.join(there)}")
    if problem_type is None:
        problem_type = _problem_type(raw, columns.label)
    values = _label_values(raw, columns.label, problem_type)
    names = _known_names(declared, label_names)
    if names is None:
        rows = sum(map(len, raw.values()))
        fewest = 1 if problem_type == "multi_label_classification" else 2
        names = _names_of(source, values, rows, fewest)
    _check_number(source, names, problem_type)
    read = _label_set if problem_type == "multi_label_classification" else _label
    checked = {
        split: Dataset(split, tuple(_check_rows(rows, columns, names, read)), names, problem_type)
        for split, rows in raw.items()
    }
    _check_pairs(checked, raw)
    return checked


def load_split(
    source: str,
    split: str,
    columns: Columns | None = None,
    label_names: Sequence[str] | None = None,
    problem_type: ProblemType | None = None,
) -> Dataset:
    """One split of a data source."""
    return load_splits(source, columns, label_names, (split,), problem_type)[split]


def hold_out(train: Dataset, count: int, seed: int) -> tuple[Dataset, Dataset]:
    """(train without them, held-out rows): a seeded sample of `count` rows.

    A text that occurs twice stays in train whole: a held-out copy would be a training row in
    disguise, and thresholds tuned on it would be too bold.
    """
    counts: dict[str, int] = {}
    keys = [_folded(row.text, row.text_pair) for row in train.rows]
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


def check_classes(train: Dataset, left_by: str, column: str = "label") -> None:
    """Refuses training rows that show nothing of a class; held-out rows may lack some.

    `left_by` is what left these rows: the source, or the setting that took others away.
    """
    seen = {label for row in train.rows for label in train.ids_of(row)}
    missing = [name for number, name in enumerate(train.label_names) if number not in seen]
    if missing:
        raise DataError(
            f"{left_by}: no training row with {column!r} = {_some(missing)}; allowed: one or more "
            f"for each of {_some(train.label_names)}"
        )


# ---- reading -------------------------------------------------------------------------------------


Splits = dict[str, Iterable[RawRow]]  # read only when iterated
Declared = tuple[str, ...] | None  # the label names that a source states, if it does


def _read_source(source: str, columns: Columns) -> tuple[Splits, Declared]:
    path = Path(source)
    if path.is_dir():
        return _read_directory(path)
    if path.is_file():
        return _split_file(path, list(_read_file(path)), columns), None
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1
    if is_path or source.lower().endswith((*JSON_LINES, CSV, PARQUET)):
        raise DataError(
            f"{source}: no such file or directory; allowed: a directory of "
            "train/validation/test.jsonl[.gz], a .jsonl[.gz], .csv or .parquet file, a hub name"
        )
    return _read_hub(source, columns)


def _read_directory(directory: Path) -> tuple[Splits, Declared]:
    raw: Splits = {}
    for split in SPLITS:
        found = [directory / f"{split}{end}" for end in JSON_LINES]
        found = [path for path in found if path.is_file()]
        if len(found) > 1:
            raise DataError(f"{directory}: both {found[0].name} and {found[1].name}; keep one")
        if found:
            raw[split] = _read_file(found[0])
    if not raw:
        raise DataError(f"{directory}: none of train, validation, test as .jsonl or .jsonl.gz")
    return raw, _declared_labels(directory / "dataset_info.json")


def _declared_labels(path: Path) -> Declared:
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
    if len(set(names)) != len(names) or not names:
        raise DataError(f"{path}: label_names must be different names, got {names!r}")
    return tuple(names)


def _read_file(path: Path) -> Iterator[RawRow]:
    name = path.name.lower()
    if name.endswith(JSON_LINES):
        return _read_json_lines(path)
    if name.endswith(CSV):
        return _read_csv(path)
    if name.endswith(PARQUET):
        return _read_parquet(path)
    raise DataError(f"{path}: unknown kind of file; allowed: .jsonl, .jsonl.gz, .csv, .parquet")


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file, compressed or not, each with its end."""
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}:{number}: not UTF-8: {error.reason}") from None
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not readable after line {number}: {error}") from None


def _read_json_lines(path: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_lines(path), start=1):
        yield RawRow(f"{path}:{number}", _json_object(f"{path}:{number}", line))


def _json_object(place: str, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{place}: not JSON: {getattr(error, 'msg', error)}") from None
    if not isinstance(value, dict):
        raise DataError(f"{place}: a JSON object is needed, got {type(value).__name__}")
    return value


def _read_csv(path: Path) -> Iterator[RawRow]:
    reader = csv.DictReader(_lines(path), strict=True)
    try:
        for values in reader:
            place = f"{path}:{reader.line_num}"
            if None in values:
                raise DataError(f"{place}: more fields than the header has columns")
            # CSV cannot tell a missing value from an empty one: both are missing.
            yield RawRow(place, {key: value or None for key, value in values.items()}, CSV)
    except csv.Error as error:
        raise DataError(f"{path}:{reader.reader.line_num}: not CSV: {error}") from None


def _read_parquet(path: Path) -> Iterator[RawRow]:
    import pyarrow as arrow  # heavy, and only for this kind of file
    import pyarrow.parquet as parquet

    try:
        rows = parquet.read_table(path).to_pylist()
    except (arrow.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}") from None
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{path}: row {number}", values, PARQUET)


def _read_hub(name: str, columns: Columns) -> tuple[Splits, Declared]:
    import datasets  # heavy, and only for hub names

    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # the hub client has no common base for what can go wrong
        raise DataError(
            f"{name}: no such path here, and the hub did not give it: {error}"
        ) from None
    declared = None
    for rows in loaded.values():
        feature = rows.features.get(columns.label)
        feature = getattr(feature, "feature", feature)  # of lists: that of what is in them
        names = getattr(feature, "names", None)
        declared = declared or tuple(names or ()) or None
    return {str(split): _hub_rows(name, split, rows) for split, rows in loaded.items()}, declared


def _hub_rows(name: str, split: str, rows: Iterable[Any]) -> Iterator[RawRow]:
    for number, values in enumerate(rows, start=1):
        yield RawRow(f"{name} {split}: row {number}", dict(values))


def _split_file(path: Path, rows: list[RawRow], columns: Columns) -> Splits:
    """One file as train, validation and test, always the same way; a text is in one of them only.

    Rows of one text stay together: in train, where there is no room for them in another split.
    """
    if len(rows) < 10:
        raise DataError(f"{path}: a single file needs 10 rows or more to be split, got {len(rows)}")
    together: dict[str, list[int]] = {}
    for place, row in enumerate(rows):
        text, pair = row.values.get(columns.text), row.values.get(columns.text_pair)
        together.setdefault(_folded(str(text), pair and str(pair)), []).append(place)
    groups = list(together.values())
    random.Random(FILE_SPLIT_SEED).shuffle(groups)
    part = max(1, int(len(rows) * FILE_SPLIT_SHARE))
    places: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for group in groups:
        small = (name for name in SPLITS[1:] if len(places[name]) + len(group) <= part)
        places[next(small, "train")] += group
    return {split: [rows[place] for place in sorted(chosen)] for split, chosen in places.items()}


# ---- checking ------------------------------------------------------------------------------------


def _problem_type(raw: dict[str, list[RawRow]], column: str) -> ProblemType:
    """Multi-label if any row has a set of labels."""
    for rows in raw.values():
        for row in rows:
            value = row.values.get(column)
            if isinstance(value, list) or (row.kind and SEPARATOR in str(value)):
                return "multi_label_classification"
    return "single_label_classification"


def _members(row: RawRow, column: str) -> list[Any]:
    """What a row has as the labels of its set, not checked yet."""
    value = row.values.get(column)
    if isinstance(value, list):
        return value
    if row.kind == CSV and column in row.values and value is None:
        return []
    if row.kind and isinstance(value, str):
        return [name.strip() for name in value.split(SEPARATOR)] if value else []
    if value is None:
        raise _no_label(row, column)
    cell = f", or text with {SEPARATOR!r} between names" if row.kind else ""
    raise DataError(
        f"{row.place}: {column!r} = {_short(value)} is one label, in multi-label data; allowed: a "
        f"list of labels, which may be empty{cell}"
    )


def _label_values(
    raw: dict[str, list[RawRow]], column: str, problem_type: ProblemType
) -> list[Any]:
    """Every label of every row as it was given, not checked yet."""
    every = [row for rows in raw.values() for row in rows]
    if problem_type == "multi_label_classification":
        return [label for row in every for label in _members(row, column)]
    return [row.values.get(column) for row in every]


def _check_number(source: str, names: Sequence[str], problem_type: ProblemType) -> None:
    if problem_type == "multi_label_classification":
        if len(names) > MOST_LABELS_OF_SETS:
            raise DataError(
                f"{source}: {len(names)} labels; allowed in multi-label data: up to "
                f"{MOST_LABELS_OF_SETS}"
            )
    elif len(names) < 2:
        raise DataError(
            f"{source}: {names[0]!r} is the only label; two or more are needed, or lists of labels "
            "where it is yes or no"
        )


def _known_names(declared: Declared, wanted: Sequence[str] | None) -> Declared:
    """Those that the source declares, else those of a checkpoint."""
    if declared is not None and wanted is not None and tuple(wanted) != declared:
        raise DataError(
            f"the data's labels are {', '.join(declared)}; the checkpoint's are {', '.join(wanted)}"
        )
    return declared if wanted is None else tuple(wanted)


def _names_of(source: str, values: Sequence[Any], rows: int, fewest: int) -> tuple[str, ...]:
    """The text labels sorted, else "0", "1", ... up to the largest; at least `fewest`."""
    texts = {value for value in values if isinstance(value, str)}
    if texts and not all(map(_is_number, texts)):
        return tuple(sorted(texts))
    largest = max((int(value) for value in values if isinstance(value, (int, str))), default=0)
    if largest > rows:
        raise DataError(
            f"{source}: the largest label is {largest}, for {rows} rows; allowed: numbers from 0 "
            "on, or names (label_names in dataset_info.json)"
        )
    return tuple(str(number) for number in range(max(fewest, largest + 1)))


def _is_number(label: str) -> bool:
    return label.isdecimal() and len(label) < 19  # longer ones, int() may refuse


ReadLabel = Callable[[RawRow, str, tuple[str, ...], dict[str, int]], int]
"""(row, column, names, their ids) → `Row.label`."""


def _check_rows(
    rows: list[RawRow], columns: Columns, names: tuple[str, ...], read: ReadLabel
) -> Iterator[Row]:
    by_name = {name: number for number, name in enumerate(names)}
    for number, row in enumerate(rows):
        pair = row.values.get(columns.text_pair)
        yield Row(
            id=number,
            text=_text(row, columns.text),
            text_pair=None if pair is None else _text(row, columns.text_pair),
            label=read(row, columns.label, names, by_name),
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
    return _encodable(row, column, value)


def _encodable(row: RawRow, column: str, value: str) -> str:
    """JSON can spell half a surrogate pair, which no tokenizer and no file takes."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{row.place}: {column!r} is not Unicode at character {error.start + 1}: {error.reason}"
        ) from None
    return value


def _no_label(row: RawRow, column: str) -> DataError:
    have = ", ".join(str(key) for key in row.values)
    return DataError(f"{row.place}: no {column!r}; the row has: {have}")


def _label(row: RawRow, column: str, names: tuple[str, ...], by_name: dict[str, int]) -> int:
    value = row.values.get(column)
    if value is None:
        raise _no_label(row, column)
    return _label_id(row, column, value, names, by_name)


def _label_set(row: RawRow, column: str, names: tuple[str, ...], by_name: dict[str, int]) -> int:
    given = _members(row, column)
    ids = [_label_id(row, column, value, names, by_name) for value in given]
    if len(set(ids)) < len(ids):
        raise DataError(
            f"{row.place}: {column!r} = {_short(given)} names a label twice; allowed: each label "
            "of the row once (not a 0 or 1 for every label there is)"
        )
    return bits_of(ids)


def _label_id(
    row: RawRow, column: str, value: Any, names: tuple[str, ...], by_name: dict[str, int]
) -> int:
    if isinstance(value, str):
        if _encodable(row, column, value) in by_name:
            return by_name[value]
        value = int(value) if _is_number(value) else value
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    or_name = "" if all(map(_is_number, names)) else f", or a name: {_some(names)}"
    raise DataError(
        f"{row.place}: {column!r} = {_short(value)}; allowed: a whole number from 0 to "
        f"{len(names) - 1}{or_name}"
    )


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


def _short(value: Any, most: int = 60) -> str:
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def _some(names: Sequence[str], most: int = 10) -> str:
    more = f", ... ({len(names)} in all)" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _folded(text: str, pair: str | None) -> str:
    return "\x00".join(" ".join(one.casefold().split()) for one in (text, pair or ""))
