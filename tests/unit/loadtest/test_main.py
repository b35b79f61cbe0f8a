"""The command against a made-up server: flags, files, exit codes."""

import json
import multiprocessing
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trustme

from loading import load
from offramp_loadtest.__main__ import DONE, MISSED, UNREACHABLE, WRONG, main

support = load("tests/unit/loadtest/server.py")

INFO = {
    "served_model_name": "clf",
    "num_layers": 6,
    "model_type": {"classifier": {"id2label": {"0": "no", "1": "yes"}}},
}


def respond(request: bytes) -> bytes:
    """As `offramp-serve` would, to the few things that are asked here."""
    status, content = b"200 OK", {"data": [{"label": "yes"}]}
    if request.startswith(b"GET /info"):
        content = INFO
    elif b"authorization: Bearer right" not in request and b"x-open" not in request:
        status, content = b"401 No", {"error": "who are you?"}
    body = json.dumps(content).encode()
    head = b"HTTP/1.1 %s\r\nx-exit-layer: 3\r\ncontent-length: %d\r\n\r\n" % (status, len(body))
    return head + body


@pytest.fixture
def server() -> Iterator[Any]:
    with support.running() as start:
        yield start(support.Server(answer=respond))


def command(server: Any, *words: str) -> list[str]:
    port = str(server.address.port)
    return ["--port", port, "--rate", "100", "--seconds", "0.6", "--quiet", *words]


def test_flags_alone_are_a_run(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "rows.jsonl"
    texts.write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 0}\n')
    files = {name: tmp_path / f"r.{name}" for name in ("json", "html", "hgrm")}
    words = [word for name, path in files.items() for word in (f"--{name}", str(path))]
    code = main(
        command(
            *(server, "--texts", str(texts), "--header", "x-open: 1", *words),
            *("--pattern", "constant", "--speedup", "2:3", "--speedup", "1", "--warm-up", "0.1"),
        )
    )
    assert code == DONE
    assert "flags: 50 requests due in 0.5 s, 100.0/s" in capsys.readouterr().out
    report = json.loads(files["json"].read_text())
    assert report["requests"]["statuses"] == {"200": 50}
    assert report["requests"]["in_warm_up"] == 10
    assert report["target"]["model"] == "clf"
    assert report["exits"]["speedup_achieved"] == 2.0
    assert 0.2 < report["accuracy"]["accuracy"] < 0.8
    assert set(report["by"]["controls"]) == {"speedup 1", "speedup 2"}
    assert report["scenario"]["controls"][0]["truncate"] is True  # as before the flag
    assert "<svg" in files["html"].read_text()
    assert "Percentile" in files["hgrm"].read_text()
    assert all(b'"truncate_prompt_tokens"' in one for one in server.requests[1:])


def test_exit_codes(
    server: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "right")
    keyed = command(server, "--api-key-env", "MY_KEY")
    assert main([*keyed, "--slo-error-share", "0", "--slo-p99-ms", "5000"]) == DONE
    assert main([*keyed, "--slo-rate", "5000"]) == MISSED
    assert "rate at least 5000" in capsys.readouterr().out
    assert main(command(server, "--slo-error-share", "0")) == MISSED  # without the key
    assert main([*keyed, "--set", "nonsense=1"]) == WRONG
    assert "unknown: nonsense; allowed: name" in capsys.readouterr().err
    assert main(command(server, "--api-key-env", "NOT_SET_ANYWHERE")) == WRONG
    assert main(command(server, "--json", "/nowhere/at/all.json")) == WRONG
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        target = f"127.0.0.1:{nobody.getsockname()[1]}"
        assert main(["--target", target, "--quiet"]) == UNREACHABLE
    assert "does not answer" in capsys.readouterr().err


def test_a_scenario_with_flags_over_it(server: Any, tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        '[arrivals]\npattern = "ramp"\nfrom_rate = 10.0\nto_rate = 50.0\nramp_s = 0.5\n'
        '[[texts]]\nwords = {distribution = "always", words = 3}\n'
    )
    target = f"http://127.0.0.1:{server.address.port}"
    out = tmp_path / "r.json"
    words = ["run", str(path), "--target", target, "--header", "x-open: 1", "--json", str(out)]
    assert main([*words, "--scale", "2", "--set", "clients.malformed_share=0.5", "--quiet"]) == DONE
    report = json.loads(out.read_text())
    assert report["name"] == "mine"
    assert report["scenario"]["arrivals"]["to_rate"] == 100.0
    assert report["requests"]["malformed"]
    assert report["requests"]["malformed_wrongly_answered"] > 0  # this server takes anything


def test_a_trace_and_a_closed_loop(server: Any, tmp_path: Path) -> None:
    trace, out = tmp_path / "trace.jsonl", tmp_path / "r.json"
    trace.write_text("\n".join(json.dumps({"at_s": at / 50, "words": 3}) for at in range(20)))
    words = ["--target", f"127.0.0.1:{server.address.port}", "--header", "x-open: 1", "--quiet"]
    assert main([*words, "--trace", str(trace), "--json", str(out)]) == DONE
    assert json.loads(out.read_text())["requests"]["statuses"] == {"200": 20}
    assert main([*words, "--in-flight", "3", "--seconds", "0.3", "--json", str(out)]) == DONE
    report = json.loads(out.read_text())
    assert report["generator"]["connections"] == 3
    assert any("closed loop" in one for one in report["warnings"])


def test_over_tls_only_who_is_trusted_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    authority, context = trustme.CA(), ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca_file, out = tmp_path / "ca.pem", tmp_path / "r.json"
    authority.cert_pem.write_to_path(str(ca_file))
    with support.running() as start:
        server = start(support.Server(answer=respond, tls=context))
        words = ["--target", f"https://127.0.0.1:{server.address.port}", "--header", "x-open: 1"]
        words += ["--rate", "50", "--seconds", "0.4", "--pattern", "constant", "--quiet"]
        assert main([*words, "--set", f"target.ca_file={ca_file}", "--json", str(out)]) == DONE
        assert json.loads(out.read_text())["requests"]["statuses"] == {"200": 20}
        assert main(words) == UNREACHABLE
    assert "certificate verify failed" in capsys.readouterr().err


@pytest.mark.timeout(120)
def test_processes_share_a_run_and_reports_are_merged(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    words = command(server, "--header", "x-open: 1", "--pattern", "constant")
    assert main([*words, "--processes", "2", "--json", str(one)]) == DONE
    assert main([*words, "--json", str(two)]) == DONE
    first, second = (json.loads(path.read_text()) for path in (one, two))
    assert first["generator"]["processes"] == 2
    assert first["requests"]["statuses"] == second["requests"]["statuses"] == {"200": 60}
    html = tmp_path / "both.html"
    assert main(["merge", str(one), str(two), "--html", str(html)]) == DONE
    assert "flags: 120 requests due" in capsys.readouterr().out
    assert "<svg" in html.read_text()
    one.write_text("{}")
    assert main(["merge", str(one), str(two)]) == WRONG


@pytest.mark.parametrize("processes", ["1", "2"])
def test_ctrl_c_ends_the_sending_and_tells_what_there_is(
    server: Any, tmp_path: Path, processes: str
) -> None:
    out = tmp_path / "r.json"
    words = ["--port", str(server.address.port), "--rate", "50", "--seconds", "300"]
    words += ["--header", "x-open: 1", "--json", str(out), "--processes", processes]
    command = [sys.executable, "-m", "offramp_loadtest", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        deadline = time.monotonic() + 30
        while len(server.requests) < 20:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == DONE
    report = json.loads(out.read_text())
    assert 15 <= report["requests"]["due"] < 1000
    assert report["seconds"] < 20
    assert set(report["requests"]["statuses"]) == {"200"}


def test_what_a_process_cannot_do_is_told_and_ends_all(
    server: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    began = time.monotonic()
    words = command(server, "--processes", "3", "--texts", str(tmp_path / "none.jsonl"))
    assert main(words) == WRONG
    assert "texts.file: " in capsys.readouterr().err
    assert time.monotonic() - began < 20
    assert multiprocessing.active_children() == []


def test_scenarios_are_listed_and_checked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == DONE
    assert "step-overload" in capsys.readouterr().out
    assert main(["check", "step-overload", "--scale", "0.5"]) == DONE
    assert capsys.readouterr().out == "step-overload: step, 90 s\n"
    assert main(["check", "steady", "--rate", "-5"]) == WRONG
    assert "arrivals.poisson.rate: -5.0 given" in capsys.readouterr().err
    assert main(["check", "steady", "--door", "vllm:x"]) == WRONG
    assert main(["check", "steady", "--set", "seed"]) == WRONG


def test_help_is_asked_for_by_saying_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["offramp-load"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    assert "offramp-load run" in capsys.readouterr().out
