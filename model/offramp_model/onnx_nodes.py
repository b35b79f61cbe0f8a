"""A small builder of ONNX graphs: nodes, constants, and names that nobody else has.

It knows nothing about encoders.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from offramp_model.encoder import Norm

OPSET, CONTRIB, IR_VERSION = 23, 1, 10
"""ONNX operators (the first set with `Attention`), Microsoft's operators, and the file format."""

_CONTRIB_OPS = frozenset({"MatMulIntegerToFloat"})


class Nodes:
    """A graph under construction; values are handed on by name."""

    def __init__(self, prefix: str = "") -> None:
        self._prefix = prefix
        self._nodes: list[onnx.NodeProto] = []
        self._constants: dict[str, onnx.TensorProto] = {}

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        """A node with one output; returns the output's name."""
        return self.add_many(op, *inputs, outputs=1, **attributes)[0]

    def add_many(self, op: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """A node with several outputs; returns their names."""
        name = f"{self._prefix}{op}-{len(self._nodes)}"
        names = [f"{name}.{index}" for index in range(outputs)]
        domain = "com.microsoft" if op in _CONTRIB_OPS else ""
        self._nodes.append(
            helper.make_node(op, inputs, names, name=name, domain=domain, **attributes)
        )
        return names

    def constant(self, name: str, value: Any) -> str:
        """A constant, once for each name; a tensor becomes float32."""
        if name not in self._constants:
            array = value.float().numpy() if isinstance(value, Tensor) else np.asarray(value)
            self._constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def norm(self, name: str, x: str, norm: Norm) -> str:
        """LayerNorm over the last dimension."""
        weight = self.constant(f"{name}.weight", norm.weight)
        bias = self.constant(f"{name}.bias", norm.bias)
        return self.add("LayerNormalization", x, weight, bias, axis=-1, epsilon=norm.eps)

    def branch(self, name: str, output: str) -> onnx.GraphProto:
        """As a branch of an `If`, which takes what it needs from the graph around it."""
        return helper.make_graph(self._nodes, name, [], [_floats(output)], self._initializers)

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[str]
    ) -> onnx.ModelProto:
        """As a whole model; outputs are float32."""
        values = [_floats(one) for one in outputs]
        graph = helper.make_graph(self._nodes, name, list(inputs), values, self._initializers)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", CONTRIB)]
        return helper.make_model(
            graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="offramp"
        )

    @property
    def _initializers(self) -> list[onnx.TensorProto]:
        return list(self._constants.values())


def _floats(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
