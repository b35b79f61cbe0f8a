"""The locust file against `offramp-serve`: started as people start it, without its page.

Locust (gevent) cannot share an environment with this project's tools; `--locust` is its command.
Three short runs: all doors at once, one door by its tag with controls, and the shape of steps.
"""

import argparse
import csv
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from offramp_loadtest.server_process import ServerProcess, serving

LOCUSTFILE = Path(__file__).parents[2] / "loadtest" / "locustfile.py"
DOORS = {"vllm", "tei", "v2", "v2-binary", "v1"}


def locust(
    command: str, server: ServerProcess, words: Sequence[str], **environment: str
) -> Mapping[str, Mapping[str, str]]:
    """A run without a page; its table of requests, by name."""
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(Path(folder) / "run")
        words = ["-f", str(LOCUSTFILE), "--host", str(server.address), "--headless", *words]
        done = subprocess.run(
            [command, *words, "--csv", prefix, "--only-summary"],
            env={**os.environ, **environment},
            timeout=120,
            check=False,
        )
        if done.returncode:
            raise SystemExit(f"locust ended with {done.returncode}")
        with Path(f"{prefix}_stats.csv").open(encoding="utf-8") as table:
            return {row["Name"]: row for row in csv.DictReader(table)}


def check(table: Mapping[str, Mapping[str, str]], names: set[str]) -> None:
    """These requests were made, no others, and none failed."""
    found = set(table) - {"Aggregated", "/info"}
    assert found == names, f"{sorted(found)} were asked, {sorted(names)} should have been"
    for name, row in table.items():
        assert int(row["Failure Count"]) == 0, f"{row['Failure Count']} of {name} failed"
    count = table["Aggregated"]["Request Count"]
    sys.stdout.write(f"{count} requests, none failed: {', '.join(sorted(names))}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("checkpoint", help="to serve")
    parser.add_argument("--locust", required=True, help="locust's command")
    arguments = parser.parse_args()
    command = str(Path(arguments.locust).absolute())
    flags = ["--model-id", arguments.checkpoint, "--port", "0", "--drain-seconds", "0"]
    with serving([sys.executable, "-m", "offramp_service", *flags]) as server:
        some = ["-u", "18", "-r", "18", "-t", "6s", "--pace", "4"]
        check(locust(command, server, some), DOORS)
        words = [*some, "--tags", "v2-binary", "--speedups", "1,2", "--batch", "3"]
        check(locust(command, server, words), {"v2-binary speedup 1", "v2-binary speedup 2"})
        shape = {
            "LOCUST_SHAPE": "steps",
            "LOCUST_SHAPE_USERS": "12",
            "LOCUST_SHAPE_FASTER": "40",
        }
        check(locust(command, server, ["--tags", "vllm"], **shape), {"vllm"})
    return 0


if __name__ == "__main__":
    sys.exit(main())
