"""The seam between the training loop and what it trains for.

An `Objective` turns a model into a list of `Stage`s; the loop runs them in order, one visible nest:
stage -> epoch -> batch -> loss -> backward, clip, step. A stage decides which parameters move,
which losses they see and what it remembers; it never calls the optimiser of the loop. Networks of
its own (a gate, a weight predictor, with their own optimiser) live inside the stage and travel in
its `state_dict`, so that a resumed run is the same run.

Knows nothing about files, progress bars, validation or early stopping.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from offramp_training.objectives.row_losses import Distillation
from offramp_training.processes import ALONE, Processes

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.config import Recipe
    from offramp_training.model import MultiExitModel


@dataclass(frozen=True)
class Progress:
    """Where the loop stands when it asks a stage for losses."""

    epoch: int
    step: int  # optimiser steps done in this stage
    total_steps: int  # optimiser steps this stage will take
    lr: float  # of the backbone, at this step


class Stage:
    """One stage of training. Defaults: every parameter, the recipe's rates, nothing to remember."""

    def __init__(self, name: str, model: MultiExitModel, epochs: int) -> None:
        self.name = name
        self.model = model
        self.epochs = epochs
        self.steps_per_batch = 1  # how many losses one batch yields
        self.batch_size: int | None = None  # None: the recipe's
        self.keeps_best = True  # end with the best weights by held-out accuracy, not the newest
        self.lr: float | None = None  # None: the recipe's two rates; else one for all parameters
        self.drop_incomplete = False  # leave out the batches with fewer rows than the batch size
        # The loop's, set before the first batch: a stage may read its state, never step it.
        self.optimiser: Any = None
        # What the recipe's [distillation] asks for, set before the first batch; by default nothing.
        self.distillation = Distillation()
        # Likewise: those that train together.
        self.processes: Processes = ALONE

    def parameters(self) -> dict[str, nn.Parameter]:
        """Named parameters this stage trains; all others stay bit-identical."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """Before the first epoch, with the training rows in file order. Not when resuming in it."""

    def rebuild(self, batches: Callable[[], Iterable[Batch]]) -> None:
        """When resuming in the stage, with the same rows, once model and `state_dict` are back:
        makes anew what follows from them and is too large to keep."""

    def report(self) -> list[str]:
        """Lines for whoever watches, once the stage is prepared."""
        return []

    def begin_epoch(self, epoch: int) -> None:
        """Before the first batch of an epoch. Not called when resuming inside it."""

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        """Scalars to descend, `steps_per_batch` of them; the loop steps between two of them.

        The batch is that of all processes; a loss is to be the mean over the rows of
        `self.processes.share(batch)`, and statistics over rows are to be reduced.
        """
        raise NotImplementedError

    def row_losses(
        self, logits: torch.Tensor, batch: Batch, last_exit: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Every row's training loss at every exit: logits [E, B, C] -> [E, B].

        Cross-entropy with the labels, mixed with soft targets where the recipe distils; what is
        descended comes from here, what measures (rewards, right or wrong) from the labels. The last
        exit's own logits are the others' target unless `last_exit` [B, C] holds it still while
        parameters are moved for a look ahead.
        """
        return self.distillation.row_losses(logits, batch, last_exit)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs beside the model: nested dicts, lists, tensors, numbers.

        Also asked between two stages, of the one to come: what earlier stages left it.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Undo of `state_dict`."""


class Objective(Protocol):
    """What a recipe's `[objective]` table becomes: its own options, and the stages they ask for."""

    @property
    def name(self) -> str: ...

    @property
    def exit_policy(self) -> str:
        """The policy that checkpoints of this objective serve with unless told otherwise."""
        ...

    @property
    def exit_threshold(self) -> float | None:
        """That policy's raw threshold that the exits are trained for, where there is one."""
        ...

    @property
    def not_in_first_stage(self) -> tuple[str, ...]:
        """Options, by their names in a recipe, that do not change a bit of the first stage: runs
        that differ in nothing else can share it."""
        ...

    def stages(self, model: MultiExitModel, config: Recipe) -> list[Stage]: ...

    def options(self) -> dict[str, Any]:
        """Every hyper-parameter, ready for JSON."""
        ...
