"""Which run of equal lengths goes into which slot of a segment's graph.

The one thing that whoever writes the graphs (`onnx_attention.py` explains the slots) and whoever
runs them (`onnx_stack.py`) must agree on. It needs neither onnx nor onnxruntime.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from offramp_model.rows import Run

GROUPS = (1, 2, 4, 8, 16)
MAX_RUNS = sum(GROUPS)
"""Runs that one call takes."""

TOKENS, SHAPES, USED, SINGLE = "tokens", "shapes", "used", "single"
"""Inputs: the tokens of each slot's run, int64 [slots]; its rows, its length and H, int64
[3 · slots]; which groups are at work, bool [groups]; is there one run only, bool [1]."""


def plan_runs(runs: Sequence[Run], width: int) -> dict[str, NDArray[np.generic]]:
    """At most `MAX_RUNS` runs → the inputs. Groups are filled from the smallest on, in order."""
    count = len(runs)
    used = [bool(count & group) for group in GROUPS]
    tokens, shapes = [0] * MAX_RUNS, [0] * (3 * MAX_RUNS)
    slots = (slot for group in GROUPS if count & group for slot in range(group - 1, 2 * group - 1))
    for slot, run in zip(slots, runs, strict=True):
        tokens[slot] = run.rows * run.length
        shapes[3 * slot : 3 * slot + 3] = run.rows, run.length, width
    return {
        TOKENS: np.array(tokens, np.int64),
        SHAPES: np.array(shapes, np.int64),
        USED: np.array(used),
        SINGLE: np.array([count == 1]),
    }
