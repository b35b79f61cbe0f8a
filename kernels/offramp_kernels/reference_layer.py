"""Plain-torch twins of an encoder layer's ops on packed tokens.

Computed in fp32 and rounded once, as the kernels do. Knows nothing about Triton. On CUDA they
wait for the host where a live count or lengths are read.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp_kernels.contract import (
    Activation,
    check_attention_inputs,
    check_linear_inputs,
    check_norm_inputs,
)


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
    """LayerNorm(x + input_bias + residual) * weight + bias over the live rows."""
    check_norm_inputs(x, weight, bias, residual, input_bias, counts, out)
    out = torch.empty_like(x) if out is None else out
    live = _live(counts, 1, x.shape[0])
    total = x[:live].float()
    if input_bias is not None:
        total = total + input_bias.float()
    if residual is not None:
        total = total + residual[:live].float()
    out[:live] = F.layer_norm(total, x.shape[1:], weight.float(), bias.float(), eps)
    return out


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
    """activation(x @ weight^T + bias) + residual over the live rows."""
    check_linear_inputs(x, weight, bias, activation, residual, counts, out)
    out = x.new_empty((x.shape[0], weight.shape[0])) if out is None else out
    live = _live(counts, 1, x.shape[0])
    total = F.linear(x[:live].float(), weight.float(), bias.float())
    if activation != "none":
        total = F.gelu(total, approximate="tanh" if activation == "gelu_tanh" else "none")
    if residual is not None:
        total = total + residual[:live].float()
    out[:live] = total
    return out


def varlen_attn(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_length: int,
    *,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Self-attention of each live text over its own tokens, one text at a time.

    Raises:
        ValueError: a text is longer than max_length, which the kernel cannot know.
    """
    check_attention_inputs(qkv, cu_seqlens, num_heads, max_length, counts, out)
    width = qkv.shape[1] // 3
    out = qkv.new_empty((qkv.shape[0], width)) if out is None else out
    live = _live(counts, 0, cu_seqlens.shape[0] - 1)
    offsets = cu_seqlens[: live + 1].tolist()
    for start, stop in pairwise(offsets):
        if stop - start > max_length:
            raise ValueError(f"a text has {stop - start} tokens, max_length is {max_length}")
        if stop > start:
            text = qkv[start:stop].float().view(stop - start, 3, num_heads, -1)
            query, key, value = text.permute(1, 2, 0, 3)  # (heads, length, dim)
            context = F.scaled_dot_product_attention(query, key, value)
            out[start:stop] = context.transpose(0, 1).flatten(1)
    return out


def _live(counts: Tensor | None, which: int, capacity: int) -> int:
    return capacity if counts is None else min(int(counts[which]), capacity)
