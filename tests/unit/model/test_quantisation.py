"""Bytes for values: bounds that hold for any weights and activations."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.quantisation import measure_scale, quantise_weight

seeds = st.integers(0, 2**31)


@given(seed=seeds, spread=st.floats(0.0, 3.0))
def test_a_weight_is_off_by_half_a_step_at_most(seed: int, spread: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(7, 5, generator=generator) * 10 ** (
        spread * torch.randn(7, 1, generator=generator)
    )
    balance = np.exp(np.random.default_rng(seed).normal(size=5)).astype(np.float32)
    values, scales = quantise_weight(weight, balance)
    assert (values.shape, scales.shape) == ((5, 7), (7,))
    assert values.min() >= -127
    restored = values * scales / balance[:, None]
    error = np.abs(restored - weight.numpy().T) * balance[:, None]
    assert (error <= scales * 0.51).all()


@given(seed=seeds, offset=st.floats(-2, 2))
def test_activations_survive_even_with_an_outlying_feature(seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(400, 8)).astype(np.float32) + np.float32(offset)
    values[:, 3] *= 40
    scale = measure_scale(values, [torch.randn(6, 8, generator=torch.Generator().manual_seed(1))])
    assert (scale.balance > 0).all()
    assert 0 <= scale.zero_point <= 255
    balanced = values / scale.balance
    bytes_ = np.clip(np.rint(balanced / scale.scale) + scale.zero_point, 0, 255)
    restored = (bytes_ - scale.zero_point) * scale.scale * scale.balance
    # One scale for all as they are would leave the small features an error of some 30 %.
    for feature in range(8):
        error = np.linalg.norm(restored[:, feature] - values[:, feature])
        assert error < 0.12 * np.linalg.norm(values[:, feature])


def test_a_silent_layer_is_no_division_by_zero() -> None:
    scale = measure_scale(np.zeros((4, 3), np.float32), [torch.zeros(2, 3)])
    assert np.isfinite([scale.scale, *scale.balance]).all()
    values, scales = quantise_weight(torch.zeros(2, 3), scale.balance)
    assert not values.any()
    assert np.isfinite(scales).all()


@pytest.mark.parametrize("values", [np.zeros((0, 3)), np.full((2, 3), np.nan)])
def test_nothing_and_nan_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="must be finite"):
        measure_scale(values.astype(np.float32), [torch.ones(2, 3)])
