"""The layer loop on a CUDA device against the CPU: same exits, same labels."""

from types import ModuleType
from typing import Any

import pytest
import torch

from loading import load
from offramp_model.encoder import PackedEncoder
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.policies import POLICIES, make_policy
from offramp_model.recorded import record_exits
from offramp_model.rows import Encoding, RowSettings, TokenBatch

pytestmark = pytest.mark.gpu


def tiny() -> ModuleType:
    """The tiny random encoder of the model's unit tests."""
    return load("tests/unit/model/conftest.py")


def on(device: str) -> tuple[PackedEncoder, list[Encoding]]:
    """The tiny encoder on a device, and texts for it."""
    fixtures: Any = tiny()
    config = fixtures.tiny_config(gate_hidden=5)
    stack = PackedEncoder(
        fixtures.BACKBONE,
        fixtures.bert_tensors().__getitem__,
        fixtures.spread_heads(config),
        config,
        device=device,
    )
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 20, (40,), generator=generator).tolist()
    encodings = [
        Encoding(torch.randint(1, 49, (length,), generator=generator).tolist(), [0] * length)
        for length in lengths
    ]
    return stack, encodings


def answers(device: str, policy_name: str, threshold: float) -> list[tuple[int, int]]:
    stack, encodings = on(device)
    policy = make_policy(policy_name)
    rows = start_rows(
        stack,
        TokenBatch.pack(encodings),
        policy,
        RowSettings.uniform(len(encodings), threshold, max_layer=stack.num_layers),
    )
    found = [(0, 0)] * len(encodings)
    for leavers in layer_loop(stack, rows, policy):
        for row, label in zip(leavers.row.tolist(), leavers.label.tolist(), strict=True):
            found[row] = (leavers.exit_layer, label)
    return found


@pytest.mark.parametrize("name", POLICIES)
def test_the_device_leaves_where_the_cpu_leaves(name: str) -> None:
    threshold = {"fixed_layer": 2.0, "patience": 1.0, "vote": 1.2, "energy": 0.1}.get(name, 0.6)
    assert answers("cuda", name, threshold) == answers("cpu", name, threshold)


def test_what_is_recorded_on_the_device_is_what_the_cpu_records() -> None:
    found, expected = (record_exits(*on(device)) for device in ("cuda", "cpu"))
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.gate, expected.gate, rtol=1e-4, atol=1e-4)
