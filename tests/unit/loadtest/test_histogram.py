"""Histograms against the values themselves, numpy's quantiles and the library's own counting."""

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.histogram import LARGEST_US, QUANTILES, Histogram

times = st.lists(st.floats(0, 4000, allow_nan=False), min_size=1, max_size=200)
microseconds = st.lists(st.integers(0, LARGEST_US), min_size=1, max_size=200)


def of(values: list[float], digits: int = 3) -> Histogram:
    histogram = Histogram(digits)
    for value in values:
        histogram.record(value)
    return histogram


@given(times, st.floats(0, 1))
def test_quantiles_are_numpys_to_three_digits(values: list[float], share: float) -> None:
    held = np.minimum(np.array(values), LARGEST_US / 1e6)
    exact = float(np.quantile(held, share, method="inverted_cdf"))
    found = of(values).quantile(share)
    # Never less than it was, but for the half of a microsecond that is rounded.
    assert exact - 1e-6 <= found <= exact * 1.001 + 2e-6


@given(microseconds, st.sampled_from([1, 2, 3]))
def test_it_counts_as_the_library_does(values: list[int], digits: int) -> None:
    theirs = HdrHistogram(1, LARGEST_US, digits)
    for value in values:
        theirs.record_value(value)
    ours = of([value / 1e6 for value in values], digits)
    back = ours.to_hdr()
    assert back.get_total_count() == theirs.get_total_count() == len(values)
    for share in (0.0, *QUANTILES.values(), 1.0):
        percentile = 100 * share
        expected = theirs.get_value_at_percentile(percentile)
        assert back.get_value_at_percentile(percentile) == expected
    assert back.encode() == theirs.encode()


@given(microseconds, st.sampled_from([1, 2, 3]))
def test_through_text_and_json_and_back(values: list[int], digits: int) -> None:
    histogram = of([value / 1e6 for value in values], digits)
    read = Histogram.decode(histogram.encode())
    assert read.sparse() == histogram.sparse()
    assert Histogram.from_sparse(histogram.sparse(), digits).sparse() == histogram.sparse()
    assert read.milliseconds() == histogram.milliseconds()


@given(times, times)
def test_two_together_are_one(first: list[float], second: list[float]) -> None:
    together, both = of(first), of([*first, *second])
    together.add(of(second))
    assert together.sparse() == both.sparse()
    assert together.count == len(first) + len(second)


@given(times)
def test_figures_agree_with_single_questions(values: list[float]) -> None:
    histogram = of(values)
    figures = histogram.milliseconds()
    assert list(figures) == ["mean", *QUANTILES, "max"]
    for name, share in QUANTILES.items():
        assert figures[name] == pytest.approx(histogram.quantile(share) * 1000)
    assert figures["max"] == pytest.approx(histogram.quantile(1.0) * 1000)
    held = [min(value, LARGEST_US / 1e6) for value in values]
    assert figures["mean"] == pytest.approx(1000 * float(np.mean(held)), rel=1e-3, abs=1e-3)
    shares = [share for share, _ in histogram.by_percentile()]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_memory_is_bounded_by_digits_not_by_values() -> None:
    rng = np.random.default_rng(0)
    histogram = of(list(10 ** rng.uniform(-6, 3.5, size=200_000)))
    assert len(histogram.sparse()) < 1100 * 22  # half the buckets of each power of two


def test_a_table_of_percentiles_in_milliseconds() -> None:
    lines = of([0.001 * value for value in range(1, 101)]).hgrm().decode().splitlines()
    assert lines[0].split() == ["Value", "Percentile", "TotalCount", "1/(1-Percentile)"]
    rows = [line.split() for line in lines[2:] if not line.startswith("#")]
    assert float(rows[-1][0]) == pytest.approx(100, rel=0.001)
    assert rows[-1][2] == "100"


def test_what_cannot_be() -> None:
    assert Histogram().milliseconds() == {}
    with pytest.raises(ValueError, match="nothing"):
        Histogram().quantile(0.5)
    with pytest.raises(ValueError, match="2 digits cannot be added to 3"):
        Histogram(3).add(Histogram(2))
    with pytest.raises(ValueError, match="not an HDR histogram"):
        Histogram.decode("nonsense")
    with pytest.raises(ValueError, match="not an HDR histogram"):
        Histogram.decode(of([1.0]).encode()[:-8])
