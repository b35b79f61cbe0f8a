"""`python -m offramp_loadtest`: one run of load against a server, its results as JSON.

python -m offramp_loadtest --port 3000 --texts FILE --rate 200 --pattern poisson --seconds 10
python -m offramp_loadtest --port 3000 --texts FILE --in-flight 64 --seconds 10
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from offramp_loadtest.arrivals import PATTERNS, schedule
from offramp_loadtest.generator import Load, keep_in_flight, send_when_due
from offramp_loadtest.http_client import Address
from offramp_loadtest.report import summary
from offramp_loadtest.texts import classify_requests, read_texts


def main() -> None:
    arguments = _parse()
    address = Address(arguments.host, arguments.port)
    requests = classify_requests(
        *(address, read_texts(arguments.texts)), batch=arguments.batch, speedup=arguments.speedup
    )
    json.dump(_run(arguments, address, requests), sys.stdout, indent=1)
    print()


def _run(arguments: argparse.Namespace, address: Address, requests: list[bytes]) -> dict[str, Any]:
    seconds = arguments.seconds
    if arguments.in_flight:
        load = Load(address, requests, arguments.in_flight)
        result = keep_in_flight(load, seconds)
        how = {"in_flight": arguments.in_flight, "seconds": seconds}
    else:
        load = Load(address, requests, arguments.max_connections)
        due = schedule(arguments.pattern, arguments.rate, seconds, arguments.seed)
        result = send_when_due(load, due, processes=arguments.processes)
        how = {"pattern": arguments.pattern, "rate": arguments.rate, "seed": arguments.seed}
    how |= {"seconds": seconds, "batch": arguments.batch, "speedup": arguments.speedup}
    return how | summary(result, seconds=seconds, max_connections=load.max_connections)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="offramp_loadtest", description=__doc__.splitlines()[0])
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=3000)
    parser.add_argument("--texts", type=Path, required=True, help=".jsonl[.gz], or a text a line")
    parser.add_argument("--batch", type=int, default=0, help="texts in a list; 0: single texts")
    parser.add_argument("--speedup", type=float, help="default: the server's")
    how = parser.add_mutually_exclusive_group(required=True)
    how.add_argument("--rate", type=float, help="requests a second, due by --pattern")
    how.add_argument("--in-flight", type=int, help="instead: so many requests at all times")
    parser.add_argument("--pattern", choices=list(PATTERNS), default="poisson")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--max-connections", type=int, default=512)
    parser.add_argument("--processes", type=int, default=1, help="that share an open loop")
    return parser.parse_args()


if __name__ == "__main__":
    main()
