"""The comparison with peers: what is asked of each server and read from its answers, what the
servers written for it compute, how processes are started and ended, and the report's arithmetic.
"""

import json
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loading import ROOT, load
from offramp_loadtest.http_client import Address, Reply
from offramp_service.settings import parse_command_line

PEERS = "loadtest/peers"
ADDRESS = Address("127.0.0.1", 1)


def from_peers(name: str) -> ModuleType:
    """A file of the comparison; they import each other as scripts do."""
    folders = [str(ROOT / PEERS), str(ROOT / PEERS / "servers")]
    sys.path[:0] = folders
    try:
        return load(f"{PEERS}/{name}.py")
    finally:
        for folder in folders:
            sys.path.remove(folder)


adapters = from_peers("adapters")
bench = from_peers("bench_peers")
classifier = from_peers("servers/classifier")
compared = from_peers("compared")
comparison = from_peers("comparison")
measuring = from_peers("measuring")
running = from_peers("running")


# -- requests and answers ------------------------------------------------------------------------

TEXT = 'a "warm", fünny film'
ANSWERED: dict[str, tuple[Any, str, dict[str, Any], dict[str, Any]]] = {
    "plain": (
        adapters.plain("/inference"),
        "/inference",
        {"text": TEXT},
        {"label": "positive", "score": 0.9},
    ),
    "infinity": (
        adapters.infinity("m"),
        "/classify",
        {"model": "m", "input": [TEXT]},
        {
            "object": "classify",
            "data": [[{"score": 0.1, "label": "negative"}, {"score": 0.9, "label": "positive"}]],
        },
    ),
    "triton": (
        adapters.triton("m"),
        "/v2/models/m/infer",
        {"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": [TEXT]}]},
        {"outputs": [{"name": "score", "data": [0.9]}, {"name": "label", "data": ["positive"]}]},
    ),
    "offramp": (
        adapters.offramp(2.0),
        "/classify",
        {"input": TEXT, "speedup": 2.0},
        {"data": [{"index": 0, "label": "positive", "probs": [0.1, 0.9], "num_classes": 2}]},
    ),
}


@pytest.mark.parametrize("name", ANSWERED)
def test_each_server_is_asked_in_its_own_words(name: str) -> None:
    adapter, path, body, answer = ANSWERED[name]
    head, _, sent = adapter.request(ADDRESS, TEXT).partition(b"\r\n\r\n")
    assert head.startswith(f"POST {path} HTTP/1.1\r\n".encode())
    assert f"content-length: {len(sent)}".encode() in head
    assert json.loads(sent) == body
    assert adapter.read(Reply(200, b"", json.dumps(answer).encode())) == "positive"


@pytest.mark.parametrize("name", ANSWERED)
def test_what_holds_no_label_is_said(name: str) -> None:
    adapter = ANSWERED[name][0]
    with pytest.raises(ValueError, match="without an answer"):
        adapter.read(None)
    with pytest.raises(ValueError, match="answered with 429"):
        adapter.read(Reply(429, b"", b"{}"))
    for body in (b"{}", b'{"data": []}', b"[]"):
        with pytest.raises(ValueError, match="no label in"):
            adapter.read(Reply(200, b"", body))


# -- what the peers' servers compute -------------------------------------------------------------


@given(lengths=st.lists(st.integers(1, 128), min_size=1, max_size=64), size=st.integers(0, 40))
def test_groups_hold_every_row_once_and_rows_of_like_length(lengths: list[int], size: int) -> None:
    found = classifier.groups(lengths, size)
    assert sorted(row for group in found for row in group) == list(range(len(lengths)))
    if size:
        assert all(0 < len(group) <= size for group in found)
        in_order = [lengths[row] for group in found for row in group]
        assert in_order == sorted(lengths)
    else:
        assert found == [list(range(len(lengths)))]


def test_padding_and_probabilities() -> None:
    ids, lengths = classifier.padded([[5, 6, 7], [8]])
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert lengths.tolist() == [3, 1]
    found = classifier.probabilities(np.array([[1000.0, 1000.0], [0.0, np.log(3)]]))
    assert found == pytest.approx(np.array([[0.5, 0.5], [0.25, 0.75]]))


@pytest.mark.parametrize("group", [0, 1, 2, 16])
def test_answers_come_in_the_order_of_the_texts(tmp_path: Path, group: int) -> None:
    support = load("tests/unit/service/support.py")
    support.make_tokenizer().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"id2label": {"0": "odd", "1": "even"}}')
    seen: list[int] = []

    def by_length(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        seen.append(len(ids))
        even = lengths % 2 == 0
        return np.stack([~even, even], axis=1).astype(np.float32)

    texts = [" ".join(["w1"] * count) for count in (4, 1, 3, 2, 2)]
    answers = classifier.Classifier(tmp_path, by_length, group=group)(texts)
    # Two specials come with each text.
    assert [one["label"] for one in answers] == ["even", "odd", "odd", "even", "even"]
    assert all(one["score"] == pytest.approx(1 / (1 + np.exp(-1))) for one in answers)
    assert max(seen) == (min(group, 5) or 5)


def test_other_servers_get_the_weights_of_the_checkpoint(tmp_path: Path) -> None:
    weights = from_peers("weights")
    from transformers import BertConfig

    from offramp_model import load_checkpoint
    from offramp_model.recorded import record_exits

    support = load("tests/unit/service/support.py")
    checkpoint = load_checkpoint(support.write_tiny_checkpoint(tmp_path / "tiny"))
    weights.write_final_head(checkpoint, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["id2label"] == {"0": "negative", "1": "positive", "2": "neutral"}
    assert (tmp_path / "out" / "mean_pooled_bert.py").exists()
    # Not by the auto class, which would copy the code into the user's cache.
    kind = weights.MeanPooledBertForSequenceClassification
    model = kind.from_pretrained(
        tmp_path / "out", config=BertConfig.from_pretrained(tmp_path / "out")
    ).eval()
    encodings = checkpoint.tokenizer().encode(support.random_texts(12))
    ids, lengths = classifier.padded([one.ids for one in encodings])
    mask = torch.from_numpy((np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64))
    with torch.inference_mode():
        theirs = model(torch.from_numpy(ids), attention_mask=mask).logits
    ours = record_exits(checkpoint.stack(), encodings).logits[-1]
    assert torch.allclose(theirs, ours, atol=1e-5)
    assert not (tmp_path / "out" / "exits.safetensors").exists()


# -- who is compared -----------------------------------------------------------------------------

PLACES = compared.Places(Path("cache"), Path("torch"), Path("int8"))


def test_every_row_has_a_server_and_every_server_a_grid() -> None:
    servers = {one.name: one for one in compared.SERVERS}
    assert {one.server for one in compared.SUBJECTS} == set(servers)
    assert len({one.name for one in compared.SUBJECTS}) == len(compared.SUBJECTS)
    for one in servers.values():
        assert len(one.grid) >= 4
        assert len({json.dumps(setting, sort_keys=True) for setting in one.grid}) == len(one.grid)
        wanted = ROOT / PEERS / "requirements" / f"{one.environment}.txt"
        assert not one.environment or wanted.exists()


def test_the_servers_written_here_understand_their_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    checked = 0
    for server in compared.SERVERS:
        for setting in server.grid:
            command = server.command(setting, PLACES, 1234)
            if "servers" not in command[1]:
                continue
            monkeypatch.setattr(sys, "argv", command[1:])
            options = classifier.options()
            assert options.listen == 1234
            assert options.model == Path("cache/weights/final-head")
            assert (options.graph is not None) == ("int8" in server.name)
            for name, value in setting.items():
                if name != "graph":
                    assert getattr(options, name) == value
            checked += 1
    assert checked > 20


def test_offramp_understands_its_flags() -> None:
    for server in compared.SERVERS:
        if server.environment:
            continue
        for setting in server.grid:
            command = server.command(setting, PLACES, 1234)
            settings = parse_command_line(command[3:])
            assert settings.port == 1234
            assert all(getattr(settings, name) == value for name, value in setting.items())
            assert settings.model_id == Path("int8" if "int8" in server.name else "torch")


# -- processes -----------------------------------------------------------------------------------

SERVER = """
import asyncio, subprocess, sys
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
async def serve(reader, writer):
    try:
        while True:
            head = await reader.readuntil(b"\\r\\n\\r\\n")
            length = int(head.lower().partition(b"content-length: ")[2].split(b"\\r\\n")[0])
            text = await reader.readexactly(length)
            label = b"long" if len(text) > 20 else b"short"
            body = b'{"label": "' + label + b'"}'
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: %d\\r\\n\\r\\n" % len(body) + body)
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()
async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()
asyncio.run(main())
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Any]]:
    started = []

    def starting(program: str) -> Any:
        port = running.free_port()
        one = running.RunningServer(
            [sys.executable, "-c", program, str(port)],
            port=port,
            cores=[0],
            environment={"PEER": "x"},
            log=tmp_path / "log",
        )
        started.append(one)
        return one

    yield starting
    for one in started:
        one.end()


def test_a_server_is_waited_for_measured_asked_and_ended(start: Callable[[str], Any]) -> None:
    server = start(SERVER)
    adapter = adapters.plain("/")
    requests = [adapter.request(server.address, text) for text in ("a", "a much longer text")]
    server.wait_until_it_answers(requests[0])
    assert psutil.Process(server._process.pid).cpu_affinity() == [0]
    texts = ["b", "another long text", "c"] * 50
    assert measuring.labels(server, adapter, texts) == ["short", "long", "short"] * 50
    figures = measuring.saturated(server, requests, 0.2)
    assert figures["not_answered"] == 0
    assert figures["answered"] == pytest.approx(figures["rows_per_s"] * 0.2, rel=0.5)
    assert figures["latency_ms"]["p50"] <= figures["latency_ms"]["p99"]
    assert figures["server_cpu_s"] > 0
    figures = measuring.under_arrivals(server, requests, 200, 0.3, seed=1)
    assert figures["answered"] == pytest.approx(60, abs=30)
    family = [psutil.Process(server._process.pid)]
    family += family[0].children(recursive=True)
    assert len(family) == 2  # taskset has become the server
    server.end()
    assert not any(one.is_running() for one in family)


def test_a_server_that_ends_is_not_waited_for(start: Callable[[str], Any]) -> None:
    server = start("import os; print('no such model', os.environ['PEER']); raise SystemExit(2)")
    with pytest.raises(RuntimeError, match="ended before it answered\nno such model x"):
        server.wait_until_it_answers(b"")


# -- what is done, and going on ------------------------------------------------------------------


def test_a_setting_is_judged_by_its_better_pass() -> None:
    tried = [
        {"setting": {"threads": 1}, "rows_per_s": [100.0, 90.0]},
        {"setting": {"threads": 2}, "rows_per_s": [40.0, 120.0]},
    ]
    assert bench.chosen(tried) == {"threads": 2}


def echo(setting: dict[str, Any], _: Any, port: int) -> list[str]:
    return [sys.executable, "-c", SERVER, str(port)]


def make_bench(cache: Path, ends: float = float("inf")) -> Any:
    return bench.Bench(
        places=compared.Places(cache, Path("torch"), Path("int8")),
        texts=["a", "a much longer text", "b"],
        truth=["short", "long", "long"],
        cores=[0],
        progress=bench.Progress(cache / "progress.json", ends),
    )


def test_what_is_done_is_kept_and_what_is_left_waits_for_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench, "TUNE_S", 0.1)
    monkeypatch.setattr(bench, "TUNE_WARM_S", 0.05)
    adapter = adapters.plain("/")
    grid = ({"threads": 1}, {"threads": 2})
    server = compared.Server("one", "", adapter, grid, echo)
    subject = compared.Subject("one, asked", "one", adapter, "torch")
    monkeypatch.setattr(bench, "SERVERS", (server,))
    monkeypatch.setattr(bench, "SUBJECTS", (subject,))
    with pytest.raises(bench.OutOfTime):
        bench.tune(make_bench(tmp_path, ends=0.0), server)
    bench.tune(make_bench(tmp_path), server)
    bench.tune(make_bench(tmp_path, ends=0.0), server)  # there is nothing left to do
    again = make_bench(tmp_path)
    tried = again.progress.done["tuned"]["one"]
    assert [one["setting"] for one in tried] == list(grid)
    assert all(len(one["rows_per_s"]) == 2 and min(one["rows_per_s"]) > 0 for one in tried)
    with bench.all_running(again) as running:
        bench.check(again, running)
        bench.saturate(again, running, rounds=2, seconds=0.1)
    found = make_bench(tmp_path).progress.done
    assert found["checked"]["one, asked"]["accuracy"] == pytest.approx(2 / 3)
    assert [sorted(one) for one in found["saturated"]] == [["one, asked"]] * 2


def test_each_round_begins_with_another() -> None:
    assert [bench.turned([1, 2, 3], by)[0] for by in range(4)] == [1, 2, 3, 1]
    assert sorted(bench.turned([1, 2, 3], 2)) == [1, 2, 3]


# -- the arithmetic ------------------------------------------------------------------------------


def figures(rows_per_s: float, p99: float = 10.0) -> dict[str, Any]:
    return {
        "rows_per_s": rows_per_s,
        "latency_ms": {"p50": p99 / 4, "p95": p99 / 2, "p99": p99},
        "server_cpu_s": 1.0,
        "answered": 100,
    }


@given(
    over=st.floats(1, 1000),
    under=st.floats(1, 1000),
    slower=st.lists(st.floats(0.1, 10), min_size=1, max_size=7),
)
def test_a_machine_that_is_slow_for_a_round_changes_no_ratio(
    over: float, under: float, slower: list[float]
) -> None:
    rounds = [{"a": figures(over * by), "b": figures(under * by)} for by in slower]
    assert comparison.ratio(rounds, "a", "b") == pytest.approx(over / under)


def test_medians_and_who_can_and_how_much() -> None:
    rounds = [
        {"a": figures(100), "b": figures(40), "o": figures(300)},
        {"a": figures(130), "b": figures(50), "o": figures(330)},
        {"a": figures(90), "b": figures(60), "o": figures(90)},
        {"o": figures(320)},
    ]
    assert comparison.median(rounds, "a") == 100
    assert comparison.spread(rounds, "b") == (40, 60)
    assert comparison.ratio(rounds, "o", "a") == pytest.approx(330 / 130)
    assert comparison.fastest(rounds, ["a", "b"]) == "a"
    kinds = {"a": "torch", "b": "onnx", "o": "offramp"}
    assert comparison.rates(rounds, kinds) == {"a": 80, "b": 40}
    assert comparison.able(rounds, 80) == ["a", "o"]
    with pytest.raises(ValueError, match="no round has c"):
        comparison.median(rounds, "c")
    with pytest.raises(ValueError, match="no round has a and c"):
        comparison.ratio(rounds, "a", "c")


def test_equal_accuracy_is_one_point_below_and_no_more() -> None:
    accuracy = {"peer": 0.9, "less": 0.89, "much less": 0.8899, "more": 0.95}
    names = ["less", "much less", "more"]
    assert comparison.as_accurate(accuracy, names, "peer") == ["less", "more"]


def report(**changed: float) -> dict[str, Any]:
    speeds = {"t": 100, "x": 200, "x sorted": 300, "ours": 520, "ours, rash": 2000} | changed
    kinds = {"t": "torch", "x": "onnx", "x sorted": "onnx"}
    kinds |= {"ours": "offramp", "ours, rash": "offramp"}
    found = {
        "kinds": kinds,
        "accuracy": dict.fromkeys(kinds, 0.9) | {"ours, rash": 0.8},
        "agreement": dict.fromkeys(kinds, 1.0),
        "saturated": [{name: figures(speed) for name, speed in speeds.items()}] * 3,
        "rates": {"t": 80.0, "x sorted": 240.0},
        "arrivals": {
            "t": [{name: figures(80, p99=8 if "ours" in name else 20) for name in speeds}],
            "x sorted": [{"x sorted": figures(240, 30), "ours": figures(240, 24)}],
        },
    }
    return found | {"targets": comparison.targets(found)}


def test_the_fast_and_wrong_one_is_not_what_counts() -> None:
    found = {(one["what"], one["peer"]): one for one in report()["targets"]}
    assert {one["subject"] for one in found.values()} == {"ours"}
    for key, value, met in (
        (("rows a second", "t"), 5.2, True),
        (("rows a second", "x"), 2.6, True),
        (("rows a second", "x sorted"), 520 / 300, True),
        (("p99 at its 80 % load", "t"), 0.4, True),
        (("p99 at its 80 % load", "x sorted"), 0.8, False),
    ):
        assert found[key]["found"] == pytest.approx(value)
        assert found[key]["met"] is met
    slower = {(one["what"], one["peer"]): one for one in report(ours=430)["targets"]}
    assert [one["met"] for one in slower.values()] == [False, False, False, True, False]


def test_tables_say_what_was_missed_and_who_could_not() -> None:
    text = comparison.tables(report(ours=430))
    assert "| t | 100 | 100 to 100 |" in text
    assert "**4.30 ×, missed**" in text
    assert "**0.80 ×, missed**" in text
    assert "| t | cannot |" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for line, after in pairwise(rows):
        if after.startswith("|---"):
            assert line.count("|") == after.count("|")
