"""Texts from a file, and the requests that carry them."""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from offramp_loadtest.http_client import Address, post


def read_texts(path: Path) -> list[str]:
    """The `text` of each line of a .jsonl or .jsonl.gz file, or the lines of any other.

    Raises:
        OSError, ValueError, KeyError: it cannot be read so, or holds no text.
    """
    name = path.name
    raw = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
    lines = [line for line in raw.decode().splitlines() if line.strip()]
    if name.removesuffix(".gz").endswith(".jsonl"):
        lines = [json.loads(line)["text"] for line in lines]
    if not lines:
        raise ValueError(f"{name} holds no text")
    return lines


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
