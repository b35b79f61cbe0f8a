"""Exit heads: each exit's pooling, the small classifier behind it, and the gate.

One module holds the heads of all exits, so that training optimises and the service runs the very
same parameters; its state dict is `exits.safetensors`. It knows nothing about the encoder, about
decisions, or about which rows are still alive.
"""

import torch
from torch import Tensor, nn

from offramp_model.config import MultiExitConfig
from offramp_model.policies import HeadOutput
from offramp_model.pooling import make_pooling, pool_packed
from offramp_model.rows import PackedTokens


class Gate(nn.Module):
    """A small policy network: one logit per row, large where the row should leave.

    Linear, GELU, Linear; with `hidden` 0 a single linear map (ConsistentEE page, section 1).
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, hidden) if hidden else None
        self.out = nn.Linear(hidden or width, 1)

    def forward(self, state: Tensor) -> Tensor:
        """States [n, W] → logits [n]."""
        if self.hidden is not None:
            state = nn.functional.gelu(self.hidden(state))
        logits: Tensor = self.out(state)
        return logits.squeeze(-1)


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
        self.poolings = nn.ModuleList(make_pooling(config) for _ in range(config.num_exits))
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

    def pool_packed(self, exit_index: int, hidden: PackedTokens) -> Tensor:
        """Packed hidden states [T, H] → pooled [n, P], the same without padding."""
        return pool_packed(self.poolings[exit_index], hidden)

    def answer(self, exit_index: int, hidden: PackedTokens) -> HeadOutput:
        """What the exit at 0-based `exit_index` says of packed hidden states; they are pooled in
        their own dtype, the rest is float32."""
        state = self.state(exit_index, self.pool_packed(exit_index, hidden).float())
        return HeadOutput(
            self.classify(exit_index, state), self.exit_probability(exit_index, state)
        )

    def forward(self, exit_index: int, pooled: Tensor) -> Tensor:
        """Pooled states [n, P] of the exit at 0-based `exit_index` → logits [n, C]."""
        return self.classify(exit_index, self.state(exit_index, pooled))

    def state(self, exit_index: int, pooled: Tensor) -> Tensor:
        """What the classifier and the gate of an exit see, [n, W]: the pooled states [n, P], or
        tanh of the pooler's map of them."""
        if not self.poolers:
            return pooled
        pooler = self.poolers[min(exit_index, len(self.poolers) - 1)]
        return torch.tanh(pooler(pooled))

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
        """The gate's probability [n] that a row leaves here: 1 at the last exit, None without
        gates."""
        if not self.gates:
            return None
        if exit_index == len(self.classifiers) - 1:
            return state.new_ones(len(state))
        return torch.sigmoid(self.gate_logits(exit_index, state))


def _initialise(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.02)
            nn.init.zeros_(part.bias)
