"""Attention over packed tokens in an ONNX graph: once per run of rows of one length, no mask.

A graph cannot loop over runs cheaply, and `Attention` takes no empty batch. So there are groups of
1, 2, 4, 8 and 16 *slots*, each in an `If`, and the bits of the number of runs say which groups are
at work: every run gets a slot of its own and no slot is idle. A single run, the case of one text,
has a branch without any splitting.

Writes nodes; `run_slots.py` says which run goes where. It knows nothing about weights or sessions.
"""

from collections.abc import Sequence

import numpy as np

from offramp_model.onnx_nodes import Nodes
from offramp_model.run_slots import GROUPS, MAX_RUNS, SHAPES, SINGLE, TOKENS, USED


class RunAttention:
    """Writes the attention of one graph's layers."""

    def __init__(self, nodes: Nodes, width: int) -> None:
        self._nodes = nodes
        self._flat = nodes.constant("flat", np.array([-1, width]))
        self._nobody = nodes.constant("nobody", np.zeros((0, width), np.float32))
        self._start = nodes.constant("start", np.array([0]))
        self._end = nodes.constant("end", np.array([3]))

    def apply(self, name: str, qkv: Sequence[str], heads: int) -> str:
        """Queries, keys and values, [T, H] each → context [T, H]."""
        single = Nodes(f"{name}.single.")
        shape = single.add("Slice", SHAPES, self._start, self._end)
        alone = self._run(single, qkv, shape, heads)
        several = Nodes(f"{name}.several.")
        together = self._several(several, name, qkv, heads)
        return self._nodes.add(
            "If",
            SINGLE,
            then_branch=single.branch(f"{name}.single", alone),
            else_branch=several.branch(f"{name}.several", together),
        )

    def _several(self, nodes: Nodes, name: str, qkv: Sequence[str], heads: int) -> str:
        # Slots without a run get no tokens, and nobody looks at them.
        runs = [nodes.add_many("Split", one, TOKENS, outputs=MAX_RUNS) for one in qkv]
        shapes = nodes.add_many("Split", SHAPES, outputs=MAX_RUNS, num_outputs=MAX_RUNS)
        at_work = nodes.add_many("Split", USED, outputs=len(GROUPS), num_outputs=len(GROUPS))
        contexts = []
        for group, is_used in zip(GROUPS, at_work, strict=True):
            used, unused = Nodes(f"{name}.{group}-slots."), Nodes(f"{name}.no-{group}-slots.")
            each = [
                self._run(used, [one[slot] for one in runs], shapes[slot], heads)
                for slot in range(group - 1, 2 * group - 1)
            ]
            context = used.add("Concat", *each, axis=0) if group > 1 else each[0]
            none = unused.add("Identity", self._nobody)
            contexts.append(
                nodes.add(
                    "If",
                    is_used,
                    then_branch=used.branch(f"{name}.{group}-slots", context),
                    else_branch=unused.branch(f"{name}.no-{group}-slots", none),
                )
            )
        return nodes.add("Concat", *contexts, axis=0)

    def _run(self, nodes: Nodes, qkv: Sequence[str], shape: str, heads: int) -> str:
        """Rows of one length, [rows, length, H] seen flat."""
        rows = [nodes.add("Reshape", one, shape) for one in qkv]
        context = nodes.add("Attention", *rows, q_num_heads=heads, kv_num_heads=heads)
        return nodes.add("Reshape", context, self._flat)
