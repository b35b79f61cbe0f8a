"""Bucketing: every row exactly once, the same order for the same seed and epoch."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.rows import Encoding
from offramp_training.batches import EncodedRows, bucketed_order

lengths_of_rows = st.lists(st.integers(1, 60), min_size=1, max_size=300)


@given(lengths_of_rows, st.integers(1, 40), st.integers(0, 2**31), st.integers(0, 5))
def test_every_row_exactly_once_in_batches_of_the_size(
    lengths: list[int], batch_size: int, seed: int, epoch: int
) -> None:
    order = bucketed_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert sorted(place for batch in order for place in batch) == list(range(len(lengths)))
    assert max(len(batch) for batch in order) <= batch_size
    again = bucketed_order(lengths, batch_size=batch_size, seed=seed, epoch=epoch)
    assert order == again


@given(lengths_of_rows, st.integers(1, 400), st.integers(0, 2**31))
def test_a_token_budget_is_kept_except_by_a_row_that_is_longer(
    lengths: list[int], budget: int, seed: int
) -> None:
    order = bucketed_order(lengths, batch_size=8, seed=seed, epoch=0, batch_tokens=budget)
    assert sorted(place for batch in order for place in batch) == list(range(len(lengths)))
    for batch in order:
        padded = len(batch) * max(lengths[place] for place in batch)
        assert padded <= budget or len(batch) == 1


def test_epochs_and_seeds_differ() -> None:
    lengths = [1 + place % 7 for place in range(200)]
    orders = [
        bucketed_order(lengths, batch_size=8, seed=seed, epoch=epoch)
        for seed, epoch in ((0, 0), (0, 1), (1, 0))
    ]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_buckets_save_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 60, (2000,), generator=generator).tolist()
    order = bucketed_order(lengths, batch_size=32, seed=0, epoch=0)
    padded = sum(len(batch) * max(lengths[place] for place in batch) for batch in order)
    assert padded < 1.1 * sum(lengths)


@pytest.fixture
def rows() -> EncodedRows:
    encodings = [Encoding([2, *range(5, 5 + n), 3], [0] * (n + 1) + [1]) for n in (4, 1, 2)]
    return EncodedRows(encodings, ids=[10, 11, 12], labels=[0, 1, 1], pad_id=9)


def test_a_batch_is_padded_to_its_longest_row(rows: EncodedRows) -> None:
    batch = rows.batch([1, 2])
    assert batch.input_ids.tolist() == [[2, 5, 3, 9], [2, 5, 6, 3]]
    assert batch.attention_mask.tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch.token_type_ids.tolist() == [[0, 0, 1, 0], [0, 0, 0, 1]]
    assert batch.ids.tolist() == [11, 12]
    assert batch.labels.tolist() == [1, 1]


def test_in_order_gives_file_order(rows: EncodedRows) -> None:
    assert [batch.ids.tolist() for batch in rows.in_order(2)] == [[10, 11], [12]]
