"""The soak in short: everything at once against the real command, and every promise checked."""

import json
from pathlib import Path

import pytest

from loading import load

# Twenty seconds are too short for allocators to have seen everything; `make soak` is not.
MEMORY_MAY_GROW = 0.2


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_twenty_seconds_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    support, soak = load("tests/unit/service/support.py"), load("service/bench/soak.py")
    monkeypatch.setattr(soak, "MEMORY_MAY_GROW", MEMORY_MAY_GROW)
    checkpoint = support.write_tiny_checkpoint(tmp_path / "tiny")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(support.random_texts(40, seed=5)))
    capsys.readouterr()
    code = soak.main([str(checkpoint), "--texts", str(texts), "--seconds", "20"])
    report = json.loads(capsys.readouterr().out)
    assert report["violations_shown"] == []
    assert code == 0
    assert report["exit_code"] == 0
    assert report["texts_compared"] > 500
    assert report["checkpoint_exchanges"] == 2
    for kind, least in {
        "single, 200": 50,
        "list, 200": 50,
        "tei, 200": 20,
        "v2, 200": 20,
        "departure, left": 30,
    }.items():
        assert report["requests"][kind] >= least
    assert report["requests"]["not JSON, 400"] + report["requests"]["oversized body, 413"] > 0
