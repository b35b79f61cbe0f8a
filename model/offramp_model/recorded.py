"""What every exit says of a set of texts, recorded once and replayed under any policy.

The replay is a `LayerStack` without an encoder: evaluation and calibration drive the real layer
loop over it, at no encoder cost. Records are tensors of torch, whatever the stack computes with. It
knows nothing about where the figures came from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from offramp_model.config import ProblemType
from offramp_model.labels import reading
from offramp_model.layer_loop import LayerStack, layer_loop, start_rows
from offramp_model.policies import ExitPolicy, HeadOutput
from offramp_model.rows import Encoding, PackedTokens, RowSettings, TokenBatch


@dataclass(frozen=True, slots=True)
class RecordedExits:
    """Logits of every exit for every row: float32 [E, N, C], rows in submitted order; where the
    model has gates, their probabilities to leave, float32 [E, N]."""

    logits: Tensor
    exit_layers: tuple[int, ...]
    gate: Tensor | None = None
    problem_type: ProblemType = "single_label_classification"

    def __post_init__(self) -> None:
        if self.logits.ndim != 3 or self.logits.shape[0] != len(self.exit_layers):
            raise ValueError(
                f"logits must be [{len(self.exit_layers)} exits, rows, classes], "
                f"got {tuple(self.logits.shape)}"
            )
        if self.gate is not None and self.gate.shape != self.logits.shape[:2]:
            raise ValueError(
                f"gate must be {list(self.logits.shape[:2])}, one per exit and row, "
                f"got {tuple(self.gate.shape)}"
            )

    @property
    def num_layers(self) -> int:
        return self.exit_layers[-1]

    @property
    def num_rows(self) -> int:
        return self.logits.shape[1]

    @property
    def num_labels(self) -> int:
        return self.logits.shape[2]

    @property
    def said(self) -> Tensor:
        """The label, or label set, that every exit says of every row: int64 [E, N]."""
        said: Tensor = reading(self.problem_type)(self.logits)
        return said


class RecordedStack:
    """Replays recorded logits as a `LayerStack`: a row's hidden state is its own index."""

    def __init__(self, recorded: RecordedExits) -> None:
        self._recorded = recorded

    @property
    def num_layers(self) -> int:
        return self._recorded.num_layers

    @property
    def num_labels(self) -> int:
        return self._recorded.num_labels

    @property
    def problem_type(self) -> ProblemType:
        return self._recorded.problem_type

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self._recorded.exit_layers

    def embed(self, batch: TokenBatch) -> PackedTokens:
        # float64 holds every row index exactly.
        rows = torch.from_numpy(batch.input_ids)[:, None].double()
        return PackedTokens(rows, torch.from_numpy(batch.cu_seqlens))

    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        return hidden

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        index, row = self._recorded.exit_layers.index(exit_layer), hidden.values[:, 0].long()
        gate = self._recorded.gate
        return HeadOutput(
            self._recorded.logits[index, row], None if gate is None else gate[index, row]
        )

    def batch(self) -> TokenBatch:
        """All recorded rows as one batch: one token each, the row's index."""
        return TokenBatch.pack([Encoding([row], [0]) for row in range(self._recorded.num_rows)])


@dataclass(frozen=True, slots=True)
class ExitOutcome:
    """Where each row left and with which label: int64 [N] each, and the signal [N] there."""

    exit_layer: Tensor
    label: Tensor
    signal: Tensor


def record_exits(
    stack: LayerStack,
    encodings: Sequence[Encoding],
    *,
    batch_size: int = 64,
    last_only: bool = False,
    progress: Callable[[int], None] | None = None,
) -> RecordedExits:
    """Run texts through the whole stack and keep what every exit says.

    Batches are formed in order of length, so that a batch holds few distinct lengths. What is kept
    lies on the CPU. With `last_only` no other exit is asked or kept. `progress` is told the number
    of rows done after each batch.

    Raises:
        ValueError: there are no texts.
    """
    if not encodings:
        raise ValueError("there are no texts to record")
    by_length = sorted(range(len(encodings)), key=lambda index: len(encodings[index]))
    kept = stack.exit_layers[-1:] if last_only else stack.exit_layers
    logits = torch.empty(len(kept), len(encodings), stack.num_labels)
    gate: Tensor | None = None
    for start in range(0, len(by_length), batch_size):
        chosen = by_length[start : start + batch_size]
        batch = TokenBatch.pack([encodings[index] for index in chosen])
        submitted = torch.tensor(chosen)[batch.order]
        hidden = stack.embed(batch)
        for exit_layer in stack.exit_layers:
            hidden = stack.segment(exit_layer, hidden)
            if exit_layer not in kept:
                continue
            exit_index = kept.index(exit_layer)
            head = stack.exit_head(exit_layer, hidden)
            logits[exit_index, submitted] = torch.as_tensor(head.logits).float().cpu()
            if head.gate is not None:
                gate = logits.new_empty(logits.shape[:2]) if gate is None else gate
                gate[exit_index, submitted] = torch.as_tensor(head.gate).float().cpu()
        if progress is not None:
            progress(start + len(chosen))
    return RecordedExits(logits, kept, gate, stack.problem_type)


def replay(
    recorded: RecordedExits,
    policy: ExitPolicy,
    threshold: float,
    *,
    min_layer: int = 1,
    max_layer: int | None = None,
) -> ExitOutcome:
    """Let every recorded row leave under one policy and threshold, through the layer loop."""
    stack = RecordedStack(recorded)
    settings = RowSettings.uniform(
        recorded.num_rows,
        threshold,
        min_layer=min_layer,
        max_layer=recorded.num_layers if max_layer is None else max_layer,
    )
    rows = start_rows(stack, stack.batch(), policy, settings)
    exit_layer = torch.zeros(recorded.num_rows, dtype=torch.int64)
    label = torch.zeros(recorded.num_rows, dtype=torch.int64)
    signal = torch.zeros(recorded.num_rows, dtype=torch.float64)
    for leavers in layer_loop(stack, rows, policy):
        exit_layer[leavers.row] = leavers.exit_layer
        label[leavers.row] = leavers.label
        signal[leavers.row] = leavers.signal.double()
    return ExitOutcome(exit_layer, label, signal)
