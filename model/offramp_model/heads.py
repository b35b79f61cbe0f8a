"""Exit heads: pooling of a layer's hidden states and the small classifier behind it.

One module holds the heads of all exits, so that training optimises and the service runs the very
same parameters; its state dict is `exits.safetensors`. It knows nothing about the encoder, about
decisions, or about which rows are still alive.
"""

import torch
from torch import Tensor, nn

from offramp_model.config import MultiExitConfig, Pooling
from offramp_model.rows import PackedTokens


def pool_padded(hidden: Tensor, attention_mask: Tensor, pooling: Pooling) -> Tensor:
    """[B, S, H] and 0/1 mask [B, S] → [B, H]: the first token, or the mean of the real tokens."""
    if pooling == "cls":
        return hidden[:, 0]
    weights = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return (hidden * weights).sum(dim=1) / weights.sum(dim=1)


def pool_packed(hidden: PackedTokens, pooling: Pooling) -> Tensor:
    """Packed [T, H] → [n, H], the same pooling as `pool_padded` without padding."""
    if pooling == "cls":
        return hidden.values[hidden.cu_seqlens[:-1].long()]
    # Runs of equal length are plain [rows, length, H] views: no scatter, and a row's mean does
    # not depend on its neighbours.
    means = [
        hidden.values[run.start : run.stop].view(run.rows, run.length, -1).mean(dim=1)
        for run in hidden.runs
    ]
    return torch.cat(means) if means else hidden.values[:0]


class ExitHeads(nn.Module):
    """The heads of all exits: optional dense + tanh pooler, dropout, linear classifier."""

    def __init__(self, config: MultiExitConfig) -> None:
        super().__init__()
        width = config.hidden_size
        poolers = {"shared": 1, "per_exit": config.num_exits, "none": 0}[config.pooler]
        self.poolers = nn.ModuleList(nn.Linear(width, width) for _ in range(poolers))
        self.classifiers = nn.ModuleList(
            nn.Linear(width, config.num_labels) for _ in range(config.num_exits)
        )
        self.dropout = nn.Dropout(config.head_dropout)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def init_pooler(self, dense: nn.Linear) -> None:
        """Start every pooler from a pre-trained one (BERT's own, where the backbone has it)."""
        for pooler in self.poolers:
            pooler.load_state_dict(dense.state_dict())

    def forward(self, exit_index: int, pooled: Tensor) -> Tensor:
        """Pooled states [n, H] of the exit at 0-based `exit_index` → logits [n, C]."""
        if self.poolers:
            pooler = self.poolers[min(exit_index, len(self.poolers) - 1)]
            pooled = torch.tanh(pooler(pooled))
        logits: Tensor = self.classifiers[exit_index](self.dropout(pooled))
        return logits
