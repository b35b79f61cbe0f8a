"""Sizes of a lane's buckets, and where each moves rows; with the kernels' twins."""

from typing import Any

import pytest
import torch

from loading import load
from offramp_model.cost import StepTable
from offramp_model.lane_buckets import buckets, moving_price, open_lane
from offramp_model.policies import make_policy
from offramp_model.rows import Encoding, RowSettings

cases: Any = load("tests/unit/model/lane_cases.py")


def test_sizes_double_up_to_the_largest_batch() -> None:
    sizes = buckets(2000, 500, 64)
    assert [one.tokens for one in sizes] == [128, 256, 512, 1024, 2000]
    assert [one.rows for one in sizes] == [42, 85, 170, 341, 500]
    assert {one.max_length for one in sizes} == {64}
    assert {one.compact_after for one in sizes} == {frozenset()}
    (only,) = buckets(2, 500, 64)
    assert (only.tokens, only.rows) == (2, 1)
    assert buckets(10**5, 10**5, 64)[-1].rows == 4096


def test_a_move_costs_its_launches_and_a_copy_of_each_row() -> None:
    stack = cases.make_stack()
    assert moving_price(stack)["seconds_per_token"] == pytest.approx(2 * 64 * 4 / 2e12)
    half = cases.make_stack(dtype=torch.bfloat16)
    assert moving_price(half)["seconds_per_token"] == pytest.approx(2 * 64 * 2 / 2e12)


@pytest.mark.parametrize("flat", [True, False])
def test_rows_are_moved_where_the_measured_table_says_that_it_pays(
    flat: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(time_layer: Any, *, most_tokens: int, budget_s: float) -> StepTable:
        assert time_layer(most_tokens) > 0  # the lane takes batches as large
        return StepTable((1, most_tokens), (1e-3, 1e-3 if flat else most_tokens * 1e-3))

    monkeypatch.setattr(StepTable, "measured", measured)
    stack = cases.make_stack()
    lane, table = open_lane(
        *(stack, make_policy("entropy")), max_tokens=300, max_rows=50, survival=[0.5, 0.25, 0.0]
    )
    sizes = [one.bucket for one in lane._passes]
    assert [one.tokens for one in sizes] == [128, 256, 300]
    assert all(one.compact_after == (frozenset() if flat else {1, 2}) for one in sizes)
    assert table(1) == 1e-3
    encodings = [Encoding([5 + row] * length, [0] * length) for row, length in enumerate((3, 9, 1))]
    asked = RowSettings.uniform(3, 0.5, max_layer=3)
    expected = cases.of_loop(stack, "entropy", encodings, asked)
    cases.assert_same(cases.of_lane(lane, encodings, asked), expected, 1e-4)


def test_a_table_is_measured_on_the_lane_itself() -> None:
    _, table = open_lane(
        *(cases.make_stack(), make_policy("entropy")),
        max_tokens=64,
        max_rows=8,
        survival=[1.0, 1.0, 0.0],
    )
    assert table.tokens == (16, 32, 64)
    assert 0 < table(16) < 1


def test_a_lane_of_few_rows_is_timed_with_longer_texts() -> None:
    policy, survival = make_policy("entropy"), [1.0, 1.0, 0.0]
    how = {"max_tokens": 1024, "max_rows": 4, "survival": survival}
    lane, table = open_lane(cases.make_stack(), policy, **how)
    assert lane._passes[-1].bucket.rows == 4
    assert table.tokens == (16, 32, 64, 128)  # 4 texts of the longest, 32 tokens
