"""COSEE: train each row most around the layer where it would leave, and make signals tell.

One stage. Each step draws thresholds, sees where every row would leave under each of them and
weighs the row's cross-entropies around that exit; a hinge keeps the exit signals of rows that an
exit gets right apart from those it gets wrong (He et al. 2025).

The signals are serving's own (`offramp_model.signals`). Exits are numbered 1..E here and distances
count exits, so that a model with an exit at every second layer is treated like any other. Knows
nothing about the thresholds of serving: those are calibrated, without dropout, on held-out rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from offramp_model import signals as exit_signals
from offramp_model.policies import Direction, make_policy
from offramp_training import seeds
from offramp_training.objectives.base import Progress, Stage
from offramp_training.processes import ALONE, Processes

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel

Signal = Literal["energy", "entropy", "confidence"]
Normaliser = Literal["contributing", "paper"]
SIGNALS: dict[Signal, Callable[[torch.Tensor, float], torch.Tensor]] = {
    "energy": exit_signals.energy,
    "entropy": exit_signals.normalised_entropy,
    "confidence": exit_signals.max_probability,
}
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]


class Cosee(BaseModel):
    """Options of the COSEE objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["cosee"] = "cosee"
    signal: Signal = "energy"
    # Thresholds drawn per step.
    num_thresholds: Annotated[int, Field(strict=True, ge=1)] = 5
    # How sharply weights fall off around the simulated exit at the end of training; 0: not at all.
    beta_0: NonNegative = 10.0
    # Weight of the signal term, and the distance between right and wrong rows that it asks for.
    alpha: NonNegative = 0.1
    eps: NonNegative = 0.3
    # The signal term's mean: over the exits that have both right and wrong rows, as the authors'
    # code takes it, or over all internal exits, as their paper writes it.
    osc_norm: Normaliser = "contributing"

    @property
    def exit_policy(self) -> str:
        return self.signal

    @property
    def exit_threshold(self) -> None:
        return None

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        return ()

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]:
        return [
            CoseeStage(
                model,
                config.loop.epochs,
                self,
                config.loop.seed,
                temperature=config.policies.temperature,
            )
        ]

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name"})


class CoseeStage(Stage):
    """Every parameter, every exit, every batch; remembers the signals' range and its own draws."""

    def __init__(
        self,
        model: MultiExitModel,
        epochs: int,
        options: Cosee,
        seed: int,
        *,
        temperature: float = 1.0,  # of the signals, as the policies have it
    ) -> None:
        super().__init__("cosee", model, epochs)
        self.options, self.temperature = options, temperature
        self.direction = make_policy(options.signal).direction
        self.range = SignalRange()
        # The same in every process: all draw alike.
        self.generator = seeds.generator(seed, "cosee thresholds")

    def begin_epoch(self, epoch: int) -> None:
        self.range.next_epoch()

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        options = self.options
        batch = self.processes.share(batch)
        logits = self.model.logits(batch).float()
        signals = signal_of(logits[:-1], options.signal, self.temperature)
        self.range.see(signals, self.processes)
        exits = simulated_exits(
            signals, self.range.draw(options.num_thresholds, self.generator), self.direction
        )
        beta = beta_at(options.beta_0, progress.step, progress.total_steps)
        loss = cosee_cross_entropy(
            self.row_losses(logits, batch), folded_weights(exits, len(logits), beta)
        )
        right = logits[:-1].argmax(dim=-1) == batch.labels
        calibration = osc_loss(
            signals, right, options.eps, self.direction, options.osc_norm, self.processes
        )
        yield loss + options.alpha * calibration

    def state_dict(self) -> dict[str, Any]:
        return {"range": self.range.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.range.load_state_dict(state["range"])
        self.generator.set_state(state["generator"])


class SignalRange:
    """Where thresholds are drawn: the extremes of the previous epoch's signals, at first [0, 1].

    Float32 on the CPU, the dtype in which signals are compared.
    """

    def __init__(self) -> None:
        self._drawn_from = torch.tensor([0.0, 1.0])
        self._seen = self._nothing()

    @staticmethod
    def _nothing() -> torch.Tensor:
        return torch.tensor([torch.inf, -torch.inf])

    @property
    def limits(self) -> tuple[float, float]:
        """The range in force."""
        low, high = self._drawn_from.tolist()
        return low, high

    def next_epoch(self) -> None:
        """What has been seen comes into force; the new epoch has seen nothing yet."""
        anything = bool(self._seen.isfinite().all())
        self._drawn_from = self._seen if anything else torch.tensor([0.0, 1.0])
        self._seen = self._nothing()

    def see(self, signals: torch.Tensor, processes: Processes = ALONE) -> None:
        """Widens the running extremes by a batch's signals, of all processes at once.

        At each batch rather than at the end of an epoch: the result is the same, and what one
        process writes into a resume point is then what all have seen.
        """
        if not signals.numel():
            return
        signals = signals.detach().float()
        extremes = torch.stack([-signals.amin(), signals.amax()])
        extremes = processes.reduce(extremes, "max").cpu()
        # fmin and fmax pass over a batch of NaN.
        low = torch.fmin(self._seen[0], -extremes[0])
        self._seen = torch.stack([low, torch.fmax(self._seen[1], extremes[1])])

    def draw(self, count: int, generator: torch.Generator) -> torch.Tensor:
        """Thresholds, uniform over the range in force: [K]."""
        low, high = self._drawn_from
        drawn = low + (high - low) * torch.rand(count, generator=generator)
        return torch.clamp(drawn, low, high)  # rounding may carry one past the end of the range

    def state_dict(self) -> dict[str, torch.Tensor]:
        return {"drawn_from": self._drawn_from, "seen": self._seen}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        self._drawn_from, self._seen = state["drawn_from"], state["seen"]


def signal_of(logits: torch.Tensor, signal: Signal, temperature: float = 1.0) -> torch.Tensor:
    """The exit signal of softmax(z / T): logits [..., C] -> [...], float32 at least."""
    return SIGNALS[signal](logits, temperature)


def beta_at(beta_0: float, step: int, total_steps: int) -> float:
    """Decay of the weights when `step` of `total_steps` optimiser steps are done: 0 at first."""
    return beta_0 * step / total_steps


@torch.no_grad()
def simulated_exits(
    signals: torch.Tensor, thresholds: torch.Tensor, direction: Direction
) -> torch.Tensor:
    """Which exit, 1..E, each row would leave at: signals [E-1, B], thresholds [K] -> [K, B].

    Strict, like the policies that serve these signals: a tie stays, NaN never leaves. The last exit
    needs no signal.
    """
    limit = thresholds.to(signals)[:, None, None]
    leaves = signals < limit if direction == "below" else signals > limit
    stayed = (~leaves).long().cumprod(dim=1)  # 1 as long as nothing has let the row leave
    return stayed.sum(dim=1) + 1


def weight_table(num_exits: int, beta: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """[E, E]: row m has the weights of a row that leaves at exit m + 1; each sums to 1."""
    places = torch.arange(num_exits, dtype=dtype)
    distance = (places[:, None] - places).abs()
    # An infinite beta is legal and gives a one-hot table; its product with 0 would be NaN.
    return torch.softmax((-beta * distance).masked_fill(distance == 0, 0.0), dim=1)


@torch.no_grad()
def folded_weights(
    exits: torch.Tensor, num_exits: int, beta: float, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Mean over the thresholds of each row's weights: exits [K, B] -> [E, B], constants.

    The loss is linear in the weights, so their mean gives the mean of the losses.
    """
    table = weight_table(num_exits, beta, dtype).to(exits.device)
    return table[exits - 1].mean(dim=0).T


def cosee_cross_entropy(cross_entropies: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """mean_b sum_l w[l, b] * CE[l, b], both [E, B]."""
    return (weights.to(cross_entropies) * cross_entropies).sum(dim=0).mean()


def osc_terms(
    signals: torch.Tensor,
    right: torch.Tensor,
    eps: float,
    direction: Direction,
    processes: Processes = ALONE,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The hinge of each internal exit, [E-1], and which exits have both kinds of rows, [E-1].

    max(0, mean over right rows - mean over wrong rows + eps) of signals [E-1, B] that fall with
    ease, the other way round for those that rise. Means are over the rows of all processes.
    """
    easy = right.to(signals)
    hard = 1 - easy
    sums = torch.stack([easy * signals, hard * signals, easy, hard]).sum(dim=-1)
    easy_sum, hard_sum, easy_count, hard_count = processes.reduce(sums, "sum")
    gap = easy_sum / easy_count.clamp(min=1) - hard_sum / hard_count.clamp(min=1)
    if direction == "above":
        gap = -gap
    return torch.relu(gap + eps), (easy_count > 0) & (hard_count > 0)


def osc_loss(
    signals: torch.Tensor,
    right: torch.Tensor,
    eps: float,
    direction: Direction,
    norm: Normaliser = "contributing",
    processes: Processes = ALONE,
) -> torch.Tensor:
    """Mean hinge over the exits; 0, with gradients of 0, where none has both kinds of rows."""
    terms, mixed = osc_terms(signals, right, eps, direction, processes)
    exits = mixed.sum() if norm == "contributing" else torch.tensor(len(terms))
    return torch.where(mixed, terms, 0.0).sum() / exits.clamp(min=1)
