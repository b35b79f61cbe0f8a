"""Texts: from a file, with their labels where it has them, or made up in given lengths.

Knows no HTTP but for the ready requests that benchmarks send.
"""

import gzip
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from offramp_loadtest.http_client import Address, post

_COMMON = (
    "the a of to and in that it is was for on with as at by from this but not are have had "
    "they you we she he his her their one all would there what so up out if about who get "
    "which go me when make can like time no just him know take people into year your good "
    "some could them see other than then now look only come its over think also back after "
    "use two how our work first well way even new want because any these give day most us "
    "film story music weather order bank card train ticket hotel room price money phone call "
    "message photo light window kitchen garden river city street school doctor letter answer "
)
_WORDS = _COMMON.split()


@dataclass(frozen=True, slots=True)
class Text:
    """A text and what it is, where that is known."""

    text: str
    label: str | int | None = None


def read_rows(path: Path) -> list[Text]:
    """Each line of a .jsonl or .jsonl.gz file, with its `text` and, if it has one, its `label`; or
    the lines of any other file.

    Raises:
        OSError: it cannot be read.
        ValueError: a line is not what it should be, or there is none.
    """
    name = path.name
    raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    lines = raw.decode().splitlines()
    if name.removesuffix(".gz").endswith(".jsonl"):
        rows = [_row(line, f"{name}, line {at}") for at, line in _numbered(lines)]
    else:
        rows = [Text(line) for _, line in _numbered(lines)]
    if not rows:
        raise ValueError(f"{name} holds no text")
    return rows


def read_texts(path: Path) -> list[str]:
    """`read_rows` without the labels."""
    return [row.text for row in read_rows(path)]


def _numbered(lines: Sequence[str]) -> Iterator[tuple[int, str]]:
    return ((at, line) for at, line in enumerate(lines, 1) if line.strip())


def _row(line: str, where: str) -> Text:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error.msg}") from None
    text = row.get("text") if isinstance(row, dict) else None
    if not isinstance(text, str):
        raise ValueError(f'{where} has no "text" that is a string')
    label = row.get("label")
    if isinstance(label, bool) or not isinstance(label, str | int | None):
        raise ValueError(f"{where} has a label that is neither a name nor a number")
    return Text(text, label)


# -- made up -------------------------------------------------------------------------------------

Lengths = Callable[[Random], int]
"""Draws a number of words."""


def always(words: int) -> Lengths:
    return lambda _: words


def uniform(least: int, most: int) -> Lengths:
    return lambda random: random.randint(least, most)


def lognormal(median: float, p95: float, most: int) -> Lengths:
    """Many short ones, few long ones, as people write; at least one word."""
    centre = math.log(median)
    width = (math.log(p95) - centre) / 1.6448536269514722  # the normal distribution's own 95 %
    return lambda random: min(most, max(1, round(random.lognormvariate(centre, width))))


def make_text(words: int, random: Random) -> str:
    return " ".join(random.choices(_WORDS, k=words))


# -- requests for benchmarks ---------------------------------------------------------------------


def classify_requests(
    address: Address, texts: Sequence[str], *, batch: int = 0, speedup: float | None = None
) -> list[bytes]:
    """Requests to /classify, each with one text, or with a list of `batch` of them; a rest that
    fills no list is left out.

    Raises:
        ValueError: there are fewer texts than go into one list.
    """
    if len(texts) < batch:
        raise ValueError(f"lists of {batch} cannot be made of {len(texts)} texts")
    controls = {} if speedup is None else {"speedup": speedup}
    return [
        post(address, "/classify", json.dumps({"input": given, **controls}).encode())
        for given in (_lists(texts, batch) if batch else texts)
    ]


def _lists(texts: Sequence[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(texts) - size + 1, size):
        yield list(texts[start : start + size])
