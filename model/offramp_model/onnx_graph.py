"""ONNX graphs of an encoder, one for each stretch from exit to exit, straight from its weights.

Writes nodes; runs nothing and reads no file. What it writes was chosen by measurement
(`docs/results/engine.md`, "ONNX Runtime"):

- Tokens stay packed, [T, H], through every linear layer, norm and activation: no padding.
- `Add` and `LayerNormalization`, not the fused `SkipLayerNormalization`, which takes several times
  as long on CPU.
- int8: weights per output, activations with scales measured beforehand (`quantisation.py`); norms,
  softmax and GELU in float32. Nothing depends on the batch.

It knows nothing about exit heads, policies, sessions or directories.
"""

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper

from offramp_model.encoder import Embeddings, Layer, Linear
from offramp_model.onnx_attention import RunAttention
from offramp_model.onnx_nodes import Nodes
from offramp_model.quantisation import ActivationScales, quantise_weight
from offramp_model.run_slots import GROUPS, MAX_RUNS, SHAPES, SINGLE, TOKENS, USED

HIDDEN = "hidden"


def embedding_graph(embeddings: Embeddings) -> onnx.ModelProto:
    """`input_ids`, `positions` and, where the family has types, `type_ids`, int64 [T] each → hidden
    states before the first layer, float32 [T, H]."""
    nodes = Nodes()
    names = ["input_ids", "positions"]
    words = nodes.constant("words", embeddings.words)
    places = nodes.constant("places", embeddings.positions[embeddings.first_position :])
    x = nodes.add(
        "Add", nodes.add("Gather", words, "input_ids"), nodes.add("Gather", places, "positions")
    )
    if embeddings.types is not None:
        # A family with a single type (RoBERTa) was never trained on a second one.
        names.append("type_ids")
        last = nodes.constant("last_type", np.int64(embeddings.types.shape[0] - 1))
        types = nodes.constant("types", embeddings.types)
        known = nodes.add("Min", "type_ids", last)
        x = nodes.add("Add", x, nodes.add("Gather", types, known))
    x = nodes.norm("norm", x, embeddings.norm)
    if embeddings.projection is not None:
        x = _Linears(nodes, None).apply("projection", x, embeddings.projection)
    inputs = [helper.make_tensor_value_info(one, TensorProto.INT64, ["T"]) for one in names]
    return nodes.model("embeddings", inputs, [x])


def segment_graph(
    layers: Mapping[int, Layer], activation: str, *, scales: ActivationScales | None = None
) -> onnx.ModelProto:
    """The layers between two exits as one graph: hidden states [T, H] → hidden states [T, H].

    Besides `hidden` it takes what `plan_runs` says of the rows.

    Args:
        layers: by their 1-based number, in order.
        activation: its name in `config.json`.
        scales: int8 with these; None is float32.
    """
    return _segment(layers, activation, scales)[0]


def observed_graph(
    layers: Mapping[int, Layer], activation: str
) -> tuple[onnx.ModelProto, list[str]]:
    """The float32 graph, which after its hidden states also puts out all that enters its linear
    layers, and the names of these in `ActivationScales`."""
    model, entering = _segment(layers, activation, None)
    for value in entering.values():
        model.graph.output.append(helper.make_tensor_value_info(value, TensorProto.FLOAT, None))
    return model, list(entering)


def linears_of(number: int, layer: Layer) -> dict[str, Linear]:
    """The linear layers of layer `number`, by the name of what enters them."""
    return {
        f"layer-{number}.attention": layer.qkv,
        f"layer-{number}.attention_out": layer.attention_out,
        f"layer-{number}.ffn_in": layer.ffn_in,
        f"layer-{number}.ffn_out": layer.ffn_out,
    }


def _segment(
    layers: Mapping[int, Layer], activation: str, scales: ActivationScales | None
) -> tuple[onnx.ModelProto, dict[str, str]]:
    width = next(iter(layers.values())).ffn_norm.weight.shape[0]
    nodes = Nodes()
    attention, linears = RunAttention(nodes, width), _Linears(nodes, scales)
    x = HIDDEN
    for number, layer in layers.items():
        name = f"layer-{number}"
        q, k, v = _thirds(layer.qkv)
        if scales is not None:
            # Values enter the output layer linearly: balanced in their own weights, for nothing.
            v = _divided(v, scales[f"{name}.attention_out"].balance)
        qkv = [
            linears.apply(f"{name}.{part}", x, linear, entering=f"{name}.attention")
            for part, linear in zip("qkv", (q, k, v), strict=True)
        ]
        context = attention.apply(name, qkv, layer.num_heads)
        attended = linears.apply(
            f"{name}.attention_out", context, layer.attention_out, is_balanced=True
        )
        x = nodes.norm(
            f"{name}.attention_norm", nodes.add("Add", attended, x), layer.attention_norm
        )
        inner = _activate(nodes, activation, linears.apply(f"{name}.ffn_in", x, layer.ffn_in))
        outer = linears.apply(f"{name}.ffn_out", inner, layer.ffn_out)
        x = nodes.norm(f"{name}.ffn_norm", nodes.add("Add", outer, x), layer.ffn_norm)
    value = helper.make_tensor_value_info
    inputs = [
        value(HIDDEN, TensorProto.FLOAT, ["T", width]),
        value(TOKENS, TensorProto.INT64, [MAX_RUNS]),
        value(SHAPES, TensorProto.INT64, [3 * MAX_RUNS]),
        value(USED, TensorProto.BOOL, [len(GROUPS)]),
        value(SINGLE, TensorProto.BOOL, [1]),
    ]
    name = "layers-" + "-".join(map(str, layers))
    return nodes.model(name, inputs, [x]), linears.entering


class _Linears:
    """Writes linear layers over packed tokens, in float32 or in int8."""

    def __init__(self, nodes: Nodes, scales: ActivationScales | None) -> None:
        self._nodes, self._scales = nodes, scales
        self.entering: dict[str, str] = {}  # the value that enters, by its name in `scales`
        self._bytes: dict[str, str] = {}

    def apply(
        self,
        name: str,
        x: str,
        linear: Linear,
        *,
        entering: str | None = None,
        is_balanced: bool = False,
    ) -> str:
        """`entering` names what enters, where several layers share it; default: the layer's own.
        `is_balanced`: whoever made `x` has divided it by its balance."""
        nodes, entering = self._nodes, entering or name
        self.entering[entering] = x
        bias = nodes.constant(f"{name}.bias", linear.bias)
        if self._scales is None:
            weight = nodes.constant(f"{name}.weight", linear.weight.T)
            return nodes.add("Gemm", x, weight, bias)
        by = self._scales[entering]
        scale = nodes.constant(f"{entering}.scale", np.float32(by.scale))
        zero = nodes.constant(f"{entering}.zero_point", np.uint8(by.zero_point))
        if entering not in self._bytes:  # once for all that share it
            if not is_balanced:
                x = nodes.add("Mul", x, nodes.constant(f"{entering}.balance", 1 / by.balance))
            self._bytes[entering] = nodes.add("QuantizeLinear", x, scale, zero)
        values, weight_scales = quantise_weight(linear.weight, by.balance)
        weight = nodes.constant(f"{name}.weight", values)
        each = nodes.constant(f"{name}.weight_scales", weight_scales)
        return nodes.add(
            "MatMulIntegerToFloat", self._bytes[entering], weight, scale, each, zero, "", bias
        )


def _thirds(qkv: Linear) -> list[Linear]:
    parts = zip(qkv.weight.chunk(3), qkv.bias.chunk(3), strict=True)
    return [Linear(weight, bias) for weight, bias in parts]


def _divided(linear: Linear, by: NDArray[np.float32]) -> Linear:
    """The layer whose outputs are those of `linear`, each divided by its own number."""
    divisor = torch.from_numpy(by)
    return Linear(linear.weight / divisor[:, None], linear.bias / divisor)


def _activate(nodes: Nodes, name: str, x: str) -> str:
    match name:
        case "gelu":
            return nodes.add("Gelu", x)
        case "gelu_new" | "gelu_pytorch_tanh":
            return nodes.add("Gelu", x, approximate="tanh")
        case "relu":
            return nodes.add("Relu", x)
        case "silu":
            return nodes.add("Mul", x, nodes.add("Sigmoid", x))
    raise ValueError(f"activation {name!r} has no ONNX form here")
