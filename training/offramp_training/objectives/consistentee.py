"""ConsistentEE: a gate at every exit, taught by reinforcement when one right answer is enough.

Stage 1 warms encoder and heads up. Then each training row's memorised layer is counted, the first
from which all exits are right, and stage 2 teaches the gates alone, on one cached pass of the now
frozen encoder. Stage 3 trains everything together at the exits that the gates choose, or, as
`stage3 = "alternate"`, the classifiers alone, in turn with the gates.

The stages from the second on need of the first nothing but the model. Knows nothing about how a
served row is told to leave; formulas are in `reinforce.py`, what is kept by row in `row_memory.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from offramp_training import seeds
from offramp_training.objectives.base import Progress, Stage
from offramp_training.objectives.joint import exit_weights, joint_loss
from offramp_training.objectives.reinforce import (
    Baseline,
    exit_rewards,
    policy_loss,
    sample_exits,
    sampled_cross_entropy,
)
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.objectives.row_memory import RowMemory

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel

GATES, CLASSIFIERS = "exits.gates.", "exits.classifiers."

# "recipe" is what the recipe's [loop] and [optimiser] say, as for any other objective.
Epochs = Annotated[int, Field(strict=True, ge=1)] | Literal["recipe"]
BatchSize = Annotated[int, Field(strict=True, ge=1)] | Literal["recipe"]
Rate = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] | Literal["recipe"]


class ConsistentEE(BaseModel):
    """Options of the consistentee objective."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Literal["consistentee"] = "consistentee"
    # The cost of a layer, in nats of cross-entropy. ln(C)/L makes full depth of an easy row cost as
    # much as a guess; one checkpoint serves the trade-off of one alpha.
    alpha: Annotated[float, Field(strict=True, ge=0, le=10, allow_inf_nan=False)] = 0.03
    hardness: bool = True  # a row pays less the later it is memorised; false: all pay alike
    trajectories: Annotated[int, Field(strict=True, ge=2, le=1024)] = 8  # drawn per row and step
    baseline: Baseline = "own_mean"
    gate_hidden: Annotated[int, Field(strict=True, ge=0, le=65536)] = 32  # 0: one linear map
    # Leave where a gate says more, by default.
    theta: Annotated[float, Field(strict=True, gt=0, lt=1)] = 0.5
    stage1_epochs: Epochs = 3
    stage1_batch_size: BatchSize = 16
    stage1_lr: Rate = 2e-5
    stage2_epochs: Epochs = 2
    stage2_batch_size: BatchSize = 32
    stage2_lr: Rate = 3e-4
    stage3: Literal["joint", "alternate"] = "joint"
    stage3_epochs: Epochs = 1
    stage3_batch_size: BatchSize = 16
    stage3_lr: Rate = 2e-5
    # Of the gates' loss beside the cross-entropy at the sampled exits, in a joint stage 3.
    policy_weight: Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)] = 1.0
    rounds: Annotated[int, Field(strict=True, ge=1, le=100)] = 1  # turns of stages 2 and 3

    @property
    def exit_policy(self) -> str:
        return "gate"

    @property
    def exit_threshold(self) -> float:
        return self.theta

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        """Not `gate_hidden`: the gates are there, untrained, before the warm-up begins."""
        return (
            *("alpha", "hardness", "trajectories", "baseline", "theta", "policy_weight", "rounds"),
            *("stage2_epochs", "stage2_batch_size", "stage2_lr"),
            *("stage3", "stage3_epochs", "stage3_batch_size", "stage3_lr"),
        )

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]:
        """Gives the model its gates, and lists who trains what."""
        model.add_gates(self.gate_hidden)
        # Draws of their own: all processes draw the same trajectories, whatever dropout takes from
        # torch's generator in each of them.
        draws = seeds.generator(config.loop.seed, "trajectories")
        shared = (model, config, self, RowMemory(), draws)
        last = JointStage3 if self.stage3 == "joint" else HeadsStage
        stages: list[Stage] = [WarmUp("warm-up", *shared)]
        for number in range(1, self.rounds + 1):
            of = f" {number} of {self.rounds}" if self.rounds > 1 else ""
            stages += [
                PolicyStage(f"gates{of}", *shared),
                last(f"{self.stage3}{of}", *shared),
            ]
        return stages

    def options(self) -> dict[str, Any]:
        return self.model_dump(mode="json", exclude={"name"})


class _Stage(Stage):
    """What the stages have in common: options, and memory and draws that outlive each of them."""

    number = 0  # which of the options' rates, sizes and epochs are this stage's
    trains: tuple[str, ...] = ("",)  # names of its parameters start with one of these
    never_trains: tuple[str, ...] = ()

    def __init__(
        self,
        name: str,
        model: MultiExitModel,
        config: Recipe,
        options: ConsistentEE,
        memory: RowMemory,
        generator: torch.Generator,
    ) -> None:
        def setting(what: str) -> Any:
            value = getattr(options, f"stage{self.number}_{what}")
            return None if value == "recipe" else value

        super().__init__(name, model, setting("epochs") or config.loop.epochs)
        self.batch_size, self.lr = setting("batch_size"), setting("lr")
        self.options, self.memory = options, memory
        self.exit_layers = torch.tensor(model.config.exit_layers)
        self.generator = generator

    def parameters(self) -> dict[str, nn.Parameter]:
        return {
            name: parameter
            for name, parameter in super().parameters().items()
            if name.startswith(self.trains) and not name.startswith(self.never_trains)
        }

    def rewards(self, batch: Batch, cross_entropies: torch.Tensor) -> torch.Tensor:
        """Of leaving at each exit, [E, B]."""
        return exit_rewards(
            cross_entropies,
            self.exit_layers,
            self.memory.memorised_layers(batch.ids),
            alpha=self.options.alpha,
            hardness=self.options.hardness,
        )

    def sample(self, gates: torch.Tensor, rows: int) -> torch.Tensor:
        """Exits by the gates of this process's share of a batch of so many rows: [K, B]."""
        shape = (self.options.trajectories, len(gates), rows)
        draws = self.processes.own(torch.rand(shape, generator=self.generator))
        return sample_exits(gates, draws.to(gates.device))

    def state_dict(self) -> dict[str, Any]:
        return {"memory": self.memory.state_dict(), "generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.memory.load_state_dict(state["memory"])
        self.generator.set_state(state["generator"])


class WarmUp(_Stage):
    """Stage 1: encoder and heads, each exit's cross-entropy weighted by its layer."""

    number = 1
    never_trains = (GATES,)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        batch = self.processes.share(batch)
        weights = exit_weights("depth", self.model.config.exit_layers)
        yield joint_loss(self.row_losses(self.model.logits(batch), batch), weights, "weighted")


class _CachedStage(_Stage):
    """A stage over an encoder that does not move: one pass serves every epoch."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.keeps_best = False  # the exits' own accuracy says nothing about it

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self.memory.run(self.model, batches(), self.processes)

    def rebuild(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self.prepare(batches)

    def gate_logits(self, states: torch.Tensor) -> torch.Tensor:
        """States [E, B, W] -> [E - 1, B]."""
        exits = self.model.exits
        return torch.stack([exits.gate_logits(i, state) for i, state in enumerate(states[:-1])])


class PolicyStage(_CachedStage):
    """Stage 2: the gates, and nothing else."""

    number = 2
    trains = (GATES,)

    def report(self) -> list[str]:
        shown = ", ".join(f"{layer}: {rows}" for layer, rows in self.memory.histogram().items())
        return [f"training rows by memorised layer: {shown}"]

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        rows, batch = len(batch), self.processes.share(batch)
        gates = self.gate_logits(self.memory.states(batch.ids))
        rewards = self.rewards(batch, self.memory.cross_entropies(batch.ids))
        exits = self.sample(gates, rows)
        yield policy_loss(gates, rewards, exits, self.options.baseline)


class JointStage3(_Stage):
    """Stage 3: everything, at the exits that the gates choose, and the gates with it."""

    number = 3

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.keeps_best = False  # it gives up exits that nobody leaves by, as it should

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self.memory.forget_pass()

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        rows, batch = len(batch), self.processes.share(batch)
        logits, gates = self.model.logits_and_gates(batch)
        rewards = self.rewards(batch, exit_cross_entropies(logits, batch.labels))
        exits = self.sample(gates, rows)
        policy = policy_loss(gates, rewards, exits, self.options.baseline)
        losses = sampled_cross_entropy(self.row_losses(logits, batch), exits)
        yield losses + self.options.policy_weight * policy


class HeadsStage(_CachedStage):
    """Stage 3 in its other reading: the classifiers alone, at the exits that the gates choose.

    What pools and maps their states stands still with the encoder: the cached states are its work.
    """

    number = 3
    trains = (CLASSIFIERS,)

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        rows, batch = len(batch), self.processes.share(batch)
        states = self.memory.states(batch.ids)
        with torch.no_grad():
            gates = self.gate_logits(states)
        logits = [self.model.exits.classify(i, state) for i, state in enumerate(states)]
        losses = self.row_losses(torch.stack(logits), batch)
        yield sampled_cross_entropy(losses, self.sample(gates, rows))
