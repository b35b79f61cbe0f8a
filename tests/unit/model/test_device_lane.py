"""The device lane against the layer loop: with the kernels' twins here, interpreted in a process of
its own, and on a device in tests/gpu."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loading import load
from offramp_model.config import PolicyOptions
from offramp_model.device_lane import Bucket, DeviceLane, not_covered
from offramp_model.policies import POLICIES, make_policy
from offramp_model.rows import Encoding, RowSettings, TokenBatch

cases: Any = load("tests/unit/model/lane_cases.py")
laws: Any = load("tests/unit/model/test_laws.py")

SOME = st.lists(
    st.lists(st.integers(1, 49), min_size=1, max_size=12).map(
        lambda ids: Encoding(ids, [0] * len(ids))
    ),
    min_size=0,
    max_size=14,
)


@pytest.fixture(scope="module")
def lane_stack() -> Any:
    return cases.make_stack()


@settings(max_examples=20)
@pytest.mark.parametrize("name", POLICIES)
@given(encodings=SOME, seed=laws.seeds, compact=st.sets(st.sampled_from((1, 2, 3))))
def test_the_lane_answers_as_the_loop(
    lane_stack: Any, name: str, encodings: list[Encoding], seed: int, compact: set[int]
) -> None:
    asked = laws.random_settings(len(encodings), make_policy(name), 3, seed)
    lane = cases.make_lane(lane_stack, name, frozenset(compact))
    found = cases.of_lane(lane, encodings, asked)
    assert len(found) == len(encodings)
    cases.assert_same(found, cases.of_loop(lane_stack, name, encodings, asked), 1e-4)
    # The same buffers again, with something else's remains in them.
    again = cases.of_lane(lane, encodings, asked)
    assert again == found


@pytest.mark.parametrize("pooling", ["cls", "mean", "mean_cls"])
@pytest.mark.parametrize("pooler", ["none", "shared", "per_exit"])
def test_every_head_that_the_lane_covers(pooling: str, pooler: str) -> None:
    stack = cases.make_stack(pooling=pooling, pooler=pooler, gate_hidden=0)
    encodings = [Encoding([5 + row] * length, [0] * length) for row, length in enumerate((3, 9, 1))]
    asked = RowSettings.uniform(3, 0.5, max_layer=3)
    for name in ("gate", "margin"):
        found = cases.of_lane(cases.make_lane(stack, name), encodings, asked)
        cases.assert_same(found, cases.of_loop(stack, name, encodings, asked), 1e-4)


def test_exits_need_not_be_at_every_layer() -> None:
    stack = cases.make_stack(exit_layers=(2, 3))
    encodings = [Encoding([7, 8, 9], [0, 0, 0]), Encoding([4], [0])]
    asked = RowSettings.uniform(2, 0.9, max_layer=3)
    found = cases.of_lane(cases.make_lane(stack, "entropy"), encodings, asked)
    cases.assert_same(found, cases.of_loop(stack, "entropy", encodings, asked), 1e-4)


def test_who_is_given_up_is_not_answered_and_the_others_are(lane_stack: Any) -> None:
    encodings = [Encoding([4 + row], [0]) for row in range(5)]
    asked = RowSettings.uniform(5, -torch.inf, max_layer=3)
    lane = cases.make_lane(lane_stack, "entropy")

    def abandoned(rows: torch.Tensor) -> torch.Tensor:
        return (rows == 1) | (rows == 4)

    # Without a device the whole pass runs before the host looks, so the words are written before.
    batch = TokenBatch.pack(encodings)
    one = lane._pass_for(batch)
    assert one is not None
    one.load(batch, asked, lane._rule)
    one._cancelled[[1, 4]] = 1
    one.start()
    left = [int(row) for leavers in one.leavers(batch, abandoned) for row in leavers.row]
    assert sorted(left) == [0, 2, 3]
    # The next batch does not inherit the words.
    assert cases.of_lane(lane, encodings, asked).keys() == set(range(5))


def test_a_row_of_nan_runs_to_the_end() -> None:
    stack = cases.make_stack()
    stack.embeddings.words[9] = torch.nan
    encodings = [Encoding([9, 9], [0, 0]), Encoding([5, 6], [0, 0])]
    asked = RowSettings.uniform(2, 0.0, max_layer=3)
    found = cases.of_lane(cases.make_lane(stack, "confidence"), encodings, asked)
    assert found[0][0] == 3
    assert found[1][0] == 1


def test_the_smallest_bucket_that_fits_is_taken_and_none_is_told(lane_stack: Any) -> None:
    lane = cases.make_lane(lane_stack, "entropy", sizes=((256, 16), (64, 8)))

    def batch(*lengths: int) -> TokenBatch:
        return TokenBatch.pack([Encoding([5] * n, [0] * n) for n in lengths])

    sizes = {(5,): 64, (32, 32): 64, (1,) * 9: 256, (32, 32, 1): 256}
    for lengths, tokens in sizes.items():
        found = lane._pass_for(batch(*lengths))
        assert found is not None
        assert found.bucket.tokens == tokens
    for lengths in ((33,), (1,) * 17, (32,) * 9):
        assert not lane.covers(batch(*lengths))
    with pytest.raises(ValueError, match=r"no bucket for 1 rows of 33 tokens; they hold: Bucket"):
        next(lane(batch(33), RowSettings.uniform(1, 0.5, max_layer=3)))


@pytest.mark.parametrize(
    ("changes", "activation", "reason"),
    [
        ({}, "relu", "activation 'relu' has no fused form"),
        ({"pooling": "attention", "attention_heads": 2}, "gelu", "pooling 'attention'"),
        ({"num_attention_heads": 4}, "gelu", "heads of 16 instead of 32 or 64"),
        ({"policies": PolicyOptions(temperature=2.0)}, "gelu", "signals have a temperature"),
        ({"labels": tuple(map(str, range(257)))}, "gelu", "257 labels, more than 256"),
        (
            {"problem_type": "multi_label_classification", "gate_hidden": None},
            "gelu",
            "its exits say sets of labels",
        ),
    ],
)
def test_what_the_lane_does_not_cover(
    changes: dict[str, Any], activation: str, reason: str
) -> None:
    stack = cases.make_stack(**changes)
    said = not_covered(stack, activation)
    assert said is not None
    assert reason in said
    with pytest.raises(ValueError, match="the device lane does not cover this encoder"):
        DeviceLane(stack, activation, make_policy("entropy"), [Bucket(32, 4)])


def test_bad_buckets_and_a_gate_without_gates_are_refused(lane_stack: Any) -> None:
    for tokens, rows, length in ((8, 9, 8), (8, 0, 8), (8192, 4097, 8)):
        with pytest.raises(ValueError, match="a bucket holds 1 to"):
            Bucket(tokens, rows, length)
    with pytest.raises(ValueError, match=r"max_length must lie in \[1, 128\], got 129"):
        Bucket(512, 8, 129)
    with pytest.raises(ValueError, match="needs gates"):
        DeviceLane(cases.make_stack(gate_hidden=None), "gelu", make_policy("gate"), [Bucket(32, 4)])


@pytest.mark.timeout(200)
def test_the_kernels_answer_as_the_loop_under_the_interpreter() -> None:
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("interpreted_lane.py")],
        cwd=Path(__file__).parents[3],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=190,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.strip() == "the lane and the loop agree"
