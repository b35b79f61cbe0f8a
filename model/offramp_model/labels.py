"""What an exit's logits say, as one whole number a row, so that answers of both kinds of problem
are latched, compared and counted in the same way.

single_label_classification  the id of the most probable class
multi_label_classification   the set of labels that are more probable than not, as bits: label c is
                             in the set where bit c is 1. No label at all is 0

int64 has room for 63 labels beside its sign, so no set is negative. Knows nothing about policies,
recorded exits or rows.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from offramp_model.config import MOST_LABELS_OF_SETS, ProblemType

Reading = Callable[[Tensor], Tensor]
"""Logits [..., C] → what they say, int64 [...]."""


def reading(problem_type: ProblemType) -> Reading:
    """How logits are read in this kind of problem."""
    return label_set if problem_type == "multi_label_classification" else most_probable


def most_probable(logits: Tensor) -> Tensor:
    """The class with the largest logit."""
    return logits.argmax(dim=-1)


def label_set(logits: Tensor) -> Tensor:
    """The labels with sigmoid(z) > 0.5, that is z > 0: exact, whatever sigmoid rounds to."""
    return to_bits(logits > 0)


def to_bits(members: Tensor) -> Tensor:
    """Who is in a set, bool [..., C] → its bits, int64 [...]."""
    return (members.long() << _places(members.shape[-1], members.device)).sum(dim=-1)


def from_bits(sets: Tensor, num_labels: int = MOST_LABELS_OF_SETS) -> Tensor:
    """Undo of `to_bits`: int64 [...] → bool [..., C]."""
    return (sets[..., None] >> _places(num_labels, sets.device) & 1).bool()


def bits_of(ids: Iterable[int]) -> int:
    """The bits of a set that is given by its labels' ids."""
    return sum(1 << label for label in set(ids))


def ids_of(bits: int) -> list[int]:
    """Undo of `bits_of`, ascending."""
    return [label for label in range(bits.bit_length()) if bits >> label & 1]


def _places(count: int, device: torch.device) -> Tensor:
    return torch.arange(count, device=device)
