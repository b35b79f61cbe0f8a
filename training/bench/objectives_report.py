"""Tables and plots of the comparison of objectives, from the JSON files of its runs.

    python training/bench/objectives_report.py [--results docs/results/objectives]

Writes what stands between the two marks of `objectives.md` beside the results directory anew, and
`<results>/curves.png`. Figures are of the rows that each set reports, means over the seeds that are
done with the standard deviation behind them; each run speaks by the policy that was best at
speed-up 2 on its calibration rows. Trains and evaluates nothing.
"""

import argparse
import statistics
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from compare_objectives import HERE, Protocol, Results, chosen_area

from offramp_training.statistics import Curves

SHOWN = ("1", "1.25", "1.5", "2", "2.5", "3")
TRUNCATED_AT = "2"  # the speed-up at which a truncated model is the yardstick
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
COLOURS = ("#5f6368", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00")

Done = dict[str, Any]  # the JSON of one run


class Contest:
    """The runs of one objective on one data set."""

    def __init__(self, protocol: Protocol, results: Results, data_set: str, objective: str) -> None:
        self.data_set, self.objective = data_set, objective
        self.seeds = len(protocol.seeds(data_set))
        done = {
            name: [
                found
                for seed in protocol.seeds(data_set)
                if (found := results.read(protocol.run(data_set, objective, name, seed)))
            ]
            for name in protocol.configurations(data_set, objective)
        }
        self.missing = [name for name, runs in done.items() if not runs]
        # Configurations compete with the first seed, unless all are run with every seed.
        most = None if protocol.every_seed(data_set) else 1
        self.tuned = {name: runs[:most] for name, runs in done.items() if runs}
        self.winner = max(self.tuned, key=self._selection, default=None)
        self.runs: list[Done] = done[self.winner] if self.winner else []

    def _selection(self, name: str) -> float:
        return statistics.fmean(chosen_area(done["selection"]) for done in self.tuned[name])

    @property
    def policies(self) -> str:
        """Those that speak for the seeds, the most frequent first."""
        return ", ".join(name for name, _ in self._counted.most_common())

    @property
    def _counted(self) -> Counter[str]:
        return Counter(run["report"]["policy"] for run in self.runs)

    def values(self, figure: Callable[[Done], float | None]) -> list[float]:
        """Of every seed; none unless all have one."""
        return values(self.runs, "report", figure)


def values(runs: Sequence[Done], rows: str, figure: Callable[[Done], float | None]) -> list[float]:
    """A figure of every run, on "report" or "selection" rows; none unless all have one."""
    found = [figure(run[rows]) for run in runs]
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []


def spoken(key: str) -> Callable[[Done], float | None]:
    """A figure of the policy that speaks for the run: at a speed-up, or "auc"."""

    def figure(report: Done) -> float | None:
        own = report["policies"][report["policy"]]
        value: float | None = own["auc"] if key == "auc" else own["at"][key]
        return value

    return figure


def of_policy(name: str, key: str) -> Callable[[Done], float | None]:
    """The same of a named policy, if the run has it."""

    def figure(report: Done) -> float | None:
        own = report["policies"].get(name)
        if own is None:
            return None
        value: float | None = own["auc"] if key == "auc" else own["at"][key]
        return value

    return figure


def full_depth(report: Done) -> float:
    value: float = report["layers"][-1]
    return value


# ---- tables --------------------------------------------------------------------------------------


def tables(contests: Sequence[Contest]) -> Iterator[str]:
    """Markdown, data set by data set."""
    for data_set in dict.fromkeys(one.data_set for one in contests):
        here = [one for one in contests if one.data_set == data_set and one.runs]
        if not here:
            continue
        report = here[0].runs[0]["report"]
        yield f"## {data_set}: {report['rows']} rows of {report['split']}\n"
        yield from _frontier(here)
        yield from _policies(here)
        yield from _layers(here)
        yield from _configurations(here)


def _frontier(here: Sequence[Contest]) -> Iterator[str]:
    yield _row(
        "objective", "policy", *(f"{one}x" for one in SHOWN), "area 1x-3x", "layer 3", "seeds"
    )
    yield _row(*["---"] * (len(SHOWN) + 5))
    for one in here:
        cells = [_spread(one.values(spoken(key))) for key in (*SHOWN, "auc")]
        truncated = _spread(one.values(of_policy("fixed_layer", TRUNCATED_AT)))
        count = f"{len(one.runs)} of {one.seeds}"
        name = f"`{one.objective}` ({one.winner})"
        yield _row(name, one.policies, *cells, truncated, count)
    yield ""


def _policies(here: Sequence[Contest]) -> Iterator[str]:
    names = list(dict.fromkeys(name for one in here for name in one.runs[0]["report"]["policies"]))
    names = [name for name in names if name != "fixed_layer"]
    yield "Accuracy at speed-up 2 by policy:\n"
    yield _row("objective", *(f"`{name}`" for name in names))
    yield _row(*["---"] * (len(names) + 1))
    for one in here:
        values = [_spread(one.values(of_policy(name, "2")), digits=3) for name in names]
        yield _row(f"`{one.objective}`", *values)
    yield ""


def _layers(here: Sequence[Contest]) -> Iterator[str]:
    layers = range(len(here[0].runs[0]["report"]["layers"]))
    yield "Accuracy if every row left at one layer / AUROC of the policy's signal against right:\n"
    yield _row("objective", *(f"layer {layer + 1}" for layer in layers))
    yield _row(*["---"] * (len(layers) + 1))
    for one in here:
        cells = [
            f"{_mean(one.values(lambda run, at=layer: run['layers'][at]), 3)} / "
            f"{_mean(one.values(lambda run, at=layer: run['aurocs'][at]), 3)}"
            for layer in layers
        ]
        yield _row(f"`{one.objective}`", *cells)
    yield ""


def _configurations(here: Sequence[Contest]) -> Iterator[str]:
    yield "Every configuration (chosen by the area on the calibration rows, first seed):\n"
    columns = ("area, calibration", "at 2x, calibration", "full depth", "at 2x", "area", "seconds")
    yield _row("objective", "configuration", *columns)
    yield _row(*["---"] * (len(columns) + 2))
    for one in here:
        for name, runs in one.tuned.items():
            cells = [
                _spread(values(runs, "selection", spoken("auc"))),
                _spread(values(runs, "selection", spoken("2"))),
                _spread(values(runs, "report", full_depth)),
                _spread(values(runs, "report", spoken("2"))),
                _spread(values(runs, "report", spoken("auc"))),
            ]
            shown = f"**{name}**" if name == one.winner else name
            seconds = f"{statistics.fmean(done['seconds'] for done in runs):.0f}"
            shared = runs[0].get("first_stage", "own") not in ("own", runs[0]["run"])
            yield _row(f"`{one.objective}`", shown, *cells, seconds + "*" * shared)
        if one.missing:
            yield _row(f"`{one.objective}`", f"not run: {', '.join(one.missing)}", *[""] * 6)
    yield "\n\\* without the first stage, which another run had trained.\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _number(value: float, digits: int = 4) -> str:
    return f"{value:.{digits}f}".removeprefix("0")


def _mean(values: Sequence[float], digits: int) -> str:
    return _number(statistics.fmean(values), digits) if values else "-"


def _spread(values: Sequence[float], digits: int = 4) -> str:
    if len(values) < 2:
        return _mean(values, digits)
    return f"{_mean(values, digits)} ± {_number(statistics.stdev(values), digits)}"


# ---- plot ----------------------------------------------------------------------------------------


def plot(contests: Sequence[Contest], path: Path) -> None:
    """One sheet with a panel for each data set: the mean of the seeds' curves."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    data_sets = list(dict.fromkeys(one.data_set for one in contests if one.runs))
    figure = Figure(figsize=(11, 4 * ((len(data_sets) + 1) // 2)), layout="constrained")
    FigureCanvasAgg(figure)
    objectives = list(dict.fromkeys(one.objective for one in contests))
    grid = np.linspace(1, 4, 301)
    for place, data_set in enumerate(data_sets):
        axes = figure.add_subplot((len(data_sets) + 1) // 2, 2, place + 1)
        for one in contests:
            if one.data_set != data_set or not one.runs:
                continue
            colour = COLOURS[objectives.index(one.objective) % len(COLOURS)]
            curves = [_curve(run) for run in one.runs]
            mean = np.mean([[curve.at(speedup) for speedup in grid] for curve in curves], axis=0)
            axes.plot(grid, mean, color=colour, label=one.objective, linewidth=1.4)
        axes.set_title(data_set)
        axes.set_xlabel("speed-up in layers")
        axes.set_ylabel("accuracy")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def _curve(run: Done) -> Curves:
    points = np.array(run["report"]["curve"])
    return Curves(points[:, 0], points[:, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--results", type=Path, default=Path("docs/results/objectives"))
    arguments = parser.parse_args()
    protocol, results = Protocol(HERE / "objectives.toml"), Results(arguments.results)
    contests = [Contest(protocol, results, *names) for names in protocol.contests()]
    page = arguments.results.with_suffix(".md")
    before, _, rest = page.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    text = "\n".join(tables(contests))
    page.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")
    plot(contests, arguments.results / "curves.png")


if __name__ == "__main__":
    main()
