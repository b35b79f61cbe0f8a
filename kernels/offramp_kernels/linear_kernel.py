"""Linear layer on the GPU: a GEMM over the live token rows, with what follows it fused in.

A plain grid at capacity whose tiles past the live rows return at once. A persistent grid would
save the dead programs' start (an estimated 1-2 us for thousands of them) but needs the number of
SMs at launch and a loop around the tile that keeps the accumulator's registers alive across the
epilogue; the plain one keeps the hardware's own scheduling and one binary for every device.

Knows nothing about layers. Importing this file imports Triton; ``dispatch`` does so on first use.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import Activation, check_linear_inputs
from offramp_kernels.launch import check_aligned, check_launch_device, check_no_gradient


@dataclass(frozen=True, slots=True)
class GemmConfig:
    block_rows: int
    block_outputs: int
    block_inputs: int
    num_warps: int
    num_stages: int


# Tiles are fixed by dtype and by the buffer's capacity, never by how many rows are live, so that
# a row's sum is always taken in the same order: over K from the start, block_inputs at a time.
LARGE = GemmConfig(128, 128, 64, num_warps=8, num_stages=3)
# A wave of large tiles takes as long for 16 rows as for 16 x 128: below some 1000 rows smaller
# tiles occupy more SMs.
SMALL = GemmConfig(64, 64, 64, num_warps=4, num_stages=4)
SMALL_ROWS = 1024
# fp32 runs on FMA units in full precision: for tests and for who asks for it.
PRECISE = GemmConfig(64, 64, 32, num_warps=8, num_stages=2)
GROUP_ROWS = 8
"""Row tiles whose programs run side by side, so that they find the weight in L2."""


@triton.jit(do_not_specialize=["n_rows"])
def linear_kernel(
    x_ptr,  # [n_rows, N_INPUTS]
    weight_ptr,  # [N_OUTPUTS, N_INPUTS]
    bias_ptr,  # [N_OUTPUTS]
    residual_ptr,  # [n_rows, N_OUTPUTS] or None
    counts_ptr,  # int32 [2] or None: n_alive, T_alive
    out_ptr,  # [n_rows, N_OUTPUTS]; may be residual
    n_rows,
    ACTIVATION: tl.constexpr,  # "none", "gelu", "gelu_tanh"
    N_INPUTS: tl.constexpr,
    N_OUTPUTS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_OUTPUTS: tl.constexpr,
    BLOCK_INPUTS: tl.constexpr,
    GROUP: tl.constexpr,
):
    """out = activation(x @ weight^T + bias) + residual, one [BLOCK_ROWS, BLOCK_OUTPUTS] tile."""
    # Tiles in groups of GROUP row tiles; within a group rows change first.
    output_tiles: tl.constexpr = (N_OUTPUTS + BLOCK_OUTPUTS - 1) // BLOCK_OUTPUTS
    group = tl.program_id(0) // (GROUP * output_tiles)
    place = tl.program_id(0) % (GROUP * output_tiles)
    first_row = (group * GROUP + place % GROUP) * BLOCK_ROWS
    if counts_ptr is not None:
        n_rows = tl.minimum(n_rows, tl.load(counts_ptr + 1))
    if first_row >= n_rows:
        return
    row = first_row + tl.arange(0, BLOCK_ROWS)
    output = (place // GROUP) * BLOCK_OUTPUTS + tl.arange(0, BLOCK_OUTPUTS)
    is_row, is_output = row < n_rows, output < N_OUTPUTS
    x_row = x_ptr + row.to(tl.int64)[:, None] * N_INPUTS
    weight_row = weight_ptr + output.to(tl.int64)[None, :] * N_INPUTS

    total = tl.zeros([BLOCK_ROWS, BLOCK_OUTPUTS], tl.float32)
    for first in range(0, N_INPUTS, BLOCK_INPUTS):
        feature = first + tl.arange(0, BLOCK_INPUTS)
        in_inputs = feature < N_INPUTS
        x = tl.load(x_row + feature[None, :], mask=is_row[:, None] & in_inputs[None, :], other=0.0)
        weight = tl.load(
            weight_row + feature[:, None], mask=in_inputs[:, None] & is_output[None, :], other=0.0
        )
        total = tl.dot(x, weight, total, input_precision="ieee")

    total += tl.load(bias_ptr + output, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    if ACTIVATION == "gelu_tanh":  # (1 + tanh u) / 2 = sigmoid 2u, and libdevice is not interpreted
        inner = 1.5957691216057308 * (total + 0.044715 * total * total * total)
        total = total / (1.0 + tl.exp(-inner))
    mask = is_row[:, None] & is_output[None, :]
    address = row.to(tl.int64)[:, None] * N_OUTPUTS + output[None, :]
    if residual_ptr is not None:
        total += tl.load(residual_ptr + address, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + address, total.to(out_ptr.dtype.element_ty), mask=mask)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """activation(x @ weight^T + bias) + residual, row by row.

    x           [T, K], fp32, fp16 or bf16, contiguous, 16-byte aligned, K >= 1
    weight      [N, K], bias [N], of x's dtype, contiguous, weight 16-byte aligned
    activation  "none", "gelu" (erf) or "gelu_tanh"
    residual    None, or [T, N] of x's dtype
    counts      None, or int32 [2] (n_alive, T_alive): T_alive, read on the device, is the number
                of live rows
    out         None, or [T, N] of x's dtype: residual itself or apart from it; apart from x
    all on the current CUDA device (or on the CPU when Triton interprets); inference only

    Returns out [T, N]. Rows past the live ones are neither read nor written (in a new tensor they
    hold whatever was there). Products are taken in x's dtype (fp32: in full, never TF32), summed
    in fp32, rounded once at the end. Tiles depend on dtype and T alone: what a row gets does not
    depend on the other rows or on how many are live. One launch, no synchronisation. A breach of
    the contract raises ValueError.
    """
    check_linear_inputs(x, weight, bias, activation, residual, counts, out)
    check_launch_device(linear_kernel, x.device)
    check_no_gradient("linear", x, weight, bias)
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = x.new_empty((rows, outputs)) if out is None else out
    for name, tensor in (("x", x), ("weight", weight), ("out", out)):
        check_aligned(name, tensor)
    if rows == 0:
        return out
    config = gemm_config(rows, x.dtype)
    # Whole groups of row tiles; those past the end return at once.
    row_tiles = triton.cdiv(triton.cdiv(rows, config.block_rows), GROUP_ROWS) * GROUP_ROWS
    linear_kernel[(row_tiles * triton.cdiv(outputs, config.block_outputs),)](
        x,
        weight,
        bias,
        residual,
        counts,
        out,
        rows,
        ACTIVATION=activation,
        N_INPUTS=inputs,
        N_OUTPUTS=outputs,
        BLOCK_ROWS=config.block_rows,
        BLOCK_OUTPUTS=config.block_outputs,
        BLOCK_INPUTS=config.block_inputs,
        GROUP=GROUP_ROWS,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,  # said because Triton's default is changing
    )
    return out


def gemm_config(rows: int, dtype: torch.dtype) -> GemmConfig:
    """By the capacity of the buffer and the dtype; live rows are not known here."""
    if dtype is torch.float32:
        return PRECISE
    return SMALL if rows <= SMALL_ROWS else LARGE


def bytes_moved(
    tokens: int, inputs: int, outputs: int, element_size: int, *, residual: bool
) -> int:
    """Everything read once and the result written once, as if L2 held the rest."""
    rows = tokens * (inputs + (2 if residual else 1) * outputs)
    return (rows + outputs * (inputs + 1)) * element_size


def flops(tokens: int, inputs: int, outputs: int) -> int:
    """Multiply and add of the product; the epilogue is noise."""
    return 2 * tokens * inputs * outputs
