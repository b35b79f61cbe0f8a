"""What the service does on this machine, against what its parts can do alone.

One run measures, in turn and in several rounds, so that a noisy machine hits all alike:

    engine alone      tokenised texts through the scheduler and the engine, no HTTP
    null engine       the same server with an engine that answers at once: the HTTP ceiling
    service           `offramp-serve` itself, saturated by single texts and by lists of texts

and then, at 60 % of the saturated load, latencies of arrivals that do not wait for the server
(Poisson and bursty), against those of a server with nothing else to do. Ratios are taken within a
round; the median over the rounds counts.

Everything shares the machine, the load generator included: what it costs is reported beside each
figure, and so is what other processes took of the cores meanwhile.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib as mpl
import uvloop
from fastapi import FastAPI
from null_engine import NullEngine
from starlette.types import Message

from offramp_loadtest.arrivals import schedule
from offramp_loadtest.generator import Load, Outcome, Result, keep_in_flight, send_when_due
from offramp_loadtest.report import milliseconds
from offramp_loadtest.server_process import ServerProcess, machine_cpu_s, serving
from offramp_loadtest.texts import classify_requests
from offramp_service.app import create_app
from offramp_service.controls import Asked
from offramp_service.engine import Engine
from offramp_service.jobs import Job
from offramp_service.pipeline import RoomPipeline
from offramp_service.scheduler import Scheduler
from offramp_service.served_model import ServedModel, load_model
from offramp_service.settings import Settings
from offramp_training.data import load_split

LIST = 32
"""Texts in a client batch."""
TEXTS_IN_FLIGHT = 256
"""When saturated: enough for full batches, and half of what the server admits."""
LOAD_SHARE = 0.6
UNLOADED_RATE = 10.0
"""Requests a second that hardly ever meet each other."""
DIRECT_CALLS = 1500

SATURATED_AT_LEAST, LISTS_AT_LEAST = 0.75, 0.9
TAIL_AT_MOST, OUTSIDE_MS_AT_MOST = 3.0, 0.4

Figures = dict[str, Any]


@dataclass(frozen=True)
class Subject:
    """What is measured: the texts, two servers, the engine in this process."""

    texts: list[str]
    service: ServerProcess
    null: ServerProcess
    app: FastAPI  # with the null engine, in this process
    engine: Engine
    workers: ThreadPoolExecutor  # its threads
    speedups: tuple[float, ...]

    @property
    def pipeline(self) -> RoomPipeline:
        pipeline: RoomPipeline = self.app.state.models.default
        return pipeline


class Watch:
    """Processor time over a measurement: of a server, and of whoever else is on the machine."""

    def __init__(self, servers: Sequence[ServerProcess]) -> None:
        self._servers = servers
        self._ours = self._our_cpu_s()
        self._all = machine_cpu_s()

    def others_cpu_s(self) -> float:
        """Of processes that have nothing to do with this benchmark."""
        return max(0.0, machine_cpu_s() - self._all - (self._our_cpu_s() - self._ours))

    def _our_cpu_s(self) -> float:
        return time.process_time() + sum(one.cpu_s() for one in self._servers)


# -- the engine alone ----------------------------------------------------------------------------


class _Waiting:
    """A client that never leaves."""

    abandoned = False


def make_jobs(subject: Subject, speedup: float) -> list[Job]:
    controls = subject.pipeline.controls.resolve(Asked(speedup=speedup), {})
    encodings = subject.pipeline.model.tokenizer.encode(subject.texts)
    jobs = [Job(one.ids, one.type_ids, controls) for one in encodings]
    for index, job in enumerate(jobs):
        job.waiter, job.index, job.queued_at, job.deadline = _Waiting(), index, 0.0, None
    return jobs


def run_through(subject: Subject, jobs: Sequence[Job]) -> None:
    """All texts queued at once: the scheduler's batches, the batcher's steps, nobody to answer."""
    scheduler, lock = Scheduler(subject.pipeline.batcher.scheduler.plan), threading.Lock()
    scheduler.add(jobs, 0.0)

    def work(worker: int) -> None:
        while True:
            with lock:
                step = scheduler.next_step(0.0, worker)
            if step is None:
                return
            group = step.group
            if step.opened is not None:
                group.course = subject.engine(group.jobs)
            if (left := next(group.course, None)) is None:
                with lock:
                    scheduler.close(group)
            else:
                group.passed(left)

    for _ in subject.workers.map(work, range(scheduler.plan.workers)):
        pass


def engine_alone(subject: Subject, speedup: float, seconds: float) -> Figures:
    jobs = make_jobs(subject, speedup)
    started, rows = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        run_through(subject, jobs)
        rows += len(jobs)
    return {"rows_per_s": rows / (time.perf_counter() - started)}


# -- servers under load --------------------------------------------------------------------------


def saturated(
    server: ServerProcess, subject: Subject, speedup: float, batch: int, seconds: float
) -> Figures:
    """As many texts in flight at all times as fill the engine's batches."""
    requests = classify_requests(server.address, subject.texts, batch=batch, speedup=speedup)
    began, began_cpu_s = time.perf_counter(), server.cpu_s()
    result = keep_in_flight(
        Load(server.address, requests, TEXTS_IN_FLIGHT // max(1, batch)), seconds
    )
    took_s = time.perf_counter() - began
    check_all_answered(result)
    count = len(result.outcomes)
    return {
        "rows_per_s": count * max(1, batch) / took_s,
        "requests_per_s": count / took_s,
        "server_cpu_ms_per_request": (server.cpu_s() - began_cpu_s) / count * 1000,
        "generator_cpu_ms_per_request": result.cpu_s / count * 1000,
    }


def check_all_answered(result: Result) -> None:
    """A figure counts only where every request was answered."""
    if failed := [one.status for one in result.outcomes if one.status != 200]:
        raise SystemExit(f"{len(failed)} requests were answered with {sorted(set(failed))}")


def arrivals(
    subject: Subject, speedup: float, pattern: str, rate: float, seconds: float, seed: int
) -> Result:
    address = subject.service.address
    requests = classify_requests(address, subject.texts, speedup=speedup)
    due = schedule(pattern, rate, seconds, seed)
    result = send_when_due(Load(address, requests, max_connections=512), due)
    check_all_answered(result)
    return result


# -- the time around the engine ------------------------------------------------------------------


def outside_engine(subject: Subject) -> Figures:
    """Wall time of the application around the null engine, called directly, one request after the
    other: routing, body, controls, tokeniser, queue, the way to the engine's thread and back,
    answer, metrics. What uvicorn and the sockets cost is not in it."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_call_directly(subject))


async def _call_directly(subject: Subject) -> Figures:
    app, registry = subject.app, subject.pipeline.metrics.registry
    model = subject.pipeline.model
    labels = {"model_name": model.name, "model_version": model.version}

    def total(name: str) -> float:
        return registry.get_sample_value(f"offramp_{name}_duration_seconds_sum", labels) or 0.0

    bodies = [json.dumps({"input": text, "speedup": 1.0}).encode() for text in subject.texts]
    walls: list[float] = []
    async with app.router.lifespan_context(app):
        for index in range(DIRECT_CALLS // 5):  # to warm up
            await _call(app, bodies[index % len(bodies)])
        began_s = {name: total(name) for name in ("queue", "inference", "tokenization")}
        began_cpu_s = time.process_time()
        for index in range(DIRECT_CALLS):
            started = time.perf_counter()
            await _call(app, bodies[index % len(bodies)])
            walls.append(time.perf_counter() - started)
        cpu_s = time.process_time() - began_cpu_s
        per_call = {
            f"{name}_ms": (total(name) - began) / DIRECT_CALLS * 1000
            for name, began in began_s.items()
        }
    return {
        "calls": DIRECT_CALLS,
        "wall_ms": milliseconds(walls),
        "cpu_ms": cpu_s / DIRECT_CALLS * 1000,
        **per_call,
    }


async def _call(app: FastAPI, body: bytes) -> None:
    """One request as an ASGI server hands it over."""
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "path": "/classify",
        "raw_path": b"/classify",
        "root_path": "",
        "scheme": "http",
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"127.0.0.1")],
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 1),
    }
    messages: list[Message] = [{"type": "http.request", "body": body}]
    statuses: list[int] = []

    async def receive() -> Message:
        if messages:
            return messages.pop()
        return await asyncio.get_running_loop().create_future()  # this client never leaves

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    await app(scope, receive, send)
    if statuses != [200]:
        raise SystemExit(f"the application answered {statuses}")


# -- a run ---------------------------------------------------------------------------------------


def throughput_ways(subject: Subject, seconds: float) -> dict[str, Callable[[], Figures]]:
    """What takes turns in a round, by name."""
    first = subject.speedups[0]
    ways: dict[str, Callable[[], Figures]] = {
        "null engine, single texts": lambda: saturated(subject.null, subject, first, 0, seconds),
        f"null engine, lists of {LIST}": lambda: saturated(
            subject.null, subject, first, LIST, seconds
        ),
    }
    for speedup in subject.speedups:
        ways |= {
            f"engine alone at {speedup:g}": lambda s=speedup: engine_alone(subject, s, seconds),
            f"service at {speedup:g}, single texts": lambda s=speedup: saturated(
                subject.service, subject, s, 0, seconds
            ),
            f"service at {speedup:g}, lists of {LIST}": lambda s=speedup: saturated(
                subject.service, subject, s, LIST, seconds
            ),
        }
    return ways


def measure_throughput(subject: Subject, rounds: int, seconds: float) -> dict[str, list[Figures]]:
    """Figures by way, one for each round, after a short round to warm up."""
    for way in throughput_ways(subject, 0.5).values():
        way()
    ways = throughput_ways(subject, seconds)
    found: dict[str, list[Figures]] = {name: [] for name in ways}
    for round_index in range(rounds):
        for name, way in ways.items():
            watch = Watch((subject.service, subject.null))
            figures = way()
            found[name].append(figures | {"others_cpu_s": watch.others_cpu_s()})
            print(f"{round_index + 1}/{rounds} {name}: {figures['rows_per_s']:.0f} rows/s")
    return found


def measure_latency(
    subject: Subject, rates: dict[float, float], rounds: int, seconds: float
) -> dict[float, dict[str, Figures]]:
    """By speed-up and pattern: latencies of all rounds together, at these rates of arrival."""
    patterns = ("unloaded", "poisson", "bursty")
    outcomes: dict[tuple[float, str], list[Outcome]] = {
        (speedup, pattern): [] for speedup in subject.speedups for pattern in patterns
    }
    others: dict[tuple[float, str], float] = dict.fromkeys(outcomes, 0.0)
    for seed in range(rounds):
        for speedup, pattern in outcomes:
            how, rate = (
                ("constant", UNLOADED_RATE) if pattern == "unloaded" else (pattern, rates[speedup])
            )
            watch = Watch((subject.service, subject.null))
            result = arrivals(subject, speedup, how, rate, seconds, seed)
            outcomes[speedup, pattern] += result.outcomes
            others[speedup, pattern] += watch.others_cpu_s()
    return {
        speedup: {
            pattern: {
                "rate_due": len(outcomes[speedup, pattern]) / (rounds * seconds),
                "requests": len(outcomes[speedup, pattern]),
                "latency_ms": milliseconds([o.latency_s for o in outcomes[speedup, pattern]]),
                "lateness_ms": milliseconds([o.lateness_s for o in outcomes[speedup, pattern]]),
                "others_cpu_s": others[speedup, pattern],
            }
            for pattern in patterns
        }
        for speedup in subject.speedups
    }


def median_of(found: list[Figures], name: str = "rows_per_s") -> float:
    return statistics.median(one[name] for one in found)


def ratio(found: dict[str, list[Figures]], over: str, under: Sequence[str]) -> float:
    """Median over the rounds of a way's rows a second against the least of others'."""
    rounds = range(len(found[over]))
    return statistics.median(
        found[over][at]["rows_per_s"] / min(found[name][at]["rows_per_s"] for name in under)
        for at in rounds
    )


def targets(
    subject: Subject,
    found: dict[str, list[Figures]],
    latency: dict[float, dict[str, Figures]],
    outside: Figures,
) -> list[Figures]:
    """What was asked of the service, and what was found."""
    rows = []

    def add(what: str, asked: str, value: float, met: bool) -> None:
        rows.append({"what": what, "asked": asked, "found": value, "met": met})

    for speedup in subject.speedups:
        single, alone = f"service at {speedup:g}, single texts", f"engine alone at {speedup:g}"
        value = ratio(found, single, (alone, "null engine, single texts"))
        what = f"single texts at {speedup:g}, against the lesser of engine alone and HTTP ceiling"
        add(what, f"at least {SATURATED_AT_LEAST}", value, value >= SATURATED_AT_LEAST)
        value = ratio(found, f"service at {speedup:g}, lists of {LIST}", (alone,))
        what = f"lists of {LIST} at {speedup:g}, against engine alone"
        add(what, f"at least {LISTS_AT_LEAST}", value, value >= LISTS_AT_LEAST)
        unloaded = latency[speedup]["unloaded"]["latency_ms"]["p50"]
        for pattern in ("poisson", "bursty"):
            value = latency[speedup][pattern]["latency_ms"]["p99"] / unloaded
            what = f"p99 at {LOAD_SHARE:.0%} load at {speedup:g}, {pattern}, against unloaded p50"
            met = value <= TAIL_AT_MOST
            add(what, f"at most {TAIL_AT_MOST}" if pattern == "poisson" else "reported", value, met)
    value = outside["wall_ms"]["p50"]
    what = "ms of the application around the engine, single text"
    add(what, f"at most {OUTSIDE_MS_AT_MOST}", value, value <= OUTSIDE_MS_AT_MOST)
    value = median_of(found["null engine, single texts"], "server_cpu_ms_per_request")
    what = "ms of CPU of the whole server process, null engine, saturated by single texts"
    add(what, f"at most {OUTSIDE_MS_AT_MOST}", value, value <= OUTSIDE_MS_AT_MOST)
    return rows


def measure(subject: Subject, arguments: argparse.Namespace) -> Figures:
    outside = outside_engine(subject)
    found = measure_throughput(subject, arguments.rounds, arguments.seconds)
    rates = {
        speedup: LOAD_SHARE * median_of(found[f"service at {speedup:g}, single texts"])
        for speedup in subject.speedups
    }
    latency = measure_latency(subject, rates, arguments.latency_rounds, arguments.latency_seconds)
    return {
        "texts": len(subject.texts),
        "texts_in_flight": TEXTS_IN_FLIGHT,
        "rounds": arguments.rounds,
        "seconds": arguments.seconds,
        "targets": targets(subject, found, latency, outside),
        "throughput": {name: _medians(figures) for name, figures in found.items()},
        "latency": {f"{speedup:g}": figures for speedup, figures in latency.items()},
        "outside_engine": outside,
        "by_round": found,
    }


def _medians(figures: list[Figures]) -> Figures:
    return {name: median_of(figures, name) for name in figures[0]}


def run(arguments: argparse.Namespace) -> Figures:
    settings = Settings(model_id=arguments.checkpoint)
    model = load_model(settings)
    flags = ["--model-id", str(arguments.checkpoint), "--port", "0", "--log-level", "warning"]
    here = Path(__file__).parent
    engine = Engine(model.stack, model.policy, torch_threads=model.torch_threads)

    def warm_up() -> None:
        engine.warm_up(model.max_input_length)

    with (
        serving([sys.executable, "-m", "offramp_service", *flags]) as service,
        serving([sys.executable, str(here / "null_engine.py"), *flags]) as null,
        ThreadPoolExecutor(model.engine_workers, initializer=warm_up) as workers,
    ):
        subject = Subject(
            texts=[row.text for row in load_split(arguments.data, arguments.split).rows],
            service=service,
            null=null,
            app=create_app(settings, model, computes=_null_engine(model)),
            engine=engine,
            workers=workers,
            speedups=(1.0, arguments.speedup),
        )
        load_before = os.getloadavg()
        figures = measure(subject, arguments)
    return {
        "command": _command(),
        "machine": machine() | {"load_average": [load_before, os.getloadavg()]},
        "backend": f"{model.backend} {model.dtype}",
        "engine_threads": settings.engine_threads,
        "engine_workers": model.engine_workers,
        **figures,
    }


def _null_engine(model: ServedModel) -> NullEngine:
    return NullEngine(model.num_layers, len(model.config.labels))


def _command() -> str:
    """As it was typed, without this machine's paths."""
    return " ".join("PATH" if Path(one).is_absolute() else one for one in ["python", *sys.argv])


def machine() -> Figures:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("offramp", "torch", "onnxruntime", "fastapi", "uvicorn", "uvloop", "httptools")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


# -- what people read ----------------------------------------------------------------------------


def draw(report: Figures, path: Path) -> None:
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    figure, (rates, tails) = plt.subplots(1, 2, figsize=(11, 4))
    _draw_rates(rates, report["throughput"])
    _draw_tails(tails, report["latency"])
    for axis in (rates, tails):
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def _draw_rates(axis: Any, throughput: dict[str, Figures]) -> None:
    colours = {"null": "#5f6368", "engine": "#0072B2", "service": "#009E73"}
    # Texts of lists that cost no model are ten times the rest.
    names = [name for name in reversed(throughput) if name != f"null engine, lists of {LIST}"]
    values = [throughput[name]["rows_per_s"] for name in names]
    bars = axis.barh(names, values, color=[colours[name.split()[0]] for name in names])
    axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=8)
    axis.set(xlabel="texts a second")
    axis.tick_params(axis="y", labelsize=8)


def _draw_tails(axis: Any, latency: dict[str, dict[str, Figures]]) -> None:
    styles = {"unloaded": ":", "poisson": "-", "bursty": "--"}
    for colour, (speedup, patterns) in zip(("#0072B2", "#D55E00"), latency.items(), strict=True):
        for pattern, figures in patterns.items():
            quantiles = figures["latency_ms"]
            shares = [0.5, 0.1, 0.05, 0.01, 0.001]
            values = [quantiles[name] for name in ("p50", "p90", "p95", "p99", "p99.9")]
            label = f"speed-up {speedup}, {pattern}"
            axis.plot(values, shares, styles[pattern], color=colour, marker=".", label=label)
    axis.set(
        xlabel="ms from when a request was due",
        ylabel="share of requests that took longer",
        xscale="log",
        yscale="log",
    )
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7, frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncol=2)


def table(report: Figures) -> str:
    """Markdown: asked and found."""
    lines = ["| | asked | found |", "|---|---|---|"]
    for one in report["targets"]:
        found = f"{one['found']:.2f}"
        missed = one["asked"] != "reported" and not one["met"]
        lines.append(
            f"| {one['what']} | {one['asked']} | {f'**{found}, missed**' if missed else found} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--speedup", type=float, default=2.0, help="besides full depth")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each way in a round")
    parser.add_argument("--latency-rounds", type=int, default=2)
    parser.add_argument("--latency-seconds", type=float, default=10.0)
    parser.add_argument("--json", type=Path, help="a .png goes beside it")
    arguments = parser.parse_args()
    report = run(arguments)
    print(table(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        draw(report, arguments.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
