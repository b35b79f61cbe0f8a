"""The public face of the package: names, backends, and what every backend refuses."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import offramp_kernels
from offramp_kernels import CompactPlan, compact_plan, gather_rows

KEEP = torch.tensor([True, False, True])
CU_SEQLENS = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
VALUES = torch.randn(5, 4)

WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it now fails
import torch
from offramp_kernels import compact_plan, gather_rows
cu_seqlens = torch.tensor([0, 2, 3, 5], dtype=torch.int32)
plan = compact_plan(torch.tensor([True, False, True]), cu_seqlens)
packed = gather_rows(torch.arange(5.0)[:, None], cu_seqlens, plan)
assert packed.flatten().tolist() == [0.0, 1.0, 3.0, 4.0]
"""

MODULES_DO_NOT_HIDE_FUNCTIONS = """
import offramp_kernels.compact_plan_kernel, offramp_kernels.gather_rows_kernel
assert callable(offramp_kernels.compact_plan) and callable(offramp_kernels.gather_rows)
"""

TRITON_REFUSES_CPU_TENSORS = """
import torch
from offramp_kernels import compact_plan, gather_rows
keep, cu_seqlens = torch.tensor([True, False]), torch.tensor([0, 1, 2], dtype=torch.int32)
plan = compact_plan(keep, cu_seqlens)
for call in (
    lambda: compact_plan(keep, cu_seqlens, backend="triton"),
    lambda: gather_rows(torch.ones(2, 1), cu_seqlens, plan, backend="triton"),
):
    try:
        call()
    except ValueError as error:
        assert "Triton runs on CUDA tensors" in str(error)
    else:
        raise AssertionError("not refused")
"""


def test_exports_are_sorted_and_exist() -> None:
    assert offramp_kernels.__all__ == sorted(offramp_kernels.__all__)
    assert all(hasattr(offramp_kernels, name) for name in offramp_kernels.__all__)


@pytest.mark.parametrize(
    "program",
    [
        pytest.param(WITHOUT_TRITON, id="without-triton"),
        pytest.param(MODULES_DO_NOT_HIDE_FUNCTIONS, id="modules-do-not-hide-functions"),
        pytest.param(TRITON_REFUSES_CPU_TENSORS, id="triton-refuses-cpu-tensors"),
    ],
)
def test_in_a_fresh_process(program: str) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr


def test_the_reference_backend_is_what_a_cpu_gets() -> None:
    auto = compact_plan(KEEP, CU_SEQLENS)
    asked_for = compact_plan(KEEP, CU_SEQLENS, backend="reference")
    assert torch.equal(auto.source, asked_for.source)
    assert torch.equal(
        gather_rows(VALUES, CU_SEQLENS, auto),
        gather_rows(VALUES, CU_SEQLENS, auto, backend="reference"),
    )


def test_an_unknown_backend_is_answered_with_the_known_ones() -> None:
    wrong: Any = "cuda"
    with pytest.raises(ValueError, match="unknown backend 'cuda'; known: auto, triton, reference"):
        compact_plan(KEEP, CU_SEQLENS, backend=wrong)


@pytest.mark.parametrize(
    ("keep", "cu_seqlens", "complaint"),
    [
        (KEEP.int(), CU_SEQLENS, "keep must be bool"),
        (KEEP[None], CU_SEQLENS, r"keep must be \[B\]"),
        (KEEP.repeat(2)[::2], CU_SEQLENS, "keep must be contiguous"),
        (torch.ones(4097, dtype=torch.bool), torch.zeros(4098, dtype=torch.int32), "4096 rows"),
        (KEEP, CU_SEQLENS.long(), "cu_seqlens must be int32"),
        (KEEP, CU_SEQLENS[:3], r"cu_seqlens must be \[4\]"),
        (KEEP, CU_SEQLENS.repeat(2)[::2], "cu_seqlens must be contiguous"),
        (KEEP, CU_SEQLENS.to("meta"), "cu_seqlens is on meta"),
    ],
)
def test_plan_contract(keep: torch.Tensor, cu_seqlens: torch.Tensor, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        compact_plan(keep, cu_seqlens)


PLAN = compact_plan(KEEP, CU_SEQLENS)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"values": VALUES.int()}, "values cannot be torch.int32"),
        ({"values": VALUES[0]}, r"values must be \[T, H\]"),
        ({"values": VALUES[:, :0]}, "at least one column"),
        ({"values": VALUES.T.contiguous().T}, "values must be contiguous"),
        ({"cu_seqlens": CU_SEQLENS[:3]}, r"cu_seqlens must be \[4\]"),
        ({"cu_seqlens": CU_SEQLENS.long()}, "cu_seqlens must be int32"),
        ({"plan": replace(PLAN, source=PLAN.source.long())}, "plan.source must be int32"),
        ({"plan": replace(PLAN, cu_seqlens=CU_SEQLENS[:3])}, r"plan.cu_seqlens must be \[4\]"),
        ({"plan": replace(PLAN, counts=CU_SEQLENS)}, r"plan.counts must be \[2\]"),
        ({"plan": replace(PLAN, counts=PLAN.counts.to("meta"))}, "plan.counts is on meta"),
        ({"out": torch.empty(5, 4, dtype=torch.float16)}, "out is torch.float16"),
        ({"out": torch.empty(5, 3)}, "out must be 4 wide"),
        ({"out": torch.empty(5, 8)[:, :4]}, "out must be contiguous"),
        ({"out": torch.empty(5, 4, device="meta")}, "out is on meta"),
        ({"out": VALUES}, "must not overlap"),
        ({"out": VALUES[1:]}, "must not overlap"),
    ],
)
def test_gather_contract(changed: dict[str, Any], complaint: str) -> None:
    arguments = {"values": VALUES, "cu_seqlens": CU_SEQLENS, "plan": PLAN, "out": None} | changed
    with pytest.raises(ValueError, match=complaint):
        gather_rows(**arguments)


def test_neighbouring_slices_of_one_buffer_do_not_overlap() -> None:
    buffer = torch.randn(10, 4)
    gather_rows(buffer[:5], CU_SEQLENS, PLAN, out=buffer[5:])
    assert torch.equal(buffer[5:9], buffer[[0, 1, 3, 4]])


def test_a_plan_is_frozen() -> None:
    plan: Any = CompactPlan(PLAN.source, PLAN.cu_seqlens, PLAN.counts)
    with pytest.raises(AttributeError):
        plan.source = None
