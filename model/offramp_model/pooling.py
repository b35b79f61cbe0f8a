"""Pooling: how the hidden states of a text's tokens become the one vector that an exit head sees.

Each form is one short module over rows of one length, [rows, S, H], with a mask where rows are
padded. Training calls it on a padded batch; serving calls the same module once per run of rows of
equal length, which needs no mask. It knows nothing about exits, layers or classifiers.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from offramp_model.config import MultiExitConfig
from offramp_model.rows import PackedTokens, Run


class FirstToken(nn.Module):
    """The hidden state of the first token, [CLS] or <s>."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H] → [rows, H]."""
        return hidden[:, 0]

    def packed(self, hidden: PackedTokens) -> Tensor:
        """Packed [T, H] → [rows, H]."""
        return hidden.values[hidden.cu_seqlens[:-1].long()]


class Mean(nn.Module):
    """The mean of the real tokens, specials among them."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, H]."""
        if mask is None:
            return hidden.mean(dim=1)
        weights = mask.unsqueeze(-1).to(hidden.dtype)
        return (hidden * weights).sum(dim=1) / weights.sum(dim=1)

    def packed(self, hidden: PackedTokens) -> Tensor:
        """Packed [T, H] → [rows, H], all in one call; bags of tokens are added up one by one."""
        values = hidden.values
        tokens = torch.arange(len(values), dtype=torch.int32, device=values.device)
        return F.embedding_bag(tokens, values, hidden.cu_seqlens[:-1], mode="mean")


class Max(nn.Module):
    """The largest value of each feature over the real tokens."""

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, H]."""
        if mask is not None:
            hidden = hidden.masked_fill(mask.unsqueeze(-1) == 0, -torch.inf)
        return hidden.amax(dim=1)


class Attention(nn.Module):
    """A learned weighted mean: one query per attention head asks each token how much it matters.

    Head k looks at its own slice of the features, H / heads wide, as key and as value:
    softmax over the real tokens of (slice · query_k) / √(H / heads). A query of zeros, the start,
    weighs all tokens alike, so that training sets out from `Mean`; weight decay pulls back to it.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.zeros(heads, width // heads))

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, H]."""
        rows, length, _ = hidden.shape
        tokens = hidden.reshape(rows, length, *self.query.shape).transpose(1, 2)
        query = self.query.to(hidden.dtype)[:, None].expand(rows, -1, -1, -1)
        allowed = None if mask is None else mask[:, None, None].bool()
        # Query (rows, heads, 1, dim) over tokens (rows, heads, S, dim).
        pooled = F.scaled_dot_product_attention(query, tokens, tokens, attn_mask=allowed)
        return pooled.flatten(1)


class Joined(nn.Module):
    """Two forms side by side, [rows, 2H]."""

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.first, self.second = first, second

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, 2H]."""
        return torch.cat([self.first(hidden, mask), self.second(hidden, mask)], dim=-1)

    def packed(self, hidden: PackedTokens) -> Tensor:
        """Packed [T, H] → [rows, 2H]."""
        return torch.cat([pool_packed(self.first, hidden), pool_packed(self.second, hidden)], -1)


def make_pooling(config: MultiExitConfig) -> nn.Module:
    """A fresh pooling of the configured form, for one exit: vectors of `config.pooled_size`."""
    match config.pooling:
        case "cls":
            return FirstToken()
        case "mean":
            return Mean()
        case "mean_cls":
            return Joined(Mean(), FirstToken())
        case "max_mean":
            return Joined(Max(), Mean())
        case "attention":
            return Attention(config.hidden_size, config.attention_heads)


def pool_packed(pooling: nn.Module, hidden: PackedTokens) -> Tensor:
    """Packed [T, H] → [n, P], what `pooling` gives for the same rows padded.

    A form that knows a quick way over packed tokens takes it. For the others runs of equal length
    are plain [rows, length, H] views: no mask, no scatter. Either way, what a row gets does not
    depend on its neighbours.
    """
    if isinstance(pooling, FirstToken | Mean | Joined):
        return pooling.packed(hidden)
    width = hidden.values.shape[1]
    nobody = Run(start=0, rows=0, length=1)  # so that an empty batch has the right width, too
    return torch.cat(
        [
            pooling(hidden.values[run.start : run.stop].view(run.rows, run.length, width))
            for run in hidden.runs or (nobody,)
        ]
    )
