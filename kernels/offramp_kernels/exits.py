"""What an exit needs to decide on the device: its weights, and a table with one line per text.

Plain device tensors of fixed capacity. Knows nothing about layers to come, compaction, or which
backend reads and writes them. The exit rules themselves are those of `offramp_model.policies` for
one label a text; a multi-label model's exits are decided on the host.
"""

from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor

Pooling = Literal["cls", "mean", "mean_cls"]
VoteFallback = Literal["last", "majority"]

RULES = (
    "full_depth",
    "fixed_layer",
    "confidence",
    "margin",
    "entropy",
    "energy",
    "patience",
    "vote",
    "gate",
)
"""A rule's id is its place here; names and order are those of the model's policies."""

ALIVE = -1
"""`exit_layer` of a slot whose text has not left yet."""
GIVEN_UP = 0
"""`exit_layer` of a slot that was cancelled: it left without an answer."""

MAX_CLASSES = 256
MAX_GATE_HIDDEN = 128
BALLOT_UNIT = 1024
"""A class's ballots are votes · BALLOT_UNIT + the exit that voted for it last (0: none). The
largest number is the most voted class, among equals the latest: one word says both."""


@dataclass(frozen=True, slots=True, eq=False)
class Dense:
    """A linear map: `weight` fp32 [out, in], `bias` fp32 [out]."""

    weight: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class GateWeights:
    """The learned gate: sigmoid(out(GELU(hidden(state)))), or without `hidden` sigmoid(out(state)).

    `hidden` [G, W] with G <= 128, `out` [1, G], without `hidden` [1, W].
    """

    out: Dense
    hidden: Dense | None = None


@dataclass(frozen=True, slots=True, eq=False)
class ExitSpec:
    """One exit: what it computes, and where in the model it stands. Made once, used every batch.

    pooling       "cls" the first token, "mean" over the text's tokens, "mean_cls" both joined.
                  P = H, joined 2H. A text without tokens pools to zeros.
                  Any other form: pool outside and pass the [B, P] result as `hidden` with
                  `cu_seqlens` 0, 1, 2, ... and "cls"
    pooler        None, or P -> W: the state is tanh of it; without one the state is what pooling
                  gave, W = P
    classifier    W -> C, 2 <= C <= 256
    gate          None or a gate on the state. The last exit needs none: its signal is 1 there. At
                  any other exit without one, rule "gate" has a NaN signal, so nobody leaves by it
    exit_layer    1-based layer after which the exit stands
    exit_number   1-based place among the exits, below 1024: how many have voted by now
    is_last       everybody leaves here

    All weights fp32, contiguous, on one device.
    """

    classifier: Dense
    exit_layer: int
    exit_number: int
    is_last: bool
    pooling: Pooling = "mean"
    pooler: Dense | None = None
    gate: GateWeights | None = None
    vote_exponent: float = 0.75
    vote_fallback: VoteFallback = "last"
    vote_signals: Tensor = field(init=False)
    """float64 [exit_number + 1], v / exit_number ** vote_exponent for v votes: computed once,
    on the host, so that no kernel needs pow or divides in fp64."""

    def __post_init__(self) -> None:
        if self.pooling not in get_args(Pooling):
            known = ", ".join(get_args(Pooling))
            raise ValueError(f"unknown pooling {self.pooling!r}; known: {known}")
        if self.vote_fallback not in get_args(VoteFallback):
            known = ", ".join(get_args(VoteFallback))
            raise ValueError(f"unknown vote fallback {self.vote_fallback!r}; known: {known}")
        if not 1 <= self.exit_number < BALLOT_UNIT:
            raise ValueError(f"exit_number must lie in [1, {BALLOT_UNIT}), got {self.exit_number}")
        if self.exit_layer < 1:
            raise ValueError(f"exit_layer counts from 1, got {self.exit_layer}")
        self._check_weights()
        # The policy's own expression: Python's power, whose last bit libraries do not share.
        divisor = float(self.exit_number) ** self.vote_exponent
        signals = torch.tensor(
            [votes / divisor for votes in range(self.exit_number + 1)],
            dtype=torch.float64,
            device=self.classifier.weight.device,
        )
        object.__setattr__(self, "vote_signals", signals)

    def _check_weights(self) -> None:
        _check_dense("classifier", self.classifier, None, None, self)
        if not 2 <= self.num_labels <= MAX_CLASSES:
            raise ValueError(f"2 to {MAX_CLASSES} classes, got {self.num_labels}")
        if self.pooler is not None:
            _check_dense("pooler", self.pooler, self.state_size, None, self)
        if self.gate is None:
            return
        inner = self.state_size
        if self.gate.hidden is not None:
            _check_dense("gate.hidden", self.gate.hidden, None, self.state_size, self)
            inner = self.gate.hidden.weight.shape[0]
            if not 1 <= inner <= MAX_GATE_HIDDEN:
                raise ValueError(f"gate.hidden is 1 to {MAX_GATE_HIDDEN} wide, got {inner}")
        _check_dense("gate.out", self.gate.out, 1, inner, self)

    @property
    def num_labels(self) -> int:
        return self.classifier.weight.shape[0]

    @property
    def state_size(self) -> int:
        """W, what the classifier and the gate see."""
        return self.classifier.weight.shape[1]

    @property
    def pooled_size(self) -> int:
        """P, what pooling gives."""
        return self.state_size if self.pooler is None else self.pooler.weight.shape[1]

    @property
    def hidden_size(self) -> int:
        """H, the width of the hidden states."""
        return self.pooled_size // 2 if self.pooling == "mean_cls" else self.pooled_size


def _check_dense(
    name: str, dense: Dense, outputs: int | None, inputs: int | None, spec: ExitSpec
) -> None:
    weight, bias = dense.weight, dense.bias
    device = spec.classifier.weight.device
    for part, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype is not torch.float32:
            raise ValueError(f"{name}.{part} must be float32, got {tensor.dtype}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name}.{part} must be contiguous")
        if tensor.device != device:
            raise ValueError(f"{name}.{part} is on {tensor.device}, expected {device}")
    fits = weight.dim() == 2 and outputs in (None, weight.shape[0])
    if not fits or inputs not in (None, weight.shape[1]):
        raise ValueError(
            f"{name}.weight must be [{outputs or 'out'}, {inputs or 'in'}], "
            f"got shape {tuple(weight.shape)}"
        )
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"{name}.bias must be [{weight.shape[0]}], got shape {tuple(bias.shape)}")


@dataclass(frozen=True, slots=True, eq=False)
class SlotTable:
    """One line per text: what it asks for, what policies remember of it, and its answer.

    The host fills the settings of a slot and calls `reset` before a batch; each exit reads them,
    brings the memory up to date, and writes the answer once, when the text leaves.
    """

    # Settings.
    rule: Tensor
    """int32 [S], place in RULES."""
    threshold: Tensor
    """float64 [S], in the rule's own units and direction."""
    min_layer: Tensor
    """int32 [S], 1-based, inclusive."""
    max_layer: Tensor
    """int32 [S], 1-based, inclusive."""
    cancelled: Tensor
    """int32 [S], the cancel word: not 0 means that nobody waits for this answer any more."""

    # Memory.
    last_label: Tensor
    """int32 [S], the label of the exit before, -1 if there was none or it was NaN (patience)."""
    agreeing: Tensor
    """int32 [S], exits in a row that agreed with the one before (patience)."""
    ballots: Tensor
    """int32 [S, C], see BALLOT_UNIT (vote)."""

    # Answers, each written once.
    exit_layer: Tensor
    """int32 [S], ALIVE, GIVEN_UP, or the layer at which the text left."""
    label: Tensor
    """int32 [S]."""
    signal: Tensor
    """float64 [S], what was compared; exact for every rule."""
    by_policy: Tensor
    """bool [S], false where max_layer or the end of the model forced the text out."""
    logits: Tensor
    """float32 [S, C]."""

    @classmethod
    def empty(
        cls, capacity: int, num_labels: int, device: torch.device | str = "cpu"
    ) -> "SlotTable":
        """A table of `capacity` slots that run to full depth."""

        def full(value: float, dtype: torch.dtype, *width: int) -> Tensor:
            return torch.full((capacity, *width), value, dtype=dtype, device=device)

        return cls(
            rule=full(RULES.index("full_depth"), torch.int32),
            threshold=full(torch.inf, torch.float64),
            min_layer=full(1, torch.int32),
            max_layer=full(2**31 - 1, torch.int32),
            cancelled=full(0, torch.int32),
            last_label=full(-1, torch.int32),
            agreeing=full(0, torch.int32),
            ballots=full(0, torch.int32, num_labels),
            exit_layer=full(ALIVE, torch.int32),
            label=full(-1, torch.int32),
            signal=full(torch.nan, torch.float64),
            by_policy=full(False, torch.bool),
            logits=full(torch.nan, torch.float32, num_labels),
        )

    def reset(self) -> None:
        """Every slot alive, with no memory and no answer; settings and cancel words stay. No
        synchronisation, so it may be the first node of a graph."""
        self.last_label.fill_(-1)
        self.agreeing.zero_()
        self.ballots.zero_()
        self.exit_layer.fill_(ALIVE)
        self.label.fill_(-1)
        self.signal.fill_(torch.nan)
        self.by_policy.zero_()
        self.logits.fill_(torch.nan)

    @property
    def capacity(self) -> int:
        return self.rule.shape[0]

    @property
    def num_labels(self) -> int:
        return self.logits.shape[1]
