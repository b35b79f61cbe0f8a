"""A report as one page that needs nothing else: no script, no font, no request. Plots are SVG."""

import json
from collections.abc import Mapping, Sequence
from html import escape
from itertools import count
from typing import Any

from offramp_loadtest import svg
from offramp_loadtest.histogram import QUANTILES, Histogram
from offramp_loadtest.recorder import Recorder
from offramp_loadtest.svg import COLOURS, HEIGHT, Axis, Line

PLOT_WIDTH = svg.WIDTH - svg.LEFT - svg.RIGHT
PLOT_HEIGHT = HEIGHT - svg.TOP - svg.BOTTOM

_STYLE = """
:root{color-scheme:light
dark;--ink:#1a1c1e;--soft:#5b6168;--line:#dcdfe3;--paper:#fff;--card:#f7f8f9;
--good:#0a7d43;--bad:#b3261e;--warn:#8a5a00}
@media
(prefers-color-scheme:dark){:root{--ink:#e8eaed;--soft:#a3a9b0;--line:#3a3f45;--paper:#17191b;
--card:#1f2225;--good:#56c98d;--bad:#ff8a80;--warn:#f2bc5b}
}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1240px;padding:24px 20px 60px;background:var(--paper);
color:var(--ink);font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0}
h2{font-size:17px;margin:0 0 6px}
.about{color:var(--soft);margin:2px 0 18px}
.tiles{display:flex;flex-wrap:wrap;gap:12px;margin:0 0 18px}
.tile{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px
14px;min-width:118px}
.tile b{display:block;font-size:22px; font-variant-numeric:tabular-nums}
.tile span{color:var(--soft);font-size:13px}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,440px),1fr));gap:16px}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:14px
16px;min-width:0}
section.wide{margin-top:16px;overflow-x:auto}
svg{display:block;width:100%;height:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:14px}
th,td{text-align:right;padding:4px 10px;border-bottom:1px solid var(--line);white-space:nowrap}
th:first-child,td:first-child{text-align:left}
th{color:var(--soft);font-weight:500}
.note{color:var(--soft);font-size:13px;margin:6px 0 0}
.warning{border-left:4px solid var(--warn); background:var(--card);padding:8px 14px;margin:0 0
10px;border-radius:4px}
.met{color:var(--good);font-weight:600}
.missed{color:var(--bad);font-weight:600}
.legend{margin:4px 0 0;font-size:13px;color:var(--soft);display:flex;flex-wrap:wrap;gap:4px
16px}
.key{display:inline-block;width:10px;height:10px;border-radius:2px;margin-right:6px;
background:var(--c)}
.grid{stroke:var(--line);stroke-width:1}
.tick,.value{fill:var(--soft);font-size:11px}
.value{fill:var(--ink)}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.dashed{stroke-dasharray:5 4}
.bar,.dot{fill:var(--c)}
details{margin-top:16px}
pre{overflow-x:auto;font-size:13px}
.c0{--c:#2f7ed8}
.c1{--c:#d9661f}
.c2{--c:#149b74}
.c3{--c:#b5599b}
.c4{--c:#b08800}
.c5{--c:#4aa5d6}
.c6{--c:#7a7f87}
.c7{--c:#c0392b}
"""


def page(report: Mapping[str, Any]) -> str:
    """The whole page."""
    recorder = Recorder.from_json(report["recorded"])
    charts = [
        _by_percentile(recorder),
        _latency_over_time(report),
        _rates_over_time(report),
        _statuses(report),
        _exit_layers(report),
        _accuracies(report),
        _speedup_over_time(report),
    ]
    parts = [
        *_head(report),
        _tiles(report),
        *(f'<p class="warning">{escape(one)}</p>' for one in report["warnings"]),
        _slo(report),
        f'<div class="charts">{"".join(charts)}</div>',
        _parts_table(report),
        _generator(report),
        _details(report),
    ]
    title = f"Load test: {escape(report['name'])}"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body>\n{''.join(parts)}\n</body></html>\n"
    )


# -- words and numbers ---------------------------------------------------------------------------


def _head(report: Mapping[str, Any]) -> list[str]:
    target = report["target"]
    known = (target.get(name) for name in ("backend", "model_dtype", "device"))
    words = [
        ", ".join(target["urls"]),
        f"model {target['model']}" if target["model"] else "",
        " ".join(str(one) for one in known if one),
        f"{report['seconds']:.1f} s from {report['started']}",
        f"after {report['warm_up_s']:g} s of warm-up" if report["warm_up_s"] else "",
        report["scenario"]["arrivals"]["pattern"],
    ]
    about = " · ".join(escape(one) for one in words if one)
    return [f"<h1>{escape(report['name'])}</h1>", f'<p class="about">{about}</p>']


def _tiles(report: Mapping[str, Any]) -> str:
    rate, latency_ms, requests = report["rate"], report["latency_ms"], report["requests"]
    tiles = [
        ("due a second", f"{rate['due']:.1f}"),
        ("answered a second", f"{rate['answered']:.1f}"),
        ("p50", _ms(latency_ms.get("p50"))),
        ("p99", _ms(latency_ms.get("p99"))),
        ("errors", f"{requests['error_share']:.2%}"),
    ]
    exits = report["exits"]
    if "speedup_achieved" in exits:
        tiles.append(("speed-up, in layers", f"{exits['speedup_achieved']:.2f}"))
    if report["accuracy"]:
        tiles.append(("accuracy", f"{report['accuracy']['accuracy']:.4f}"))
    shown = "".join(
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(name)}</span></div>'
        for name, value in tiles
    )
    return f'<div class="tiles">{shown}</div>'


def _slo(report: Mapping[str, Any]) -> str:
    if not report["slo"]:
        return ""
    rows = [
        [
            escape(one["name"]),
            f"{one['bound']} {one['asked']:g}",
            "nothing" if one["found"] is None else f"{one['found']:.4g}",
            '<span class="met">met</span>' if one["met"] else '<span class="missed">missed</span>',
        ]
        for one in report["slo"]
    ]
    return _table("What must hold", ["", "asked", "found", ""], rows, wide=False) + "<br>"


def _parts_table(report: Mapping[str, Any]) -> str:
    rows = []
    for way, parts in report["by"].items():
        for name, part in parts.items():
            latency_ms, exits, accuracy = part["latency_ms"], part["exits"], part["accuracy"]
            answered = part["statuses"].get("200", 0)
            cells = [escape(f"{way}: {name}"), f"{part['requests']:,}"]
            cells.append(f"{answered / part['requests']:.2%}" if part["requests"] else "")
            cells += [_ms(latency_ms.get(one)) for one in QUANTILES]
            cells.append(f"{exits['mean_exit_layer']:.2f}" if exits else "")
            speedup = exits.get("speedup_achieved") if exits else None
            cells.append(f"{speedup:.2f}" if speedup else "")
            cells.append(f"{accuracy['accuracy']:.4f}" if accuracy else "")
            rows.append(cells)
    heads = ["", "requests", "answered", *QUANTILES, "mean exit layer", "speed-up", "accuracy"]
    return _table("By what requests differ in", heads, rows)


def _generator(report: Mapping[str, Any]) -> str:
    one, requests = report["generator"], report["requests"]
    busy = one["machine_busy"]
    rows = [
        [
            "sent after it was due, p50 / p99 / max",
            " / ".join(_ms(one["lateness_ms"].get(name)) for name in ("p50", "p99", "max")),
        ],
        ["processes", str(one["processes"])],
        ["processor time, of a core, busiest process", f"{one['cpu_share']:.0%}"],
        ["its machine busy, all cores", "unknown" if busy is None else f"{busy:.0%}"],
        ["connections, at most", f"{one['connections']} of {one['max_connections']}"],
        ["requests that waited for a connection", f"{one['waited_for_a_connection']:,}"],
        ["requests in the warm-up, in no figure", f"{requests['in_warm_up']:,}"],
        ["clients that left on purpose", _counts(requests["left"])],
    ]
    rows += [
        [f"malformed: {escape(name)}", _counts(counts)]
        for name, counts in requests["malformed"].items()
    ]
    return _table("The generator itself", ["", ""], rows)


def _details(report: Mapping[str, Any]) -> str:
    scenario = escape(json.dumps(report["scenario"], indent=1))
    percentiles = escape(Histogram.decode(report["hdr"]["latency"]).hgrm().decode())
    return (
        f"<details><summary>The scenario as it was run</summary><pre>{scenario}</pre></details>"
        "<details><summary>Latency in ms by percentile (HdrHistogram)</summary>"
        f"<pre>{percentiles}</pre></details>"
    )


def _counts(counts: Mapping[str, int]) -> str:
    return escape(", ".join(f"{name}: {count:,}" for name, count in counts.items()) or "none")


def _ms(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} ms" if value < 100 else f"{value:,.0f} ms"


def _table(
    title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], *, wide: bool = True
) -> str:
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return (
        f'<section class="{"wide" if wide else ""}"><h2>{escape(title)}</h2>'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></section>"
    )


# -- plots ---------------------------------------------------------------------------------------


def _chart(title: str, drawn: str, legend: str = "", note: str = "") -> str:
    told = f'<p class="note">{escape(note)}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{drawn}{legend}{told}</section>"


def _by_percentile(recorder: Recorder) -> str:
    """Stretched towards the tail: each step to the right is ten times as rare."""
    names = sorted({kind.controls for kind, _ in recorder.tallies})
    found = {"all": recorder.total().latency}
    if len(names) > 1:
        for name in names[: COLOURS - 1]:
            found[name] = recorder.total(lambda kind, _, n=name: kind.controls == n).latency  # type: ignore[misc]
    found = {name: one for name, one in found.items() if one.count}
    if not found:
        return ""
    most = max(one.count for one in found.values())
    rarest = max(10, 10 ** (len(str(most)) - 1))
    shown, values = [], []
    for colour, (name, histogram) in zip(count(), found.items(), strict=False):
        points = [(1.0, histogram.quantile(0.0) * 1000)]
        for share, seconds in histogram.by_percentile():
            rare = 1 / max(1e-12, 1 - share)
            if rare > min(rarest, histogram.count):
                break
            points.append((rare, seconds * 1000))
        points = _thinned(points)
        values += [b for _, b in points]
        shown.append(Line(name, points, colour % COLOURS))
    ticks = [(10.0**power, _percent(power)) for power in range(len(str(rarest)))]
    x = Axis(1, rarest, PLOT_WIDTH, log=True, ticks=ticks)
    y = svg.logarithmic(max(min(values), 1e-3), max(values), PLOT_HEIGHT)
    drawn = svg.lines(shown, x, y, "percentile", "ms")
    keys = [(one.name, one.colour) for one in shown]
    return _chart("Latency by percentile", drawn, svg.legend(keys), "From when a request was due.")


def _percent(power: int) -> str:
    return "0" if power == 0 else f"{100 * (1 - 10.0**-power):.{max(0, power - 2)}f}%"


def _thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """So many that a line looks the same."""
    step = max(1, len(points) // 400)
    return [*points[::step], points[-1]]


def _over_time(
    report: Mapping[str, Any], title: str, y_title: str, names: Mapping[str, str], note: str = ""
) -> str:
    slots = report["timeline"]
    shown = [
        Line(name, [(one["at_s"] + one["seconds"] / 2, one[key]) for one in slots], colour)
        for colour, (key, name) in enumerate(names.items())
    ]
    values = [b for line in shown for _, b in line.points if b is not None]
    if not values:
        return ""
    x = svg.between(slots[0]["at_s"], slots[-1]["at_s"] + slots[-1]["seconds"], PLOT_WIDTH)
    y = svg.linear(max(values), PLOT_HEIGHT)
    if y_title == "ms":
        y = svg.logarithmic(max(min(values), 1e-3), max(values), PLOT_HEIGHT)
    drawn = svg.lines(shown, x, y, "seconds", y_title)
    return _chart(title, drawn, svg.legend([(one.name, one.colour) for one in shown]), note)


def _latency_over_time(report: Mapping[str, Any]) -> str:
    names = {"p50_ms": "p50", "p99_ms": "p99", "max_ms": "largest"}
    note = "Of requests by when they were due."
    return _over_time(report, "Latency over time", "ms", names, note)


def _rates_over_time(report: Mapping[str, Any]) -> str:
    names = {
        "rate_due": "due",
        "rate_answered": "answered with 200",
        "rate_refused": "anything else",
    }
    return _over_time(report, "Requests over time", "a second", names)


def _speedup_over_time(report: Mapping[str, Any]) -> str:
    names = {"speedup_achieved": "achieved"}
    return _over_time(report, "Speed-up over time, in layers", "speed-up", names)


def _statuses(report: Mapping[str, Any]) -> str:
    counts = report["requests"]["statuses"]
    if not counts:
        return ""
    groups = [(name, [(name, float(n), 0 if name == "200" else 7)]) for name, n in counts.items()]
    drawn = svg.bars(groups, "requests", "status", lambda value: f"{value:,.0f}")
    return _chart("Statuses", drawn, note="Of well-formed requests whose clients stayed.")


def _exit_layers(report: Mapping[str, Any]) -> str:
    """Layer by layer, a bar for each kind of controls: its share of texts."""
    parts = {
        name: part["exits"]["layers"]
        for name, part in report["by"].get("controls", {}).items()
        if part["exits"].get("layers")
    }
    if not parts:
        return ""
    num_layers = report["target"]["num_layers"] or max(
        int(n) for one in parts.values() for n in one
    )
    colours = _colours(report)
    groups = []
    for layer in range(1, num_layers + 1):
        group = [
            (f"{name}, layer {layer}", counts.get(str(layer), 0) / sum(counts.values()), colour)
            for name, counts, colour in ((one, parts[one], colours[one]) for one in parts)
        ]
        groups.append((str(layer), group))
    share = "{:.0%}".format
    drawn = svg.bars(groups, "share of texts", "exit layer", share, most=1.0)
    keys = [(name, colours[name]) for name in parts]
    return _chart("Exit layers", drawn, svg.legend(keys))


def _accuracies(report: Mapping[str, Any]) -> str:
    """What each kind of controls costs in right answers, where they are known."""
    colours = _colours(report)
    groups = [
        (name, [(name, part["accuracy"]["accuracy"], colours[name])])
        for name, part in report["by"].get("controls", {}).items()
        if part["accuracy"]
    ]
    if not groups:
        return ""
    drawn = svg.bars(groups, "share of texts", "asked for", "{:.3f}".format, most=1.0)
    return _chart("Right labels", drawn, note="Of texts whose label is known.")


def _colours(report: Mapping[str, Any]) -> dict[str, int]:
    """Of each kind of controls, in all plots; where they are several, the first is of all."""
    names = report["by"].get("controls", {})
    return {name: (place + (len(names) > 1)) % COLOURS for place, name in enumerate(names)}
