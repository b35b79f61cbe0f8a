"""Attention on the GPU for short texts of a packed batch: a text's keys and values on chip at once.

One pass and a plain softmax: for up to 128 tokens there is nothing to stream. Knows nothing about
projections or masks other than the text's end. Importing this file imports Triton; ``dispatch``
does so on first use.
"""

from dataclasses import dataclass
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from offramp_kernels.contract import MAX_TEXT_LENGTH, check_attention_inputs
from offramp_kernels.launch import check_aligned, check_launch_device, check_no_gradient


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    block_tokens: int
    block_queries: int
    heads: int  # attention heads a program takes one after another, at most
    num_warps: int


# The smallest block that holds the longest text. Short texts are so little work that a program
# takes several heads, or starting the programs would cost more than they do.
ATTENTION_CONFIGS = (
    AttentionConfig(16, 16, 4, 1),
    AttentionConfig(32, 32, 2, 2),
    AttentionConfig(64, 64, 1, 4),
    AttentionConfig(MAX_TEXT_LENGTH, MAX_TEXT_LENGTH, 1, 8),
)
# In fp32 whole texts do not fit in registers: the queries are shared out among programs.
PRECISE_CONFIGS = (
    AttentionConfig(16, 16, 4, 2),
    AttentionConfig(32, 16, 2, 4),
    AttentionConfig(64, 16, 1, 4),
    AttentionConfig(MAX_TEXT_LENGTH, 16, 1, 8),
)


@triton.jit
def varlen_attn_kernel(
    qkv_ptr,  # [T, 3 * HEADS * DIM]: queries, keys, values of all heads
    cu_seqlens_ptr,  # int32 [B + 1]
    counts_ptr,  # int32 [2] or None: n_alive, T_alive
    out_ptr,  # [T, HEADS * DIM]
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HEADS_HERE: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_QUERIES: tl.constexpr,
):
    """softmax(q k^T / sqrt(DIM)) v for one text, HEADS_HERE heads and BLOCK_QUERIES queries."""
    text = tl.program_id(0)
    if counts_ptr is not None and text >= tl.load(counts_ptr):
        return
    start = tl.load(cu_seqlens_ptr + text)
    length = tl.load(cu_seqlens_ptr + text + 1) - start
    first_query = tl.program_id(2) * BLOCK_QUERIES
    if first_query >= length:
        return
    token = tl.arange(0, BLOCK_TOKENS)
    asking = first_query + tl.arange(0, BLOCK_QUERIES)
    feature = tl.arange(0, DIM)
    in_text = token < length
    mask = in_text[:, None]
    asks = (asking < length)[:, None]
    width: tl.constexpr = HEADS * DIM
    row = start.to(tl.int64) + token
    asking_row = start.to(tl.int64) + asking
    scale: tl.constexpr = DIM**-0.5

    for index in range(HEADS_HERE):
        first = (tl.program_id(1) * HEADS_HERE + index) * DIM
        at = row[:, None] * (3 * width) + first + feature[None, :]
        asked = asking_row[:, None] * (3 * width) + first + feature[None, :]
        query = tl.load(qkv_ptr + asked, mask=asks, other=0.0)
        key = tl.load(qkv_ptr + at + width, mask=mask, other=0.0)
        value = tl.load(qkv_ptr + at + 2 * width, mask=mask, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="tf32x3") * scale
        scores = tl.where(in_text[None, :], scores, -float("inf"))
        weights = tl.exp(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(weights, 1)
        # Weights are at most 1, so half precision holds them; the division comes last, in fp32.
        context = tl.dot(weights.to(value.dtype), value, input_precision="tf32x3") / total[:, None]
        to = asking_row[:, None] * width + first + feature[None, :]
        tl.store(out_ptr + to, context.to(out_ptr.dtype.element_ty), mask=asks)


def varlen_attn(
    qkv: Tensor,
    cu_seqlens: Tensor,
    num_heads: int,
    max_length: int,
    *,
    counts: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Self-attention of each text over its own tokens, for texts of up to 128 tokens.

    qkv         [T, 3H], fp32, fp16 or bf16, contiguous, 16-byte aligned: per token the queries of
                all heads, then the keys, then the values; H = num_heads * 32 or num_heads * 64
    cu_seqlens  int32 [B + 1], from 0, never falling, T >= the last that is looked at
    max_length  1 to 128, no text is longer. It picks the block (16, 32, 64, 128) and nothing else:
                a bound that holds for every batch keeps a captured graph valid
    counts      None, or int32 [2] (n_alive, T_alive): only the first n_alive texts, read on the
                device, are looked at; all B without
    out         None, or [T, H] of qkv's dtype, apart from qkv
    all on the current CUDA device (or on the CPU when Triton interprets); inference only

    Returns out [T, H]. Rows that belong to no live text are neither read nor written (in a new
    tensor they hold whatever was there). A text longer than the block cannot be noticed without
    asking the device: its tokens past the block are not attended to and their rows not written.
    Scores and sums are fp32 (of fp32 input in three TF32 products, as accurate as fp32); weights
    are rounded to qkv's dtype before they meet the values. What a text gets does not depend on the
    others. One launch, no synchronisation. A breach of the contract raises ValueError.
    """
    check_attention_inputs(qkv, cu_seqlens, num_heads, max_length, counts, out)
    check_launch_device(varlen_attn_kernel, qkv.device)
    check_no_gradient("varlen_attn", qkv)
    width = qkv.shape[1] // 3
    out = qkv.new_empty((qkv.shape[0], width)) if out is None else out
    check_aligned("qkv", qkv)
    check_aligned("out", out)
    texts = cu_seqlens.shape[0] - 1
    if texts == 0 or qkv.shape[0] == 0:
        return out
    config = attention_config(max_length, qkv.dtype)
    heads_here = gcd(num_heads, config.heads)
    query_blocks = config.block_tokens // config.block_queries
    varlen_attn_kernel[(texts, num_heads // heads_here, query_blocks)](
        qkv,
        cu_seqlens,
        counts,
        out,
        HEADS=num_heads,
        DIM=width // num_heads,
        HEADS_HERE=heads_here,
        BLOCK_TOKENS=config.block_tokens,
        BLOCK_QUERIES=config.block_queries,
        num_warps=config.num_warps,
        enable_fp_fusion=True,  # said because Triton's default is changing
    )
    return out


def attention_config(max_length: int, dtype: torch.dtype) -> AttentionConfig:
    configs = PRECISE_CONFIGS if dtype is torch.float32 else ATTENTION_CONFIGS
    return next(config for config in configs if max_length <= config.block_tokens)


def bytes_moved(tokens: int, width: int, element_size: int) -> int:
    """Queries, keys and values read once, the result written once."""
    return 4 * tokens * width * element_size


def flops(lengths: list[int], width: int) -> int:
    """Two products of length x length x H for each text; the softmax is noise."""
    return sum(4 * length * length * width for length in lengths)
