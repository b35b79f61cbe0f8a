"""The arithmetic of the comparison: medians, ratios within rounds, who is as accurate as whom, and
the tables. Works on the JSON that the benchmark writes; measures nothing.

A round asks everybody in turn. Ratios are taken within a round and their median counts, so that a
machine that is slow for a minute is slow for all.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

AS_ACCURATE = 0.01
"""Equal accuracy: at most so much below the other's."""
LOAD_SHARE = 0.8
OF_TORCH, OF_ONNX, OF_SORTED, OF_TAIL = 5.0, 2.2, 1.6, 0.6
"""What is asked: × rows a second of the best peer of each kind, × its p99."""

Figures = dict[str, Any]
Round = Mapping[str, Figures]
"""What one round saw, by subject."""


def rows_per_s(figures: Figures) -> float:
    return float(figures["rows_per_s"])


def p99_ms(figures: Figures) -> float:
    return float(figures["latency_ms"]["p99"])


def median(rounds: Sequence[Round], subject: str, what: Any = rows_per_s) -> float:
    """Over the rounds that have the subject.

    Raises:
        ValueError: none has.
    """
    values = [what(one[subject]) for one in rounds if subject in one]
    if not values:
        raise ValueError(f"no round has {subject}")
    return statistics.median(values)


def spread(rounds: Sequence[Round], subject: str, what: Any = rows_per_s) -> tuple[float, float]:
    values = [what(one[subject]) for one in rounds if subject in one]
    return min(values), max(values)


def ratio(rounds: Sequence[Round], over: str, under: str, what: Any = rows_per_s) -> float:
    """Median of the ratio within a round.

    Raises:
        ValueError: no round has both.
    """
    values = [what(one[over]) / what(one[under]) for one in rounds if over in one and under in one]
    if not values:
        raise ValueError(f"no round has {over} and {under}")
    return statistics.median(values)


def fastest(rounds: Sequence[Round], names: Iterable[str]) -> str:
    """Who answers most texts a second when saturated."""
    return max(names, key=lambda name: median(rounds, name))


def as_accurate(accuracy: Mapping[str, float], names: Iterable[str], peer: str) -> list[str]:
    """Those that are at most a point below the peer."""
    return [name for name in names if accuracy[name] >= accuracy[peer] - AS_ACCURATE - 1e-9]


def rates(rounds: Sequence[Round], kinds: Mapping[str, str]) -> dict[str, float]:
    """Loads for the open loop: a share of what the best peer of a kind can do, by its name."""
    found = {}
    for kind in ("torch", "onnx"):
        best = fastest(rounds, [name for name, its in kinds.items() if its == kind])
        found[best] = LOAD_SHARE * median(rounds, best)
    return found


def able(rounds: Sequence[Round], rate: float) -> list[str]:
    """Who can answer so many texts a second at all."""
    names = dict.fromkeys(name for one in rounds for name in one)
    return [name for name in names if median(rounds, name) >= rate]


def targets(report: Figures) -> list[Figures]:
    """What was asked, and what was found, by the fastest that is as accurate as the peer."""
    kinds, accuracy = report["kinds"], report["accuracy"]
    saturated, arrivals = report["saturated"], report["arrivals"]
    ours = [name for name, kind in kinds.items() if kind == "offramp"]
    rows = []
    for kind, is_sorted, asked in (
        ("torch", False, OF_TORCH),
        ("torch", True, OF_TORCH),
        ("onnx", False, OF_ONNX),
        ("onnx", True, OF_SORTED),
    ):
        peers = [
            name
            for name, its in kinds.items()
            if its == kind and name.endswith("sorted") == is_sorted
        ]
        if not peers:
            continue
        peer = fastest(saturated, peers)
        chosen = fastest(saturated, as_accurate(accuracy, ours, peer))
        found = ratio(saturated, chosen, peer)
        rows.append(
            _row("rows a second", chosen, peer, f"at least {asked:g}", found, found >= asked)
        )
    for peer, rounds in arrivals.items():
        there = [name for name in ours if any(name in one for one in rounds)]
        candidates = as_accurate(accuracy, there, peer)
        if not candidates:
            continue
        chosen = fastest(saturated, candidates)
        found = ratio(rounds, chosen, peer, p99_ms)
        rows.append(
            _row("p99 at its 80 % load", chosen, peer, f"at most {OF_TAIL:g}", found,
                 found <= OF_TAIL)
        )  # fmt: skip
    return rows


def _row(what: str, subject: str, peer: str, asked: str, found: float, met: bool) -> Figures:
    return {
        "what": what,
        "subject": subject,
        "peer": peer,
        "asked": asked,
        "found": found,
        "met": met,
    }


# -- what people read ----------------------------------------------------------------------------


def tables(report: Figures) -> str:
    """Markdown."""
    parts = [saturated_table(report), *arrival_tables(report), target_table(report)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def saturated_table(report: Figures) -> list[str]:
    rounds, accuracy = report["saturated"], report["accuracy"]
    lines = [
        "| 64 connections, a text each | texts a second | least to most | p50 ms | p99 ms | "
        "accuracy | as float32 | server CPU ms a text |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name in report["kinds"]:
        least, most = spread(rounds, name)
        p50 = median(rounds, name, lambda one: one["latency_ms"]["p50"])
        cpu = median(rounds, name, lambda one: one["server_cpu_s"] / one["answered"] * 1e3)
        lines.append(
            f"| {name} | {median(rounds, name):.0f} | {least:.0f} to {most:.0f} | {p50:.0f} | "
            f"{median(rounds, name, p99_ms):.0f} | {accuracy[name]:.4f} | "
            f"{report['agreement'][name]:.2%} | {cpu:.2f} |"
        )
    return lines


def arrival_tables(report: Figures) -> list[list[str]]:
    found = []
    for peer, rounds in report["arrivals"].items():
        rate = report["rates"][peer]
        lines = [
            f"| {rate:.0f} texts a second, 80 % of {peer} | p50 ms | p95 ms | p99 ms | "
            "least to most p99 | accuracy |",
            "|---|---:|---:|---:|---:|---:|",
        ]
        for name in report["kinds"]:
            if not any(name in one for one in rounds):
                lines.append(f"| {name} | cannot | | | | {report['accuracy'][name]:.4f} |")
                continue
            p50, p95, p99 = (
                median(rounds, name, lambda one, key=key: one["latency_ms"][key])
                for key in ("p50", "p95", "p99")
            )
            least, most = spread(rounds, name, p99_ms)
            lines.append(
                f"| {name} | {p50:.1f} | {p95:.1f} | {p99:.1f} | {least:.0f} to {most:.0f} | "
                f"{report['accuracy'][name]:.4f} |"
            )
        found.append(lines)
    return found


def target_table(report: Figures) -> list[str]:
    lines = ["| | against | asked | found |", "|---|---|---|---|"]
    for one in report["targets"]:
        found = f"{one['found']:.2f} ×"
        if not one["met"]:
            found = f"**{found}, missed**"
        lines.append(
            f"| {one['what']}: {one['subject']} | {one['peer']} | {one['asked']} × | {found} |"
        )
    return lines
