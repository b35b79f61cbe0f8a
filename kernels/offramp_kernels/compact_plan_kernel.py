"""Compaction plan on the GPU: one program scans the keep flags of a batch of at most 4096 rows.

Knows nothing about hidden states or about why a row stays. Importing this file imports Triton;
``dispatch`` does so on first use.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import MAX_ROWS, check_plan_inputs
from offramp_kernels.launch import check_launch_device
from offramp_kernels.plan import CompactPlan


@dataclass(frozen=True, slots=True)
class ScanConfig:
    block: int
    num_warps: int


# The smallest block that holds the batch's capacity; three binaries in all.
SCAN_CONFIGS = (ScanConfig(128, 1), ScanConfig(1024, 4), ScanConfig(MAX_ROWS, 8))


@triton.jit(do_not_specialize=["n_rows"])
def compact_plan_kernel(
    keep_ptr,  # bool [n_rows]
    cu_seqlens_ptr,  # int32 [n_rows + 1]
    source_ptr,  # int32 [n_rows], out
    new_cu_seqlens_ptr,  # int32 [n_rows + 1], out
    counts_ptr,  # int32 [2], out
    n_rows,
    BLOCK: tl.constexpr,
):
    """rank = exclusive cumsum(keep), new start = exclusive cumsum(keep * length).

    Places below n_alive are written by the survivor of that rank, the others by the row of that
    number: two disjoint masks, so no store has to wait for another.
    """
    row = tl.arange(0, BLOCK)
    in_batch = row < n_rows
    keep = tl.load(keep_ptr + row, mask=in_batch, other=0).to(tl.int32)
    start = tl.load(cu_seqlens_ptr + row, mask=in_batch, other=0)
    end = tl.load(cu_seqlens_ptr + row + 1, mask=in_batch, other=0)
    kept_length = tl.where(keep != 0, end - start, 0)

    rank = tl.cumsum(keep, 0) - keep
    new_start = tl.cumsum(kept_length, 0) - kept_length
    n_alive = tl.sum(keep, 0)
    t_alive = tl.sum(kept_length, 0)

    alive = keep != 0
    vacant = in_batch & (row >= n_alive)
    tl.store(source_ptr + rank, row, mask=alive)
    tl.store(source_ptr + row, -1, mask=vacant)
    tl.store(new_cu_seqlens_ptr + rank, new_start, mask=alive)
    tl.store(new_cu_seqlens_ptr + row, t_alive, mask=vacant)
    tl.store(new_cu_seqlens_ptr + n_rows, t_alive)
    tl.store(counts_ptr, n_alive)
    tl.store(counts_ptr + 1, t_alive)


def compact_plan(keep: Tensor, cu_seqlens: Tensor) -> CompactPlan:
    """Plan the move of the rows with ``keep`` set to the front, in their order.

    keep        bool [B], contiguous, B <= 4096 (0 is allowed)
    cu_seqlens  int32 [B + 1], contiguous, from 0, never falling (contents are not checked: that
                would synchronise)
    both on the current CUDA device (or on the CPU when Triton interprets)

    Returns new tensors of capacity B; see CompactPlan. One launch, no synchronisation. A breach
    of the contract raises ValueError.
    """
    check_plan_inputs(keep, cu_seqlens)
    check_launch_device(compact_plan_kernel, keep.device)
    rows = keep.shape[0]
    plan = CompactPlan(
        source=torch.empty_like(cu_seqlens[:rows]),
        cu_seqlens=torch.empty_like(cu_seqlens),
        counts=cu_seqlens.new_empty(2),
    )
    config = scan_config(rows)
    compact_plan_kernel[(1,)](
        keep,
        cu_seqlens,
        plan.source,
        plan.cu_seqlens,
        plan.counts,
        rows,
        BLOCK=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # nothing to fuse; said because Triton's default is changing
    )
    return plan


def scan_config(rows: int) -> ScanConfig:
    return next(config for config in SCAN_CONFIGS if rows <= config.block)


def bytes_moved(rows: int) -> int:
    """Flags and offsets read once; source, offsets and counts written once; no FLOPs."""
    read = rows + 4 * (rows + 1)
    written = 4 * rows + 4 * (rows + 1) + 8
    return read + written
