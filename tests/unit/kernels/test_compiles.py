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


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("core", marks=pytest.mark.timeout(200)),
        pytest.param("all", marks=[pytest.mark.slow, pytest.mark.timeout(600)]),
    ],
)
def builds(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton-cache"))
    run = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT, request.param],
        env=environment,
        capture_output=True,
        text=True,
        timeout=590 if request.param == "all" else 190,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def of(builds: list[dict[str, Any]], prefix: str) -> list[dict[str, Any]]:
    found = [build for build in builds if build["name"].startswith(prefix)]
    assert found
    return found


def test_every_config_is_compiled_for_both_architectures(builds: list[dict[str, Any]]) -> None:
    compiled = {(build["name"], build["architecture"]) for build in builds}
    names = {f"compact_plan-{block}" for block in (128, 1024, 4096)}
    names |= {f"gather_rows-{w}-{d}" for w in (384, 768) for d in ("fp16", "bf16", "fp32")}
    if len(builds) > 30:  # all, not only the core
        names |= {
            f"varlen_attn-{block}-{dim}-{dtype}"
            for block in (16, 32, 64, 128)
            for dim in (32, 64)
            for dtype in ("bf16", "fp32")
        }
        names |= {f"add_layernorm-{w}" for w in ("128-fp32", "384-bf16", "768-bf16", "1024-fp32")}
        for prefix, configs in (("exit_head", 5), ("linear-large", 4), ("linear-small", 2)):
            assert len(of(builds, prefix)) == 2 * configs
    assert compiled >= {(name, architecture) for name in names for architecture in ARCHITECTURES}


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


def test_big_products_run_on_the_tensor_cores_of_their_architecture(
    builds: list[dict[str, Any]],
) -> None:
    for build in of(builds, "linear-large") + of(builds, "linear-small"):
        expected = {80: "mma.sync", 90: "wgmma.mma_async"}[build["architecture"]]
        assert build["products"] == [expected], build
    for build in of(builds, "varlen_attn-128-64-bf16"):
        expected = {80: "mma.sync", 90: "wgmma.mma_async"}[build["architecture"]]
        assert build["products"] == [expected], build


def test_fp32_linear_stays_off_the_tensor_cores(builds: list[dict[str, Any]]) -> None:
    """TF32 would be off by 3e-4."""
    for build in (build for build in builds if build["name"].startswith("linear-precise")):
        assert build["products"] == [], build


def test_two_large_tiles_share_an_sm(builds: list[dict[str, Any]]) -> None:
    """One tile's loads hide behind the other's products."""
    for build in of(builds, "linear-large"):
        if build["architecture"] == 90:
            assert 2 * 32 * build["num_warps"] * build["usage"]["REG"] <= REGISTERS_PER_SM, build
            assert 2 * build["shared"] <= SHARED_LIMIT[90], build


def test_a_row_of_an_exit_leaves_room_for_others(builds: list[dict[str, Any]]) -> None:
    """Few classes: a program per row, four at least on an SM."""
    for build in of(builds, "exit_head-768-2-"):
        assert build["usage"]["REG"] <= 128, build


def test_rows_are_stored_16_bytes_at_a_time(builds: list[dict[str, Any]]) -> None:
    halves = [build for build in of(builds, "varlen_attn") if build["name"].endswith("bf16")]
    for build in of(builds, "add_layernorm") + of(builds, "linear") + halves:
        stores = {access for access in build["accesses"] if access.startswith("st.")}
        assert stores == {"st.global.v4.b32"}, build
