"""What an expert would build without exits: the whole encoder and its last head as one ONNX graph,
fused as onnxruntime's own optimiser fuses BERT, quantised with its own dynamic quantiser.

For the benchmarks only. Two kinds of norm, since the fused one is the slower on CPU: the better of
the two is what an expert who measures would ship.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper

from offramp_model import Checkpoint, Encoding
from offramp_model.onnx_stack import exact_int8


class WholeModel:
    """Padded batches → labels, in onnxruntime's default settings but for the pool of threads, which
    all sessions of the process share: a stack must have been opened before.

    `fused_norms`: SkipLayerNormalization, what the optimiser makes; else Add, LayerNormalization.
    """

    def __init__(self, checkpoint: Checkpoint, *, fused_norms: bool) -> None:
        if checkpoint.model.pooling != "mean" or checkpoint.model.pooler != "none":
            raise SystemExit("the whole-model graph is written for pooling mean without a pooler")
        options = onnxruntime.SessionOptions()
        options.use_per_session_threads = False
        options.log_severity_level = 3
        options.add_session_config_entry("session.x64quantprecision", exact_int8())
        with tempfile.TemporaryDirectory() as name:
            path = quantised(graph(checkpoint, fused_norms=fused_norms), Path(name))
            self._session = onnxruntime.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )

    def __call__(self, batch: Sequence[Encoding]) -> list[int]:
        longest = max(map(len, batch))
        ids = np.zeros((len(batch), longest), np.int64)
        lengths = np.array([len(encoding) for encoding in batch], np.int32)
        for row, encoding in enumerate(batch):
            ids[row, : len(encoding)] = encoding.ids
        (logits,) = self._session.run(None, {"ids": ids, "lengths": lengths})
        return [int(label) for label in logits.argmax(-1)]


def quantised(model: onnx.ModelProto, directory: Path) -> Path:
    """Per channel, activations by the range of each batch; the head stays in float32."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    plain, small = directory / "plain.onnx", directory / "int8.onnx"
    onnx.save(model, plain)
    quantize_dynamic(
        plain,
        small,
        per_channel=True,
        weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul", "Attention"],
        nodes_to_exclude=["head", "head_MatMul"],
        extra_options={"DefaultTensorType": TensorProto.FLOAT},
    )
    kinds = [node.op_type for node in onnx.load(small).graph.node]
    layers = sum(node.op_type == "Attention" for node in model.graph.node)
    assert kinds.count("QAttention") == layers
    assert sum(kind in ("MatMulInteger", "DynamicQuantizeMatMul") for kind in kinds) == 3 * layers
    return small


def graph(checkpoint: Checkpoint, *, fused_norms: bool) -> onnx.ModelProto:
    stack, config = checkpoint.stack(), checkpoint.model
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, Any] = {}

    def keep(name: str, value: Any) -> str:
        array = value.numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(array), name)
        return name

    def add(op: str, *inputs: str, name: str = "", domain: str = "", **attributes: Any) -> str:
        name = name or f"{op}-{len(nodes)}"
        nodes.append(
            helper.make_node(op, inputs, [f"{name}.out"], name=name, domain=domain, **attributes)
        )
        return f"{name}.out"

    def norm(x: str, skip: str, bias: str, layer_norm: Any, name: str) -> str:
        weight, shift = keep(f"{name}.w", layer_norm.weight), keep(f"{name}.b", layer_norm.bias)
        epsilon = layer_norm.eps
        if fused_norms:
            return add("SkipLayerNormalization", x, skip, weight, shift, bias,
                       domain="com.microsoft", epsilon=epsilon)  # fmt: skip
        added = add("Add", add("Add", x, bias), skip)
        return add("LayerNormalization", added, weight, shift, epsilon=epsilon)

    embeddings = stack.embeddings
    # One type: the texts of this benchmark are no pairs.
    places = embeddings.positions[embeddings.first_position :]
    if embeddings.types is not None:
        places = places + embeddings.types[0]
    length = add("Shape", "ids", start=1, end=2)
    cut = add("Slice", keep("places", places), keep("from", np.array([0])), length)
    x = add("Add", add("Gather", keep("words", embeddings.words), "ids"), cut)
    x = add("LayerNormalization", x, keep("n.w", embeddings.norm.weight),
            keep("n.b", embeddings.norm.bias), epsilon=embeddings.norm.eps)  # fmt: skip
    for index, layer in enumerate(stack.layers):

        def linear(what: Any, name: str) -> tuple[str, str]:
            full = f"{index}.{name}"  # noqa: B023
            return keep(f"{full}.w", what.weight.T), keep(f"{full}.b", what.bias)

        attended = add("Attention", x, *linear(layer.qkv, "qkv"), "lengths",
                       domain="com.microsoft", num_heads=layer.num_heads)  # fmt: skip
        weight, bias = linear(layer.attention_out, "attention_out")
        x = norm(add("MatMul", attended, weight), x, bias, layer.attention_norm, f"{index}.an")
        weight, bias = linear(layer.ffn_in, "ffn_in")
        inner = add("BiasGelu", add("MatMul", x, weight), bias, domain="com.microsoft")
        weight, bias = linear(layer.ffn_out, "ffn_out")
        x = norm(add("MatMul", inner, weight), x, bias, layer.ffn_norm, f"{index}.fn")
    # The mean of the real tokens, and the last exit's classifier.
    steps = add(
        "Range", keep("zero", np.int64(0)), add("Squeeze", length), keep("one", np.int64(1))
    )
    limits = add("Unsqueeze", add("Cast", "lengths", to=TensorProto.INT64), keep("axis", [1]))
    mask = add("Cast", add("Less", steps, limits), to=TensorProto.FLOAT)
    total = add("ReduceSum", add("Mul", x, add("Unsqueeze", mask, keep("last", [2]))), "axis",
                keepdims=0)  # fmt: skip
    mean = add("Div", total, add("Cast", limits, to=TensorProto.FLOAT))
    last = checkpoint.heads().state_dict()
    exit_index = config.num_exits - 1
    logits = add("Gemm", mean, keep("head.w", last[f"classifiers.{exit_index}.weight"].T),
                 keep("head.b", last[f"classifiers.{exit_index}.bias"]), name="head")  # fmt: skip
    value = helper.make_tensor_value_info
    whole = helper.make_graph(
        nodes,
        "whole",
        [value("ids", TensorProto.INT64, ["B", "S"]), value("lengths", TensorProto.INT32, ["B"])],
        [value(logits, TensorProto.FLOAT, ["B", config.num_labels])],
        list(constants.values()),
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(whole, opset_imports=opsets, ir_version=8)
