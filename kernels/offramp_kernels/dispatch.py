"""One signature per op: Triton for CUDA tensors, the plain-torch twin for everything else.

Knows nothing about how an op works. Triton is imported on the first call that needs it, so the
package works where Triton is not installed.
"""

import logging
from functools import cache
from importlib.util import find_spec
from typing import Literal, get_args

from torch import Tensor

from offramp_kernels import reference, reference_exit, reference_layer
from offramp_kernels.contract import Activation
from offramp_kernels.exits import ExitSpec, SlotTable
from offramp_kernels.plan import CompactPlan

_LOGGER = logging.getLogger(__name__)

Backend = Literal["auto", "triton", "reference"]


def compact_plan(keep: Tensor, cu_seqlens: Tensor, *, backend: Backend = "auto") -> CompactPlan:
    """Plan the order-preserving move of the rows with ``keep`` set to the front.

    keep: bool [B], cu_seqlens: int32 [B + 1]. Fixed-capacity answer; see CompactPlan.
    """
    if _runs_on_triton(keep, backend):
        from offramp_kernels import compact_plan_kernel

        return compact_plan_kernel.compact_plan(keep, cu_seqlens)
    return reference.compact_plan(keep, cu_seqlens)


def gather_rows(
    values: Tensor,
    cu_seqlens: Tensor,
    plan: CompactPlan,
    *,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Pack the survivors' token rows of ``values`` [T, H]; ``cu_seqlens`` are the old offsets.

    Without ``out`` the answer has exactly T_alive rows (the host waits for the device to learn
    it) and may be a view of ``values``. With ``out`` [capacity, H] the first T_alive rows are
    written, the rest is left untouched, and ``out`` is returned without waiting.
    """
    if _runs_on_triton(values, backend):
        from offramp_kernels import gather_rows_kernel

        return gather_rows_kernel.gather_rows(values, cu_seqlens, plan, out=out)
    return reference.gather_rows(values, cu_seqlens, plan, out=out)


def exit_head(
    hidden: Tensor,
    cu_seqlens: Tensor,
    counts: Tensor,
    slots: Tensor,
    spec: ExitSpec,
    table: SlotTable,
    *,
    source: Tensor | None = None,
    slots_out: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Let every live row leave or stay at one exit; latch in ``table`` the answers of those who
    leave. Returns keep, bool [B], for ``compact_plan``.

    hidden: [T, H], cu_seqlens: int32 [B + 1], counts: int32 [2] (n_alive, T_alive), slots: int32
    [B], the table's line of each row; with a plan's ``source`` that of each row before the move,
    and ``slots_out`` int32 [B] receives it for the rows of now.
    """
    if _runs_on_triton(hidden, backend):
        from offramp_kernels import exit_head_kernel

        op = exit_head_kernel.exit_head
    else:
        op = reference_exit.exit_head
    return op(
        hidden,
        cu_seqlens,
        counts,
        slots,
        spec,
        table,
        source=source,
        slots_out=slots_out,
        out=out,
    )


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    counts: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """activation(x @ weight^T + bias) + residual over the live rows; the others stay untouched.

    x: [T, K], weight: [N, K], bias: [N], residual, out: [T, N], counts: int32 [2], whose second
    is the number of live rows.
    """
    if _runs_on_triton(x, backend):
        from offramp_kernels import linear_kernel

        op = linear_kernel.linear
    else:
        op = reference_layer.linear
    return op(x, weight, bias, activation=activation, residual=residual, counts=counts, out=out)


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
    backend: Backend = "auto",
) -> Tensor:
    """LayerNorm(x + input_bias + residual) * weight + bias over the live rows; the others stay
    untouched.

    x, residual, out: [T, H], H <= 1024, weight, bias, input_bias: [H], counts: int32 [2], whose
    second is the number of live rows.
    """
    if _runs_on_triton(x, backend):
        from offramp_kernels import add_layernorm_kernel

        op = add_layernorm_kernel.add_layernorm
    else:
        op = reference_layer.add_layernorm
    return op(
        x,
        weight,
        bias,
        eps=eps,
        residual=residual,
        input_bias=input_bias,
        counts=counts,
        out=out,
    )


def varlen_attn(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_length: int,
    *,
    counts: Tensor | None = None,
    out: Tensor | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Self-attention of each live text over its own tokens, up to ``max_length`` <= 128 of them.

    qkv: [T, 3H], H = heads * 32 or 64, cu_seqlens: int32 [B + 1], out: [T, H], counts: int32 [2],
    whose first is the number of live texts.
    """
    if _runs_on_triton(qkv, backend):
        from offramp_kernels import varlen_attn_kernel

        op = varlen_attn_kernel.varlen_attn
    else:
        op = reference_layer.varlen_attn
    return op(qkv, cu_seqlens, num_heads, max_length, counts=counts, out=out)


def _runs_on_triton(tensor: Tensor, backend: Backend) -> bool:
    if backend not in get_args(Backend):
        raise ValueError(f"unknown backend {backend!r}; known: {', '.join(get_args(Backend))}")
    if backend == "auto":
        return tensor.is_cuda and _triton_is_installed()
    return backend == "triton"


@cache
def _triton_is_installed() -> bool:
    installed = find_spec("triton") is not None
    if not installed:
        _LOGGER.warning("triton is not installed: CUDA tensors take the slower torch path")
    return installed
