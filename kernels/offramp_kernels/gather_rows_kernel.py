"""Row gather on the GPU: packs the survivors' token rows of one buffer into another, bit for bit.

Knows nothing about who survives (that is the plan) or what a row means. Importing this file
imports Triton; ``dispatch`` does so on first use.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import check_gather_inputs
from offramp_kernels.launch import check_aligned, check_launch_device, check_no_gradient
from offramp_kernels.plan import CompactPlan


@dataclass(frozen=True, slots=True)
class TileConfig:
    block_rows: int
    block_columns: int
    num_warps: int


# Keyed by width alone: the batch changes at every layer and must not change the binary.
# 384 = 3 x 128 leaves no lane idle; with 256 columns a quarter of the lanes would be.
TILE_CONFIGS = {384: TileConfig(16, 128, 4)}
DEFAULT_TILE = TileConfig(16, 256, 4)


@triton.jit(do_not_specialize=["out_rows"])
def gather_rows_kernel(
    values_ptr,  # [T, WIDTH]
    cu_seqlens_ptr,  # int32 [B + 1], old offsets
    source_ptr,  # int32 [B], the plan's
    new_cu_seqlens_ptr,  # int32 [B + 1], the plan's
    out_ptr,  # [out_rows, WIDTH], disjoint from values
    out_rows,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out[new_start + i] = values[old_start + i], i < length, for one text and one column slab.

    Program (j, s, c) copies tiles s, s + splits, s + 2 * splits ... of new row j, columns of slab
    c. Programs past the survivors, or whose first tile lies past the text, have nothing to do.
    """
    old_row = tl.load(source_ptr + tl.program_id(0))
    if old_row < 0:
        return
    old_start = tl.load(cu_seqlens_ptr + old_row)
    new_start = tl.load(new_cu_seqlens_ptr + tl.program_id(0))
    new_end = tl.load(new_cu_seqlens_ptr + tl.program_id(0) + 1)
    length = tl.minimum(new_end, out_rows) - new_start  # never past the end of out

    column = tl.program_id(2) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    first_tile = tl.program_id(1) * BLOCK_ROWS
    stride = tl.num_programs(1) * BLOCK_ROWS
    for tile in range(first_tile, length, stride):
        token = tile + tl.arange(0, BLOCK_ROWS)
        mask = (token < length)[:, None] & (column < WIDTH)[None, :]
        old = (old_start + token).to(tl.int64)[:, None] * WIDTH + column[None, :]
        new = (new_start + token).to(tl.int64)[:, None] * WIDTH + column[None, :]
        tl.store(out_ptr + new, tl.load(values_ptr + old, mask=mask, other=0.0), mask=mask)


def gather_rows(
    values: Tensor, cu_seqlens: Tensor, plan: CompactPlan, *, out: Tensor | None = None
) -> Tensor:
    """Pack the survivors' token rows of ``values``, in order, bit for bit.

    values      [T, H], fp32, fp16, bf16 or fp64, contiguous, 16-byte aligned, T >= cu_seqlens[-1]
    cu_seqlens  int32 [B + 1], the old offsets that the plan was made from
    plan        of capacity B
    out         None, or [capacity, H] with capacity >= T_alive, like values, and no byte shared
    all on the current CUDA device (or on the CPU when Triton interprets); inference only

    With ``out``: one launch, no synchronisation; the first T_alive rows are written, the rest is
    left untouched, ``out`` is returned. An ``out`` that is too small cannot be noticed without
    asking the device: the rows that do not fit are dropped, nothing is written past its end.
    Without ``out``: the host waits for the counts, and the answer has exactly T_alive rows; if
    every row survives it is a view of ``values``. A breach of the contract raises ValueError.
    """
    check_gather_inputs(values, cu_seqlens, plan, out)
    check_launch_device(gather_rows_kernel, values.device)
    check_no_gradient("gather_rows", values)
    if out is None:
        n_alive, t_alive = plan.read_counts()  # synchronises: the answer's size is data
        if n_alive == plan.capacity:
            return values[:t_alive]
        out = values.new_empty((t_alive, values.shape[1]))
    check_aligned("values", values)
    check_aligned("out", out)
    if plan.capacity and out.numel():
        _launch(values, cu_seqlens, plan, out)
    return out


def _launch(values: Tensor, cu_seqlens: Tensor, plan: CompactPlan, out: Tensor) -> None:
    tokens, width = values.shape
    config = tile_config(width)
    # Shapes alone decide the grid: enough programs for texts of equal length; a longer text is
    # walked by its programs in several steps.
    splits = max(1, triton.cdiv(tokens, plan.capacity * config.block_rows))
    grid = (plan.capacity, min(splits, 65_535), triton.cdiv(width, config.block_columns))
    gather_rows_kernel[grid](
        values,
        cu_seqlens,
        plan.source,
        plan.cu_seqlens,
        out,
        out.shape[0],
        WIDTH=width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        num_warps=config.num_warps,
        enable_fp_fusion=False,  # nothing to fuse; said because Triton's default is changing
    )


def tile_config(width: int) -> TileConfig:
    return TILE_CONFIGS.get(width, DEFAULT_TILE)


def bytes_moved(t_alive: int, width: int, element_size: int) -> int:
    """Every surviving element read once and written once (offsets are noise); no FLOPs."""
    return 2 * t_alive * width * element_size
