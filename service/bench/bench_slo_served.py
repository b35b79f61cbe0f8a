"""The latency target under real load: `offramp-serve` with the SLO controller and without.

`bench_slo.py` simulates it; here requests come over HTTP, from an open loop, on this machine. First
the server is saturated at full depth, to know what it can carry; then the load steps from 0.6 of
that to a peak and back, the same arrivals for a server without a target and for one with it, in
turn. Every text asks for speed-up 1. Once a second the metrics are asked for the floor and for the
calibrated accuracy at it.

The load generator shares the cores with the server, so what the server can carry is what it can
carry beside it.
"""

import argparse
import json
import statistics
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import matplotlib as mpl
from bench_serve import machine

from offramp_loadtest.arrivals import schedule
from offramp_loadtest.generator import Load, Outcome, keep_in_flight, send_when_due
from offramp_loadtest.server_process import ServerProcess, serving
from offramp_loadtest.texts import classify_requests
from offramp_training.data import load_split

TEXTS_IN_FLIGHT = 256
TRANSITION_S = 5
"""After the step up: the target holds after it."""
LEAST_OF_A_SECOND = 20
"""Fewer answers have no p95."""

Figures = dict[str, Any]


class Watch:
    """Asks a server once a second for its floor and what accuracy is expected at it."""

    def __init__(self, server: ServerProcess) -> None:
        self.floor: list[float] = []
        self.accuracy: list[float] = []
        self._server, self._stop = server, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(1.0):
            self.floor.append(self._server.metric("offramp_speedup_floor"))
            self.accuracy.append(self._server.metric("offramp_expected_accuracy"))


def capacity(server: ServerProcess, requests: list[bytes], batch: int, seconds: float) -> float:
    """Requests a second when as many are in flight as fill the engine."""
    result = keep_in_flight(Load(server.address, requests, TEXTS_IN_FLIGHT // batch), seconds)
    if failed := [one.status for one in result.outcomes if one.status != 200]:
        raise SystemExit(f"{len(failed)} requests were answered with {sorted(set(failed))}")
    return len(result.outcomes) / seconds


def arrivals(carried: float, steps: list[tuple[float, float]], seed: int) -> list[float]:
    """When requests are due: Poisson, at shares of what can be carried, for so long each."""
    due: list[float] = []
    begins = 0.0
    for share, seconds in steps:
        due += [begins + at for at in schedule("poisson", share * carried, seconds, seed)]
        begins += seconds
    return due


def course(
    server: ServerProcess, requests: list[bytes], due: list[float], steps: list[tuple[float, float]]
) -> Figures:
    """What came of the load, second by second and by its parts."""
    with Watch(server) as watch:
        result = send_when_due(Load(server.address, requests, max_connections=1024), due)
    first = min(one.due for one in result.outcomes)
    parts = {"before": (0.0, steps[0][1])}
    peak_ends = steps[0][1] + steps[1][1]
    parts["first seconds"] = (steps[0][1], steps[0][1] + TRANSITION_S)
    parts["steady"] = (steps[0][1] + TRANSITION_S, peak_ends)
    parts["after"] = (peak_ends, peak_ends + steps[2][1])
    by_second: dict[int, list[Outcome]] = {}
    for one in result.outcomes:
        by_second.setdefault(int(one.due - first), []).append(one)
    seconds = [by_second.get(second, []) for second in range(int(max(due)) + 1)]
    peak = slice(int(steps[0][1]), int(peak_ends))
    return {
        "requests": len(result.outcomes),
        "codes": dict(Counter(str(one.status) for one in result.outcomes)),
        "p95_ms": {
            name: p95_ms([o for o in result.outcomes if begin <= o.due - first < end])
            for name, (begin, end) in parts.items()
        },
        "lateness_p99_ms": 1000
        * statistics.quantiles([one.lateness_s for one in result.outcomes], n=100)[98],
        "floor_most": max(watch.floor),
        "expected_accuracy_least": min(watch.accuracy),
        "expected_accuracy_at_the_peak": statistics.mean(watch.accuracy[peak]),
        "let_go_after_s": let_go_after(watch.floor, peak_ends),
        "by_second": {
            "due": [len(one) for one in seconds],
            "refused": [sum(o.status == 429 for o in one) for one in seconds],
            "p95_ms": [p95_ms(one) for one in seconds],
            "floor": watch.floor,
            "expected_accuracy": watch.accuracy,
        },
    }


def p95_ms(outcomes: list[Outcome]) -> float | None:
    """Of those that were answered; None: too few were."""
    answered = [one.latency_s for one in outcomes if one.status == 200]
    if len(answered) < LEAST_OF_A_SECOND:
        return None
    return 1000 * statistics.quantiles(answered, n=20)[18]


def let_go_after(floor: list[float], peak_ends: float) -> float | None:
    """Seconds from the end of the peak until nobody is raised any more; None: not in this time."""
    raised = [second for second, one in enumerate(floor, start=1) if one > 1.0]
    if not raised:
        return 0.0
    if raised[-1] == len(floor):
        return None
    return max(0.0, raised[-1] + 1 - peak_ends)


def run(arguments: argparse.Namespace) -> Figures:
    texts = list(load_split(str(arguments.data), "validation").inputs)
    command = [
        *(sys.executable, "-m", "offramp_service", "--model-id", str(arguments.checkpoint)),
        *("--port", "0", "--warmup"),
    ]
    target = [
        *("--slo-p95-ms", str(arguments.slo_p95_ms)),
        *("--min-accuracy", str(arguments.min_accuracy)),
    ]
    steps = [
        (0.6, arguments.before_s),
        (arguments.peak, arguments.peak_s),
        (0.6, arguments.after_s),
    ]
    with serving(command) as off, serving([*command, *target]) as on:
        servers = {"off": off, "on": on}
        asked = {
            name: classify_requests(one.address, texts, batch=arguments.batch, speedup=1.0)
            for name, one in servers.items()
        }
        capacity(off, asked["off"], arguments.batch, 2.0)
        carried = capacity(off, asked["off"], arguments.batch, 8.0)
        courses: dict[str, list[Figures]] = {"off": [], "on": []}
        for seed in range(arguments.rounds):
            due = arrivals(carried, steps, seed)
            for name, server in servers.items():
                courses[name].append(course(server, asked[name], due, steps))
                one = courses[name][-1]
                print(f"round {seed + 1}, controller {name}: {one['codes']} {one['p95_ms']}")
                time.sleep(2.0)
    return {
        "command": " ".join(["python", "service/bench/bench_slo_served.py", *_command()]),
        "machine": machine(),
        "texts_in_a_request": arguments.batch,
        "carried_requests_per_s": carried,
        "peak": arguments.peak,
        "slo_p95_ms": arguments.slo_p95_ms,
        "min_accuracy": arguments.min_accuracy,
        "steps": steps,
        "courses": courses,
    }


def _command() -> list[str]:
    """Without the places where things are on this machine."""
    return [Path(one).name if one.startswith("/") else one for one in sys.argv[1:]]


def draw(report: Figures, path: Path) -> None:
    """The first round."""
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (load, tail, floor) = plt.subplots(3, 1, figsize=(9, 7), sharex=True)
    colours = {"off": "#D55E00", "on": "#0072B2"}
    for name, colour in colours.items():
        one = report["courses"][name][0]["by_second"]
        look = {"color": colour, "linewidth": 1.3, "label": f"controller {name}"}
        tail.plot([float("nan") if v is None else v for v in one["p95_ms"]], **look)
        floor.step(range(len(one["floor"])), one["floor"], where="post", **look)
        load.bar(range(len(one["refused"])), one["refused"], color=colour, alpha=0.4, width=1)
    load.step(range(len(one["due"])), one["due"], where="post", color="#5f6368")
    load.set(ylabel="requests a second\n(bars: 429)", ylim=(0, None))
    tail.axhline(report["slo_p95_ms"], color="black", linewidth=0.8, linestyle="--")
    tail.set(ylabel="p95, ms", yscale="log")
    tail.legend(fontsize=8, frameon=False)
    floor.set(ylabel="speed-up floor", xlabel="seconds")
    for axis in (load, tail, floor):
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", type=Path, help="with a calibration for its own backend")
    parser.add_argument("--data", type=Path, required=True, help="SST-2")
    parser.add_argument("--batch", type=int, default=8, help="texts in a request")
    parser.add_argument("--peak", type=float, default=1.6, help="of what full depth can carry")
    parser.add_argument("--slo-p95-ms", type=float, default=150.0)
    parser.add_argument("--min-accuracy", type=float, default=0.87)
    parser.add_argument("--before-s", type=float, default=10.0)
    parser.add_argument("--peak-s", type=float, default=40.0)
    parser.add_argument("--after-s", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    report = run(arguments)
    arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    draw(report, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
