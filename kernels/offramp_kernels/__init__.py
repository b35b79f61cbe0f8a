"""Triton kernels, their plain-torch twins and the dispatch between them."""

from offramp_kernels.dispatch import compact_plan, exit_head, gather_rows
from offramp_kernels.exits import RULES, Dense, ExitSpec, GateWeights, SlotTable
from offramp_kernels.plan import CompactPlan

__all__ = [
    "RULES",
    "CompactPlan",
    "Dense",
    "ExitSpec",
    "GateWeights",
    "SlotTable",
    "compact_plan",
    "exit_head",
    "gather_rows",
]
