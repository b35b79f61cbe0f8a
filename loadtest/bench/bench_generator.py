"""How much load a process of the generator can offer and still be on time.

A Poisson stream of single texts at rising rates against a server that costs nothing
(`null_server.py`) on another core: how late requests were sent after they were due, and what of a
core that took. A rate counts as offered where in the median of the rounds p99 of the lateness stays
below a millisecond and as many requests are answered as were due. And the memory of a longer run.
"""

import argparse
import json
import os
import platform
import statistics
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from offramp_loadtest.progress import Moment
from offramp_loadtest.report import make_report
from offramp_loadtest.running import run
from offramp_loadtest.scenario import make_scenario
from offramp_loadtest.server_process import ServerProcess, serving

LATE_AT_MOST_MS = 1.0
ANSWERED_AT_LEAST = 0.99

Figures = dict[str, Any]


def offer(server: ServerProcess, rate: float, seconds: float, processes: int, seed: int) -> Figures:
    """One run, and what it says of itself."""
    scenario = make_scenario(
        {
            "name": "generator",
            "seed": seed,
            "warm_up_s": 0.5,
            "processes": processes,
            "arrivals": {"pattern": "poisson", "rate": rate, "seconds": seconds + 0.5},
            "texts": [
                {"words": {"distribution": "lognormal", "median": 12.0, "p95": 40.0, "most": 200}}
            ],
            "target": {"urls": [f"http://127.0.0.1:{server.address.port}"]},
        }
    )
    memory: list[float] = []

    def show(_: float, __: Moment) -> None:
        memory.append(psutil.Process().memory_info().rss / 2**20)

    cpu_before = server.cpu_s()
    report = make_report(run(scenario, {}, show))
    generator = report["generator"]
    return {
        "rate": rate,
        "processes": processes,
        "requests": report["requests"]["due"],
        "answered_share": report["requests"]["answered"] / max(1, report["requests"]["due"]),
        "rate_due": report["rate"]["due"],
        "rate_answered": report["rate"]["answered"],
        "lateness_ms": generator["lateness_ms"],
        "latency_ms": report["latency_ms"],
        "cpu_share": generator["cpu_share"],
        "cpu_us_per_request": generator["cpu_s"] / max(1, report["requests"]["due"]) * 1e6,
        "server_cpu_share": (server.cpu_s() - cpu_before) / (seconds + 0.5),
        "machine_busy": generator["machine_busy"],
        "connections": generator["connections"],
        "memory_mib": memory,
    }


def on_time(rounds: Sequence[Figures]) -> bool:
    late = statistics.median(one["lateness_ms"]["p99"] for one in rounds)
    answered = statistics.median(one["rate_answered"] / one["rate_due"] for one in rounds)
    return late < LATE_AT_MOST_MS and answered >= ANSWERED_AT_LEAST


def measure(arguments: argparse.Namespace) -> Figures:
    found: dict[str, list[Figures]] = {}
    with serving([sys.executable, str(Path(__file__).with_name("null_server.py"))]) as server:
        offer(server, arguments.rates[0], 1.0, 1, 0)  # to warm up
        for number in range(arguments.rounds):
            for rate in arguments.rates:
                one = offer(server, rate, arguments.seconds, 1, number)
                found.setdefault(f"{rate:g}", []).append(one)
                print(
                    f"{number + 1}/{arguments.rounds} {rate:g}/s: "
                    f"late p99 {one['lateness_ms']['p99']:.3f} ms, core {one['cpu_share']:.0%}"
                )
        long = offer(server, arguments.long_rate, arguments.long_seconds, 1, 0)
    good = [float(rate) for rate, rounds in found.items() if on_time(rounds)]
    # What others take of the cores only adds to the lateness.
    once = [float(rate) for rate, rounds in found.items() if any(on_time([one]) for one in rounds)]
    return {
        "late_at_most_ms": LATE_AT_MOST_MS,
        "seconds": arguments.seconds,
        "rounds": arguments.rounds,
        "offered_on_time": max(good, default=0.0),
        "offered_on_time_in_one_round": max(once, default=0.0),
        "by_rate": {rate: _median(rounds) for rate, rounds in found.items()},
        "long_run": long,
    }


def _median(rounds: Sequence[Figures]) -> Figures:
    """Figure by figure."""
    names = ("rate_due", "rate_answered", "cpu_share", "cpu_us_per_request", "server_cpu_share")
    figures: Figures = {name: statistics.median(one[name] for one in rounds) for name in names}
    figures["machine_busy_by_round"] = [one["machine_busy"] for one in rounds]
    for name in ("lateness_ms", "latency_ms"):
        quantiles = rounds[0][name]
        figures[name] = {q: statistics.median(one[name][q] for one in rounds) for q in quantiles}
    return figures | {"p99_late_ms_by_round": [one["lateness_ms"]["p99"] for one in rounds]}


def machine() -> Figures:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        **{name: version(name) for name in ("offramp", "uvloop", "hdrhistogram")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1000, 2000, 4000, 6000, 8000, 10_000, 12_000, 15_000, 20_000],
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--long-rate", type=float, default=4000.0)
    parser.add_argument("--long-seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    report = {"machine": machine(), **measure(arguments)}
    print(
        f"on time up to {report['offered_on_time']:g} requests a second, in the best round up to "
        f"{report['offered_on_time_in_one_round']:g}"
    )
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
