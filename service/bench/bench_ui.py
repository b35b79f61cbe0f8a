"""How long people wait on the page at /ui: from the key that ends a text until its answer stands
there, in a real browser; and what the signals of all exits cost a request that asks for them.

    python service/bench/bench_ui.py CHECKPOINT [--json FILE]
"""

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from playwright.sync_api import expect, sync_playwright

from offramp_loadtest.server_process import serving

TEXT = "not without charm, yet somehow dull number"
KEYSTROKES, REQUESTS, ROUNDS = 30, 150, 4
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")

# Looks at every frame, as an eye would; the page's own policy forbids what is made of strings.
WATCH = """() => new Promise(resolve => {
    const began = performance.now();
    const look = () => document.querySelector("#answers > li")
        ? resolve(performance.now() - began) : requestAnimationFrame(look);
    look();
})"""


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args(arguments)
    command = [sys.executable, "-m", "offramp_service", "--model-id", str(asked.checkpoint)]
    with serving([*command, "--port", "0", "--threads", "1"]) as server:
        host, port = server.address.host, server.address.port
        found = {
            "checkpoint": asked.checkpoint.name,
            "signals": time_signals(host, port),
            "page": time_page(f"http://{host}:{port}/ui"),
        }
    text = json.dumps(found, indent=1)
    print(text)
    if asked.json is not None:
        asked.json.write_text(text + "\n", encoding="utf-8")


def time_page(address: str) -> dict[str, Any]:
    """Milliseconds from the last key to the answer, its 150 ms of waiting for another key
    included."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium here; Debian: apt-get install chromium")
    taken = []
    with sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS)).new_page()
        page.goto(address)
        expect(page.locator("#facts")).to_contain_text("layers")
        for number in range(KEYSTROKES):
            page.locator("#texts").fill("")
            expect(page.locator("#answers > li")).to_have_count(0)
            page.keyboard.type(f"{TEXT} {number}")
            taken.append(page.evaluate(WATCH))
    return summary(taken)


def time_signals(host: str, port: int) -> dict[str, Any]:
    """Milliseconds of requests with one text and with 32, one at a time; kinds take turns."""
    connection = HTTPConnection(host, port, timeout=60)
    kinds: tuple[dict[str, bool], ...] = ({}, {"return_details": True}, {"return_signals": True})
    found: dict[str, Any] = {}
    for texts in (1, 32):
        taken: dict[str, list[float]] = {next(iter(one), "plain"): [] for one in kinds}
        for _ in range(ROUNDS):
            for one in kinds:
                body = {"input": [f"{TEXT} {number}" for number in range(texts)], "speedup": 2}
                content = json.dumps(body | one).encode()
                times = taken[next(iter(one), "plain")]
                times += [ask(connection, content) for _ in range(REQUESTS // ROUNDS)]
        found[f"{texts} texts"] = {name: summary(times) for name, times in taken.items()}
    connection.close()
    return found


def ask(connection: HTTPConnection, content: bytes) -> float:
    began = time.perf_counter()
    connection.request("POST", "/classify", content, {"content-type": "application/json"})
    response = connection.getresponse()
    response.read()
    if response.status != 200:
        sys.exit(f"the service answered {response.status}")
    return (time.perf_counter() - began) * 1000


def summary(taken: Sequence[float]) -> dict[str, float]:
    ordered = sorted(taken)
    return {
        "median_ms": round(statistics.median(ordered), 2),
        "p95_ms": round(ordered[int(0.95 * len(ordered))], 2),
        "worst_ms": round(ordered[-1], 2),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
