"""The public face of the package: names, backends, and what every backend refuses."""

import os
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import offramp_kernels
from offramp_kernels import (
    CompactPlan,
    Dense,
    ExitSpec,
    GateWeights,
    SlotTable,
    add_layernorm,
    compact_plan,
    exit_head,
    gather_rows,
    linear,
    varlen_attn,
)

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
import importlib
import offramp_kernels
for name in (
    "add_layernorm", "compact_plan", "exit_head", "gather_rows", "linear", "varlen_attn"
):
    importlib.import_module(f"offramp_kernels.{name}_kernel")
    assert callable(getattr(offramp_kernels, name))
"""

TRITON_REFUSES_CPU_TENSORS = """
import torch
from offramp_kernels import *
from offramp_kernels import Dense, ExitSpec, SlotTable
keep, cu_seqlens = torch.tensor([True, False]), torch.tensor([0, 1, 2], dtype=torch.int32)
plan = compact_plan(keep, cu_seqlens)
x, vector = torch.ones(2, 96), torch.ones(96)
spec = ExitSpec(Dense(x, vector[:2]), exit_layer=1, exit_number=1, is_last=True)
slots, table = torch.zeros(2, dtype=torch.int32), SlotTable.empty(2, 2)
for call in (
    lambda: compact_plan(keep, cu_seqlens, backend="triton"),
    lambda: gather_rows(torch.ones(2, 1), cu_seqlens, plan, backend="triton"),
    lambda: linear(x, x, vector[:2], backend="triton"),
    lambda: add_layernorm(x, vector, vector, eps=1e-5, backend="triton"),
    lambda: varlen_attn(x, cu_seqlens, 1, 16, backend="triton"),
    lambda: exit_head(x, cu_seqlens, plan.counts, slots, spec, table, backend="triton"),
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


def row_view(rows: int, columns: int) -> torch.Tensor:
    """Rows with a gap between them."""
    return torch.randn(rows, columns + 1)[:, :columns]


X, WEIGHT, BIAS = torch.randn(5, 4), torch.randn(3, 4), torch.randn(3)
COUNTS = torch.tensor([3, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"x": X.double()}, r"x cannot be torch\.float64"),
        ({"x": row_view(5, 4)}, "x must be contiguous"),
        ({"weight": WEIGHT[0]}, r"weight must be \[N, K\]"),
        ({"weight": WEIGHT[:, :3]}, r"weight must be \[3, 4\]"),
        ({"weight": WEIGHT[:0], "bias": BIAS[:0]}, "at least one output"),
        ({"weight": WEIGHT.half()}, r"weight must be torch\.float32"),
        ({"bias": BIAS[:2]}, r"bias must be \[3\]"),
        ({"activation": "relu"}, "unknown activation 'relu'; known: none, gelu, gelu_tanh"),
        ({"residual": X}, r"residual must be \[5, 3\]"),
        ({"counts": COUNTS.long()}, "counts must be int32"),
        ({"counts": CU_SEQLENS}, r"counts must be \[2\]"),
        ({"out": row_view(5, 3)}, "out must be contiguous"),
        ({"out": torch.empty(5, 3, device="meta")}, "out is on meta"),
        ({"out": X.view(-1)[:15].view(5, 3)}, "out must not overlap x"),
    ],
)
def test_linear_contract(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        linear(**({"x": X, "weight": WEIGHT, "bias": BIAS} | changed))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"x": torch.randn(2, 1025)}, "x may be 1024 wide, got 1025"),
        ({"weight": BIAS}, r"weight must be \[4\]"),
        ({"bias": X[0].half()}, r"bias must be torch\.float32"),
        ({"input_bias": X[0].to("meta")}, "input_bias is on meta"),
        ({"residual": X[:4]}, r"residual must be \[5, 4\]"),
        ({"counts": COUNTS[:1]}, r"counts must be \[2\]"),
        ({"out": X.new_empty(6, 4)[:4]}, r"out must be \[5, 4\]"),
    ],
)
def test_norm_contract(changed: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {"x": X, "weight": X[0], "bias": X[1], "eps": 1e-12}
    with pytest.raises(ValueError, match=complaint):
        add_layernorm(**(arguments | changed))


QKV = torch.randn(5, 3 * 64)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"qkv": QKV.double()}, r"qkv cannot be torch\.float64"),
        ({"qkv": QKV[:, :191].contiguous()}, "qkv must be 3 . 2 heads wide, got 191"),
        ({"num_heads": 4}, "heads must be 32, 64 wide, got 16"),
        ({"num_heads": 0}, "qkv must be 3 . 0 heads wide"),
        ({"max_length": 129}, "1 to 128 tokens, got max_length 129"),
        ({"max_length": 1}, "a text has 2 tokens, max_length is 1"),
        ({"cu_seqlens": CU_SEQLENS[:0]}, r"cu_seqlens must be \[B \+ 1\]"),
        ({"cu_seqlens": CU_SEQLENS.long()}, "cu_seqlens must be int32"),
        ({"counts": CU_SEQLENS}, r"counts must be \[2\]"),
        ({"out": torch.empty(5, 32)}, r"out must be \[5, 64\]"),
        ({"out": QKV.view(-1)[:320].view(5, 64)}, "out must not overlap qkv"),
    ],
)
def test_attention_contract(changed: dict[str, Any], complaint: str) -> None:
    arguments = {"qkv": QKV, "cu_seqlens": CU_SEQLENS, "num_heads": 2, "max_length": 16}
    with pytest.raises(ValueError, match=complaint):
        varlen_attn(**(arguments | changed))


SPEC: dict[str, Any] = {
    "classifier": Dense(WEIGHT, BIAS),
    "exit_layer": 1,
    "exit_number": 1,
    "is_last": False,
}
TABLE = SlotTable.empty(7, 3)


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"hidden": X.double()}, r"hidden cannot be torch\.float64"),
        ({"hidden": torch.randn(5, 3)}, "hidden must be 4 wide, got 3"),
        ({"slots": COUNTS}, r"cu_seqlens must be \[3\]"),
        ({"slots": CU_SEQLENS[:3].long()}, "slots must be int32"),
        ({"slots": CU_SEQLENS[None]}, r"slots must be \[B\]"),
        ({"counts": CU_SEQLENS}, r"counts must be \[2\]"),
        ({"source": COUNTS}, r"source must be \[3\]"),
        ({"slots_out": COUNTS}, r"slots_out must be \[3\]"),
        ({"slots_out": CU_SEQLENS[1:]}, "slots_out must not overlap slots"),
        ({"out": KEEP.int()}, r"out must be torch\.bool"),
        ({"table": SlotTable.empty(7, 2)}, "a table of 2 classes, an exit of 3"),
        ({"table": replace(TABLE, label=TABLE.label.long())}, r"table\.label must be torch\.int32"),
        ({"table": replace(TABLE, ballots=TABLE.ballots[:6])}, r"table\.ballots must be \[7, 3\]"),
    ],
)
def test_exit_contract(changed: dict[str, Any], complaint: str) -> None:
    arguments: dict[str, Any] = {
        "hidden": X,
        "cu_seqlens": CU_SEQLENS,
        "counts": COUNTS,
        "slots": CU_SEQLENS[:3],
        "spec": ExitSpec(**SPEC),
        "table": TABLE,
    }
    with pytest.raises(ValueError, match=complaint):
        exit_head(**(arguments | changed))


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"pooling": "max"}, "unknown pooling 'max'; known: cls, mean, mean_cls"),
        ({"vote_fallback": "first"}, "unknown vote fallback 'first'; known: last, majority"),
        ({"exit_number": 0}, r"exit_number must lie in \[1, 1024\)"),
        ({"exit_layer": 0}, "exit_layer counts from 1"),
        ({"classifier": Dense(WEIGHT.half(), BIAS)}, "classifier.weight must be float32"),
        ({"classifier": Dense(WEIGHT, BIAS[:2])}, r"classifier.bias must be \[3\]"),
        ({"classifier": Dense(WEIGHT[:1], BIAS[:1])}, "2 to 256 classes, got 1"),
        ({"classifier": Dense(row_view(3, 4), BIAS)}, "classifier.weight must be contiguous"),
        ({"pooler": Dense(WEIGHT, BIAS)}, r"pooler.weight must be \[4, in\]"),
        ({"gate": GateWeights(Dense(WEIGHT, BIAS))}, r"gate.out.weight must be \[1, 4\]"),
        (
            {"gate": GateWeights(Dense(WEIGHT[:1], BIAS[:1]), Dense(WEIGHT, BIAS))},
            r"gate.out.weight must be \[1, 3\]",
        ),
        ({"pooler": Dense(WEIGHT.to("meta"), BIAS)}, "pooler.weight is on meta"),
    ],
)
def test_an_exit_is_checked_when_it_is_made(changed: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        ExitSpec(**(SPEC | changed))
