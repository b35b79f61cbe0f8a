"""Triton kernels, their plain-torch twins and the dispatch between them."""

from offramp_kernels.dispatch import compact_plan, gather_rows
from offramp_kernels.plan import CompactPlan

__all__ = ["CompactPlan", "compact_plan", "gather_rows"]
