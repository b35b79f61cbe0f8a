"""Axes hold all values, ticks are round and few, charts are well-formed."""

from xml.etree import ElementTree

from hypothesis import given
from hypothesis import strategies as st

from offramp_loadtest.svg import Line, bars, between, linear, lines, logarithmic

values = st.floats(1e-3, 1e7)


@given(values)
def test_a_linear_axis_begins_at_nothing_and_holds_the_most(most: float) -> None:
    axis = linear(most, 100)
    assert axis.most >= most * (1 - 1e-9)
    assert 2 <= len(axis.ticks) <= 7
    assert axis.place(0) == 0
    assert abs(axis.place(axis.most) - 100) < 1e-6


@given(values, values)
def test_a_logarithmic_axis_holds_both_ends(one: float, other: float) -> None:
    least, most = sorted((one, other))
    axis = logarithmic(least, most, 100)
    assert 0 <= axis.place(least) <= axis.place(most) <= 100 + 1e-6
    assert 2 <= len(axis.ticks) <= 12


@given(st.floats(0, 1e5), values)
def test_a_length_of_time_has_its_own_ends(begins: float, seconds: float) -> None:
    axis = between(begins, begins + seconds, 100)
    assert axis.place(begins) == 0
    assert all(-1e-6 <= axis.place(value) <= 101 for value, _ in axis.ticks)


points = st.lists(st.tuples(st.floats(0, 10), st.none() | st.floats(0, 10)), max_size=20)


@given(points, st.text(st.characters(codec="utf-8", exclude_categories=("Cc", "Cs")), max_size=8))
def test_charts_are_well_formed_whatever_they_are_called(
    drawn: list[tuple[float, float | None]], name: str
) -> None:
    chart = lines([Line(name, drawn, 0)], linear(10, 400), linear(10, 200), "x", name)
    groups = [(name, [(name, b or 0.0, 1)]) for _, b in drawn]
    for one in (chart, bars(groups, name)):
        root = ElementTree.fromstring(one)
        assert root.tag == "svg"
    runs = "".join("." if b is not None else " " for _, b in drawn).split()
    found = ElementTree.fromstring(chart)
    assert len(found.findall("polyline")) + len(found.findall("circle")) == len(runs)
