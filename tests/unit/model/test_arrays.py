"""numpy's arrays against torch's tensors: functions, signals and policies say the same of both."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from loading import load
from offramp_model import arrays, labels, signals
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.policies import (
    LABEL_SET_POLICIES,
    POLICIES,
    HeadOutput,
    VotePolicy,
    make_policy,
)
from offramp_model.recorded import RecordedExits, RecordedStack
from offramp_model.rows import PackedTokens, TokenBatch

laws = load("tests/unit/model/test_laws.py")

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "softmax": arrays.softmax,
    "log_softmax": arrays.log_softmax,
    "logsumexp": arrays.logsumexp,
    "sigmoid": arrays.sigmoid,
    "softplus": arrays.softplus,
    "gelu": arrays.gelu,
}
SIGNALS: dict[str, Callable[..., Any]] = {
    "max_probability": signals.max_probability,
    "margin": signals.margin,
    "normalised_entropy": signals.normalised_entropy,
    "energy": signals.energy,
    "least_certain": signals.least_certain,
    "least_margin": signals.least_margin,
    "mean_binary_entropy": signals.mean_binary_entropy,
}
DTYPES = pytest.mark.parametrize("dtype", [np.float32, np.float64])

seeds = st.integers(0, 2**31)


def hard(seed: int, dtype: Any) -> np.ndarray:
    """Logits of every size up to where exp overflows and beyond, equal ones, and NaN."""
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((12, 5)) * 10.0 ** rng.integers(-3, 5, (12, 1))
    z[0], z[1], z[2] = 0.0, np.nan, [1e4, -1e4, 0, 1, 2]
    z[3, 2], z[4] = np.nan, -z[2]
    return np.clip(z, -1e4, 1e4).astype(dtype)


@DTYPES
@pytest.mark.parametrize("name", [*FUNCTIONS, *SIGNALS])
@given(seed=seeds)
def test_both_libraries_compute_the_same(name: str, dtype: Any, seed: int) -> None:
    z, function = hard(seed, dtype), (FUNCTIONS | SIGNALS)[name]
    ours, theirs = function(z), function(torch.from_numpy(z))
    assert isinstance(ours, np.ndarray)
    assert ours.dtype == dtype
    # Relative: what is close to 0 has all its digits, too.
    rtol = 2e-5 if dtype == np.float32 else 1e-12
    tiny = 1e-35 if name in ("softmax", "sigmoid", "energy") else rtol
    if name in ("softplus", "mean_binary_entropy"):
        tiny = max(tiny, 3e-9)  # torch takes log(1 + exp(x)) as x from 20 on
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=rtol, atol=tiny)


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy"])
@pytest.mark.parametrize(
    "row", [[np.inf, 0.0], [np.inf, np.inf], [-np.inf, -np.inf], [np.nan, 0.0]]
)
def test_what_is_not_finite_is_no_warning_and_nobody_leaves(name: str, row: list[float]) -> None:
    policy: Any = make_policy(name)
    assert np.isnan(policy.signal(np.array([row], np.float32))).all()
    assert policy.signal(torch.tensor([row])).isnan().all()


@given(seed=seeds)
def test_labels_are_read_alike(seed: int) -> None:
    z = hard(seed, np.float32)
    for reading in (labels.most_probable, labels.label_set):
        assert reading(z).tolist() == reading(torch.from_numpy(z)).tolist()
    sets = labels.label_set(z)
    assert np.array_equal(labels.from_bits(sets, 5), z > 0)


class InNumpy(RecordedStack):
    """Recorded exits as a stack that computes in numpy."""

    def embed(self, batch: TokenBatch) -> PackedTokens:
        return PackedTokens(batch.input_ids[:, None].astype(np.float64), batch.cu_seqlens)

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        head = super().exit_head(exit_layer, hidden.replace(torch.from_numpy(hidden.values)))
        return HeadOutput(head.logits.numpy(), None if head.gate is None else head.gate.numpy())


def left(stack: RecordedStack, policy: Any, asked: Any) -> dict[int, tuple[int, int, bool]]:
    found = {}
    rows = start_rows(stack, stack.batch(), policy, asked)
    for leavers in layer_loop(stack, rows, policy):
        columns = (leavers.row, leavers.label, leavers.by_policy)
        for row, label, sure in zip(*(one.tolist() for one in columns), strict=True):
            found[row] = (leavers.exit_layer, label, sure)
    return found


@pytest.mark.parametrize(
    ("name", "problem_type"),
    [(name, "single_label_classification") for name in POLICIES]
    + [(name, "multi_label_classification") for name in LABEL_SET_POLICIES],
)
@given(seed=seeds)
def test_policies_decide_alike(name: str, problem_type: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 30, 3, generator=generator) * 3
    logits[torch.rand(4, 30, generator=generator) < 0.05] = torch.nan
    gate = torch.rand(4, 30, generator=generator)
    recorded = RecordedExits(logits, (1, 2, 3, 4), gate, problem_type)
    policy = make_policy(name, problem_type=problem_type)
    asked = laws.random_settings(30, policy, 4, seed)
    ours, theirs = (left(stack(recorded), policy, asked) for stack in (InNumpy, RecordedStack))
    assert ours == theirs
    assert len(ours) == 30


@pytest.mark.parametrize("exponent", [0.7, 0.75, 0.8])
def test_votes_are_divided_by_the_same_number_in_both(exponent: float) -> None:
    """Libraries' powers differ in the last bit from l = 10 on, and ties with a threshold count."""
    policy = VotePolicy(exponent)
    for library in (np.asarray, torch.as_tensor):
        seen = library(np.arange(1, 25))
        found = policy._divisor(seen, 24).tolist()
        assert found == [float(exits) ** exponent for exits in range(1, 25)]
