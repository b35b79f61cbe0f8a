"""What an exit's logits say, as one whole number a row, so that answers of both kinds of problem
are latched, compared and counted in the same way.

single_label_classification  the id of the most probable class
multi_label_classification   the set of labels that are more probable than not, as bits: label c is
                             in the set where bit c is 1. No label at all is 0

int64 has room for 63 labels beside its sign, so no set is negative. Knows nothing about policies,
recorded exits or rows.
"""

from collections.abc import Callable, Iterable

from offramp_model.arrays import Array, namespace, on_device_of
from offramp_model.config import MOST_LABELS_OF_SETS, ProblemType

Reading = Callable[[Array], Array]
"""Logits [..., C] → what they say, int64 [...]."""


def reading(problem_type: ProblemType) -> Reading:
    """How logits are read in this kind of problem."""
    return label_set if problem_type == "multi_label_classification" else most_probable


def most_probable(logits: Array) -> Array:
    """The class with the largest logit."""
    return namespace(logits).argmax(logits, axis=-1)


def label_set(logits: Array) -> Array:
    """The labels with sigmoid(z) > 0.5, that is z > 0: exact, whatever sigmoid rounds to."""
    return to_bits(logits > 0)


def to_bits(members: Array) -> Array:
    """Who is in a set, bool [..., C] → its bits, int64 [...]."""
    xp = namespace(members)
    return xp.sum(xp.astype(members, xp.int64) << _places(members.shape[-1], members), axis=-1)


def from_bits(sets: Array, num_labels: int = MOST_LABELS_OF_SETS) -> Array:
    """Undo of `to_bits`: int64 [...] → bool [..., C]."""
    return (sets[..., None] >> _places(num_labels, sets) & 1) == 1


def bits_of(ids: Iterable[int]) -> int:
    """The bits of a set that is given by its labels' ids."""
    return sum(1 << label for label in set(ids))


def ids_of(bits: int) -> list[int]:
    """Undo of `bits_of`, ascending."""
    return [label for label in range(bits.bit_length()) if bits >> label & 1]


def _places(count: int, beside: Array) -> Array:
    xp = namespace(beside)
    return xp.arange(count, dtype=xp.int64, **on_device_of(beside))
