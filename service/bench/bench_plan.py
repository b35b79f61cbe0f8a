"""The planner against the scheduler: how many replicas a load needs, by `planner.py` and by the
simulator (`simulator.py`), which runs the scheduler's own code.

The machines are cost tables of `bench_scheduler.py`: two CPU tables that were measured, and the
H200 as it is reckoned there, with exits that fall by a constant share. The simulator's answer is
the fewest replicas at whose share of the load so many percent are in time. "Balancers": one load
on as many replicas as planned, dealt out in three ways. Neither has HTTP in it.

The same files give the same figures.
"""

import argparse
import heapq
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from simulator import Device, Simulation, Text, poisson

from offramp_model import load_checkpoint
from offramp_model.cost import StepTable
from offramp_service.jobs import Depth
from offramp_service.planner import Machine, Replica, Traffic
from offramp_service.planner import plan as planned
from offramp_service.scheduler import Plan
from offramp_training.data import load_split

RATES = (5, 15, 50)
"""Times what one replica can do in full batches."""
TARGETS = (2, 6)
"""Times the p99 of an empty replica."""
SPEEDUPS = (1.0, 2.0)
PERCENTILE = 99
SHARED = 8  # replicas, for the balancers


@dataclass(frozen=True)
class Setting:
    """A machine and what comes to it."""

    name: str
    speedup: float
    costs: StepTable
    plan: Plan
    exit_layers: tuple[int, ...]
    depth: Depth
    tokens: tuple[int, ...]  # to draw from
    texts: int  # of one simulated run
    seeds: int

    @cached_property
    def replica(self) -> Replica:
        machine = Machine(
            name=self.name,
            layer_seconds=self.costs,
            max_batch_tokens=self.plan.max_batch_tokens,
            max_batch_texts=self.plan.max_batch_texts,
            front_s=0.0,
            front_text_s=0.0,
        )
        return Replica(machine, self.traffic)

    @property
    def traffic(self) -> Traffic:
        lengths = Counter(self.tokens)
        mix = tuple((length, n / lengths.total()) for length, n in sorted(lengths.items()))
        return Traffic(self.depth.exit_shares, mix)

    @property
    def device(self) -> Device:
        return Device(self.costs, self.exit_layers)

    def arrivals(self, rate: float, seed: int) -> list[Text]:
        """What comes at such a rate."""
        rng = random.Random(seed)
        return poisson(rng, rate, self.texts, classes=[(1.0, self.depth)], tokens=self.tokens)


def main() -> None:
    args = _arguments()
    settings = [one for speedup in SPEEDUPS for one in make_settings(args, speedup)]
    rows = [row for setting in settings for row in compare(setting)]
    report = {
        "texts": args.texts,
        "seeds": args.seeds,
        "percentile": PERCENTILE,
        "settings": [describe(one) for one in settings],
        "replicas": rows,
        "worst": max(abs(one["off"]) for one in rows),
        "balancers": [row for one in settings if one.speedup == 2.0 for row in balance(one)],
    }
    args.json.write_text(json.dumps(report, indent=1) + "\n")
    print(as_markdown(report))


def make_settings(args: argparse.Namespace, speedup: float) -> list[Setting]:
    tables = {one["name"]: one for one in json.loads(args.costs.read_text())["settings"]}
    shared = {"speedup": speedup, "texts": args.texts, "seeds": args.seeds}
    made = [_assumed(tables["h200-256"], speedup, shared)]
    for directory in args.checkpoints:
        checkpoint = load_checkpoint(directory)
        calibrated = checkpoint.table(
            checkpoint.manifest.exit_policy, backend=checkpoint.backend, dtype=checkpoint.dtype
        )
        counts, layers = calibrated.point_for(speedup).exit_counts, checkpoint.model.num_layers
        rows = load_split(args.data, "validation").inputs[:1000]
        lengths = [len(one) for one in checkpoint.tokenizer().encode(rows, truncate=True)]
        one = _of(tables[directory.name], Depth.of(counts, 1, layers), tuple(lengths), shared)
        made.append(one)
    return made


def _assumed(table: dict[str, Any], speedup: float, shared: dict[str, Any]) -> Setting:
    """Each layer is left by the same share of who ran it, so that the mean depth is as asked."""
    layers = table["exit_layers"][-1]
    low, high = 0.0, 1.0
    for _ in range(50):
        stays = (low + high) / 2
        mean = sum(stays**layer for layer in range(layers))
        low, high = (stays, high) if mean < layers / speedup else (low, stays)
    depth = Depth(tuple(high**layer for layer in range(layers)))
    return _of(table, depth, (round(table["mean_tokens"]),), shared)


def _of(
    table: dict[str, Any], depth: Depth, tokens: tuple[int, ...], shared: dict[str, Any]
) -> Setting:
    plan = Plan(table["plan"]["max_batch_tokens"], table["plan"]["max_batch_texts"])
    costs = StepTable(tuple(table["tokens"]), tuple(table["layer_s"]))
    exits = tuple(table["exit_layers"])
    return Setting(table["name"], shared["speedup"], costs, plan, exits, depth, tokens,
                   shared["texts"], shared["seeds"])  # fmt: skip


# -- replicas --------------------------------------------------------------------------------------


def compare(setting: Setting) -> list[dict[str, Any]]:
    """Planner and simulator, for each target and rate."""
    simulated = lru_cache(maxsize=None)(lambda rate: simulate(setting, rate))
    empty = setting.replica.forecast(1e-6 * setting.replica.capacity)
    rows = []
    for target in TARGETS:
        slo_s = _rounded(target * empty.p99_s)
        for times in RATES:
            rate = _rounded(times * setting.replica.capacity)
            answer = planned(setting.replica, rate=rate, slo_s=slo_s, percentile=PERCENTILE)
            assert answer.replicas is not None
            assert answer.forecast is not None
            needed = fewest(rate, slo_s, simulated, times)
            p50_s, p99_s = simulated(rate / answer.replicas)
            rows.append(
                {
                    "setting": setting.name,
                    "speedup": setting.speedup,
                    "slo_s": slo_s,
                    "rate": rate,
                    "planned": answer.replicas,
                    "simulated": needed,
                    "off": answer.replicas / needed - 1,
                    "bottleneck": answer.bottleneck,
                    "load": answer.forecast.load,
                    "p50_s": [answer.forecast.p50_s, p50_s],
                    "p99_s": [answer.forecast.p99_s, p99_s],
                }
            )
    return rows


def simulate(setting: Setting, rate: float) -> tuple[float, float]:
    """Seconds within which half and 99 % of the texts are answered, over some seeds."""
    took: list[float] = []
    for seed in range(setting.seeds):
        run = Simulation(setting.plan, setting.device, setting.arrivals(rate, seed)).run()
        took += run.answered.values()
    return _percentiles(took)


def fewest(
    rate: float, slo_s: float, simulated: Callable[[float], tuple[float, float]], least: int
) -> int:
    """Replicas; below `least` none is stable."""
    low, high = least - 1, least
    while simulated(rate / high)[1] > slo_s:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if simulated(rate / middle)[1] > slo_s else (low, middle)
    return high


# -- balancers -------------------------------------------------------------------------------------


def balance(setting: Setting) -> list[dict[str, Any]]:
    """The same texts on as many replicas, dealt out in three ways."""
    rows = []
    for load in (0.5, 0.8, 0.95):
        traffic = setting.arrivals(load * SHARED * setting.replica.capacity, seed=0)
        for name, choose in BALANCERS.items():
            p50_s, p99_s = _percentiles(deal(setting, traffic, choose))
            rows.append({"setting": setting.name, "load": load, "balancer": name,
                         "p50_s": p50_s, "p99_s": p99_s})  # fmt: skip
    return rows


Choose = Callable[[int, list[int]], int]
"""Number of the text, how many each replica has open → replica."""
BALANCERS: dict[str, Choose] = {
    "at random": lambda number, _: random.Random(number).randrange(SHARED),
    "in turn": lambda number, _: number % SHARED,
    "least outstanding of two": lambda number, has: min(
        random.Random(number).sample(range(SHARED), 2), key=lambda one: has[one]
    ),
    "least outstanding": lambda number, has: min(
        range(SHARED), key=lambda one: (has[one], (one - number) % SHARED)
    ),
}


def deal(setting: Setting, traffic: Sequence[Text], choose: Choose) -> list[float]:
    """Seconds that each text took."""
    replicas = [Simulation(setting.plan, setting.device, ()) for _ in range(SHARED)]
    waiting: list[set[int]] = [set() for _ in replicas]  # dealt out, end not known
    ends: list[list[float]] = [[] for _ in replicas]  # known and still to come, a heap
    for number, text in enumerate(traffic):
        for place, one in enumerate(replicas):
            one.advance(text.arrives)
            known = {n for n in waiting[place] if n in one.outcome.answered}
            waiting[place] -= known
            for n in known:
                heapq.heappush(ends[place], traffic[n].arrives + one.outcome.answered[n])
            while ends[place] and ends[place][0] <= text.arrives:
                heapq.heappop(ends[place])
        chosen = choose(number, [len(waiting[p]) + len(ends[p]) for p in range(SHARED)])
        replicas[chosen].offer(number, text)
        waiting[chosen].add(number)
    return [took for one in replicas for took in one.run().answered.values()]


# -- report ----------------------------------------------------------------------------------------


def describe(setting: Setting) -> dict[str, Any]:
    return {
        "name": setting.name,
        "speedup": setting.speedup,
        "capacity_per_s": setting.replica.capacity,
        "exit_shares": setting.depth.exit_shares,
        "tokens": setting.traffic.tokens,
    }


def as_markdown(report: dict[str, Any]) -> str:
    lines = [
        "| machine | speed-up | p99 within, ms | texts/s | replicas planned | simulated | off "
        "| load | p50 planned / simulated, ms | p99 planned / simulated, ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for one in report["replicas"]:
        p50, p99 = (
            " / ".join(f"{seconds * 1000:.3g}" for seconds in one[which])
            for which in ("p50_s", "p99_s")
        )
        lines.append(
            f"| {one['setting']} | {one['speedup']:g} | {one['slo_s'] * 1000:.3g} "
            f"| {one['rate']:,.0f} | {one['planned']} | {one['simulated']} | {one['off']:+.0%} "
            f"| {one['load']:.2f} | {p50} | {p99} |"
        )
    lines += ["", "| machine | load | balancer | p50, ms | p99, ms |", "|---|---:|---|---:|---:|"]
    lines += [
        f"| {one['setting']} | {one['load']:g} | {one['balancer']} | {one['p50_s'] * 1000:.3g} "
        f"| {one['p99_s'] * 1000:.3g} |"
        for one in report["balancers"]
    ]
    return "\n".join(lines)


def _percentiles(took: Sequence[float]) -> tuple[float, float]:
    ordered = sorted(took)
    return ordered[len(ordered) // 2], ordered[int(0.99 * len(ordered))]


def _rounded(number: float) -> float:
    """To two digits, as people ask."""
    places = 1 - math.floor(math.log10(number))
    return round(number, places)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoints", nargs="*", type=Path)
    parser.add_argument("--data", type=Path, help="SST-2, for the lengths of its texts")
    parser.add_argument("--costs", type=Path, required=True, help="of bench_scheduler.py")
    parser.add_argument("--texts", type=int, default=20_000, help="of one simulated run")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    if args.checkpoints and args.data is None:
        parser.error("checkpoints need --data")
    return args


if __name__ == "__main__":
    main()
