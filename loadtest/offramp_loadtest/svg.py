"""Line and bar charts as SVG, no larger than what a load report needs. Knows no load."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 560, 260
LEFT, RIGHT, TOP, BOTTOM = 62, 14, 12, 40
COLOURS = 8
"""Classes `c0` to `c7`, whose colours are the page's."""


@dataclass(frozen=True)
class Line:
    """Points from left to right; a gap where y is None."""

    name: str
    points: Sequence[tuple[float, float | None]]
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """From data to a length, with ticks at round values."""

    least: float
    most: float
    length: float
    log: bool = False
    ticks: Sequence[tuple[float, str]] = field(default=())

    def place(self, value: float) -> float:
        low, high, at = self.least, self.most, value
        if self.log:
            low, high, at = math.log10(low), math.log10(high), math.log10(max(value, low))
        return self.length * (at - low) / ((high - low) or 1.0)


def number(value: float) -> str:
    """As short as it can be read."""
    if value == 0 or 0.001 <= abs(value) < 100_000:
        return f"{value:.4g}"
    return f"{value:.1e}"


def linear(most: float, length: float) -> Axis:
    """From 0 to at least `most`."""
    most = most if most > 0 else 1.0
    step = 10 ** math.floor(math.log10(most / 4))
    step = next(step * factor for factor in (1, 2, 2.5, 5, 10) if most / (step * factor) <= 5)
    count = math.ceil(most / step - 1e-9)
    return Axis(
        0, count * step, length, ticks=[(i * step, number(i * step)) for i in range(count + 1)]
    )


def between(least: float, most: float, length: float) -> Axis:
    """A length of time: rounded ticks, no rounding of the ends."""
    inner = linear(most - least, length)
    ticks = [
        (least + at, number(least + at)) for at, _ in inner.ticks if at <= (most - least) * 1.001
    ]
    return Axis(least, max(most, least + 1e-9), length, ticks=ticks)


def logarithmic(least: float, most: float, length: float) -> Axis:
    """Whole powers of ten around the values; where they are few, what lies between as well."""
    low, high = math.floor(math.log10(least)), math.ceil(math.log10(most) - 1e-9)
    high = max(high, low + 1)
    inner = (1, 2, 5) if high - low <= 2 else (1,)
    values = [factor * 10.0**power for power in range(low, high) for factor in inner]
    ticks = [(value, number(value)) for value in (*values, 10.0**high)]
    return Axis(10.0**low, 10.0**high, length, log=True, ticks=ticks)


def lines(shown: Sequence[Line], x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    """A chart of lines."""
    parts = [_frame(x, y, x_title, y_title)]
    for one in shown:
        dash = " dashed" if one.dashed else ""
        for run in _runs(one.points):
            places = " ".join(f"{LEFT + x.place(a):.1f},{_down(y, b):.1f}" for a, b in run)
            title = escape(one.name)
            if len(run) == 1:
                a, b = places.split(",")
                parts.append(f'<circle class="dot c{one.colour}" cx="{a}" cy="{b}" r="2"/>')
            else:
                parts.append(
                    f'<polyline class="line c{one.colour}{dash}" points="{places}">'
                    f"<title>{title}</title></polyline>"
                )
    return _svg(parts, y_title)


def bars(
    groups: Sequence[tuple[str, Sequence[tuple[str, float, int]]]],
    y_title: str,
    x_title: str = "",
    show: Callable[[float], str] = number,
    most: float | None = None,
) -> str:
    """Groups of bars, each (name, value, colour), with the value above."""
    values = [value for _, group in groups for _, value, _ in group]
    y = linear(most or max(values, default=1.0) * 1.08, HEIGHT - TOP - BOTTOM)
    x = Axis(0, len(groups) or 1, WIDTH - LEFT - RIGHT)
    parts = [_frame(x, y, x_title, y_title)]
    for place, (name, group) in enumerate(groups):
        begins, room = LEFT + x.place(place), x.place(1)
        width = min(60.0, 0.8 * room / max(1, len(group)))
        first = begins + (room - width * len(group)) / 2
        parts.append(
            f'<text class="tick" x="{begins + room / 2:.1f}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{escape(name)}</text>'
        )
        for index, (what, value, colour) in enumerate(group):
            left, top = first + index * width, _down(y, value)
            parts.append(
                f'<rect class="bar c{colour}" x="{left + 0.5:.1f}" y="{top:.1f}" '
                f'width="{max(1.0, width - 1):.1f}" height="{HEIGHT - BOTTOM - top:.1f}">'
                f"<title>{escape(what)}: {show(value)}</title></rect>"
            )
            if width >= 26:
                parts.append(
                    f'<text class="value" x="{left + width / 2:.1f}" y="{top - 3:.1f}" '
                    f'text-anchor="middle">{show(value)}</text>'
                )
    return _svg(parts, y_title)


def _down(y: Axis, value: float) -> float:
    return HEIGHT - BOTTOM - y.place(value)


def _runs(points: Sequence[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Points without gaps between them."""
    runs: list[list[tuple[float, float]]] = [[]]
    for a, b in points:
        if b is None:
            runs.append([])
        else:
            runs[-1].append((a, b))
    return [run for run in runs if run]


def _frame(x: Axis, y: Axis, x_title: str, y_title: str) -> str:
    right, bottom = WIDTH - RIGHT, HEIGHT - BOTTOM
    parts = []
    for value, shown in y.ticks:
        at = _down(y, value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{shown}</text>'
        )
    for value, shown in x.ticks:
        at = LEFT + x.place(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{bottom}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{shown}</text>'
        )
    parts.append(
        f'<text class="tick" x="{(LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">'
        f"{escape(x_title)}</text>"
        f'<text class="tick" transform="translate(12 {(TOP + bottom) / 2}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_title)}</text>'
    )
    return "".join(parts)


def _svg(parts: Sequence[str], title: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>"
    )


def legend(names: Sequence[tuple[str, int]]) -> str:
    """Which colour is what."""
    items = (f'<span class="key c{colour}"></span>{escape(name)}' for name, colour in names)
    return f'<p class="legend">{" ".join(f"<span>{one}</span>" for one in items)}</p>'
