"""One set of names for arrays of numpy and tensors of torch, so that what decides is written once.

Signals, policies, rows, heads and the layer loop use the functions of the Python array API standard
(`namespace`) and the few below that the standard lacks; here, and nowhere else, is told which
library an array is of. Between segments of ONNX Runtime they work on numpy arrays, and nothing
loads torch; in the torch stack and in training on its tensors, on any device and with gradients.

It knows nothing about exits.
"""

import math
from typing import Any

import array_api_compat
import numpy as np

Array = Any
"""A numpy array or a torch tensor. All arrays of one call are of one library and on one device."""


def namespace(array: Array) -> Any:
    """The standard's functions for arrays of this one's library."""
    # numpy implements the standard itself, and its small operations are what time goes into.
    return np if isinstance(array, np.ndarray) else array_api_compat.array_namespace(array)


def like(array: Array, values: Any, dtype: str) -> Array:
    """`values` as an array of the other one's library, on its device."""
    if isinstance(array, np.ndarray):
        return np.asarray(values, dtype)
    xp = namespace(array)
    return xp.asarray(values, dtype=getattr(xp, dtype), device=array.device)


def on_device_of(array: Array) -> dict[str, Any]:
    """What the standard's makers of arrays are told, so that a new one is on this one's device."""
    return {} if isinstance(array, np.ndarray) else {"device": array.device}


def is_on_gpu(array: Array) -> bool:
    """Must the host wait, to learn what is in it?"""
    return not isinstance(array, np.ndarray) and bool(array.is_cuda)


def indices(mask: Array) -> Array:
    """Where a mask [n] is true, int64 [k], ascending."""
    return namespace(mask).nonzero(mask)[0]


def softmax(x: Array) -> Array:
    """exp(x) over its sum, along the last dimension."""
    if isinstance(x, np.ndarray):
        with np.errstate(invalid="ignore"):  # what is not finite becomes NaN
            exponentials = np.exp(x - x.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)
    return _torch().softmax(x, dim=-1)


def log_softmax(x: Array) -> Array:
    """log of softmax, exact where that underflows."""
    if isinstance(x, np.ndarray):
        with np.errstate(invalid="ignore"):
            shifted = x - x.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return _torch().log_softmax(x, dim=-1)


def logsumexp(x: Array) -> Array:
    """log Σ exp(x) along the last dimension."""
    if isinstance(x, np.ndarray):
        largest = x.max(axis=-1, keepdims=True)
        with np.errstate(invalid="ignore"):
            return np.log(np.exp(x - largest).sum(axis=-1)) + largest[..., 0]
    return _torch().logsumexp(x, dim=-1)


def sigmoid(x: Array) -> Array:
    """1 / (1 + exp(-x)), with all its digits where it is close to 0."""
    if isinstance(x, np.ndarray):
        with np.errstate(over="ignore"):
            return 1 / (1 + np.exp(-x))
    return _torch().sigmoid(x)


def softplus(x: Array) -> Array:
    """log(1 + exp(x))."""
    if isinstance(x, np.ndarray):
        return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))
    return _torch().nn.functional.softplus(x)


def gelu(x: Array) -> Array:
    """x·Φ(x), with the error function itself."""
    if isinstance(x, np.ndarray):
        # numpy has none; gates are narrow, and a value takes 0.06 µs.
        scaled = (x * math.sqrt(0.5)).ravel().tolist()
        erf = np.array([math.erf(value) for value in scaled], x.dtype).reshape(x.shape)
        return x * (1 + erf) / 2
    return _torch().nn.functional.gelu(x)


def linear(x: Array, weight: Array, bias: Array) -> Array:
    """[n, in] through a weight [out, in] and a bias [out] → [n, out]."""
    if isinstance(x, np.ndarray):
        return x @ weight.T + bias
    return _torch().nn.functional.linear(x, weight, bias)


def segment_means(values: Array, cu_seqlens: Array) -> Array:
    """The mean of each text's tokens, [T, H] and int32 [n+1] → [n, H]; nothing of a neighbour goes
    into it, nor into its rounding."""
    if not isinstance(values, np.ndarray):
        torch = _torch()
        tokens = torch.arange(len(values), dtype=torch.int32, device=values.device)
        return torch.nn.functional.embedding_bag(tokens, values, cu_seqlens[:-1], mode="mean")
    offsets = cu_seqlens.tolist()
    means = np.empty((len(offsets) - 1, values.shape[1]), values.dtype)
    weights = np.empty(0, values.dtype)
    for mean, start, stop in zip(means, offsets, offsets[1:], strict=False):
        # A product with 1/length for each token: two thirds of the time of `np.add.reduce`.
        if stop - start != len(weights):
            weights = np.full(stop - start, 1 / (stop - start), values.dtype)
        np.dot(weights, values[start:stop], out=mean)
    return means


def _torch() -> Any:
    """Loaded already: whoever has a tensor has torch."""
    import torch

    return torch
