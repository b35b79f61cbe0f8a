"""int8 for linear layers: which byte stands for which value, of weights and of what enters.

Weights are signed bytes with a scale for each output. What enters a layer becomes unsigned bytes
with one scale that was measured beforehand on held-out rows, never on the batch at hand: a text's
answer must not depend on its neighbours.

A few features of a transformer are an order of magnitude larger than the rest, and one scale for
all would leave the others a handful of steps. So features are first *balanced*: divided by a vector
with which the weights are multiplied (SmoothQuant, Xiao et al. 2023, arXiv 2211.10438, eq. 3, 4).

Plain arithmetic. It knows nothing about graphs, layers or files.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]

BALANCE = 0.85
"""How much of a feature's range goes into the weights: 0 none, 1 all of it. Measured
(`docs/results/engine.md`)."""

_CLIPS = np.linspace(0.2, 1.0, 33)  # of the largest value seen
_SAMPLE = 200_000  # values that the search for a scale looks at


@dataclass(frozen=True, slots=True)
class ActivationScale:
    """How what enters a linear layer becomes bytes.

    value = balance · scale · (byte - zero_point), with one `balance` for each feature, float32 [K].
    """

    scale: float
    zero_point: int
    balance: Floats


ActivationScales = Mapping[str, ActivationScale]
"""By what enters: `layer-3.attention`, `.attention_out`, `.ffn_in`, `.ffn_out`."""


def quantise_weight(weight: Tensor, balance: Floats) -> tuple[NDArray[np.int8], Floats]:
    """A weight [out, K] and the balance of what enters → signed bytes [K, out] and a scale for each
    output, float32 [out]."""
    columns = weight.float().numpy().T * balance[:, None]
    scales = np.maximum(np.abs(columns).max(axis=0), np.finfo(np.float32).tiny) / np.float32(127)
    return np.clip(np.rint(columns / scales), -127, 127).astype(np.int8), scales


def measure_scale(entering: Floats, weights: Iterable[Tensor]) -> ActivationScale:
    """The scale for values [rows, K] that enter layers of these weights, [out, K] each.

    Of the ranges that clip nothing up to a fifth of the largest value, the one with the smallest
    squared error.

    Raises:
        ValueError: there are no values, or not all are finite.
    """
    if not entering.size or not np.isfinite(entering).all():
        raise ValueError("activations must be finite, and there must be some")
    largest = np.stack([np.abs(weight.float().numpy()).max(axis=0) for weight in weights])
    balance = _balance(np.abs(entering).max(axis=0), largest.max(axis=0))
    values = (entering / balance).ravel()
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    sample = values[:: max(1, values.size // _SAMPLE)]
    best: tuple[float, float, int] | None = None
    for clip in _CLIPS:
        # What never goes far below zero, a GELU's output, keeps that end.
        bottom = low if -low < 0.1 * high else low * clip
        scale = max((high * clip - bottom) / 255, float(np.finfo(np.float32).tiny))
        zero_point = round(-bottom / scale)
        bytes_ = np.clip(np.rint(sample / scale) + zero_point, 0, 255)
        error = float(np.square((bytes_ - zero_point) * scale - sample).mean())
        if best is None or error < best[0]:
            best = error, scale, zero_point
    assert best is not None
    return ActivationScale(best[1], best[2], balance)


def _balance(entering: Floats, weight: Floats) -> Floats:
    """Positive and around 1, [K]: features that are large for their weights are made smaller."""
    tiny = np.float32(1e-5)
    ratio = np.maximum(entering, tiny) ** BALANCE / np.maximum(weight, tiny) ** (1 - BALANCE)
    balance: Floats = (ratio / np.exp(np.log(ratio).mean())).astype(np.float32)
    return balance
