"""The device lane on a CUDA device: captured graphs against the layer loop, and nothing waits."""

from typing import Any

import pytest
import torch

from loading import load
from offramp_model.policies import POLICIES, make_policy
from offramp_model.rows import Encoding, RowSettings, TokenBatch

pytestmark = pytest.mark.gpu
cases: Any = load("tests/unit/model/lane_cases.py")
laws: Any = load("tests/unit/model/test_laws.py")


def texts(seed: int, count: int = 14) -> list[Encoding]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 17, (count,), generator=generator).tolist()
    return [
        Encoding(torch.randint(1, 49, (length,), generator=generator).tolist(), [0] * length)
        for length in lengths
    ]


@pytest.mark.parametrize("name", POLICIES)
def test_a_replayed_graph_answers_as_the_loop_on_the_cpu(name: str) -> None:
    lane = cases.make_lane(cases.make_stack("cuda"), name)
    for seed in range(6):  # other texts, lengths, counts and thresholds in the same graph
        encodings = texts(seed, count=3 + 2 * seed)
        asked = laws.random_settings(len(encodings), make_policy(name), 3, seed)
        found = cases.of_lane(lane, encodings, asked)
        cases.assert_same(found, cases.of_loop(cases.make_stack(), name, encodings, asked), 1e-3)


def test_moving_rows_changes_no_bit() -> None:
    stack, encodings = cases.make_stack("cuda", torch.bfloat16), texts(1)
    asked = laws.random_settings(len(encodings), make_policy("entropy"), 3, 1)
    found = [
        cases.of_lane(cases.make_lane(stack, "entropy", frozenset(exits)), encodings, asked)
        for exits in ((), (1,), (1, 2))
    ]
    assert found[0] == found[1] == found[2]


def test_the_pass_never_waits_for_the_host() -> None:
    lane = cases.make_lane(cases.make_stack("cuda"), "entropy")
    batch, asked = TokenBatch.pack(texts(2)), RowSettings.uniform(14, 0.5, max_layer=3)
    chosen = lane._pass_for(batch)
    assert chosen is not None
    chosen.load(batch, asked.at(batch.order), lane._rule)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        chosen.start()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert sum(len(one.row) for one in chosen.leavers(batch, None)) == 14


def test_a_pass_that_nobody_waited_for_does_not_show_in_the_next() -> None:
    lane = cases.make_lane(cases.make_stack("cuda"), "entropy")
    asked = RowSettings.uniform(14, 0.5, max_layer=3)
    expected = cases.of_lane(lane, texts(3), asked)
    for _ in range(20):
        next(iter(lane(TokenBatch.pack(texts(4)), asked)))
        assert cases.of_lane(lane, texts(3), asked) == expected
