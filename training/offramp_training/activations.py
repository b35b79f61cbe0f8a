"""The scales of int8 activations, measured on held-out rows as they run through the float32 graphs.

Knows nothing about files or the command line.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from offramp_model.encoder import PackedEncoder
from offramp_model.onnx_graph import linears_of, observed_graph
from offramp_model.onnx_stack import make_session, run_segment
from offramp_model.quantisation import ActivationScale, measure_scale
from offramp_model.rows import Encoding, TokenBatch

MOST_ROWS = 384
"""More change the scales by less than the search for them resolves."""

_BATCH = 32


def measure_activations(
    stack: PackedEncoder, activation: str, encodings: Sequence[Encoding]
) -> dict[str, ActivationScale]:
    """One scale for all that enters each linear layer; see `segment_graph`.

    Layer by layer, so that what is held in memory is what enters one layer.
    """
    batches = [
        TokenBatch.pack(encodings[start : start + _BATCH])
        for start in range(0, len(encodings), _BATCH)
    ]
    hidden = [stack.embed(batch) for batch in batches]
    scales: dict[str, ActivationScale] = {}
    for number, layer in enumerate(stack.layers, start=1):
        model, names = observed_graph({number: layer}, activation)
        session = make_session(model.SerializeToString())
        seen = [run_segment(session, one.values.numpy(), one.runs) for one in hidden]
        linears = linears_of(number, layer)
        for index, name in enumerate(names, start=1):
            entering = np.concatenate([outputs[index] for outputs in seen])
            scales[name] = measure_scale(entering, [linears[name].weight])
        hidden = [
            one.replace(torch.from_numpy(outputs[0]))
            for one, outputs in zip(hidden, seen, strict=True)
        ]
    return scales
