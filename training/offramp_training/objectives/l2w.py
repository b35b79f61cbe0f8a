"""L2W-DEN carried to encoders: the options of the objective, and what they must fit.

Exit losses are weighted row by row by a small network that learns to weigh (Han et al. 2022, image
classifiers; everything about text encoders is our reading). `l2w_stage` trains, `l2w_meta` has the
mechanics and `l2w_allocation` the budgets. Knows nothing about batches or gradients.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from offramp_training.errors import RecipeError
from offramp_training.objectives.base import Stage
from offramp_training.objectives.l2w_allocation import Rounding, q_for_speedup
from offramp_training.objectives.l2w_meta import Centring, Derivative, Reduction, lowest_weight
from offramp_training.objectives.l2w_stage import L2WStage, NetworkInput, Sureness

if TYPE_CHECKING:
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel

Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
Q = Annotated[float, Field(strict=True, ge=0.05, le=1.95)]
SpeedUp = Annotated[float, Field(strict=True, gt=1, allow_inf_nan=False)]


class L2W(BaseModel):
    """Options of the L2W-DEN objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["l2w"] = "l2w"
    # The budget of the meta-objective: a speed-up in layers (2 unless told otherwise) or the
    # authors' q. Of several, one is drawn per meta step.
    speedup: SpeedUp | Annotated[tuple[SpeedUp, ...], Field(min_length=1)] | None = None
    q: Q | Annotated[tuple[Q, ...], Field(min_length=1)] | None = None
    # Weights are 1 + eps * centred: how far they may go, and over what their mean is 1.
    eps: Annotated[float, Field(strict=True, ge=0, le=1)] = 0.3
    centring: Centring = "mat"
    negative_weights: Literal["allow", "clip", "refuse"] = "allow"  # clipped, the mean is above 1
    # Over the exits. "mean" makes clipping and rates compare with objectives that take means.
    reduction: Reduction = "sum"
    # The weight network and its Adam; its rate follows the recipe's schedule.
    network_input: NetworkInput = "loss"
    hidden: Annotated[int, Field(strict=True, ge=1)] = 500
    meta_lr: Positive = 1e-4
    meta_weight_decay: Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)] = 1e-4
    interval: Annotated[int, Field(strict=True, ge=1)] = 1  # batches from one meta step to the next
    # The step that is looked at: plain SGD at its own rate, or the loop's optimiser's own rule.
    # Both with gradients clipped as the loop clips them.
    pseudo_rule: Literal["sgd", "precond"] = "sgd"
    pseudo_lr: Positive = 0.03  # of "sgd"; the loop's rate makes a plain step tiny
    # What it moves: everything, or the exit heads and this many of the last layers.
    pseudo_layers: Literal["all"] | Annotated[int, Field(strict=True, ge=0)] = "all"
    derivative: Derivative = "central"
    difference_step: Annotated[float, Field(strict=True, gt=0, le=1)] = 3e-3  # of "central"
    # Who leaves where in the meta-objective.
    rounding: Rounding = "cumulative"
    allocation_signal: Sureness = "confidence"

    @model_validator(mode="before")
    @classmethod
    def _speedup_unless_q(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("q") is None and values.get("speedup") is None:
            return {**values, "speedup": 2.0}
        return values

    @model_validator(mode="after")
    def _one_budget(self) -> L2W:
        if self.q is not None and self.speedup is not None:
            raise ValueError(
                f"objective.q = {self.q} and objective.speedup = {self.speedup}; allowed: one of "
                "the two"
            )
        return self

    @property
    def exit_policy(self) -> str:
        return "confidence"

    @property
    def exit_threshold(self) -> None:
        return None

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        return ()

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]:
        _check_exits(model.config.exit_layers)
        _check_batches(config)
        _check_weights(self, config.loop.batch_size // 2, model.config.num_exits)
        budgets = budgets_of(self, model.config.exit_layers, model.config.num_layers)
        return [L2WStage(model, config, self, budgets)]

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name"})


def budgets_of(options: L2W, exit_layers: tuple[int, ...], num_layers: int) -> tuple[float, ...]:
    """The q of every budget."""
    if options.q is not None:
        return options.q if isinstance(options.q, tuple) else (options.q,)
    wanted = options.speedup if isinstance(options.speedup, tuple) else (options.speedup or 2.0,)
    try:
        return tuple(q_for_speedup(exit_layers, num_layers, speedup) for speedup in wanted)
    except ValueError as error:
        raise RecipeError(f"objective.{error}") from None


def _check_exits(layers: tuple[int, ...]) -> None:
    if len(layers) < 2:
        raise RecipeError(
            f"model.exit_layers = {list(layers)}; l2w shares rows out among exits, allowed: two "
            f"layers or more, the last of them {layers[-1]}"
        )


def _check_batches(config: Recipe) -> None:
    loop = config.loop
    if loop.batch_tokens is not None:
        raise RecipeError(
            f"loop.batch_tokens = {loop.batch_tokens}; l2w cuts each batch into two equal halves, "
            "allowed: loop.batch_size only"
        )
    if loop.batch_size % 2:
        raise RecipeError(
            f"loop.batch_size = {loop.batch_size}; l2w cuts each batch into two equal halves, "
            "allowed: even numbers"
        )


def _check_weights(options: L2W, rows: int, exits: int) -> None:
    lowest = lowest_weight(options.eps, options.centring, rows, exits)
    if options.negative_weights == "refuse" and lowest < 0:
        raise RecipeError(
            f"objective.eps = {options.eps} lets a weight fall to {lowest:.3g} with {exits} exits "
            f"and centring {options.centring!r}; allowed with negative_weights = 'refuse': up to "
            f"{options.eps / (1 - lowest):.3g}"
        )
