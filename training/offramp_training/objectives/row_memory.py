"""What stages keep about each training row, found again by the row's id.

Two things of different life: memorised layers, counted once and part of every resume point; and one
pass of the frozen encoder, as large as the training set is long and made anew when needed. Knows
nothing about losses or gates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch

from offramp_training.objectives.reinforce import memorised_exits
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.processes import ALONE, Processes

if TYPE_CHECKING:
    from offramp_training.batches import Batch
    from offramp_training.model import MultiExitModel


class RowMemory:
    """Memorised layers, and the cached states and cross-entropies of all exits."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}  # row id -> line of the tensors below
        self._memorised: torch.Tensor | None = None  # layers, int64 [N]
        self._states: torch.Tensor | None = None  # [N, E, W]
        self._cross_entropies: torch.Tensor | None = None  # [N, E]

    def run(
        self, model: MultiExitModel, batches: Iterable[Batch], processes: Processes = ALONE
    ) -> None:
        """Caches one pass over all rows, dropout off; counts memorised layers the first time.

        Processes take turns with the batches, and each keeps what all have found, after every turn:
        no message is larger than a batch for each of them.
        """
        was_training = model.training
        model.eval()
        batches, turns = iter(batches), []
        while turn := list(islice(batches, processes.count)):
            turns.append(_one_turn(model, turn, processes))
        model.train(was_training)
        ids, states, losses, right = (torch.cat(parts) for parts in zip(*turns, strict=True))
        layers = torch.tensor(model.config.exit_layers)
        counted = self._memorised is not None  # perhaps with the rows in another order
        memorised = self.memorised_layers(ids) if counted else layers[memorised_exits(right.T > 0)]
        self._keep(ids, memorised)
        self._states, self._cross_entropies = states, losses

    def forget_pass(self) -> None:
        """Gives the cached pass back; the memorised layers stay."""
        self._states = self._cross_entropies = None

    def memorised_layers(self, ids: torch.Tensor) -> torch.Tensor:
        """Of the rows with these ids, int64 [B]."""
        if self._memorised is None:
            raise RuntimeError("memorised layers are counted after the warm-up, not before")
        return self._memorised[self._places(ids)].to(ids.device)

    def states(self, ids: torch.Tensor) -> torch.Tensor:
        """What every exit's classifier and gate see of these rows, [E, B, W]."""
        return self._cached(self._states, ids)

    def cross_entropies(self, ids: torch.Tensor) -> torch.Tensor:
        """Of every exit for these rows, [E, B]."""
        return self._cached(self._cross_entropies, ids)

    def histogram(self) -> dict[int, int]:
        """Memorised layer -> rows."""
        counted = [] if self._memorised is None else self._memorised.tolist()
        return dict(sorted(Counter(counted).items()))

    def state_dict(self) -> dict[str, Any]:
        if self._memorised is None:
            return {}
        return {"ids": torch.tensor(list(self._place)), "memorised_layers": self._memorised}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            self._keep(state["ids"], state["memorised_layers"])

    def _keep(self, ids: torch.Tensor, memorised: torch.Tensor) -> None:
        self._place = {row: place for place, row in enumerate(ids.tolist())}
        if len(self._place) != len(ids):
            raise ValueError("two training rows have the same id")
        self._memorised = memorised

    def _places(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self._place[row] for row in ids.tolist()])

    def _cached(self, values: torch.Tensor | None, ids: torch.Tensor) -> torch.Tensor:
        if values is None:
            raise RuntimeError("no pass over the training rows is cached")
        return values[self._places(ids)].to(ids.device).transpose(0, 1)


@torch.no_grad()
def _one_turn(
    model: MultiExitModel, turn: Sequence[Batch], processes: Processes
) -> tuple[torch.Tensor, ...]:
    """A batch for each process, the last ones perhaps without: of all their rows, ids [B], states
    [B, E, W], cross-entropies [B, E] and 1 for right answers [B, E], on the CPU."""
    ids = torch.cat([batch.ids.cpu() for batch in turn])
    shape = (len(ids), model.config.num_exits)
    states = next(model.parameters()).new_zeros(*shape, model.config.state_size)
    losses = torch.zeros(shape, device=states.device)
    right = torch.zeros(shape, device=states.device, dtype=torch.long)
    if processes.rank < len(turn):
        start = sum(len(batch) for batch in turn[: processes.rank])
        mine = slice(start, start + len(turn[processes.rank]))
        states[mine], losses[mine], right[mine] = _one_batch(model, turn[processes.rank])
    # Nobody else has anything but zeros there: the sums are exact.
    found = (processes.reduce(values, "sum") for values in (states, losses, right))
    return ids, *(values.cpu() for values in found)


def _one_batch(model: MultiExitModel, batch: Batch) -> tuple[torch.Tensor, ...]:
    """States [B, E, W], cross-entropies [B, E], right answers [B, E]."""
    batch = batch.to(model.device)
    states = model.states(batch.input_ids, batch.attention_mask, batch.token_type_ids)
    logits = torch.stack([model.exits.classify(i, state) for i, state in enumerate(states)])
    losses = exit_cross_entropies(logits.float(), batch.labels)
    right = logits.argmax(dim=-1) == batch.labels
    return torch.stack(states, dim=1), losses.T, right.T
