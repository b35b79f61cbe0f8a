"""Pictures of the page at /ui for the README, in light and in the dark: the real server, a real
browser (Debian: `apt-get install chromium`), and traffic of real texts, so that its figures show
something.

    python scripts/screenshots.py CHECKPOINT --name NAME --texts ROWS.jsonl.gz --output docs/images
"""

import argparse
import gzip
import io
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from urllib.request import Request, urlopen

from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright

from offramp_loadtest.server_process import serving

TYPED = (
    "a warm, deeply human film",
    "not without charm, yet somehow dull",
    "it wants to be clever and very nearly is",
)
SPEEDUP = 2
SIZE = {"width": 1180, "height": 1075}
MOST_BYTES = 150_000
COLOURS = 256
SCALE = 1.5
FLAGS = ("--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking")


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--name", required=True, help="what the model is served as")
    parser.add_argument(
        "--texts", type=Path, required=True, help="JSON lines with a text each, compressed"
    )
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args(arguments)
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        sys.exit("there is no chromium here; Debian: apt-get install chromium")
    asked.output.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "offramp_service", "--model-id", str(asked.checkpoint)]
    command += ["--served-model-name", asked.name, "--port", "0"]
    with serving(command) as server, sync_playwright() as playwright:
        address = f"http://{server.address.host}:{server.address.port}"
        send(address, read_texts(asked.texts))
        browser = playwright.chromium.launch(executable_path=chromium, args=list(FLAGS))
        for scheme in ("light", "dark"):
            page = browser.new_page(
                viewport=SIZE,  # type: ignore[arg-type]
                color_scheme=scheme,  # type: ignore[arg-type]
                device_scale_factor=SCALE,
            )
            use(page, address)
            path = asked.output / f"ui-{scheme}.png"
            path.write_bytes(compressed(page.screenshot()))
            print(f"{path}: {path.stat().st_size} bytes")
        browser.close()


def read_texts(path: Path) -> list[str]:
    with gzip.open(path) as rows:
        return [json.loads(row)["text"] for row in rows]


def send(address: str, texts: Sequence[str]) -> None:
    """Traffic, for the exit histogram."""
    for start in range(0, len(texts), 32):
        body = {"input": texts[start : start + 32], "speedup": SPEEDUP}
        headers = {"content-type": "application/json"}
        request = Request(f"{address}/classify", json.dumps(body).encode(), headers)
        with urlopen(request, timeout=60) as response:
            response.read()


def use(page: Page, address: str) -> None:
    """What a person would do, until all of it is drawn."""
    page.goto(f"{address}/ui")
    expect(page.locator("#facts")).to_contain_text("layers")
    page.get_by_label("Speed-up asked for").fill(str(SPEEDUP))
    page.locator("#texts").fill("\n".join(TYPED))
    expect(page.locator("#answers > li")).to_have_count(len(TYPED))
    expect(page.locator("#legend-limit")).not_to_contain_text("never")
    expect(page.locator("#exits-note")).to_contain_text("since the server started")
    page.locator("#texts").blur()
    page.wait_for_timeout(1500)  # the histogram's next look, and what moves


def compressed(png: bytes) -> bytes:
    """With a palette."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    out = io.BytesIO()
    picture.quantize(palette=palette(picture), dither=Image.Dither.NONE).save(
        out, "PNG", optimize=True
    )
    if out.tell() > MOST_BYTES:
        sys.exit(f"the picture has {out.tell()} bytes, allowed are {MOST_BYTES}")
    return out.getvalue()


def palette(picture: Image.Image) -> Image.Image:
    """The colours that are there most often, exactly: surfaces are even, and what is not among them
    is the edge of a letter."""
    found = sorted(picture.getcolors(picture.width * picture.height) or (), reverse=True)
    chosen = Image.new("P", (1, 1))
    chosen.putpalette([part for _, colour in found[:COLOURS] for part in colour])
    return chosen


if __name__ == "__main__":
    main(sys.argv[1:])
