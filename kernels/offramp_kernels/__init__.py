"""Triton kernels, their plain-torch twins and the dispatch between them."""

from offramp_kernels.dispatch import (
    add_layernorm,
    compact_plan,
    exit_head,
    gather_rows,
    linear,
    varlen_attn,
)
from offramp_kernels.exits import Dense, ExitSpec, GateWeights, SlotTable
from offramp_kernels.plan import CompactPlan

__all__ = [
    "CompactPlan",
    "Dense",
    "ExitSpec",
    "GateWeights",
    "SlotTable",
    "add_layernorm",
    "compact_plan",
    "exit_head",
    "gather_rows",
    "linear",
    "varlen_attn",
]
