"""Random numbers that have nothing to do with each other, from one seed of a recipe.

torch's CPU generator reads 32 bits of a seed and drops the others, so sums and shifts of seeds soon
meet. Each use has a name of its own instead. Knows nothing about what is drawn.
"""

from __future__ import annotations

import hashlib

import torch


def number(seed: int, *use: str | int) -> int:
    """A seed of 32 bits for one use of a recipe's seed, as `number(seed, "dropout", rank)`; the
    same for the same arguments, everywhere."""
    digest = hashlib.sha256(repr((seed, *use)).encode()).digest()
    return int.from_bytes(digest[:4], "little")


def generator(seed: int, *use: str | int) -> torch.Generator:
    """A CPU generator that starts from the `number` of a use."""
    return torch.Generator().manual_seed(number(seed, *use))
