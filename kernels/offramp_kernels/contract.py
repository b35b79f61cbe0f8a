"""What callers owe the ops: shapes, dtypes, layout and devices, checked from metadata alone.

Both backends call these checks, so a call that passes on the CPU passes on a GPU. Knows nothing
about tensor *contents*: reading them would synchronise. Every breach is a ValueError.
"""

import torch
from torch import Tensor

from offramp_kernels.plan import CompactPlan

MAX_ROWS = 4096
"""Rows of a batch: one program scans them all."""

COPY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_plan_inputs(keep: Tensor, cu_seqlens: Tensor) -> None:
    """keep: bool [B], cu_seqlens: int32 [B + 1], contiguous, one device, B <= MAX_ROWS."""
    if keep.dtype is not torch.bool:
        raise ValueError(f"keep must be bool, got {keep.dtype}")
    if keep.dim() != 1:
        raise ValueError(f"keep must be [B], got shape {tuple(keep.shape)}")
    rows = keep.shape[0]
    if rows > MAX_ROWS:
        raise ValueError(f"at most {MAX_ROWS} rows, got {rows}")
    if not keep.is_contiguous():
        raise ValueError("keep must be contiguous")
    _check_index("cu_seqlens", cu_seqlens, rows + 1, keep.device)


def check_gather_inputs(
    values: Tensor, cu_seqlens: Tensor, plan: CompactPlan, out: Tensor | None
) -> None:
    """values: [T, H], cu_seqlens: int32 [B + 1], plan of capacity B, out: None or [capacity, H]."""
    _check_token_rows("values", values)
    rows, device = plan.capacity, values.device
    _check_index("cu_seqlens", cu_seqlens, rows + 1, device)
    _check_index("plan.source", plan.source, rows, device)
    _check_index("plan.cu_seqlens", plan.cu_seqlens, rows + 1, device)
    _check_index("plan.counts", plan.counts, 2, device)
    if out is None:
        return
    _check_token_rows("out", out)
    if out.device != device:
        raise ValueError(f"out is on {out.device}, values on {device}")
    if out.dtype is not values.dtype:
        raise ValueError(f"out is {out.dtype}, values {values.dtype}")
    if out.shape[1] != values.shape[1]:
        raise ValueError(f"out must be {values.shape[1]} wide, got {out.shape[1]}")
    if _overlap(values, out):
        raise ValueError("out must not overlap values: the gather is out of place")


def _check_token_rows(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in COPY_DTYPES:
        raise ValueError(f"{name} cannot be {tensor.dtype}; known: {COPY_DTYPES}")
    if tensor.dim() != 2:
        raise ValueError(f"{name} must be [T, H], got shape {tuple(tensor.shape)}")
    if tensor.shape[1] == 0:
        raise ValueError(f"{name} must be at least one column wide")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")


def _check_index(name: str, tensor: Tensor, length: int, device: torch.device) -> None:
    if tensor.dtype is not torch.int32:
        raise ValueError(f"{name} must be int32, got {tensor.dtype}")
    if tensor.shape != (length,):
        raise ValueError(f"{name} must be [{length}], got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two contiguous tensors share a byte."""
    return (
        first.data_ptr() < second.data_ptr() + second.nbytes
        and second.data_ptr() < first.data_ptr() + first.nbytes
    )
