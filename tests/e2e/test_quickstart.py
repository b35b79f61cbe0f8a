"""The README's first screen, as a newcomer types it: `make serve`, then a request.

It uses the checkpoint at $QUICKSTART if there is one (CI trains its own first), else trains one:
that is the point. Nothing is downloaded here; `make install` has run.
"""

import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer

ROOT = Path(__file__).parents[2]
DATA = ROOT / "training" / "data" / "snips"
QUICKSTART = ROOT / "checkpoints" / "quickstart"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def make_serve(port: int) -> Iterator[float]:
    """`make serve` in a process group of its own; yields the seconds until it was ready."""
    server = subprocess.Popen(
        ["make", "serve", f"PORT={port}"], cwd=ROOT, start_new_session=True, env=os.environ.copy()
    )
    started = time.perf_counter()
    try:
        while not is_ready(port):
            assert server.poll() is None, f"make serve ended with {server.returncode}"
            assert time.perf_counter() - started < 600, "not ready after ten minutes"
            time.sleep(0.1)
        yield time.perf_counter() - started
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGINT)
        server.wait(timeout=60)


def is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def classify(port: int, text: str, **controls: Any) -> dict[str, Any]:
    body = json.dumps({"input": text, "return_details": True, **controls}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/classify", body, {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=10) as answer:
        item: dict[str, Any] = json.load(answer)["data"][0]
        return item


def test_make_serve_answers_and_leaves_early() -> None:
    names = json.loads((DATA / "dataset_info.json").read_text(encoding="utf-8"))["label_names"]
    with gzip.open(DATA / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for _, line in zip(range(5), lines, strict=False)]
    port = free_port()
    with make_serve(port):
        for row in rows:
            full = classify(port, row["text"])
            early = classify(port, row["text"], speedup=3)
            assert full["label"] == early["label"] == names[row["label"]]
            assert full["details"]["exit_layer"] == 6
            assert early["details"]["exit_layer"] < 6
    # The second start finds the environment and the checkpoint.
    with make_serve(free_port_again := free_port()) as seconds:
        assert classify(free_port_again, rows[0]["text"])["label"] == names[rows[0]["label"]]
    assert seconds < 15


def test_full_depth_is_transformers() -> None:
    """500 rows through HTTP against transformers' own forward pass, padded, with the mean over the
    tokens and the last classifier written out."""
    with gzip.open(DATA / "test.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for _, line in zip(range(500), lines, strict=False)]
    assert len(texts) == 500
    port = free_port()
    with make_serve(port):
        answers = [item for start in range(0, 500, 25) for item in ask(port, texts[start:][:25])]
    expected = transformers_scores(Path(os.environ.get("QUICKSTART", QUICKSTART)), texts)
    scores = torch.tensor([item["probs"] for item in answers])
    assert (scores - expected).abs().max() < 1e-4
    assert scores.argmax(-1).tolist() == expected.argmax(-1).tolist()


def ask(port: int, texts: list[str]) -> list[dict[str, Any]]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/classify",
        json.dumps({"input": texts, "speedup": 1}).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        items: list[dict[str, Any]] = json.load(answer)["data"]
        return items


@torch.inference_mode()
def transformers_scores(directory: Path, texts: list[str]) -> torch.Tensor:
    """Probabilities [n, C] in float32."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    backbone = AutoModel.from_pretrained(directory, add_pooling_layer=False).eval()
    heads = load_file(directory / "exits.safetensors")
    last = backbone.config.num_hidden_layers - 1
    weight, bias = (heads[f"classifiers.{last}.{name}"] for name in ("weight", "bias"))
    found = []
    for start in range(0, len(texts), 25):
        batch = tokenizer(texts[start : start + 25], padding=True, return_tensors="pt")
        hidden = backbone(**batch).last_hidden_state
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (hidden * mask).sum(1) / mask.sum(1)
        found.append(torch.softmax(pooled @ weight.T + bias, dim=-1))
    return torch.cat(found)
