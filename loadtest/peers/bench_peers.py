"""offramp against the servers that others run, with the same weights, cores and load.

    install     a virtual environment for each peer
    weights     a plain transformers directory and a whole-model int8 graph of the checkpoint
    tune        each server in each setting of its grid, shortly; the best is kept
    check       what each says of all texts, against the labels and the float32 model
    saturate    rounds of 64 clients with one text each, everybody in turn
    arrive      rounds of texts that come when they are due, at 80 % of what the best peer can do
    report      medians, tables, JSON

One command does all of it. What is done is kept in a file of the cache; with `--minutes` it stops
before what would take longer and goes on when it is called again.
"""

import argparse
import hashlib
import json
import logging
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import comparison
from compared import ENVIRONMENTS, HERE, SERVERS, SUBJECTS, Places, Server, Setting, Subject
from measuring import CONNECTIONS, Figures, labels, saturated, under_arrivals
from running import RunningServer, free_port

from offramp_training.data import load_split

WARM_S = 1.0
TUNE_WARM_S, TUNE_S, TUNE_PASSES = 0.4, 1.5, 2

log = logging.getLogger("peers")


class OutOfTime(Exception):
    """What is left is for another call."""


@dataclass
class Progress:
    """What is done, in a file that is written after each step."""

    path: Path
    ends: float  # on the monotonic clock
    done: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        self.done = {"tuned": {}, "checked": {}, "saturated": [], "rates": {}, "arrivals": {}}
        if self.path.exists():
            self.done |= json.loads(self.path.read_text())

    def save(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.done, indent=1) + "\n")
        part.replace(self.path)

    def need(self, seconds: float) -> None:
        """Raises OutOfTime where less is left."""
        if time.monotonic() + seconds > self.ends:
            raise OutOfTime


@dataclass(frozen=True)
class Bench:
    """What all steps share."""

    places: Places
    texts: list[str]
    truth: list[str]
    cores: list[int]
    progress: Progress

    @contextmanager
    def running(self, wanted: Sequence[tuple[Server, Setting]]) -> Iterator[list[RunningServer]]:
        """Servers in these settings, started together, all answering, for the length of the
        block. Those whose turn it is not have nothing to do."""
        with ExitStack() as stack:
            found = [self._start(stack, *one) for one in wanted]
            for (server, _), one in zip(wanted, found, strict=True):
                one.wait_until_it_answers(server.adapter.request(one.address, self.texts[0]))
            yield found

    def _start(self, stack: ExitStack, server: Server, setting: Setting) -> RunningServer:
        port = free_port()
        name = server.name.replace(" ", "-").replace(",", "")
        found = RunningServer(
            server.command(setting, self.places, port),
            port=port,
            cores=self.cores,
            environment=server.variables(setting, self.places),
            log=self.places.cache / "logs" / f"{name}-{port}.log",
        )
        stack.callback(found.end)
        return found

    def requests(self, running: RunningServer, subject: Subject | Server) -> list[bytes]:
        return [subject.adapter.request(running.address, text) for text in self.texts]


# -- steps ---------------------------------------------------------------------------------------


def install(bench: Bench) -> None:
    for name in ENVIRONMENTS:
        command = ["sh", str(HERE / "install.sh"), name, str(bench.places.cache)]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": ""})


def write_weights(bench: Bench, data: str, split: str) -> None:
    output = bench.places.cache / "weights"
    if (output / "checked.json").exists():
        return
    log.info("weights")
    flags = ["--data", data, "--split", split, "--output", str(output)]
    script = [sys.executable, str(HERE / "weights.py"), str(bench.places.checkpoint)]
    subprocess.run([*script, *flags], check=True)


def tune(bench: Bench, server: Server) -> None:
    """All settings of the server's grid, in turn; what was found is kept beside the choice."""
    if server.name in bench.progress.done["tuned"]:
        return
    bench.progress.need(len(server.grid) * (TUNE_PASSES * (TUNE_WARM_S + TUNE_S) + 3) + 5)
    tried: list[Figures] = [
        {"setting": setting, "rows_per_s": [], "others_cpu_s": []} for setting in server.grid
    ]
    with bench.running([(server, setting) for setting in server.grid]) as running:
        for _ in range(TUNE_PASSES):
            for one, its_server in zip(tried, running, strict=True):
                requests = bench.requests(its_server, server)
                saturated(its_server, requests, TUNE_WARM_S)
                found = saturated(its_server, requests, TUNE_S)
                one["rows_per_s"].append(found["rows_per_s"])
                one["others_cpu_s"].append(found["others_cpu_s"])
    for one in tried:
        figures = " and ".join(f"{rate:.0f}" for rate in one["rows_per_s"])
        log.info("%s %s: %s rows/s", server.name, json.dumps(one["setting"]), figures)
    bench.progress.done["tuned"][server.name] = tried
    bench.progress.save()


def chosen(tried: list[Figures]) -> Setting:
    """By its better pass: what disturbs a server only makes it slower."""
    setting: Setting = max(tried, key=lambda one: max(one["rows_per_s"]))["setting"]
    return setting


@contextmanager
def all_running(bench: Bench) -> Iterator[dict[str, RunningServer]]:
    """Each server in its chosen setting."""
    wanted = [(server, chosen(bench.progress.done["tuned"][server.name])) for server in SERVERS]
    with bench.running(wanted) as running:
        log.info("all servers are up")
        yield dict(zip((server.name for server in SERVERS), running, strict=True))


def check(bench: Bench, running: dict[str, RunningServer]) -> None:
    """What each says of each text."""
    done = bench.progress.done["checked"]
    for subject in SUBJECTS:
        if subject.name in done:
            continue
        said = labels(running[subject.server], subject.adapter, bench.texts)
        right = sum(one == other for one, other in zip(said, bench.truth, strict=True))
        done[subject.name] = {"accuracy": right / len(said), "labels": said}
        log.info("%s: accuracy %.4f", subject.name, right / len(said))
        bench.progress.save()


def saturate(bench: Bench, running: dict[str, RunningServer], rounds: int, seconds: float) -> None:
    done = bench.progress.done["saturated"]
    while len(done) < rounds:
        bench.progress.need(len(SUBJECTS) * (seconds + WARM_S + 0.5))
        found: dict[str, Figures] = {}
        for subject in turned(SUBJECTS, len(done)):
            server = running[subject.server]
            requests = bench.requests(server, subject)
            saturated(server, requests, WARM_S)
            found[subject.name] = saturated(server, requests, seconds)
            found[subject.name]["resident_mib"] = server.resident_mib()
            log.info("%d: %s %.0f", len(done), subject.name, found[subject.name]["rows_per_s"])
        done.append(found)
        bench.progress.save()


def arrive(bench: Bench, running: dict[str, RunningServer], rounds: int, seconds: float) -> None:
    before, done = bench.progress.done["saturated"], bench.progress.done["arrivals"]
    kinds = {subject.name: subject.kind for subject in SUBJECTS}
    # Drawn once: a later call goes on at the same rates.
    at = bench.progress.done["rates"] = bench.progress.done["rates"] or comparison.rates(
        before, kinds
    )
    for round_index in range(rounds):
        for peer, rate in at.items():
            some: list[dict[str, Figures]] = done.setdefault(peer, [])
            if len(some) > round_index:
                continue
            names = comparison.able(before, rate)
            bench.progress.need(len(names) * (seconds + WARM_S + 1.5))
            found: dict[str, Figures] = {}
            for subject in turned([one for one in SUBJECTS if one.name in names], round_index):
                server = running[subject.server]
                requests = bench.requests(server, subject)
                saturated(server, requests, WARM_S)
                found[subject.name] = under_arrivals(server, requests, rate, seconds, round_index)
                p99 = found[subject.name]["latency_ms"].get("p99", float("nan"))
                log.info("%d at %.0f: %s p99 %.1f ms", round_index, rate, subject.name, p99)
            some.append(found)
            bench.progress.save()


def turned(subjects: tuple[Subject, ...] | list[Subject], by: int) -> list[Subject]:
    """Another one begins in each round."""
    start = by % len(subjects)
    return [*subjects[start:], *subjects[:start]]


# -- the report ----------------------------------------------------------------------------------


def report(bench: Bench, arguments: argparse.Namespace) -> Figures:
    done = bench.progress.done
    checked = done["checked"]
    # The float32 model itself, as transformers runs it, one text at a time.
    reference = checked[SUBJECTS[0].name]["labels"]
    figures: Figures = {
        "command": _command(),
        "machine": _machine(bench.cores),
        "peers": {name: _installed(bench, name) for name in ENVIRONMENTS},
        "texts": len(bench.texts),
        "connections": CONNECTIONS,
        "seconds": {"saturated": arguments.seconds, "arrivals": arguments.arrival_seconds},
        "kinds": {subject.name: subject.kind for subject in SUBJECTS},
        "accuracy": {name: one["accuracy"] for name, one in checked.items()},
        "agreement": {
            name: sum(a == b for a, b in zip(one["labels"], reference, strict=True))
            / len(reference)
            for name, one in checked.items()
        },
        "settings": {server.name: chosen(done["tuned"][server.name]) for server in SERVERS},
        "tuned": done["tuned"],
        "rates": done["rates"],
        "saturated": done["saturated"],
        "arrivals": done["arrivals"],
    }
    return figures | {"targets": comparison.targets(figures)}


_ASK_VERSIONS = """
import importlib.metadata as metadata, json, sys
def of(name):
    about = metadata.metadata(name)
    licence = about.get("License-Expression") or about.get("License") or ""
    first = (licence.splitlines() or [""])[0]
    return {"version": metadata.version(name), "licence": first}
print(json.dumps({name: of(name) for name in sys.argv[1:]}))
"""
_TOLD = ("torch", "transformers", "tokenizers", "numpy")
_MORE = {"naive": ("fastapi", "uvicorn"), "infinity": ("infinity-emb", "sentence-transformers"),
         "pytriton": ("nvidia-pytriton",), "mosec": ("mosec", "onnxruntime")}  # fmt: skip


def _installed(bench: Bench, environment: str) -> Figures:
    """Versions and licences, as the packages name them."""
    names = [*_MORE[environment], *_TOLD]
    command = [str(bench.places.python(environment)), "-c", _ASK_VERSIONS, *names]
    found: Figures = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def _machine(cores: list[int]) -> Figures:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    packages = ("offramp", "torch", "onnxruntime", "fastapi", "uvicorn", "tokenizers")
    return {
        "cpu": names[0] if names else platform.machine(),
        "cores": len(cores),
        "shared_with_load_generator": True,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def _command() -> str:
    """As it was typed, without this machine's paths."""
    return " ".join("PATH" if Path(one).is_absolute() else one for one in ["python", *sys.argv])


# -- the command ---------------------------------------------------------------------------------

STEPS = ("install", "weights", "tune", "check", "saturate", "arrive", "report")


def run(bench: Bench, arguments: argparse.Namespace) -> None:
    """All steps that were asked for, as far as time goes."""
    steps = arguments.steps
    if "install" in steps:
        install(bench)
    if "weights" in steps:
        write_weights(bench, arguments.data, arguments.split)
    for server in SERVERS:
        if "tune" in steps and server.name.startswith(tuple(arguments.only)):
            tune(bench, server)
    if left_to_do(bench, arguments):
        bench.progress.need(120)
        with all_running(bench) as running:
            if "check" in steps:
                check(bench, running)
            if "saturate" in steps:
                saturate(bench, running, arguments.rounds, arguments.seconds)
            if "arrive" in steps:
                rounds, seconds = arguments.arrival_rounds, arguments.arrival_seconds
                arrive(bench, running, rounds, seconds)
    if "report" in steps:
        found = report(bench, arguments)
        sys.stdout.write(comparison.tables(found) + "\n")
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1) + "\n")


def left_to_do(bench: Bench, arguments: argparse.Namespace) -> bool:
    done, steps = bench.progress.done, arguments.steps
    to_check = "check" in steps and len(done["checked"]) < len(SUBJECTS)
    to_saturate = "saturate" in steps and len(done["saturated"]) < arguments.rounds
    arrived = [len(done["arrivals"].get(peer, [])) for peer in done["rates"]] or [0]
    return (
        to_check or to_saturate or ("arrive" in steps and min(arrived) < arguments.arrival_rounds)
    )


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="with torch weights")
    parser.add_argument("--int8", type=Path, required=True, help="its int8 export")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--cache", type=Path, default=Path(".peers"))
    parser.add_argument("--cores", type=int, nargs="+", help="default: the first two usable")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop, to go on")
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=STEPS)
    parser.add_argument("--only", nargs="+", default=[""], help="to tune: servers that start so")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each when saturated")
    parser.add_argument("--arrival-rounds", type=int, default=2)
    parser.add_argument("--arrival-seconds", type=float, default=5.0)
    parser.add_argument("--json", type=Path)
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    # However it is ended, the servers are.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    cache = arguments.cache.absolute()
    cache.mkdir(parents=True, exist_ok=True)
    dataset = load_split(arguments.data, arguments.split)
    texts = [row.text for row in dataset.rows]
    bench = Bench(
        places=Places(cache, arguments.checkpoint.absolute(), arguments.int8.absolute()),
        texts=texts,
        truth=[dataset.label_names[label] for label in dataset.labels],
        cores=arguments.cores or sorted(os.sched_getaffinity(0))[:2],
        progress=Progress(
            cache / f"progress-{_fingerprint(arguments, texts)}.json",
            time.monotonic() + arguments.minutes * 60,
        ),
    )
    try:
        run(bench, arguments)
    except OutOfTime:
        log.info("time is over; the same command goes on")
        return 75  # as sysexits.h has it: try again later
    return 0


def _fingerprint(arguments: argparse.Namespace, texts: list[str]) -> str:
    """Figures of other weights or texts are not gone on with."""
    manifest = (arguments.int8 / "offramp.json").read_bytes()
    return hashlib.sha256(manifest + "\n".join(texts).encode()).hexdigest()[:12]


if __name__ == "__main__":
    sys.exit(main())
