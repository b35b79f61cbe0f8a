"""Joint training: one stage, the sum of every exit's cross-entropy, weighted or not.

The plain baseline of early-exit training. Knows nothing about how exits are chosen later.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from offramp_training.objectives.base import Progress, Stage

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel

Weight = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Weights = Literal["uniform", "depth"] | tuple[Weight, ...]


class Joint(BaseModel):
    """Options of the joint objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["joint"] = "joint"
    # "depth" weighs each exit by its layer number; a list names one weight per exit.
    weights: Weights = "uniform"
    # "weighted" divides the sum by the weights' own sum, so that rates compare across depths.
    reduction: Literal["sum", "weighted"] = "sum"

    @property
    def exit_policy(self) -> str:
        return "entropy"

    @property
    def exit_threshold(self) -> None:
        return None

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        return ()

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]:
        weights = exit_weights(self.weights, model.config.exit_layers)
        return [JointStage(model, config.loop.epochs, weights, self.reduction)]

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name"})


class JointStage(Stage):
    """Every parameter, every exit, every batch."""

    def __init__(
        self, model: MultiExitModel, epochs: int, weights: torch.Tensor, reduction: str
    ) -> None:
        super().__init__("joint", model, epochs)
        self.weights = weights
        self.reduction = reduction

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        batch = self.processes.share(batch)
        losses = self.row_losses(self.model.logits(batch), batch)
        yield joint_loss(losses, self.weights, self.reduction)


def exit_weights(weights: str | Sequence[float], exit_layers: Sequence[int]) -> torch.Tensor:
    """One weight per exit, float32 [E]."""
    if weights == "uniform":
        return torch.ones(len(exit_layers))
    if weights == "depth":
        return torch.tensor([float(layer) for layer in exit_layers])
    values = [float(weight) for weight in weights]
    if len(values) != len(exit_layers):
        raise ValueError(
            f"objective.weights has {len(values)} weights; the model has {len(exit_layers)} exits, "
            f"at layers {', '.join(map(str, exit_layers))}"
        )
    if sum(values) <= 0:
        raise ValueError(f"objective.weights = {values}; at least one must be above 0")
    return torch.tensor(values)


def joint_loss(row_losses: torch.Tensor, weights: torch.Tensor, reduction: str) -> torch.Tensor:
    """sum_l w_l * mean_b loss_l[b] of losses [E, B]; divided by sum_l w_l when reduction is
    "weighted"."""
    per_exit = row_losses.mean(dim=1)
    weights = weights.to(per_exit)
    total = (weights * per_exit).sum()
    return total / weights.sum() if reduction == "weighted" else total
