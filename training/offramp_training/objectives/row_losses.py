"""What each row costs each exit: cross-entropy with its label and, where the recipe distils, the
divergence from softer targets. Where a row has a set of labels, both are of each label's own yes or
no, and a row costs their mean.

Every objective takes its training losses from here, through `Stage.row_losses`, so distillation
composes with all of them and none knows of it. Knows nothing about how exits are weighed, nor where
a teacher's logits come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional

from offramp_model.config import ProblemType
from offramp_model.labels import from_bits

if TYPE_CHECKING:
    from offramp_training.batches import Batch


def exit_cross_entropies(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Unreduced cross-entropy of every exit: logits [E, B, C], labels [B] -> [E, B]."""
    exits, rows, classes = logits.shape
    flat = functional.cross_entropy(
        logits.reshape(exits * rows, classes), labels.repeat(exits), reduction="none"
    )
    return flat.reshape(exits, rows)


def divergences(logits: torch.Tensor, target: torch.Tensor, temperature: float) -> torch.Tensor:
    """T^2 * KL(target || exit) at temperature T, in nats: logits [E, B, C], target logits [B, C] ->
    [E, B].

    The target is a constant. T^2 keeps the gradients as large as at T = 1 (Hinton et al. 2015,
    section 2).
    """
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    log_target = torch.log_softmax(target.detach().to(logits) / temperature, dim=-1)
    return temperature**2 * (log_target.exp() * (log_target - log_p)).sum(dim=-1)


def exit_binary_cross_entropies(logits: torch.Tensor, sets: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of every exit, mean over labels: logits [E, B, C], label sets as bits [B] ->
    [E, B]."""
    members = from_bits(sets, logits.shape[-1]).to(logits).expand_as(logits)
    losses = functional.binary_cross_entropy_with_logits(logits, members, reduction="none")
    return losses.mean(dim=-1)


def binary_divergences(
    logits: torch.Tensor, target: torch.Tensor, temperature: float
) -> torch.Tensor:
    """`divergences` of each label's own yes or no, mean over labels."""
    z, target = logits / temperature, target.detach().to(logits) / temperature
    log = functional.logsigmoid
    yes = target.sigmoid() * (log(target) - log(z))
    no = (-target).sigmoid() * (log(-target) - log(-z))
    return temperature**2 * (yes + no).mean(dim=-1)


class RowLogits:
    """One answer to each training row, found by the row's id."""

    def __init__(self, ids: Sequence[int], logits: torch.Tensor) -> None:
        """`logits` [N, C] belong to `ids`, in this order."""
        self._place = {row: place for place, row in enumerate(ids)}
        self._logits = logits
        if not len(self._place) == len(ids) == len(logits):
            raise ValueError(f"{len(ids)} ids, {len(self._place)} different, {len(logits)} answers")

    def of(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the rows with these ids, [B, C], on their device."""
        return self._logits[[self._place[row] for row in ids.tolist()]].to(ids.device)


@dataclass(frozen=True)
class Distillation:
    """How much of a row's loss is to agree with softer targets than its label.

    (1 - s - t) * CE + s * T^2 * KL(last exit || exit) + t * T^2 * KL(teacher || exit)

    The last exit has no share s and answers to the label and the teacher alone. As a target it
    moves with training, but no gradient reaches it from there (Zhang et al. 2019, arXiv 1905.08094,
    less their loss between features; FastBERT, arXiv 2004.02178, does it to a frozen encoder,
    without labels). The teacher's share is Hinton et al.'s (2015, arXiv 1503.02531). With label
    sets CE and KL are of each label's yes or no, and their mean over labels.
    """

    self_weight: float = 0.0  # s
    teacher_weight: float = 0.0  # t
    temperature: float = 1.0  # T
    teacher: RowLogits | None = None  # where t > 0
    problem_type: ProblemType = "single_label_classification"

    def row_losses(
        self, logits: torch.Tensor, batch: Batch, last_exit: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Every row's loss at every exit: logits [E, B, C] -> [E, B]. See `Stage.row_losses`."""
        has_sets = self.problem_type == "multi_label_classification"
        cost = exit_binary_cross_entropies if has_sets else exit_cross_entropies
        diverge = binary_divergences if has_sets else divergences
        cross_entropies = cost(logits, batch.labels)
        share = cross_entropies.new_full((len(logits), 1), 1 - self.teacher_weight)
        share[:-1] -= self.self_weight
        losses = share * cross_entropies
        if self.self_weight > 0:
            target = logits[-1] if last_exit is None else last_exit
            soft = diverge(logits[:-1], target, self.temperature)
            losses = losses + self.self_weight * functional.pad(soft, (0, 0, 0, 1))
        if self.teacher is not None:
            soft = diverge(logits, self.teacher.of(batch.ids), self.temperature)
            losses = losses + self.teacher_weight * soft
        return losses
