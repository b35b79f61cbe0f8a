"""Batches side by side: the same server with one engine worker and with several.

    python service/bench/bench_workers.py CHECKPOINT... --data DIR [--json FILE]

For each checkpoint, servers that differ in `--engine-workers` alone run at the same time and take
turns in every round: saturated by single texts and by lists, then texts that arrive at a rate that
all of them can carry, and texts with nobody beside them. Ratios are taken within a round, against
one worker; the median over the rounds counts.

Everything shares the machine, the load generator included; what other processes took of the cores
is noted with each figure. It knows the command and HTTP, and nothing of the service's inside.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_serve import check_all_answered, machine

from offramp_loadtest.arrivals import schedule
from offramp_loadtest.generator import Load, keep_in_flight, send_when_due
from offramp_loadtest.report import milliseconds
from offramp_loadtest.server_process import ServerProcess, machine_cpu_s, serving
from offramp_loadtest.texts import classify_requests
from offramp_service.settings import usable_cores
from offramp_training.data import load_split

LISTS = 32
IN_FLIGHT = 64
ARRIVAL_SHARE = 0.6
"""Of what one worker answers when saturated."""
UNLOADED_RATE = 10.0
LONG = 300
"""Characters of a long text, 67 tokens on average: nearly three times as many as the others."""

Figures = dict[str, Any]


def saturate(
    server: ServerProcess, texts: Sequence[str], speedup: float, batch: int, seconds: float
) -> Figures:
    requests = classify_requests(server.address, texts, batch=batch, speedup=speedup)
    load = Load(server.address, requests, max(2, IN_FLIGHT // max(1, batch)))
    began, began_cpu_s = time.perf_counter(), server.cpu_s()
    result = keep_in_flight(load, seconds)
    check_all_answered(result)
    count = len(result.outcomes) * max(1, batch)
    took_s = time.perf_counter() - began
    return {
        "rows_per_s": count / took_s,
        "server_cpu_ms_per_text": (server.cpu_s() - began_cpu_s) / count * 1000,
    }


def arrive(
    server: ServerProcess,
    texts: Sequence[str],
    speedup: float,
    how: tuple[str, float],
    seconds: float,
    seed: int,
) -> Figures:
    requests = classify_requests(server.address, texts, speedup=speedup)
    due = schedule(*how, seconds, seed)
    result = send_when_due(Load(server.address, requests, max_connections=512), due)
    check_all_answered(result)
    return {
        "rate_due": how[1],
        "latency_ms": milliseconds([one.latency_s for one in result.outcomes]),
    }


def measure(
    servers: dict[int, ServerProcess], texts: Sequence[str], args: argparse.Namespace
) -> list[Figures]:
    """A row for each way and speed-up, with the figures of each server in each round."""
    long = [" ".join([text] * LONG)[:LONG] for text in sorted(texts, key=len)[-100:]]
    rows: list[Figures] = []

    def in_turn(name: str, speedup: float, rounds: int, way: Any) -> Figures:
        found: Figures = {"way": name, "speedup": speedup, "by_workers": {}}
        for seed in range(rounds):
            for workers, server in servers.items():
                before = machine_cpu_s() - _ours(servers)
                figures = way(server, seed)
                others = machine_cpu_s() - _ours(servers) - before
                noted = figures | {"others_and_generator_cpu_s": others}
                found["by_workers"].setdefault(workers, []).append(noted)
        rows.append(found)
        print(_line(found), flush=True)
        return found

    for speedup in args.speedups:
        for server in servers.values():
            saturate(server, texts, speedup, 0, 1.0)  # to warm up
        single = in_turn(
            "saturated, single texts",
            speedup,
            args.rounds,
            lambda server, _, s=speedup: saturate(server, texts, s, 0, args.seconds),
        )
        in_turn(
            f"saturated, lists of {LISTS}",
            speedup,
            args.rounds,
            lambda server, _, s=speedup: saturate(server, texts, s, LISTS, args.seconds),
        )
        one = statistics.median(each["rows_per_s"] for each in single["by_workers"][1])
        for name, how, asked in (
            (f"arrivals at {ARRIVAL_SHARE:.0%}", ("poisson", ARRIVAL_SHARE * one), texts),
            ("alone", ("constant", UNLOADED_RATE), texts),
            ("alone, long texts", ("constant", UNLOADED_RATE), long),
        ):
            in_turn(
                name,
                speedup,
                args.rounds,
                lambda server, seed, s=speedup, h=how, a=asked: arrive(
                    server, a, s, h, args.arrival_seconds, seed
                ),
            )
    return rows


def _ours(servers: dict[int, ServerProcess]) -> float:
    return sum(server.cpu_s() for server in servers.values())


def ratios(row: Figures, key: str, percentile: str | None = None) -> dict[int, float]:
    """By workers: the median over the rounds of the figure against that of one worker."""

    def value(figures: Figures) -> float:
        found = figures[key]
        return float(found if percentile is None else found[percentile])

    ones = row["by_workers"][1]
    return {
        workers: statistics.median(value(a) / value(b) for a, b in zip(some, ones, strict=True))
        for workers, some in row["by_workers"].items()
        if workers != 1
    }


def _line(row: Figures) -> str:
    cells = []
    for workers, some in row["by_workers"].items():
        if "rows_per_s" in some[0]:
            cells.append(f"{workers}: {statistics.median(o['rows_per_s'] for o in some):.0f}/s")
        else:
            p50, p99 = (statistics.median(o["latency_ms"][p] for o in some) for p in ("p50", "p99"))
            cells.append(f"{workers}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
    return f"{row['way']} at {row['speedup']:g}: " + "; ".join(cells)


def table(found: Figures) -> str:
    """Markdown: for each checkpoint a table of medians and ratios."""
    lines = []
    for name, rows in found["checkpoints"].items():
        lines += [
            f"| {name}, {found['threads']} threads | speed-up | one worker | others | ratio |",
            "|---|---|---|---|---|",
        ]
        for row in rows:
            rate = "rows_per_s" in row["by_workers"][1][0]
            pieces = [("rows_per_s", None)] if rate else [("latency_ms", p) for p in ("p50", "p99")]
            for key, percentile in pieces:
                medians = {
                    workers: statistics.median(
                        one[key] if percentile is None else one[key][percentile] for one in some
                    )
                    for workers, some in row["by_workers"].items()
                }
                unit = "texts/s" if percentile is None else f"ms {percentile}"
                style = ".0f" if percentile is None else ".1f"
                others = ", ".join(f"{w}: {v:{style}}" for w, v in medians.items() if w != 1)
                by = ", ".join(f"{v:.2f}" for v in ratios(row, key, percentile).values())
                lines.append(
                    f"| {row['way']}, {unit} | {row['speedup']:g} | {medians[1]:{style}} | "
                    f"{others} | {by} |"
                )
        lines.append("")
    return "\n".join(lines)


def run(args: argparse.Namespace) -> Figures:
    texts = [row.text for row in load_split(args.data, args.split).rows]
    found: dict[str, list[Figures]] = {}
    for checkpoint in args.checkpoints:
        with ExitStack() as stack:
            servers = {
                workers: stack.enter_context(
                    serving(
                        [
                            *(sys.executable, "-m", "offramp_service"),
                            *("--model-id", str(checkpoint), "--port", "0"),
                            *("--engine-workers", str(workers), "--log-level", "warning"),
                        ]
                    )
                )
                for workers in dict.fromkeys((1, *args.workers))
            }
            found[checkpoint.name] = measure(servers, texts, args)
    return {
        "command": " ".join(
            "PATH" if Path(one).is_absolute() else one for one in ["python", *sys.argv]
        ),
        "machine": machine() | {"load_average": os.getloadavg()},
        "threads": usable_cores(),
        "checkpoints": found,
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--workers", type=int, nargs="+", default=[usable_cores()])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a saturated measurement")
    parser.add_argument("--arrival-seconds", type=float, default=4.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    found = run(args)
    sys.stdout.write("\n" + table(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
