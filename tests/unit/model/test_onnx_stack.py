"""ONNX Runtime segments against the torch stack, at every exit, and the product's laws on them."""

import random
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from loading import load
from offramp_model.config import MultiExitConfig, Pooling
from offramp_model.encoder import PackedEncoder
from offramp_model.exit_head import exit_heads
from offramp_model.families import family_of
from offramp_model.heads import ExitHeads
from offramp_model.onnx_graph import embedding_graph, segment_graph
from offramp_model.onnx_nodes import Nodes
from offramp_model.onnx_stack import OnnxStack, make_session
from offramp_model.policies import POLICIES, make_policy
from offramp_model.recorded import record_exits
from offramp_model.rows import Encoding, RowSettings, TokenBatch
from offramp_model.run_slots import MAX_RUNS

parity = load("tests/unit/model/test_encoder_parity.py")
fixtures = load("tests/unit/model/conftest.py")
laws = load("tests/unit/model/test_laws.py")


def over_onnx(stack: PackedEncoder, backbone: dict[str, Any], heads: ExitHeads) -> OnnxStack:
    """The same weights and heads as graphs."""
    config: MultiExitConfig = stack.config
    activation = backbone[family_of(backbone).activation_key]
    return OnnxStack(
        embedding_graph(stack.embeddings).SerializeToString(),
        {
            layer: segment_graph(
                {index + 1: stack.layers[index] for index in config.segment(layer)}, activation
            ).SerializeToString()
            for layer in config.exit_layers
        },
        exit_heads(config, {name: value.numpy() for name, value in heads.state_dict().items()}),
        config,
        vocab_size=stack.vocab_size,
        max_positions=stack.max_positions,
        threads=1,
    )


@pytest.fixture(scope="module")
def onnx_stack(stack: PackedEncoder) -> OnnxStack:
    return over_onnx(stack, fixtures.BACKBONE, fixtures.spread_heads(stack.config))


@pytest.mark.parametrize("activation", ["own", "relu", "gelu_new", "silu"])
@pytest.mark.parametrize("family", parity.CONFIGS)
def test_every_exit_agrees_with_torch(family: str, activation: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(parity.CONFIGS[family]())
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    backbone = model.config.to_dict()
    if activation != "own":
        backbone[family_of(backbone).activation_key] = activation
    config = MultiExitConfig(
        num_layers=3, hidden_size=48, exit_layers=(1, 3), labels=("a", "b"), max_length=60
    )
    heads = fixtures.spread_heads(config)
    stack = PackedEncoder(backbone, model.state_dict().__getitem__, heads, config)
    onnx = over_onnx(stack, backbone, heads)
    # More runs than one call takes, and a single one.
    for lengths in (parity.LENGTHS, [9] * 3, [1], list(range(1, 2 * MAX_RUNS))):
        batch = TokenBatch.pack(parity.random_encodings(97, lengths, with_types=True))
        ours, theirs = onnx.embed(batch), stack.embed(batch)
        assert close(ours.values, theirs.values)
        for layer in (1, 3):
            ours, theirs = onnx.segment(layer, ours), stack.segment(layer, theirs)
            assert close(ours.values, theirs.values), f"layer {layer}, lengths {lengths}"
            assert close(onnx.exit_head(layer, ours).logits, stack.exit_head(layer, theirs).logits)


def close(found: Any, theirs: torch.Tensor) -> bool:
    ours = torch.as_tensor(found)
    assert ours.shape == theirs.shape
    return float((ours - theirs).norm() / theirs.norm()) < 1e-5


@pytest.mark.parametrize("pooler", ["none", "shared", "per_exit"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_heads_are_the_torch_heads(pooling: Any, pooler: Any) -> None:
    config = fixtures.tiny_config(pooling=pooling, pooler=pooler, gate_hidden=5)
    heads = fixtures.spread_heads(config)
    tensors = fixtures.bert_tensors()
    stack = PackedEncoder(fixtures.BACKBONE, tensors.__getitem__, heads, config)
    onnx = over_onnx(stack, fixtures.BACKBONE, heads)
    encodings = parity.random_encodings(50, [3, 8, 8, 20], with_types=False)
    ours, theirs = record_exits(onnx, encodings), record_exits(stack, encodings)
    assert close(ours.logits, theirs.logits)
    assert ours.gate is not None
    assert theirs.gate is not None
    torch.testing.assert_close(ours.gate, theirs.gate, rtol=1e-4, atol=1e-5)


@settings(max_examples=15)
@pytest.mark.parametrize("name", POLICIES)
@given(
    encodings=laws.texts,
    others=laws.texts,
    seed=laws.seeds,
    schedule=st.lists(st.booleans(), min_size=4, max_size=4),
)
def test_laws_1_2_and_5(
    onnx_stack: OnnxStack,
    run_loop: Any,
    name: str,
    encodings: list[Encoding],
    others: list[Encoding],
    seed: int,
    schedule: list[bool],
) -> None:
    policy = make_policy(name)
    mixed = [*encodings, *others]
    asked = laws.random_settings(len(mixed), policy, 4, seed)
    order = list(range(len(mixed)))
    random.Random(seed).shuffle(order)
    count = len(encodings)
    plain = run_loop(onnx_stack, encodings, policy, asked.at(np.arange(count)))
    shuffled = run_loop(
        onnx_stack,
        [mixed[index] for index in order],
        policy,
        asked.at(np.array(order)),
        lambda layer, alive, carried: schedule[layer - 1],
    )
    assert shuffled.times.eq(1).all()
    for place, index in enumerate(order):
        if index < count:
            assert int(shuffled.exit_layer[place]) == int(plain.exit_layer[index])
            assert int(shuffled.label[place]) == int(plain.label[index])


@settings(max_examples=15)
@pytest.mark.parametrize("name", ["entropy", "patience", "vote"])
@given(
    encodings=laws.texts.filter(lambda some: len(some) > 1), seed=laws.seeds, at=st.integers(0, 4)
)
def test_batches_joined_on_the_way_keep_their_answers(
    onnx_stack: OnnxStack, run_loop: Any, name: str, encodings: list[Encoding], seed: int, at: int
) -> None:
    policy = make_policy(name)
    asked = laws.random_settings(len(encodings), policy, 4, seed)
    together = run_loop(onnx_stack, encodings, policy, asked)
    layers, labels = laws.joined_answers(onnx_stack, encodings, policy, asked, at)
    assert layers == dict(enumerate(together.exit_layer.tolist()))
    assert labels == dict(enumerate(together.label.tolist()))


def test_nobody_left_is_no_work(onnx_stack: OnnxStack) -> None:
    hidden = onnx_stack.embed(TokenBatch.pack([Encoding([5, 6], [0, 0])]))
    hidden = hidden.keep(np.array([False]))
    after = onnx_stack.segment(2, hidden)
    assert after.values.shape == (0, 16)
    assert onnx_stack.exit_head(2, after).logits.shape == (0, 3)


def test_full_depth_is_the_torch_stack_under_the_loop(
    stack: PackedEncoder, onnx_stack: OnnxStack, run_loop: Any
) -> None:
    encodings = parity.random_encodings(50, [2, 7, 7, 30, 11], with_types=False)
    policy, asked = make_policy("entropy"), RowSettings.uniform(5, 0.7, max_layer=4)
    ours, theirs = (run_loop(one, encodings, policy, asked) for one in (onnx_stack, stack))
    assert ours.exit_layer.equal(theirs.exit_layer)
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=1e-4, atol=1e-4)


def test_int8_products_do_not_overflow() -> None:
    """On x86 without VNNI the usual kernel adds two products of bytes in 16 bits."""
    rng = np.random.default_rng(0)
    weight = rng.integers(-127, 128, (512, 64)).astype(np.int8)
    values = rng.integers(150, 256, (9, 512)).astype(np.uint8)
    nodes = Nodes()
    product = nodes.add(
        "MatMulIntegerToFloat",
        "x",
        nodes.constant("weight", weight),
        nodes.constant("scale", np.float32(1)),
        nodes.constant("scales", np.ones(64, np.float32)),
        nodes.constant("zero", np.uint8(128)),
        "",
        nodes.constant("bias", np.zeros(64, np.float32)),
    )
    inputs = [helper.make_tensor_value_info("x", TensorProto.UINT8, ["T", 512])]
    session = make_session(nodes.model("product", inputs, [product]).SerializeToString(), 1)
    (found,) = session.run(None, {"x": values})
    assert np.array_equal(found, (values.astype(np.int32) - 128) @ weight.astype(np.int32))


def test_a_graph_that_cannot_be_run_is_refused_by_name(stack: PackedEncoder) -> None:
    with pytest.raises(ValueError, match="onnxruntime cannot run it"):
        OnnxStack(
            b"not a graph",
            {},
            [],
            stack.config,
            vocab_size=1,
            max_positions=1,
            threads=1,
        )
