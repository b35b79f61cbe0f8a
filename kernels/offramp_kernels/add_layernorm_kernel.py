"""Residual add and layer norm on the GPU, over the live token rows of a packed batch.

Knows nothing about what comes before or after it in a layer. Importing this file imports Triton;
``dispatch`` does so on first use.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import MAX_NORM_WIDTH, check_norm_inputs
from offramp_kernels.launch import check_aligned, check_launch_device, check_no_gradient


@dataclass(frozen=True, slots=True)
class NormConfig:
    block_columns: int
    block_rows: int
    num_warps: int


# The smallest block that holds a row; 4096 elements a program, 32 a thread.
NORM_CONFIGS = (NormConfig(128, 32, 4), NormConfig(512, 8, 4), NormConfig(MAX_NORM_WIDTH, 4, 4))


@triton.jit(do_not_specialize=["n_rows"])
def add_layernorm_kernel(
    x_ptr,  # [n_rows, WIDTH]
    residual_ptr,  # [n_rows, WIDTH] or None
    input_bias_ptr,  # [WIDTH] or None
    weight_ptr,  # [WIDTH]
    bias_ptr,  # [WIDTH]
    counts_ptr,  # int32 [2] or None: n_alive, T_alive
    out_ptr,  # [n_rows, WIDTH]; may be x or residual
    n_rows,
    EPS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
):
    """out = (s - mean s) / sqrt(var s + eps) * weight + bias, s = x + input_bias + residual.

    The variance is the mean of squared deviations, from a second walk over registers: one pass
    over sums of squares would cancel.
    """
    first_row = tl.program_id(0) * BLOCK_ROWS
    if counts_ptr is not None:
        n_rows = tl.minimum(n_rows, tl.load(counts_ptr + 1))
    if first_row >= n_rows:
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_COLUMNS)
    in_width = column < WIDTH
    mask = (row < n_rows)[:, None] & in_width[None, :]
    address = row.to(tl.int64)[:, None] * WIDTH + column[None, :]

    total = tl.load(x_ptr + address, mask=mask, other=0.0).to(tl.float32)
    if input_bias_ptr is not None:
        extra = tl.load(input_bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
        total += extra[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + address, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(total, 1) / WIDTH
    centred = tl.where(in_width[None, :], total - mean[:, None], 0.0)
    scale = tl.rsqrt(tl.sum(centred * centred, 1) / WIDTH + EPS)
    weight = tl.load(weight_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + column, mask=in_width, other=0.0).to(tl.float32)
    normed = centred * scale[:, None] * weight[None, :] + bias[None, :]
    tl.store(out_ptr + address, normed.to(out_ptr.dtype.element_ty), mask=mask)


def add_layernorm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    eps: float,
    residual: Tensor | None = None,
    input_bias: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """LayerNorm(x + input_bias + residual) * weight + bias, row by row.

    x           [T, H], fp32, fp16 or bf16, contiguous, 16-byte aligned, 1 <= H <= 1024
    weight, bias, input_bias   [H], of x's dtype; input_bias may be None
    eps         a number that does not change from call to call: it is compiled in
    residual    None, or like x
    counts      None, or int32 [2] (n_alive, T_alive): T_alive, read on the device, is the number
                of live rows
    out         None, or like x; x or residual themselves, or apart from both
    all on the current CUDA device (or on the CPU when Triton interprets); inference only

    Returns out [T, H]. Rows past the live ones are neither read nor written (in a new tensor they
    hold whatever was there). Sums and statistics are fp32, rounded once; what a row gets does not
    depend on the others. One launch, no synchronisation. A breach of the contract raises
    ValueError.
    """
    check_norm_inputs(x, weight, bias, residual, input_bias, counts, out)
    check_launch_device(add_layernorm_kernel, x.device)
    check_no_gradient("add_layernorm", x, weight, bias)
    out = torch.empty_like(x) if out is None else out
    check_aligned("x", x)
    check_aligned("out", out)
    rows, width = x.shape
    if rows == 0:
        return out
    config = norm_config(width)
    add_layernorm_kernel[(triton.cdiv(rows, config.block_rows),)](
        x,
        residual,
        input_bias,
        weight,
        bias,
        counts,
        out,
        rows,
        EPS=eps,
        WIDTH=width,
        BLOCK_ROWS=config.block_rows,
        BLOCK_COLUMNS=config.block_columns,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # said because Triton's default is changing
    )
    return out


def norm_config(width: int) -> NormConfig:
    return next(config for config in NORM_CONFIGS if width <= config.block_columns)


def bytes_moved(tokens: int, width: int, element_size: int, *, residual: bool) -> int:
    """Rows read (twice with a residual) and written once; the vectors are noise."""
    return (3 if residual else 2) * tokens * width * element_size


def flops(tokens: int, width: int) -> int:
    """Add, mean, deviation, square, sum, scale, weight, bias."""
    return 8 * tokens * width
