"""Ahead-of-time gates: what becomes of every kernel on sm_80 and sm_90; needs no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "compile_kernels.py"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
REGISTERS_PER_SM = 65_536
ARCHITECTURES = (80, 90)


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton-cache"))
    run = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT],
        env=environment,
        capture_output=True,
        text=True,
        timeout=55,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_every_config_is_compiled_for_both_architectures(builds: list[dict[str, Any]]) -> None:
    compiled = {(build["name"], build["architecture"]) for build in builds}
    names = {f"compact_plan-{block}" for block in (128, 1024, 4096)}
    names |= {f"gather_rows-{w}-{d}" for w in (384, 768) for d in ("fp16", "bf16", "fp32")}
    assert compiled == {(name, architecture) for name in names for architecture in ARCHITECTURES}


def test_nothing_spills(builds: list[dict[str, Any]]) -> None:
    for build in builds:
        assert build["usage"]["LOCAL"] == 0, build
        assert build["usage"]["STACK"] == 0, build


def test_programs_fit_on_an_sm(builds: list[dict[str, Any]]) -> None:
    for build in builds:
        threads = 32 * build["num_warps"]
        assert 0 < build["usage"]["REG"] * threads <= REGISTERS_PER_SM, build
        shared = max(build["shared"], build["usage"]["SHARED"])
        assert shared <= SHARED_LIMIT[build["architecture"]], build


def test_gathers_leave_room_for_many_programs(builds: list[dict[str, Any]]) -> None:
    """A copy lives off the loads in flight: 64 registers let 8 programs of 4 warps share an SM."""
    for build in builds:
        if build["name"].startswith("gather_rows"):
            assert build["usage"]["REG"] <= 64, build


def test_gathers_copy_16_bytes_at_a_time(builds: list[dict[str, Any]]) -> None:
    gathers = [build for build in builds if build["name"].startswith("gather_rows")]
    assert gathers
    for build in gathers:
        assert set(build["accesses"]) == {
            "ld.global.b32",  # source and offsets, scalars
            "ld.global.v4.b32",
            "st.global.v4.b32",
        }, build
