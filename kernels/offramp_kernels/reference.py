"""Plain-torch twins of the kernels: the oracle of every kernel test, and what runs without Triton.

Knows nothing about Triton. Runs on any device, but on CUDA it waits for the host where the
comments say so.
"""

import torch
from torch import Tensor

from offramp_kernels.contract import check_gather_inputs, check_plan_inputs
from offramp_kernels.plan import CompactPlan


def compact_plan(keep: Tensor, cu_seqlens: Tensor) -> CompactPlan:
    """Plan the move of the rows with ``keep`` set to the front, in their order."""
    check_plan_inputs(keep, cu_seqlens)
    rows = keep.shape[0]
    survivors = keep.nonzero().squeeze(1)  # (n_alive,); its size is data: synchronises on CUDA
    n_alive = survivors.shape[0]
    counts = cu_seqlens.new_empty(2)
    counts[0] = n_alive
    if n_alive == rows:
        counts[1] = cu_seqlens[rows]
        return CompactPlan(survivors.int(), cu_seqlens.clone(), counts)
    source = cu_seqlens.new_full((rows,), -1)
    source[:n_alive] = survivors
    lengths = cu_seqlens.diff().index_select(0, survivors)
    new_cu_seqlens = cu_seqlens.new_zeros(rows + 1)
    torch.cumsum(lengths, 0, dtype=torch.int32, out=new_cu_seqlens[1 : n_alive + 1])
    new_cu_seqlens[n_alive + 1 :] = new_cu_seqlens[n_alive]
    counts[1] = new_cu_seqlens[rows]
    return CompactPlan(source, new_cu_seqlens, counts)


def gather_rows(
    values: Tensor, cu_seqlens: Tensor, plan: CompactPlan, *, out: Tensor | None = None
) -> Tensor:
    """Pack the survivors' token rows of ``values``, in order.

    Without ``out`` the answer has exactly T_alive rows and may be a view of ``values``: survivors
    that lie side by side are not copied. With ``out`` the first T_alive rows are written, the rest
    is left untouched, and ``out`` is returned.
    """
    check_gather_inputs(values, cu_seqlens, plan, out)
    n_alive, t_alive = plan.read_counts()  # the answer's size is data: synchronises on CUDA
    if out is not None and out.shape[0] < t_alive:
        raise ValueError(f"out holds {out.shape[0]} rows, {t_alive} survive")
    packed = _adjacent_rows(values, cu_seqlens, plan, n_alive, t_alive)
    if packed is None:
        index = _token_index(cu_seqlens, plan, n_alive, t_alive)
        if out is None:
            return values.index_select(0, index)
        torch.index_select(values, 0, index, out=out[:t_alive])
        return out
    if out is None:
        return packed
    out[:t_alive] = packed
    return out


def _adjacent_rows(
    values: Tensor, cu_seqlens: Tensor, plan: CompactPlan, n_alive: int, t_alive: int
) -> Tensor | None:
    """The survivors as a slice of ``values`` if no leaver lies between them (all kept: all)."""
    if n_alive in (0, plan.capacity):
        return values[:t_alive]
    first, last = int(plan.source[0]), int(plan.source[n_alive - 1])
    if last - first + 1 != n_alive:
        return None
    start = int(cu_seqlens[first])
    return values[start : start + t_alive]


def _token_index(cu_seqlens: Tensor, plan: CompactPlan, n_alive: int, t_alive: int) -> Tensor:
    """Old token row of each new token row: its place plus how far its text moved."""
    new_start = plan.cu_seqlens[:n_alive]
    lengths = plan.cu_seqlens[1 : n_alive + 1] - new_start
    shift = cu_seqlens.index_select(0, plan.source[:n_alive]) - new_start
    index = torch.repeat_interleave(shift, lengths, output_size=t_alive)  # (T_alive,)
    index += torch.arange(t_alive, dtype=torch.int32, device=index.device)
    return index
