"""What callers owe the ops: shapes, dtypes, layout and devices, checked from metadata alone.

Both backends call these checks, so a call that passes on the CPU passes on a GPU. Knows nothing
about tensor *contents*: reading them would synchronise. Every breach is a ValueError.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

from offramp_kernels.exits import ExitSpec, SlotTable
from offramp_kernels.plan import CompactPlan

MAX_ROWS = 4096
"""Rows of a batch: one program scans them all."""

COPY_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MATH_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

MAX_NORM_WIDTH = 1024
"""Columns of a layer norm: a program holds whole rows."""

MAX_TEXT_LENGTH = 128
"""Tokens of a text whose keys and values one program holds."""

HEAD_DIMS = (32, 64)

Activation = Literal["none", "gelu", "gelu_tanh"]


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


def check_exit_inputs(
    hidden: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    slots: Tensor,
    spec: ExitSpec,
    table: SlotTable,
    source: Tensor | None,
    slots_out: Tensor | None,
    out: Tensor | None,
) -> None:
    """hidden: [T, H], slots: int32 [B] and what goes with it, a spec and a table that fit."""
    _check_token_rows("hidden", hidden, MATH_DTYPES)
    device = hidden.device
    if hidden.shape[1] != spec.hidden_size:
        raise ValueError(f"hidden must be {spec.hidden_size} wide, got {hidden.shape[1]}")
    if spec.vote_signals.device != device:
        raise ValueError(
            f"the exit's weights are on {spec.vote_signals.device}, hidden on {device}"
        )
    if slots.dim() != 1:
        raise ValueError(f"slots must be [B], got shape {tuple(slots.shape)}")
    rows = slots.shape[0]
    _check_index("slots", slots, rows, device)
    _check_index("cu_seqlens", cu_seqlens, rows + 1, device)
    _check_index("counts", counts, 2, device)
    if source is not None:
        _check_index("source", source, rows, device)
    if slots_out is not None:
        _check_index("slots_out", slots_out, rows, device)
        if _overlap(slots, slots_out):
            raise ValueError("slots_out must not overlap slots: rows move")
    if out is not None:
        _check_column("out", out, torch.bool, (rows,), device)
    if table.num_labels != spec.num_labels:
        raise ValueError(f"a table of {table.num_labels} classes, an exit of {spec.num_labels}")
    line, wide = (table.capacity,), (table.capacity, table.num_labels)
    for name in ("rule", "min_layer", "max_layer", "cancelled", "last_label", "agreeing", "label"):
        _check_column(f"table.{name}", getattr(table, name), torch.int32, line, device)
    _check_column("table.exit_layer", table.exit_layer, torch.int32, line, device)
    _check_column("table.threshold", table.threshold, torch.float64, line, device)
    _check_column("table.signal", table.signal, torch.float64, line, device)
    _check_column("table.by_policy", table.by_policy, torch.bool, line, device)
    _check_column("table.ballots", table.ballots, torch.int32, wide, device)
    _check_column("table.logits", table.logits, torch.float32, wide, device)


def _check_counts(counts: Tensor | None, device: torch.device) -> None:
    """None, or int32 [2]."""
    if counts is not None:
        _check_index("counts", counts, 2, device)


def check_norm_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor | None,
    input_bias: Tensor | None,
    counts: Tensor | None,
    out: Tensor | None,
) -> None:
    """x: [T, H], H <= MAX_NORM_WIDTH; the others None, [H], or like x."""
    _check_token_rows("x", x, MATH_DTYPES)
    width = x.shape[1]
    if width > MAX_NORM_WIDTH:
        raise ValueError(f"x may be {MAX_NORM_WIDTH} wide, got {width}")
    for name, vector in (("weight", weight), ("bias", bias), ("input_bias", input_bias)):
        if vector is not None:
            _check_column(name, vector, x.dtype, (width,), x.device)
    for name, rows in (("residual", residual), ("out", out)):
        if rows is not None:
            _check_column(name, rows, x.dtype, tuple(x.shape), x.device)
    _check_counts(counts, x.device)
    for name, source in (("x", x), ("residual", residual)):
        if out is not None and source is not None:
            _check_same_or_apart(name, source, out)


def check_linear_inputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    activation: str,
    residual: Tensor | None,
    counts: Tensor | None,
    out: Tensor | None,
) -> None:
    """x: [T, K], weight: [N, K], bias: [N], residual and out: None or [T, N]."""
    if activation not in get_args(Activation):
        known = ", ".join(get_args(Activation))
        raise ValueError(f"unknown activation {activation!r}; known: {known}")
    _check_token_rows("x", x, MATH_DTYPES)
    if weight.dim() != 2:
        raise ValueError(f"weight must be [N, K], got shape {tuple(weight.shape)}")
    outputs = weight.shape[0]
    _check_column("weight", weight, x.dtype, (outputs, x.shape[1]), x.device)
    _check_column("bias", bias, x.dtype, (outputs,), x.device)
    if outputs == 0:
        raise ValueError("weight must have at least one output")
    for name, rows in (("residual", residual), ("out", out)):
        if rows is not None:
            _check_column(name, rows, x.dtype, (x.shape[0], outputs), x.device)
    _check_counts(counts, x.device)
    if out is not None and _overlap(x, out):
        raise ValueError("out must not overlap x: other programs still read it")
    if out is not None and residual is not None:
        _check_same_or_apart("residual", residual, out)


def check_attention_inputs(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_length: int,
    counts: Tensor | None,
    out: Tensor | None,
) -> None:
    """qkv: [T, 3H] with H = heads * 32 or 64, cu_seqlens: int32 [B + 1], out: None or [T, H]."""
    _check_token_rows("qkv", qkv, MATH_DTYPES)
    width = qkv.shape[1] // 3
    dims = ", ".join(map(str, HEAD_DIMS))
    if num_heads < 1 or qkv.shape[1] % 3 or width % num_heads:
        raise ValueError(f"qkv must be 3 * {num_heads} heads wide, got {qkv.shape[1]}")
    if width // num_heads not in HEAD_DIMS:
        raise ValueError(f"heads must be {dims} wide, got {width // num_heads}")
    if not 1 <= max_length <= MAX_TEXT_LENGTH:
        raise ValueError(f"texts have 1 to {MAX_TEXT_LENGTH} tokens, got max_length {max_length}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
        raise ValueError(f"cu_seqlens must be [B + 1], got shape {tuple(cu_seqlens.shape)}")
    _check_index("cu_seqlens", cu_seqlens, cu_seqlens.shape[0], qkv.device)
    _check_counts(counts, qkv.device)
    if out is not None:
        _check_column("out", out, qkv.dtype, (qkv.shape[0], width), qkv.device)
        if _overlap(qkv, out):
            raise ValueError("out must not overlap qkv: other programs still read it")


def _check_same_or_apart(name: str, source: Tensor, out: Tensor) -> None:
    """An op that reads a place before it writes it may work in place, but not shifted."""
    if source.data_ptr() != out.data_ptr() and _overlap(source, out):
        raise ValueError(f"out must be {name} itself or share no byte with it")


def _check_column(
    name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...], device: torch.device
) -> None:
    if tensor.dtype is not dtype:
        raise ValueError(f"{name} must be {dtype}, got {tensor.dtype}")
    if tensor.shape != shape:
        raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")
    if not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, expected {device}")


def _check_token_rows(
    name: str, tensor: Tensor, dtypes: tuple[torch.dtype, ...] = COPY_DTYPES
) -> None:
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} cannot be {tensor.dtype}; known: {dtypes}")
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
