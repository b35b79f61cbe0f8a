"""The one stage of L2W-DEN. Each batch is cut into two halves that take turns: on one the model
makes its step, on the other the weight network is taught (every `interval` batches, before the
step) to choose weights after which each exit does well on the rows that would leave there under the
speed-up budget.

What is weighed, and what the network sees, are the rows' training losses, soft targets included;
what it is judged by is cross-entropy with the labels alone, the aim that soft targets only serve.

The network needs labels, so it exists in training only: it lives here and travels in the stage's
state. The look ahead never touches the model, its gradients, the loop's optimiser or the random
generators; it runs without dropout and in full precision, because it lives off small differences.
Knows nothing about serving's thresholds.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from offramp_model import signals
from offramp_training import seeds
from offramp_training.errors import RecipeError
from offramp_training.objectives.base import Progress, Stage
from offramp_training.objectives.l2w_allocation import (
    allocate,
    meta_objective,
    round_shares,
    shares,
)
from offramp_training.objectives.l2w_meta import (
    MetaGradient,
    Parameters,
    PseudoUpdate,
    WeightNetwork,
    clipped,
    loss_weights,
    meta_gradient,
    optimiser_update,
    sgd_update,
    weighted_loss,
)
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.processes import ALONE, Processes

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel
    from offramp_training.objectives.l2w import L2W

NetworkInput = Literal["loss", "confidence", "both"]
Sureness = Literal["confidence", "margin", "entropy", "energy"]

# How sure an exit is of each row, larger is surer: logits [..., C] -> [...].
SURENESS: dict[Sureness, Callable[[torch.Tensor], torch.Tensor]] = {
    "confidence": signals.max_probability,
    "margin": signals.margin,
    "entropy": lambda logits: -signals.normalised_entropy(logits),
    "energy": lambda logits: -signals.energy(logits),
}


@dataclass(frozen=True)
class MetaStep:
    """What the newest meta step did, for logs and tests."""

    step: int
    q: float
    counts: tuple[int, ...]  # rows allocated to each exit
    loss: float  # L_meta
    gradient_norm: float  # of the weight network, from L_meta; should not drown in the next
    decay_norm: float  # from its weight decay


class L2WStage(Stage):
    """Every parameter, every exit, two steps a batch; remembers the weight network and its Adam."""

    def __init__(
        self,
        model: MultiExitModel,
        config: Recipe,
        options: L2W,
        budgets: tuple[float, ...],
    ) -> None:
        super().__init__("l2w", model, config.loop.epochs)
        self.steps_per_batch = 2
        self.options = options
        self.drop_incomplete = True
        self.full_batch = config.loop.batch_size  # rows; a batch of fewer is dropped
        self.base_lr, self.clip_norm = config.optimiser.lr, config.optimiser.clip_norm
        self.seed = config.loop.seed
        self.budgets = budgets
        self.moved = moved_parameters(
            self.parameters(), options.pseudo_layers, model.config.num_layers
        )
        exits = model.config.num_exits
        # Drawn on the CPU, and the run's own draws stay those of every other objective.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seeds.number(self.seed, "l2w network"))
            inputs = 2 * exits if options.network_input == "both" else exits
            self.network = WeightNetwork(inputs, exits, options.hidden)
        self.meta_optimiser = torch.optim.Adam(
            self.network.parameters(), lr=options.meta_lr, weight_decay=options.meta_weight_decay
        )
        self.newest: MetaStep | None = None
        self._functional = _Unwrapped(model)

    # ---- what the loop asks for --------------------------------------------------------------

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self.network.to(self.model.device)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        if len(batch) < self.full_batch:
            return
        # The model's step is shared out; the lesson is of all rows in every process, and the same.
        first, second = halves(batch)
        own = halves(self.processes.share(batch))
        # With eps = 0 every weight is 1 and there is nothing to learn.
        teaches = (
            self.options.eps > 0
            and (progress.step // self.steps_per_batch) % self.options.interval == 0
        )
        for turn, (train, meta) in enumerate(((first, second), (second, first))):
            if teaches:
                self.meta_step(train, meta, replace(progress, step=progress.step + turn))
            yield self.weighted(own[turn])

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.network.state_dict(),
            "meta_optimiser": self.meta_optimiser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.network.to(self.model.device)
        self.network.load_state_dict(state["network"])
        self.meta_optimiser.load_state_dict(state["meta_optimiser"])

    # ---- the model's loss --------------------------------------------------------------------

    def weighted(self, train: Batch) -> torch.Tensor:
        """The loss of this process's share of a half under the network as it stands."""
        logits = self.model.logits(train)
        losses = self.row_losses(logits, train).T  # [n, K]
        with torch.no_grad():
            weights = self._weights(losses, logits, self.processes)
        return weighted_loss(losses, weights, self.options.reduction)

    def _weights(
        self, losses: torch.Tensor, logits: torch.Tensor, processes: Processes = ALONE
    ) -> torch.Tensor:
        """[n, K]; a graph to the network and to nothing else."""
        options = self.options
        raw = self.network(features(losses.detach(), logits.detach(), options.network_input))
        weights = loss_weights(raw, options.eps, options.centring, processes)
        if options.negative_weights == "clip":
            weights = weights.clamp(min=0)
        return weights.to(losses.dtype)

    # ---- the network's lesson ----------------------------------------------------------------

    def meta_step(self, train: Batch, meta: Batch, progress: Progress) -> MetaStep:
        """One step of the weight network; the model and its optimiser stay as they are."""
        q = self._budget(progress.step)
        counts = round_shares(
            shares(self.model.config.num_exits, q), len(meta), self.options.rounding
        )
        with self._looking_ahead():
            parameters = {name: p.detach().requires_grad_() for name, p in self.moved.items()}
            logits = self._logits(parameters, train)
            losses = self.row_losses(logits, train).T
            weights = self._weights(losses, logits)
            ahead = self._look_ahead(parameters, logits, losses, weights, train, meta, counts)
        # Adam ignores a common factor but its weight decay does not: without the step's rate and
        # the mean over rows the gradient would drown in the decay.
        self.meta_optimiser.zero_grad()
        weights.backward(ahead.weights * (len(train) / max(ahead.rate, 1e-30)))  # type: ignore[no-untyped-call]
        self.newest = self._teach(ahead, progress, q, tuple(counts))
        return self.newest

    def _look_ahead(
        self,
        parameters: Parameters,
        logits: torch.Tensor,
        losses: torch.Tensor,
        weights: torch.Tensor,
        train: Batch,
        meta: Batch,
        counts: list[int],
    ) -> MetaGradient:
        options, last_exit = self.options, logits[-1].detach()
        sureness = SURENESS[options.allocation_signal]

        def train_losses(moved: Parameters) -> torch.Tensor:
            # A target of self-distillation is a constant of the step, and so of its derivative.
            return self.row_losses(self._logits(moved, train), train, last_exit).T

        def meta_loss(updated: Parameters) -> torch.Tensor:
            logits = self._logits(updated, meta)
            exit_of_row = allocate(sureness(logits.detach()).T, counts)
            return meta_objective(exit_cross_entropies(logits, meta.labels).T, exit_of_row)

        def rule(gradients: Parameters) -> PseudoUpdate:
            if options.pseudo_rule == "sgd":
                return sgd_update(parameters, options.pseudo_lr)
            if self.optimiser is None:
                raise RuntimeError("pseudo_rule 'precond' needs the loop's optimiser in the stage")
            return optimiser_update(self.optimiser, self.moved, parameters, gradients)

        return meta_gradient(
            options.derivative,
            parameters,
            losses,
            weights.detach(),
            rule=clipped(rule, self.clip_norm),
            train_losses=train_losses,
            meta_loss=meta_loss,
            reduction=options.reduction,
            difference_step=options.difference_step,
        )

    def _teach(
        self, ahead: MetaGradient, progress: Progress, q: float, counts: tuple[int, ...]
    ) -> MetaStep:
        """Adam's step with the gradient that is there, at the schedule's share of the rate."""
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        norm = float(torch.nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            key, rate = "optimiser.lr", self.base_lr
            if self.options.pseudo_rule == "sgd":
                key, rate = "objective.pseudo_lr", self.options.pseudo_lr
            raise RecipeError(
                f"{key} = {rate}: the loss after the pseudo-update of step {progress.step} is not "
                "finite; allowed: a smaller rate"
            )
        weights = list(self.network.parameters())
        decay = self.options.meta_weight_decay * float(torch.nn.utils.get_total_norm(weights))
        for group in self.meta_optimiser.param_groups:
            group["lr"] = self.options.meta_lr * progress.lr / self.base_lr
        self.meta_optimiser.step()
        return MetaStep(progress.step, q, counts, float(ahead.loss), norm, decay)

    def _budget(self, step: int) -> float:
        """One of the budgets: a function of the step, so that a resumed run draws the same."""
        generator = seeds.generator(self.seed, "l2w budget", step)
        place = int(torch.randint(len(self.budgets), (), generator=generator))
        return self.budgets[place]

    def _logits(self, parameters: Parameters, batch: Batch) -> torch.Tensor:
        """[E, n, C] with `parameters` in place of the model's own and all others held constant."""
        fixed = {name: p.detach() for name, p in self.model.named_parameters()}
        logits: torch.Tensor = functional_call(
            self._functional,
            {f"model.{name}": value for name, value in (fixed | parameters).items()},
            (batch.input_ids, batch.attention_mask, batch.token_type_ids),
        )
        return logits

    @contextmanager
    def _looking_ahead(self) -> Iterator[None]:
        """No dropout, whatever the mode; for second derivatives, attention that has them."""
        was_training = self.model.training
        self.model.eval()
        try:
            if self.options.derivative == "exact":
                with sdpa_kernel(SDPBackend.MATH):
                    yield
            else:
                yield
        finally:
            self.model.train(was_training)


class _Unwrapped(nn.Module):
    """The model's own forward. Mixed precision patches the instance's, and its rounding is coarser
    than the differences that a look ahead measures."""

    def __init__(self, model: MultiExitModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return type(self.model).forward(self.model, *inputs)


def halves(batch: Batch) -> tuple[Batch, Batch]:
    """Every other row: batches are sorted by length, and halves must not differ in it.

    Equal halves: of an odd number of rows, the last goes.
    """
    even = len(batch) - len(batch) % 2
    return batch.take(slice(0, even, 2)), batch.take(slice(1, even, 2))


def features(losses: torch.Tensor, logits: torch.Tensor, kind: NetworkInput) -> torch.Tensor:
    """What the weight network sees of each row: losses [n, K] and logits [K, n, C] -> [n, inputs].

    Float32, and not normalised.
    """
    if kind == "loss":
        return losses.float()
    confidences = signals.max_probability(logits).T.float()
    return confidences if kind == "confidence" else torch.cat([losses.float(), confidences], dim=1)


def moved_parameters(
    parameters: dict[str, nn.Parameter], layers: int | Literal["all"], num_layers: int
) -> dict[str, nn.Parameter]:
    """Those that take part in the pseudo-update: all, or the heads and the last `layers` layers."""
    if layers == "all":
        return parameters
    if layers > num_layers:
        raise RecipeError(
            f"objective.pseudo_layers = {layers}; the backbone has {num_layers} layers, allowed: "
            f"0 to {num_layers}, or 'all'"
        )
    moved = {}
    for name, parameter in parameters.items():
        number = re.search(r"\.layer\.(\d+)\.", name) if name.startswith("backbone.") else None
        if name.startswith("exits.") or (number and int(number[1]) >= num_layers - layers):
            moved[name] = parameter
    return moved
