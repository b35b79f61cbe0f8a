"""Generators from one seed: the same for the same use, different for any other."""

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from offramp_training import seeds

numbers = st.integers(0, 2**32 - 1)


def draws(*use: int | str) -> torch.Tensor:
    return torch.rand(4, generator=seeds.generator(*use))  # type: ignore[arg-type]


@given(numbers, numbers)
def test_a_use_has_draws_of_its_own(one: int, other: int) -> None:
    assert torch.equal(draws(one, "order", 3), draws(one, "order", 3))
    assume(one != other)
    assert not torch.equal(draws(one, "order", 3), draws(other, "order", 3))


def test_uses_and_large_seeds_do_not_meet() -> None:
    seen = {
        tuple(draws(seed, use, number).tolist())
        for seed in (0, 1, 4096, 2**31, 2**32 - 1)
        for use in ("order", "thresholds")
        for number in range(3)
    }
    assert len(seen) == 5 * 2 * 3


def test_a_generator_starts_from_the_number_of_its_use() -> None:
    number = seeds.number(5, "dropout", 1)
    assert 0 <= number < 2**32
    assert torch.equal(
        torch.rand(4, generator=torch.Generator().manual_seed(number)), draws(5, "dropout", 1)
    )
    # A sum of seed and rank would be another recipe's seed.
    assert number not in {seeds.number(6, "dropout", 0), 6}
