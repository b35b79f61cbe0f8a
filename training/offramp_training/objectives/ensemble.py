"""Ensemble training: every exit's cross-entropy, less a reward for exits that differ.

One stage. The reward of an exit is its cross-entropy to the most similar exit before it, so that
later votes add something to earlier ones (Sun et al. 2021). Knows nothing about votes themselves:
they are an exit policy, and the labels of any exits will do for them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from offramp_training.objectives.base import Progress, Stage
from offramp_training.processes import ALONE, Processes

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel

MinLevel = Literal["batch", "row"]


class Ensemble(BaseModel):
    """Options of the ensemble objective."""

    model_config = ConfigDict(extra="forbid", frozen=True, serialize_by_alias=True)

    name: Literal["ensemble"] = "ensemble"
    # Weight of the diversity term. `lambda` in recipes; Python keeps that word for itself.
    lambda_: Annotated[float, Field(strict=True, alias="lambda", ge=0, le=1)] = 0.1
    # "batch" looks for one most similar exit per batch, "row" for one per row.
    min_level: MinLevel = "batch"
    # Leave out the last exit's diversity term: it answers for itself and need not differ.
    drop_last: bool = False
    # For ablation: the earlier exit of a pair is a constant, only the later one moves away.
    detach_target: bool = False

    @property
    def exit_policy(self) -> str:
        return "vote"

    @property
    def exit_threshold(self) -> None:
        return None

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        return ()

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]:
        return [EnsembleStage(model, config.loop.epochs, self)]

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name"})


class EnsembleStage(Stage):
    """Every parameter, every exit, every batch."""

    def __init__(self, model: MultiExitModel, epochs: int, options: Ensemble) -> None:
        super().__init__("ensemble", model, epochs)
        self.options = options

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        batch = self.processes.share(batch)
        logits = self.model.logits(batch).float()
        yield ensemble_loss(
            logits,
            self.row_losses(logits, batch),
            self.options.lambda_,
            min_level=self.options.min_level,
            drop_last=self.options.drop_last,
            detach_target=self.options.detach_target,
            processes=self.processes,
        )


def ensemble_loss(
    logits: torch.Tensor,
    row_losses: torch.Tensor,
    weight: float,
    *,
    min_level: MinLevel = "batch",
    drop_last: bool = False,
    detach_target: bool = False,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """sum_l mean_b loss_l[b] - weight * diversity, of logits [E, B, C] and losses [E, B].

    A sum, not a mean, over the exits: about E times the scale of a single cross-entropy. The
    diversity has no upper bound, so a large weight may well give a negative loss.
    """
    accuracy = row_losses.mean(dim=1).sum()
    pairs = pair_cross_entropies(logits, detach_target=detach_target)
    return accuracy - weight * diversity(pairs, min_level, drop_last=drop_last, processes=processes)


def pair_cross_entropies(logits: torch.Tensor, *, detach_target: bool = False) -> torch.Tensor:
    """X[j, l, b] = -sum_c p_j log p_l of row b: logits [E, B, C] -> [E, E, B].

    A cross-entropy, not a divergence: the entropy of the target p_j is part of it, and pushes p_j
    apart too unless it is detached.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    target = log_p.exp()
    if detach_target:
        target = target.detach()
    return -torch.einsum("jbc,lbc->jlb", target, log_p)


def diversity(
    pairs: torch.Tensor,
    min_level: MinLevel,
    *,
    drop_last: bool = False,
    processes: Processes = ALONE,
) -> torch.Tensor:
    """sum_{l>=2} min_{j<l} X[j, l], the minimum over batch means or row by row: [E, E, B] -> [].

    The first exit has nothing before it and no term. Where rows are spread over processes, all look
    for the minimum over the batch together, and each takes the mean over its own rows there.
    """
    rows = pairs.shape[-1]
    if min_level == "batch":
        pairs = pairs.mean(dim=-1, keepdim=True)
    exits = pairs.shape[0]
    is_earlier = torch.ones(exits, exits, dtype=torch.bool, device=pairs.device).triu(diagonal=1)
    pairs = pairs.masked_fill(~is_earlier[..., None], torch.inf)[:, 1:]
    everywhere = pairs.detach()
    if min_level == "batch":
        everywhere = processes.reduce(everywhere * rows, "sum")
    # One winner gets the whole gradient, the earliest exit on ties; `amin` would share it out.
    nearest = pairs.gather(0, everywhere.argmin(dim=0, keepdim=True)).squeeze(0)
    if drop_last:
        nearest = nearest[:-1]
    return nearest.mean(dim=-1).sum()
