"""Prints what extras of the project need, as requirements for pip, without the project itself.

`python requirements.py serve onnx --replace onnxruntime=onnxruntime-gpu`. So a layer with all that
is needed changes with pyproject.toml only, not with every line of source. Knows the file beside it
and nothing about images.
"""

import argparse
import re
import sys
import tomllib
from pathlib import Path


def requirements(project: dict, extras: list[str], replaced: dict[str, str]) -> list[str]:
    """Those of the project and of its extras, each with its bounds; names exchanged as asked.

    Raises:
        SystemExit: the project has no such extra, or nothing to exchange.
    """
    optional = project["optional-dependencies"]
    if unknown := [extra for extra in extras if extra not in optional]:
        raise SystemExit(f"no extra {', '.join(unknown)}; there are: {', '.join(sorted(optional))}")
    lines = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    if absent := [name for name in replaced if name not in map(_name, lines)]:
        raise SystemExit(f"nothing to replace: {', '.join(absent)} is not required")
    return [replaced.get(_name(line), _name(line)) + line[len(_name(line)) :] for line in lines]


def _name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0]


def _pair(given: str) -> list[str]:
    name, found, other = given.partition("=")
    if not (name and found and other):
        raise argparse.ArgumentTypeError(f"{given!r}: allowed is name=other")
    return [name, other]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("extras", nargs="+")
    parser.add_argument("--replace", action="append", type=_pair, default=[], metavar="NAME=OTHER")
    options = parser.parse_args()
    table = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    lines = requirements(table["project"], options.extras, dict(options.replace))
    sys.stdout.writelines(f"{line}\n" for line in lines)
