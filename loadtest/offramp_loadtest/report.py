"""What a run showed, as plain numbers fit for JSON; and what must hold, against that.

Latencies are of requests answered with 200 and count from when they were due. Rates are a second.
"""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from offramp_loadtest.generator import Effort
from offramp_loadtest.histogram import QUANTILES, Histogram
from offramp_loadtest.question import Kind
from offramp_loadtest.recorder import Recorder, Tally, Timeline
from offramp_loadtest.running import Measured
from offramp_loadtest.scenario import Closed, Scenario, Slo

FORMAT = 1
TIMELINE_SLOTS, FEWEST_SLOTS = 120, 12
REQUESTS_IN_A_SLOT = 50
"""At least, on average, where that leaves enough slots: quantiles of fewer say little."""

LATE_MS = 1.0
"""More lateness than this at p99 is warned of, where it is no small part of the latency."""
LATE_SHARE = 0.05
BUSY = 0.9
"""More processor time of a core than this, or of the machine, is warned of."""

_LOOPBACK = ("127.0.0.1", "localhost", "::1")

Figures = dict[str, Any]


def quantile(ordered: Sequence[float], share: float) -> float:
    """The smallest value that so large a share does not exceed; exact, `ordered` is all there is.

    Raises:
        ValueError: there are no values.
    """
    if not ordered:
        raise ValueError("a quantile of nothing")
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)]


def milliseconds(seconds: Sequence[float]) -> dict[str, float]:
    """Mean, exact quantiles and largest; empty where there is nothing."""
    if not seconds:
        return {}
    ordered = sorted(seconds)
    figures = {name: quantile(ordered, share) for name, share in QUANTILES.items()}
    figures = {"mean": sum(ordered) / len(ordered), **figures, "max": ordered[-1]}
    return {name: value * 1000 for name, value in figures.items()}


# -- a report ------------------------------------------------------------------------------------


def make_report(measured: Measured) -> Figures:
    """Of one run."""
    scenario, server = measured.scenario, measured.server
    addresses = scenario.target.addresses()
    target = {
        "urls": [str(one) for one in addresses],
        "model": server.model,
        "num_layers": server.num_layers,
        **{name: server.info[name] for name in _SHOWN_INFO if name in server.info},
    }
    report = {
        "format": FORMAT,
        "name": scenario.name,
        "started": measured.started.isoformat(timespec="seconds"),
        "seconds": measured.seconds,
        "warm_up_s": scenario.warm_up_s,
        "target": target,
        "scenario": _described(scenario),
        **figures(measured.recorder, measured.seconds, scenario.warm_up_s, target),
        "generator": _generator(measured.recorder, measured.efforts, scenario),
    }
    report["generator"]["machine_busy"] = measured.machine_busy
    report["warnings"] = warnings(report)
    report["slo"] = check(scenario.slo, report)
    report["recorded"] = measured.recorder.to_json()
    return report


def merge(reports: Sequence[Mapping[str, Any]]) -> Figures:
    """Of runs of one scenario against the same targets, at the same time, from several machines.

    Raises:
        ValueError: they are no reports, or of different scenarios or targets.
    """
    first = reports[0]
    for one in reports:
        if one.get("format") != FORMAT:
            raise ValueError(f"not a report of format {FORMAT}")
        if (one["name"], one["target"]["urls"]) != (first["name"], first["target"]["urls"]):
            raise ValueError("reports of different scenarios or targets say nothing together")
    recorder = Recorder()
    for one in reports:
        recorder.add(Recorder.from_json(one["recorded"]))
    seconds = max(one["seconds"] for one in reports)
    kept = ("format", "name", "started", "warm_up_s", "target", "scenario")
    report: Figures = {name: first[name] for name in kept}
    report |= {"seconds": seconds, "merged": len(reports)}
    report |= figures(recorder, seconds, first["warm_up_s"], first["target"])
    generators = [one["generator"] for one in reports]
    busy = [one["machine_busy"] for one in generators if one["machine_busy"] is not None]
    report["generator"] = {
        "processes": sum(one["processes"] for one in generators),
        "cpu_share": max(one["cpu_share"] for one in generators),
        "cpu_s": sum(one["cpu_s"] for one in generators),
        "lateness_ms": recorder.lateness.milliseconds(),
        "machine_busy": max(busy, default=None),
        **{
            name: sum(one[name] for one in generators)
            for name in ("connections", "max_connections", "waited_for_a_connection")
        },
    }
    report["warnings"] = warnings(report)
    report["slo"] = check(Slo.model_validate(first["scenario"]["slo"]), report)
    report["recorded"] = recorder.to_json()
    return report


_SHOWN_INFO = (
    "version",
    "model_sha",
    "backend",
    "model_dtype",
    "device",
    "exit_policy",
    "max_concurrent_requests",
    "max_client_batch_size",
)


def _described(scenario: Scenario) -> Figures:
    """As it was run, without what headers hold: it may be a secret."""
    content = scenario.model_dump(exclude_none=True)
    headers = [one.partition(":")[0] for one in scenario.target.headers]
    content["target"]["headers"] = headers
    return content


def figures(
    recorder: Recorder, seconds: float, warm_up_s: float, target: Mapping[str, Any]
) -> Figures:
    """All that was counted, told."""
    total = recorder.total()
    num_layers = target.get("num_layers")
    answered, asked = total.statuses["200"], sum(total.statuses.values())
    malformed = sum(sum(one.values()) for one in recorder.malformed.values())
    leavers = sum(recorder.leavers.values())
    errors = asked - answered
    # Answers that came after the last request was due, counted into the time they took.
    took_s = max(seconds, recorder.last_answer_s - warm_up_s)
    due = asked + malformed + leavers
    rate_due = due / seconds
    # Of what can be answered at all.
    share = answered / took_s / (asked / seconds) if asked else 0.0
    return {
        "requests": {
            "due": due,
            "answered": answered,
            "errors": errors,
            "error_share": errors / asked if asked else 0.0,
            "statuses": _sorted(total.statuses),
            "left": _sorted(recorder.leavers),
            "malformed": {name: _sorted(one) for name, one in sorted(recorder.malformed.items())},
            "malformed_wrongly_answered": recorder.wrongly_answered,
            "unreadable_answers": total.unreadable,
            "in_warm_up": recorder.warm_up,
        },
        "rate": {"due": rate_due, "answered": answered / took_s, "share": share},
        "latency_ms": total.latency.milliseconds(),
        "service_ms": total.service.milliseconds(),
        "exits": _exits(total, num_layers),
        "accuracy": _accuracy(total),
        "by": _parts(recorder, num_layers, target["urls"]),
        "timeline": _timeline(recorder.timeline, warm_up_s, num_layers),
        "hdr": {"unit": "us", "latency": total.latency.encode(), "service": total.service.encode()},
    }


def latency(report: Mapping[str, Any]) -> Histogram:
    """All latencies of a report."""
    return Histogram.decode(report["hdr"]["latency"])


def _exits(tally: Tally, num_layers: int | None) -> Figures:
    """Where texts left, and how many layers that saved: a ratio of sums."""
    if not tally.texts:
        return {}
    found: Figures = {
        "texts": tally.texts,
        "mean_exit_layer": tally.layers_run / tally.texts,
        "layers": {str(layer): count for layer, count in sorted(tally.exit_layers.items())},
        "requests_raised": tally.raised,
    }
    if num_layers:
        found["speedup_achieved"] = num_layers * tally.texts / tally.layers_run
    return found


def _accuracy(tally: Tally) -> Figures | None:
    if not tally.graded:
        return None
    return {"texts": tally.graded, "accuracy": tally.right / tally.graded}


def _parts(recorder: Recorder, num_layers: int | None, urls: Sequence[str]) -> Figures:
    """The same by what requests differ in; where they do not, there is nothing to tell."""
    ways: dict[str, Callable[[Kind, int], str]] = {
        "controls": lambda kind, _: kind.controls,
        "door": lambda kind, _: kind.door,
        "texts": lambda kind, _: str(kind.texts) if kind.texts else "single",
        "target": lambda _, target: urls[target],
    }
    found: Figures = {}
    for name, way in ways.items():
        values = sorted({way(kind, target) for kind, target in recorder.tallies})
        if len(values) < 2 and name != "controls":
            continue
        found[name] = {
            value: _part(recorder.total(lambda k, t, w=way, v=value: w(k, t) == v), num_layers)  # type: ignore[misc]
            for value in values
        }
    return found


def _part(tally: Tally, num_layers: int | None) -> Figures:
    return {
        "requests": sum(tally.statuses.values()),
        "statuses": _sorted(tally.statuses),
        "latency_ms": tally.latency.milliseconds(),
        "exits": _exits(tally, num_layers),
        "accuracy": _accuracy(tally),
    }


def _timeline(timeline: Timeline, warm_up_s: float, num_layers: int | None) -> list[Figures]:
    """Latencies of what was due in each slot; what was answered in it."""
    enough = sum(one.due for one in timeline.slots) // REQUESTS_IN_A_SLOT
    shown = timeline.at_most(min(TIMELINE_SLOTS, max(FEWEST_SLOTS, enough)))
    first = math.ceil(warm_up_s / shown.slot_s - 1e-6)
    found = []
    for place, slot in enumerate(shown.slots[first:], first):
        figures = slot.latency.milliseconds()
        speedup = num_layers * slot.texts / slot.layers_run if num_layers and slot.texts else None
        found.append(
            {
                "at_s": place * shown.slot_s,
                "seconds": shown.slot_s,
                "rate_due": slot.due / shown.slot_s,
                "rate_answered": slot.answered / shown.slot_s,
                "rate_refused": slot.refused / shown.slot_s,
                "p50_ms": figures.get("p50"),
                "p99_ms": figures.get("p99"),
                "max_ms": figures.get("max"),
                "speedup_achieved": speedup,
            }
        )
    return found


def _generator(recorder: Recorder, efforts: Sequence[Effort], scenario: Scenario) -> Figures:
    return {
        "processes": len(efforts),
        "cpu_s": sum(one.cpu_s for one in efforts),
        # Of the busiest process: each has one core at most.
        "cpu_share": max((one.cpu_s / one.seconds for one in efforts), default=0.0),
        "lateness_ms": recorder.lateness.milliseconds(),
        "connections": sum(one.connections for one in efforts),
        "max_connections": scenario.target.max_connections,
        "waited_for_a_connection": sum(one.waited for one in efforts),
    }


def _sorted(counts: Mapping[str, int]) -> dict[str, int]:
    return {name: count for name, count in sorted(Counter(counts).items()) if count}


# -- what to think of it -------------------------------------------------------------------------


def warnings(report: Mapping[str, Any]) -> list[str]:
    """Why figures may not mean what they seem to."""
    return [*_of_generator(report), *_of_measurement(report)]


def _of_generator(report: Mapping[str, Any]) -> Iterable[str]:
    generator = report["generator"]
    late_ms = generator["lateness_ms"].get("p99", 0.0)
    median_ms = report["latency_ms"].get("p50", 0.0)
    if late_ms > max(LATE_MS, LATE_SHARE * median_ms):
        yield (
            f"the generator was late: p99 {late_ms:.1f} ms after requests were due, which is in "
            "every latency; use more --processes, or a machine with less to do"
        )
    if generator["cpu_share"] > BUSY:
        yield (
            f"a process of the generator used {generator['cpu_share']:.0%} of a core; use more "
            "--processes"
        )
    busy = generator["machine_busy"]
    if busy is not None and busy > BUSY:
        yield f"the generator's machine was busy to {busy:.0%}: it had no core to spare"
    if waited := generator["waited_for_a_connection"]:
        yield (
            f"{waited} requests waited for one of {generator['max_connections']} connections; the "
            "wait is in their latency"
        )


def _of_measurement(report: Mapping[str, Any]) -> Iterable[str]:
    hosts = {url.split("//")[1].partition(":")[0] for url in report["target"]["urls"]}
    if hosts & set(_LOOPBACK):
        yield "generator and server share a machine: each takes processor time from the other"
    if report["scenario"]["arrivals"]["pattern"] == Closed.__name__.lower():
        yield (
            "closed loop: clients wait for their answer before they ask again, so latencies do not "
            "show how long others would have waited"
        )
    if unreadable := report["requests"]["unreadable_answers"]:
        yield f"{unreadable} answers with status 200 could not be read"
    if wrongly := report["requests"]["malformed_wrongly_answered"]:
        yield f"{wrongly} malformed requests got another status than the right one"
    answered = report["requests"]["answered"]
    if 0 < answered < 1000:
        yield f"{answered} answers: a p99 of fewer than 1000 hangs on a handful of requests"


def check(slo: Slo, report: Mapping[str, Any]) -> list[Figures]:
    """What must hold, what was found, and whether it holds; what was not found does not hold."""
    latency_ms, rate, exits = report["latency_ms"], report["rate"], report["exits"]
    accuracy = report["accuracy"]
    at_most = {
        **{f"{name}_ms": latency_ms.get(name) for name in ("p50", "p90", "p95", "p99")},
        "p999_ms": latency_ms.get("p99.9"),
        "error_share": report["requests"]["error_share"] if report["requests"]["due"] else None,
    }
    at_least = {
        "rate": rate["answered"],
        "rate_share": rate["share"],
        "accuracy": accuracy["accuracy"] if accuracy else None,
        "speedup": exits.get("speedup_achieved"),
    }
    rows = []
    for name, asked in slo.model_dump(exclude_none=True).items():
        below = name in at_most
        found = at_most[name] if below else at_least[name]
        met = found is not None and (found <= asked if below else found >= asked)
        bound = "at most" if below else "at least"
        rows.append({"name": name, "bound": bound, "asked": asked, "found": found, "met": met})
    return rows


def as_text(report: Mapping[str, Any]) -> str:
    """The main figures for a terminal."""
    requests, rate, latency_ms = report["requests"], report["rate"], report["latency_ms"]
    statuses = ", ".join(f"{name}: {count}" for name, count in requests["statuses"].items())
    lines = [
        f"{report['name']}: {requests['due']} requests due in {report['seconds']:.1f} s, "
        f"{rate['due']:.1f}/s; answered {rate['answered']:.1f}/s",
        f"statuses     {statuses or 'none'}",
    ]
    if latency_ms:
        words = (f"{name} {value:.2f}" for name, value in latency_ms.items())
        lines.append(f"latency ms   {', '.join(words)}")
    for name, part in report["by"].get("controls", {}).items():
        lines.append(f"  {name or '-'}: {_part_as_text(part)}")
    if accuracy := report["accuracy"]:
        lines.append(f"accuracy     {accuracy['accuracy']:.4f} of {accuracy['texts']} texts")
    for one in report["slo"]:
        found = "nothing" if one["found"] is None else f"{one['found']:.4g}"
        verdict = "met" if one["met"] else "MISSED"
        lines.append(
            f"SLO          {one['name']} {one['bound']} {one['asked']:g}: {found}, {verdict}"
        )
    lines += [f"warning      {one}" for one in report["warnings"]]
    return "\n".join(lines)


def _part_as_text(part: Mapping[str, Any]) -> str:
    words = [f"{part['requests']} requests"]
    if part["latency_ms"]:
        words.append(f"p50 {part['latency_ms']['p50']:.2f}, p99 {part['latency_ms']['p99']:.2f} ms")
    if part["exits"]:
        words.append(f"mean exit layer {part['exits']['mean_exit_layer']:.2f}")
    if "speedup_achieved" in part["exits"]:
        words.append(f"speed-up {part['exits']['speedup_achieved']:.2f}")
    if part["accuracy"]:
        words.append(f"accuracy {part['accuracy']['accuracy']:.4f}")
    return ", ".join(words)
