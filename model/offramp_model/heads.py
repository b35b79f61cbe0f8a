"""Exit heads as modules of torch: parameters that can be trained.

One module holds the heads of all exits; its state dict is `exits.safetensors`. What is computed
with them stands in `exit_head.py` and `pooling.py`, here are first values, dropout and names. It
knows nothing about the encoder, about decisions, or about which rows are still alive.
"""

import torch
from torch import Tensor, nn

from offramp_model.config import MultiExitConfig
from offramp_model.exit_head import DenseGate, ExitHead
from offramp_model.policies import HeadOutput
from offramp_model.pooling import pool, pool_packed
from offramp_model.rows import PackedTokens


class Gate(nn.Module):
    """A `DenseGate` to be trained; with `hidden` 0 it is a single linear map."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.out = nn.Linear(hidden or width, 1)

    def forward(self, state: Tensor) -> Tensor:
        """States [n, W] → logits [n]."""
        logits: Tensor = DenseGate(self.hidden, self.out)(state)
        return logits


class PoolingModule(nn.Module):
    """A form of pooling with its parameters, if it has any: the query of `attention`."""

    query: nn.Parameter | None

    def __init__(self, config: MultiExitConfig) -> None:
        super().__init__()
        self.form = config.pooling
        query = None
        if config.pooling == "attention":
            size = config.hidden_size // config.attention_heads
            query = nn.Parameter(torch.zeros(config.attention_heads, size))
        self.register_parameter("query", query)

    def forward(self, hidden: Tensor, mask: Tensor | None = None) -> Tensor:
        """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, P]."""
        pooled: Tensor = pool(self.form, hidden, mask, self.query)
        return pooled

    def packed(self, hidden: PackedTokens) -> Tensor:
        """Packed [T, H] → [n, P], the same without padding."""
        pooled: Tensor = pool_packed(self.form, hidden, self.query)
        return pooled


class ExitHeads(nn.Module):
    """The heads of all exits: pooling, optional dense + tanh pooler, dropout, linear classifier.

    Pooling gives vectors of the configuration's `pooled_size`, P; classifiers see states of its
    `state_size`, W. Both are the hidden size H unless pooling joins two forms.

    Where the configuration asks for gates, every exit but the last has one on the state that its
    classifier sees, without dropout. The last exit needs none: whoever comes so far leaves there.
    """

    def __init__(self, config: MultiExitConfig) -> None:
        super().__init__()
        self._state_size = config.state_size
        self.poolings = nn.ModuleList(PoolingModule(config) for _ in range(config.num_exits))
        poolers = {"shared": 1, "per_exit": config.num_exits, "none": 0}[config.pooler]
        self.poolers = nn.ModuleList(
            nn.Linear(config.pooled_size, config.hidden_size) for _ in range(poolers)
        )
        self.classifiers = nn.ModuleList(
            nn.Linear(self._state_size, config.num_labels) for _ in range(config.num_exits)
        )
        self.dropout = nn.Dropout(config.head_dropout)
        _initialise(self)
        self.gates = nn.ModuleList()
        if config.gate_hidden is not None:
            self.add_gates(config.gate_hidden)

    def add_gates(self, hidden: int) -> None:
        """Fresh gates; whatever else is here keeps its values."""
        self.gates = nn.ModuleList(Gate(self._state_size, hidden) for _ in self.classifiers[:-1])
        _initialise(self.gates)

    def init_pooler(self, dense: nn.Linear) -> None:
        """Start every pooler from a pre-trained one (BERT's own, where the backbone has it).

        Raises:
            ValueError: its width is not that of the poolers, which joined forms make twice as wide.
        """
        for pooler in self.poolers:
            if pooler.weight.shape != dense.weight.shape:
                raise ValueError(
                    f"a pooler of {dense.in_features} → {dense.out_features} cannot start one of "
                    f"{pooler.in_features} → {pooler.out_features}"
                )
            pooler.load_state_dict(dense.state_dict())

    def pool_padded(self, exit_index: int, hidden: Tensor, attention_mask: Tensor) -> Tensor:
        """Padded hidden states [B, S, H] and 0/1 mask [B, S] → pooled [B, P]."""
        pooled: Tensor = self.poolings[exit_index](hidden, attention_mask)
        return pooled

    def head(self, exit_index: int) -> ExitHead:
        """The head of the exit at 0-based `exit_index`, over these very parameters; no dropout."""
        pooling = self.poolings[exit_index]
        assert isinstance(pooling, PoolingModule)
        return ExitHead(
            pooling=pooling.form,
            query=pooling.query,
            pooler=self.poolers[min(exit_index, len(self.poolers) - 1)] if self.poolers else None,
            classifier=self.classifiers[exit_index],
            gate=self.gates[exit_index] if exit_index < len(self.gates) else None,
            has_gates=bool(self.gates),
        )

    def answer(self, exit_index: int, hidden: PackedTokens) -> HeadOutput:
        """See `ExitHead.answer`."""
        return self.head(exit_index).answer(hidden)

    def forward(self, exit_index: int, pooled: Tensor) -> Tensor:
        """Pooled states [n, P] of the exit at 0-based `exit_index` → logits [n, C]."""
        return self.classify(exit_index, self.state(exit_index, pooled))

    def state(self, exit_index: int, pooled: Tensor) -> Tensor:
        """See `ExitHead.state`."""
        state: Tensor = self.head(exit_index).state(pooled)
        return state

    def classify(self, exit_index: int, state: Tensor) -> Tensor:
        """States [n, W] → logits [n, C]."""
        if self.training:
            state = self.dropout(state)
        logits: Tensor = self.classifiers[exit_index](state)
        return logits

    def gate_logits(self, exit_index: int, state: Tensor) -> Tensor:
        """States [n, W] of an exit before the last → logits [n] of the probability to leave."""
        logits: Tensor = self.gates[exit_index](state)
        return logits

    def exit_probability(self, exit_index: int, state: Tensor) -> Tensor | None:
        """See `ExitHead.exit_probability`."""
        return self.head(exit_index).exit_probability(state)


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
