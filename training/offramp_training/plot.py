"""Accuracy-speed pictures: of one evaluation report, and of several checkpoints on one sheet.

Draws what it is given; knows nothing about files of checkpoints or how figures are measured.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from offramp_training.compare import Compared, Comparison
from offramp_training.evaluate import PolicyReport, Report

# Colour-blind safe (Okabe-Ito), in a fixed order, so that a policy looks the same in every plot.
COLOURS = {
    "entropy": "#0072B2",
    "energy": "#D55E00",
    "confidence": "#009E73",
    "margin": "#CC79A7",
    "patience": "#E69F00",
    "vote": "#56B4E9",
    "gate": "#000000",
}
GREY = "#5f6368"
SUFFIXES = (".png", ".svg", ".pdf")


def plot_report(report: Report, path: Path, *, title: str = "") -> Path:
    """Draws every policy's curve, full depth, fixed layers and the oracle; returns `path`.

    The kind of picture is that of its suffix, one of `SUFFIXES`.
    """
    figure, axes = _sheet()
    for name, one in report.policies.items():
        _draw_policy(axes, name, one)
    _draw_references(axes, report)
    _dress(axes, _right(report), _y_range(report), title)
    figure.savefig(path, format=path.suffix.lower().removeprefix("."))
    return path


def plot_comparison(comparison: Comparison, path: Path, *, title: str = "") -> Path:
    """Draws every checkpoint's curve, its truncated models and its oracle in one colour each."""
    figure, axes = _sheet()
    for one, (line, colour) in zip(comparison.checkpoints, _strokes(), strict=False):
        _draw_compared(axes, one, colour, line)
    for label, look in (
        ("every text at one layer", {"linestyle": ":", "linewidth": 0.8, "marker": "s"}),
        ("oracle: first right exit", {"linestyle": "none", "marker": "*"}),
    ):
        axes.plot([], [], color=GREY, label=label, **look)
    everything = comparison.checkpoints
    right = max(max(one.num_layers / min(one.layers), one.oracle[0]) for one in everything)
    values = [one.oracle[1] for one in everything]
    values += [point.accuracy for one in everything for point in (*one.curve, *one.truncated)]
    _dress(axes, right, _with_room(values), title)
    figure.savefig(path, format=path.suffix.lower().removeprefix("."))
    return path


def _sheet() -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needs no display
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.add_subplot()


def _strokes() -> Iterator[tuple[str, str]]:
    """Colours first, then other kinds of line, for ever."""
    return itertools.cycle(itertools.product(("-", "--", "-.", ":"), COLOURS.values()))


def _draw_compared(axes: Any, one: Compared, colour: str, line: str) -> None:
    speedups = [point.speedup for point in one.curve]
    accuracies = [100 * point.accuracy for point in one.curve]
    coarse = {"marker": "o", "markersize": 4.5} if len(one.curve) < 12 else {}
    label = f"{one.name}, {one.policy}"
    axes.plot(
        speedups, accuracies, label=label, color=colour, linestyle=line, linewidth=2.0, zorder=3,
        **coarse,
    )  # fmt: skip
    axes.plot(
        [one.num_layers / layer for layer in one.layers],
        [100 * accuracy for accuracy in one.layers.values()],
        color=colour, linewidth=0.8, linestyle=":", marker="s", markersize=3.5, alpha=0.7, zorder=2,
    )  # fmt: skip
    speedup, accuracy = one.oracle
    axes.plot([speedup], [100 * accuracy], linestyle="none", marker="*", markersize=11,
              color=colour, zorder=4)  # fmt: skip


def _draw_policy(axes: Any, name: str, one: PolicyReport) -> None:
    speedups = [point.speedup for point in one.curve]
    accuracies = [100 * point.accuracy for point in one.curve]
    colour = COLOURS.get(name)
    coarse = len(one.curve) < 12  # few thresholds exist: the points are all there is
    line = {"linewidth": 1.0, "linestyle": ":", "marker": "o", "markersize": 4.5}
    style = line if coarse else {"linewidth": 2.0}
    axes.plot(speedups, accuracies, label=name, color=colour, zorder=3, **style)


def _draw_references(axes: Any, report: Report) -> None:
    full = 100 * report.full_accuracy
    axes.axhline(full, color=GREY, linewidth=1.0, linestyle="--", zorder=1)
    axes.annotate(
        f"full depth {full:.1f}",
        (1.0, full),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        xytext=(-4, 4),
        ha="right",
        fontsize=8,
        color=GREY,
    )
    speedups = [report.num_layers / layer for layer in report.layers]
    accuracies = [100 * accuracy for accuracy in report.layers.values()]
    axes.plot(
        speedups,
        accuracies,
        color=GREY,
        linewidth=1.2,
        marker="s",
        markersize=4,
        label="every text at one layer",
        zorder=2,
    )
    for layer, x, y in zip(report.layers, speedups, accuracies, strict=True):
        axes.annotate(
            str(layer), (x, y), textcoords="offset points", xytext=(0, -12), ha="center",
            fontsize=7, color=GREY,
        )  # fmt: skip
    axes.plot(
        [report.oracle_speedup],
        [100 * report.oracle_accuracy],
        linestyle="none",
        marker="*",
        markersize=13,
        color="black",
        label="oracle: first right exit",
        zorder=4,
    )


def _dress(axes: Any, right: float, y_range: tuple[float, float], title: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")  # equal ratios of work look equal
    ticks = [tick for tick in (1, 1.25, 1.5, 2, 2.5, 3, 4, 6, 8, 12, 24) if tick <= right]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    axes.set_xlim(0.97, right * 1.04)
    axes.set_ylim(*y_range)
    axes.set_xlabel("speed-up, in layers (L·N / Σ exit layer)")
    axes.set_ylabel("accuracy, %")
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(visible=True, color="#e3e5e8", linewidth=0.7, zorder=0)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower left")


def _right(report: Report) -> float:
    return max(report.num_layers / min(report.layers), report.oracle_speedup)


def _y_range(report: Report) -> tuple[float, float]:
    values = [report.oracle_accuracy, *report.layers.values()]
    values += [point.accuracy for one in report.policies.values() for point in one.curve]
    return _with_room(values)


def _with_room(values: Sequence[float]) -> tuple[float, float]:
    """From the worst thing drawn to the best, with room for the legend below."""
    low, high = 100 * min(values), 100 * max(values)
    room = max(1.0, high - low)
    return max(0.0, low - 0.10 * room), min(100.5, high + 0.06 * room)
