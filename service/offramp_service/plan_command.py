"""The command `offramp-serve plan`: how many replicas of which machine a load needs.

It reads what is known (cost tables of servers or files, calibration of a checkpoint), asks
`planner.py`, and prints. It starts nothing and loads no weights onto a device.
"""

import argparse
import json
import math
import sys
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from offramp_model.calibration import CalibrationTable
from offramp_model.checkpoint import CheckpointError, load_checkpoint
from offramp_model.cost import StepTable
from offramp_service.planner import (
    FRONT_S,
    FRONT_TEXT_S,
    Machine,
    Mix,
    Plan,
    Replica,
    Traffic,
    cheapest,
    plan,
)

_PATIENCE_S = 10.0
_SLACK = 1e-6  # of a speed-up
_PERCENTILES = (50, 95, 99)


class PlanError(Exception):
    """What was asked cannot be planned; the message says why and what can."""


@dataclass(frozen=True)
class Source:
    """A machine as a file or a server describes it."""

    name: str
    costs: StepTable
    max_batch_tokens: int
    max_batch_texts: int
    points: tuple["Point", ...]  # its calibration, where it tells
    mean_tokens: float | None  # of the texts that it was measured with, where it tells
    workers: int = 1  # that the costs are one of


@dataclass(frozen=True)
class Point:
    """What a speed-up means: the share of texts that leaves after each layer, and how many of all
    are right."""

    speedup: float
    accuracy: float
    exit_shares: tuple[float, ...]


def run(arguments: Sequence[str]) -> int:
    """Plan and print; returns the exit code: 1 if no number of replicas is enough."""
    args = _parser().parse_args(arguments)
    try:
        report = make_report(args)
    except (PlanError, CheckpointError) as error:
        print(f"offramp-serve plan: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report, indent=1) if args.json else as_text(report))
    return 0 if report["cheapest"] is not None else 1


def make_report(args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is printed, as JSON.

    Raises:
        PlanError, CheckpointError: see there.
    """
    sources = [source for one in args.costs for source in read_costs(one)]
    prices = _prices(args.price, [source.name for source in sources])
    calibrated = _of_checkpoint(args.model_id) if args.model_id is not None else ()
    plans: list[Plan] = []
    accuracies: dict[str, float] = {}
    for source in sources:
        points = calibrated or source.points
        exit_shares, accuracies[source.name] = _at_speedups(points, args.speedup, source.name)
        tokens = args.tokens or _tokens_of(source)
        machine = Machine(
            name=source.name,
            layer_seconds=source.costs,
            max_batch_tokens=source.max_batch_tokens,
            max_batch_texts=source.max_batch_texts,
            workers=source.workers,
            price=prices.get(source.name),
            front_s=FRONT_S if args.front_ms is None else args.front_ms / 1000,
            front_text_s=FRONT_TEXT_S if args.front_ms is None else 0.0,
        )
        one = plan(
            Replica(machine, Traffic(exit_shares, tokens, args.batch_mix)),
            rate=args.rate,
            slo_s=args.slo / 1000,
            percentile=args.percentile,
            headroom=args.headroom,
        )
        plans.append(one)
    best = cheapest(plans)
    return {
        "rate": args.rate,
        "slo_ms": args.slo,
        "percentile": args.percentile,
        "speedup": {f"{speedup:g}": share for speedup, share in args.speedup},
        "headroom": args.headroom,
        "machines": [_as_json(one, accuracies[one.machine]) for one in plans],
        "cheapest": best.machine if best is not None else None,
    }


# -- what is known ---------------------------------------------------------------------------------


def read_costs(given: str) -> list[Source]:
    """`[NAME=]FILE[#SETTING]` or `[NAME=]URL`: the content of `/info` of a server that runs with
    `--warmup`, or what `bench_scheduler.py` writes.

    Raises:
        PlanError: there is no cost table.
    """
    name, place = _name_and_place(given)
    place, _, setting = place.partition("#")
    content = _read(place)
    if not isinstance(content, dict):
        raise PlanError(f"{place}: a JSON object is needed, as /info answers")
    if "settings" in content and isinstance(content["settings"], list):
        return _of_benchmark(content["settings"], name, place, setting)
    if content.get("layer_cost") is None:
        raise PlanError(
            f"{place}: no cost table; a server has one when it was started with --warmup"
        )
    try:
        return [_of_info(content, name)]
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{place}: not the content of /info: {error!r}") from None


def _name_and_place(given: str) -> tuple[str | None, str]:
    name, found, place = given.partition("=")
    if found and "/" not in name and "?" not in name:
        return name, place
    return None, given


def _read(place: str) -> Any:
    try:
        if place.startswith(("http://", "https://")):
            url = place if place.rstrip("/").endswith("/info") else place.rstrip("/") + "/info"
            with urllib.request.urlopen(url, timeout=_PATIENCE_S) as answer:
                return json.load(answer)
        return json.loads(Path(place).read_text())
    except (OSError, urllib.error.URLError, ValueError) as error:
        raise PlanError(f"{place}: cannot be read: {error}") from None


def _of_info(info: dict[str, Any], name: str | None) -> Source:
    cost = info["layer_cost"]
    calibration = info.get("calibration") or {"points": ()}
    return Source(
        name=name or str(info["served_model_name"]),
        costs=StepTable(
            tuple(cost["tokens"]), tuple(float(ms) / 1000 for ms in cost["milliseconds"])
        ),
        max_batch_tokens=int(info["max_batch_tokens"]),
        max_batch_texts=int(info["max_batch_requests"]),
        workers=int(info.get("engine_workers", 1)),
        points=tuple(
            Point(one["speedup"], one["accuracy"], tuple(one["exit_shares"]))
            for one in calibration["points"]
            if "exit_shares" in one  # servers before 0.2 do not tell
        ),
        mean_tokens=None,
    )


def _of_benchmark(
    settings: list[dict[str, Any]], name: str | None, place: str, wanted: str
) -> list[Source]:
    known = [str(one.get("name")) for one in settings]
    if wanted and wanted not in known:
        raise PlanError(f"{place}: no setting {wanted!r}; there are {', '.join(known)}")
    if name is not None and not wanted and len(settings) > 1:
        raise PlanError(f"{place}: which setting is {name!r}? Say FILE#SETTING: {', '.join(known)}")
    try:
        return [
            Source(
                name=name or one["name"],
                costs=StepTable(tuple(one["tokens"]), tuple(one["layer_s"])),
                max_batch_tokens=one["plan"]["max_batch_tokens"],
                max_batch_texts=one["plan"]["max_batch_texts"],
                points=(),
                mean_tokens=one.get("mean_tokens"),
            )
            for one in settings
            if not wanted or one["name"] == wanted
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"{place}: not a report of bench_scheduler.py: {error!r}") from None


def _of_checkpoint(directory: Path) -> tuple[Point, ...]:
    checkpoint = load_checkpoint(directory)
    table = checkpoint.table(
        checkpoint.manifest.exit_policy, backend=checkpoint.backend, dtype=checkpoint.dtype
    )
    return _points(table)


def _points(table: CalibrationTable) -> tuple[Point, ...]:
    return tuple(
        Point(one.speedup, one.accuracy, tuple(n / table.rows for n in one.exit_counts))
        for one in table.points
    )


def _at_speedups(
    points: Sequence[Point], speedups: Sequence[tuple[float, float]], name: str
) -> tuple[tuple[float, ...], float]:
    """Exit shares and accuracy of a mix of requested speed-ups."""
    if not points:
        raise PlanError(f"{name}: where texts leave is not known; name the checkpoint, --model-id")
    chosen = [(share, _at(points, speedup, name)) for speedup, share in speedups]
    layers = len(points[0].exit_shares)
    shares = tuple(sum(s * one.exit_shares[k] for s, one in chosen) for k in range(layers))
    return shares, sum(share * one.accuracy for share, one in chosen)


def _at(points: Sequence[Point], speedup: float, name: str) -> Point:
    """As the service does: the smallest calibrated speed-up that is at least as large."""
    for one in points:
        if one.speedup >= speedup - _SLACK:
            return one
    raise PlanError(
        f"{name}: speed-up {speedup:g} is not calibrated, allowed is 1 to {points[-1].speedup:.4g}"
    )


def _tokens_of(source: Source) -> Mix:
    if source.mean_tokens is None:
        raise PlanError(
            f"{source.name}: how long are the texts? Say --tokens 25, or lengths with their "
            "shares, --tokens 16:0.7,64:0.3"
        )
    return ((round(source.mean_tokens), 1.0),)


def _prices(given: Sequence[str], names: Sequence[str]) -> dict[str, float]:
    if len(set(names)) < len(names):
        raise PlanError(f"machines must have different names, got {', '.join(names)}: NAME=FILE")
    prices: dict[str, float] = {}
    for one in given:
        name, _, number = one.partition("=")
        if name not in names:
            raise PlanError(f"--price {one}: no machine {name!r}; there are {', '.join(names)}")
        try:
            prices[name] = float(number)
        except ValueError:
            raise PlanError(f"--price {one}: allowed is NAME=NUMBER") from None
        if not prices[name] >= 0 or math.isinf(prices[name]):
            raise PlanError(f"--price {one}: a price is at least 0")
    return prices


# -- what is said ----------------------------------------------------------------------------------


def _as_json(one: Plan, accuracy: float) -> dict[str, Any]:
    content = asdict(one) | {"accuracy": accuracy}
    for part in ("empty", "forecast"):
        forecast = content[part]
        if forecast is not None:
            content[part] = {k: v if math.isfinite(v) else None for k, v in forecast.items()}
    return content


_WHY = {
    "engine": "the engine is full",
    "latency": "the latency target, before the engine is full",
    "front": "HTTP and tokenising, on one core",
    "unreachable": "not even an empty replica is fast enough",
}


def as_text(report: dict[str, Any]) -> str:
    """A table for people."""
    mix = ", ".join(
        s if share == 1 else f"{s} for {share:.0%}" for s, share in report["speedup"].items()
    )
    which = f"p{report['percentile']}"
    head = (
        f"{report['rate']:,g} requests a second, {which} within {report['slo_ms']:g} ms, "
        f"speed-up {mix}, {report['headroom']:.0%} of each replica kept free"
    )
    columns = ["machine", "replicas", "price", "accuracy", "one carries", "load", "busy", "front"]
    columns += ["batch", "p50 ms", "p95 ms", "p99 ms", "queued work", "bottleneck"]
    rows = [columns, *(_row(one) for one in report["machines"])]
    if all(one["price"] is None for one in report["machines"]):
        rows = [[*row[:2], *row[3:]] for row in rows]
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    if report["cheapest"] is None:
        best = "No number of replicas is enough: a larger --speedup, shorter texts, a later --slo?"
    else:
        best = f"Cheapest: {report['cheapest']}."
    return "\n".join([head, "", *lines, "", best])


def _row(one: dict[str, Any]) -> list[str]:
    forecast, name, why = one["forecast"], one["machine"], _WHY[one["bottleneck"]]
    accuracy = f"{one['accuracy']:.3f}"
    if forecast is None:
        times = [f"{one['empty'][which] * 1000:.3g}" for which in ("p50_s", "p95_s", "p99_s")]
        return [name, "-", "-", accuracy, "0/s", "0%", "0%", "0%", "1", *times, "-", why]
    return [
        name,
        f"{one['replicas']:,}",
        "-" if one["price"] is None else f"{one['price']:,.6g}",
        accuracy,
        f"{one['carries']:,.4g}/s",
        f"{forecast['load']:.0%}",
        f"{forecast['busy']:.0%}",
        f"{forecast['front']:.0%}",
        f"{forecast['mean_batch']:.3g}",
        *(f"{forecast[which] * 1000:.3g}" for which in ("p50_s", "p95_s", "p99_s")),
        f"{forecast['queued_layer_work']:.3g}",
        why,
    ]


# -- flags -----------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="offramp-serve plan",
        description="How many replicas of which machine a load needs, from measured costs.",
        epilog="Each replica is a queue of its own, requests dealt out at random. See "
        "docs/scale-out.md.",
    )
    parser.add_argument(
        "--rate", type=_positive, required=True, help="requests a second, all replicas together"
    )
    parser.add_argument(
        "--slo", type=_positive, required=True, metavar="MS", help="milliseconds to an answer"
    )
    parser.add_argument(
        "--percentile",
        type=int,
        choices=_PERCENTILES,
        default=99,
        help="of requests that are answered by then; default 99",
    )
    parser.add_argument(
        "--speedup",
        type=_speedups,
        default=((1.0, 1.0),),
        metavar="S[:SHARE,…]",
        help="that requests ask for; default 1",
    )
    parser.add_argument(
        "--costs",
        action="append",
        required=True,
        metavar="[NAME=]FILE|URL",
        help="a kind of machine: a server that runs there with --warmup, its /info in a file, or "
        "docs/results/scheduler.json#SETTING; may be repeated",
    )
    parser.add_argument(
        "--price",
        action="append",
        default=[],
        metavar="NAME=NUMBER",
        help="of one such machine, in any unit",
    )
    parser.add_argument(
        "--model-id",
        type=Path,
        metavar="DIR",
        help="checkpoint whose calibration says where texts leave; default: the servers' own",
    )
    parser.add_argument(
        "--tokens",
        type=_mix,
        metavar="N[:SHARE,…]",
        help="length of the texts, special tokens included",
    )
    parser.add_argument(
        "--batch-mix",
        type=_mix,
        default=((1, 1.0),),
        metavar="N[:SHARE,…]",
        help="texts in a request, 1:0.9,32:0.1 for lists of 32 in every tenth; default 1",
    )
    parser.add_argument(
        "--headroom",
        type=_share,
        default=0.2,
        help="share of what a replica can carry that is kept free; default 0.2",
    )
    parser.add_argument(
        "--front-ms",
        type=_not_negative,
        help="of one core for HTTP and tokenising, per request; default "
        f"{FRONT_S * 1000:g} and {FRONT_TEXT_S * 1000:g} for each text, as measured",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _positive(given: str) -> float:
    number = float(given)
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{given}: allowed is above 0")
    return number


def _not_negative(given: str) -> float:
    number = float(given)
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{given}: allowed is 0 or more")
    return number


def _share(given: str) -> float:
    number = float(given)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{given}: allowed is 0 to below 1")
    return number


def _speedups(given: str) -> tuple[tuple[float, float], ...]:
    pairs = _shares(given)
    if min(number for number, _ in pairs) < 1:
        raise argparse.ArgumentTypeError(f"{given}: a speed-up is at least 1")
    return pairs


def _mix(given: str) -> Mix:
    pairs = _shares(given)
    if any(number < 1 or number != int(number) for number, _ in pairs):
        raise argparse.ArgumentTypeError(f"{given}: allowed are whole numbers from 1 on")
    return tuple((int(number), share) for number, share in pairs)


def _shares(given: str) -> tuple[tuple[float, float], ...]:
    """Numbers with their shares of the whole: "8", or "8:0.25,16:0.75"."""
    pairs = []
    for part in given.split(","):
        number, found, share = part.partition(":")
        try:
            pairs.append((float(number), float(share) if found else 1.0))
        except ValueError:
            raise argparse.ArgumentTypeError(
                f"{given}: allowed is a number, or N:SHARE with commas"
            ) from None
    total = sum(share for _, share in pairs)
    if abs(total - 1) > 1e-3 or min(share for _, share in pairs) <= 0:
        raise argparse.ArgumentTypeError(
            f"{given}: shares must be above 0 and add up to 1, got {total:g}"
        )
    return tuple((number, share / total) for number, share in pairs)
