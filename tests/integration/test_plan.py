"""The planner reads what a server that runs tells about itself."""

import json
from pathlib import Path
from typing import Any

import pytest

from offramp_service.__main__ import main


async def test_a_plan_from_a_server_that_measured_its_costs(
    running: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with running(warmup=True) as client:
        info = (await client.get("/info")).json()
    for point in info["calibration"]["points"]:
        shares = point["exit_shares"]
        assert len(shares) == info["num_layers"]
        assert sum(shares) == pytest.approx(1, abs=1e-4)
        mean = sum(layer * share for layer, share in enumerate(shares, 1))
        assert mean == pytest.approx(point["mean_exit_layer"], abs=1e-3)
    (tmp_path / "info.json").write_text(json.dumps(info))
    capsys.readouterr()
    ask = ["--rate", "100", "--slo", "500", "--tokens", "12", "--speedup", "1.25", "--json"]
    assert main(["plan", *ask, "--costs", str(tmp_path / "info.json")]) == 0
    report = json.loads(capsys.readouterr().out)
    (machine,) = report["machines"]
    assert machine["replicas"] >= 1
    assert machine["forecast"]["p99_s"] <= 0.5
