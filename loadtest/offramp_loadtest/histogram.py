"""A histogram of times that stays small however long a run is: an HDR histogram, kept sparsely.

Values are whole microseconds, told apart to so many significant digits, with the very buckets of
HdrHistogram; so what is counted here is handed to that library for its formats (`.hgrm`, and the
compressed text that its tools read and add), and read back from them. Counting is done here because
it is done for each request: a dictionary entry costs a quarter of the library's `record_value`, and
a histogram of a hundred values has a hundred entries, not twenty thousand.
"""

import io
import math
from collections.abc import Iterator, Mapping
from typing import cast

from hdrh.histogram import HdrHistogram

LARGEST_US = 3_600_000_000
"""An hour; what takes longer is counted as that."""

_SUB_BUCKET_BITS = {1: 5, 2: 8, 3: 11}
"""Digits to keep → the power of two of which so many are told apart: above 2·10^digits."""

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p99": 0.99, "p99.9": 0.999}


class Histogram:
    """Counts of times in seconds."""

    __slots__ = ("_bits", "_counts", "_digits")

    def __init__(self, digits: int = 3) -> None:
        self._digits, self._bits = digits, _SUB_BUCKET_BITS[digits]
        self._counts: dict[int, int] = {}  # by the lowest value of the bucket

    @property
    def count(self) -> int:
        return sum(self._counts.values())

    def record(self, seconds: float) -> None:
        value = int(seconds * 1e6 + 0.5)
        value = min(max(value, 0), LARGEST_US)
        shift = value.bit_length() - self._bits
        if shift > 0:
            value = value >> shift << shift
        self._counts[value] = self._counts.get(value, 0) + 1

    def add(self, other: "Histogram") -> None:
        """Count what another one has counted.

        Raises:
            ValueError: it keeps another number of digits.
        """
        if other._digits != self._digits:
            raise ValueError(f"{other._digits} digits cannot be added to {self._digits}")
        for value, count in other._counts.items():
            self._counts[value] = self._counts.get(value, 0) + count

    def quantile(self, share: float) -> float:
        """The smallest time that so large a share does not exceed, rounded up to its bucket's end.

        Raises:
            ValueError: nothing was counted.
        """
        if not self._counts:
            raise ValueError("a quantile of nothing")
        wanted, seen = max(1, math.ceil(share * self.count)), 0
        for value in sorted(self._counts):
            seen += self._counts[value]
            if seen >= wanted:
                return self._highest(value) / 1e6
        raise AssertionError("all values were seen")

    def mean(self) -> float:
        """Of the buckets' middles."""
        total = sum(
            count * (value + self._highest(value)) / 2 for value, count in self._counts.items()
        )
        return total / self.count / 1e6

    def milliseconds(self) -> dict[str, float]:
        """Mean, quantiles and largest; empty where there is nothing."""
        if not self._counts:
            return {}
        ordered, seen = sorted(self._counts), 0
        shares = iter(QUANTILES.items())
        name, share = next(shares)
        figures = {"mean": self.mean() * 1000}
        total = self.count
        for value in ordered:
            seen += self._counts[value]
            while name and seen >= math.ceil(share * total):
                figures[name] = self._highest(value) / 1000
                name, share = next(shares, ("", 1.0))
        return figures | {"max": self._highest(ordered[-1]) / 1000}

    def by_percentile(self) -> Iterator[tuple[float, float]]:
        """(share of the values, time in seconds that it does not exceed), rising."""
        seen, total = 0, self.count
        for value in sorted(self._counts):
            seen += self._counts[value]
            yield seen / total, self._highest(value) / 1e6

    def _highest(self, value: int) -> int:
        """That shares a bucket with this one."""
        shift = max(0, value.bit_length() - self._bits)
        return value + (1 << shift) - 1

    # -- other forms -------------------------------------------------------------------------

    def to_hdr(self) -> HdrHistogram:
        """The library's own, with the same counts."""
        histogram = HdrHistogram(1, LARGEST_US, self._digits)
        for value, count in self._counts.items():
            histogram.record_value(value, count)
        return histogram

    def encode(self) -> str:
        """HdrHistogram's compressed form (V2), in base64."""
        return cast(bytes, self.to_hdr().encode()).decode()

    @classmethod
    def decode(cls, text: str) -> "Histogram":
        """From `encode`, or another tool's.

        Raises:
            ValueError: it is none, or in none of our numbers of digits.
        """
        try:
            read = HdrHistogram.decode(text)
            histogram = cls(read.significant_figures)
        except Exception as error:  # the library raises whatever its parts raise
            raise ValueError(f"not an HDR histogram of 1 to 3 digits: {text[:40]!r}") from error
        for item in read.get_recorded_iterator():
            histogram._counts[_lowest(item.value_iterated_to, histogram._bits)] = (
                item.count_at_value_iterated_to
            )
        return histogram

    def hgrm(self) -> bytes:
        """The table of percentiles in milliseconds that HdrHistogram's plotters read."""
        stream = io.BytesIO()
        self.to_hdr().output_percentile_distribution(stream, 1000.0)
        return stream.getvalue()

    def sparse(self) -> dict[str, int]:
        """Microseconds → count, fit for JSON; exact and short where values are few."""
        return {str(value): count for value, count in sorted(self._counts.items())}

    @classmethod
    def from_sparse(cls, counts: Mapping[str, int], digits: int) -> "Histogram":
        histogram = cls(digits)
        histogram._counts = {
            _lowest(int(value), histogram._bits): count for value, count in counts.items()
        }
        return histogram


def _lowest(value: int, bits: int) -> int:
    shift = max(0, value.bit_length() - bits)
    return value >> shift << shift
