"""`offramp-load`, or `python -m offramp_loadtest`: load against a deployment, and what it showed.

    offramp-load run SCENARIO.toml --target http://HOST:3000 --json report.json --html report.html
    offramp-load run steady --rate 200 --speedup 2 --texts rows.jsonl
    offramp-load --port 3000 --texts FILE --rate 200 --seconds 10      (no scenario, flags alone)
    offramp-load check SCENARIO.toml      offramp-load list      offramp-load merge A.json B.json

Exit codes: 0 done, 1 an SLO was missed, 2 the command or the scenario is wrong, 3 a target does
not answer.
"""

import argparse
import json
import os
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from offramp_loadtest.html_report import page
from offramp_loadtest.progress import Terminal
from offramp_loadtest.report import as_text, latency, make_report, merge
from offramp_loadtest.running import TargetError, run
from offramp_loadtest.scenario import (
    ScenarioError,
    change,
    find,
    make_scenario,
    read_table,
    scale,
    shipped,
)

DONE, MISSED, WRONG, UNREACHABLE = 0, 1, 2, 3

BARE: dict[str, Any] = {
    "name": "flags",
    "arrivals": {"pattern": "poisson", "rate": 10.0, "seconds": 10.0},
    "texts": [{"words": {"distribution": "lognormal", "median": 12.0, "p95": 40.0, "most": 200}}],
    "controls": [{"truncate": True}],
}
"""What flags change where no scenario is named."""

_FLAT = ("constant", "poisson", "bursty")


def main(words: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    words = sys.argv[1:] if words is None else list(words)
    if words and words[0] not in (*_COMMANDS, "-h", "--help"):
        words = ["run", *words]  # flags alone
    arguments = _parser().parse_args(words or ["--help"])
    try:
        return _COMMANDS[arguments.command](arguments)
    except ScenarioError as error:
        print(error, file=sys.stderr)
        return WRONG
    except TargetError as error:
        print(error, file=sys.stderr)
        return UNREACHABLE


# -- commands ------------------------------------------------------------------------------------


def _run(arguments: argparse.Namespace) -> int:
    scenario = make_scenario(_table(arguments))
    for path in (arguments.json, arguments.html, arguments.hgrm):
        if path is not None and not path.absolute().parent.is_dir():
            raise ScenarioError(f"{path} cannot be written: there is no such directory")
    terminal = Terminal(scenario.arrivals.seconds)
    show = (lambda *_: None) if arguments.quiet else terminal.show
    try:
        report = make_report(run(scenario, os.environ, show))
    finally:
        terminal.close()
    return _tell(arguments, report)


def _merge(arguments: argparse.Namespace) -> int:
    try:
        reports = [json.loads(path.read_text(encoding="utf-8")) for path in arguments.reports]
        report = merge(reports)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ScenarioError(f"reports cannot be put together: {error!r}") from None
    return _tell(arguments, report)


def _check(arguments: argparse.Namespace) -> int:
    scenario = make_scenario(_table(arguments))
    seconds = scenario.arrivals.seconds
    length = "as long as its trace" if seconds is None else f"{seconds:g} s"
    print(f"{scenario.name}: {scenario.arrivals.pattern}, {length}")
    return DONE


def _list(_: argparse.Namespace) -> int:
    for name, path in shipped().items():
        print(f"{name:20}{read_table(path).get('description', '')}")
    return DONE


_COMMANDS = {"run": _run, "check": _check, "list": _list, "merge": _merge}


def _tell(arguments: argparse.Namespace, report: Mapping[str, Any]) -> int:
    """Where it was asked for; without a file for the JSON, the figures go to the terminal."""
    if arguments.json == Path("-"):
        json.dump({k: v for k, v in report.items() if k != "recorded"}, sys.stdout, indent=1)
        print()
    else:
        print(as_text(report))
        if arguments.json:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if arguments.html:
        arguments.html.write_text(page(report), encoding="utf-8")
    if arguments.hgrm:
        arguments.hgrm.write_bytes(latency(report).hgrm())
    return DONE if all(one["met"] for one in report["slo"]) else MISSED


# -- flags over scenarios ------------------------------------------------------------------------


def _table(arguments: argparse.Namespace) -> dict[str, Any]:
    """The scenario's table with what flags change in it."""
    table = (
        read_table(find(arguments.scenario)) if arguments.scenario else json.loads(json.dumps(BARE))
    )
    _change_arrivals(table, arguments)
    if arguments.scale is not None:
        scale(table, arguments.scale)
    for key, value in _changes(arguments):
        change(table, key, value)
    if arguments.speedup:
        table["controls"] = _speedups(arguments.speedup, table.get("controls", []))
    for word in arguments.set:
        key, _, text = word.partition("=")
        change(table, key, _value(text, word))
    return table


def _change_arrivals(table: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Another pattern keeps rate and seconds, where both patterns have them."""
    pattern = arguments.pattern
    if arguments.in_flight is not None:
        pattern = "closed"
    if arguments.trace is not None:
        pattern = "replay"
    before = table.get("arrivals", {})
    if pattern is not None and pattern != before.get("pattern"):
        kept = {"closed": ("seconds",), "replay": ()}.get(pattern, ("rate", "seconds"))
        table["arrivals"] = {
            "pattern": pattern,
            **{name: before[name] for name in kept if name in before},
        }
    for name in ("rate", "seconds", "in_flight"):
        if (value := getattr(arguments, name)) is not None:
            table.setdefault("arrivals", {})[name] = value
    if arguments.trace is not None:
        table["arrivals"]["file"] = str(arguments.trace)


def _changes(arguments: argparse.Namespace) -> list[tuple[str, Any]]:
    """The flags that are a field or a table of the scenario."""
    target = arguments.target or (
        [f"{arguments.host}:{arguments.port}"] if arguments.port else None
    )
    found: list[tuple[str, Any]] = [
        ("seed", arguments.seed),
        ("warm_up_s", arguments.warm_up),
        ("processes", arguments.processes),
        ("target.urls", target),
        ("target.balance", arguments.balance),
        ("target.model", arguments.model),
        ("target.api_key_env", arguments.api_key_env),
        ("target.max_connections", arguments.max_connections),
        ("target.headers", arguments.header or None),
        ("clients.leave_share", arguments.leave_share),
        ("clients.malformed_share", arguments.malformed_share),
        ("slo.p99_ms", arguments.slo_p99_ms),
        ("slo.error_share", arguments.slo_error_share),
        ("slo.rate", arguments.slo_rate),
        ("slo.accuracy", arguments.slo_accuracy),
    ]
    if arguments.texts is not None:
        found.append(("texts", [{"file": str(arguments.texts)}]))
    if arguments.batch is not None:
        found.append(("batches", [{"texts": arguments.batch}]))
    if arguments.door:
        found.append(("doors", [_shared("door", one) for one in arguments.door]))
    return [(key, value) for key, value in found if value is not None]


def _speedups(words: Sequence[str], before: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Instead of the controls before; long texts are still cut where they all were."""
    cut = {"truncate": True} if before and all(one.get("truncate") for one in before) else {}
    shares = [_shared("speedup", one) for one in words]
    return [one | {"speedup": _number(one["speedup"])} | cut for one in shares]


def _shared(name: str, word: str) -> dict[str, Any]:
    """`VALUE` or `VALUE:SHARE`."""
    value, colon, share = word.partition(":")
    return {name: value} | ({"share": _number(share)} if colon else {})


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ScenarioError(f"{text!r} is not a number") from None


def _value(text: str, word: str) -> Any:
    """As TOML has it; a bare word is a string."""
    if "=" not in word:
        raise ScenarioError(f"--set {word}: allowed is KEY=VALUE")
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


# -- the command line ----------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        prog="offramp-load",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_it = commands.add_parser("run", help="load a deployment and report")
    check_it = commands.add_parser("check", help="say whether a scenario is one")
    commands.add_parser("list", help="the scenarios that come with offramp")
    merge_them = commands.add_parser("merge", help="one report of several machines' reports")
    merge_them.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json")
    for one in (run_it, check_it):
        one.add_argument("scenario", nargs="?", help="a .toml file, or the name of one of `list`")
        _add_scenario_flags(one)
    for one in (run_it, merge_them):
        files = one.add_argument_group("reports")
        files.add_argument("--json", type=Path, help="the whole report; - prints its figures")
        files.add_argument("--html", type=Path, help="one self-contained page with plots")
        files.add_argument("--hgrm", type=Path, help="percentiles for HdrHistogram's plotters")
    run_it.add_argument("--quiet", action="store_true", help="no progress on the terminal")
    return parser


def _add_scenario_flags(parser: argparse.ArgumentParser) -> None:
    when = parser.add_argument_group("when requests are due")
    when.add_argument("--pattern", choices=(*_FLAT, "step", "ramp", "replay", "closed"))
    when.add_argument("--rate", type=float, help="requests a second")
    when.add_argument("--seconds", type=float)
    when.add_argument("--scale", type=float, help="all rates of the scenario times so much")
    when.add_argument("--trace", type=Path, help="JSON lines to replay")
    when.add_argument(
        "--in-flight", type=int, help="a closed loop instead: how much a server can do"
    )
    when.add_argument("--warm-up", type=float, help="seconds at the start that are in no figure")
    when.add_argument("--seed", type=int)
    what = parser.add_argument_group("what is asked")
    what.add_argument(
        "--texts", type=Path, help=".jsonl[.gz] (labels are checked), or a text a line"
    )
    what.add_argument("--batch", type=int, help="texts in a list; 0: single texts")
    what.add_argument("--door", action="append", metavar="DOOR[:SHARE]", help="may be repeated")
    what.add_argument("--speedup", action="append", metavar="S[:SHARE]", help="may be repeated")
    what.add_argument("--leave-share", type=float, help="clients that leave in the middle")
    what.add_argument("--malformed-share", type=float, help="requests that no server can answer")
    to = parser.add_argument_group("to whom")
    to.add_argument("--target", action="append", metavar="URL", help="may be repeated")
    to.add_argument("--host", default="127.0.0.1", help="with --port, instead of --target")
    to.add_argument("--port", type=int)
    to.add_argument("--balance", choices=("round-robin", "least-outstanding"))
    to.add_argument("--model", help="default: what the first target says at /info")
    to.add_argument("--api-key-env", metavar="NAME", help="environment variable with the API key")
    to.add_argument("--header", action="append", metavar="NAME: VALUE")
    to.add_argument("--max-connections", type=int)
    to.add_argument("--processes", type=int, help="that share the load")
    slo = parser.add_argument_group("what must hold, or the exit code is 1")
    slo.add_argument("--slo-p99-ms", type=float, help="at most")
    slo.add_argument("--slo-error-share", type=float, help="at most")
    slo.add_argument("--slo-rate", type=float, help="answered a second, at least")
    slo.add_argument("--slo-accuracy", type=float, help="at least")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="any field, as arrivals.steps.0.rate=50",
    )


if __name__ == "__main__":
    sys.exit(main())
