"""What one exit says of its rows: pool, an optional pooler, the classifier, the gate.

Written once for training's modules (`heads.py`), for tensors on a device and for numpy arrays
between segments of ONNX Runtime. It also says which tensors the heads of a model consist of. It
knows nothing about encoders, files, training, decisions, or which rows are still alive.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from offramp_model.arrays import Array, gelu, linear, namespace, on_device_of, sigmoid
from offramp_model.config import MultiExitConfig, Pooling
from offramp_model.policies import HeadOutput
from offramp_model.pooling import pool_packed
from offramp_model.rows import PackedTokens

Map = Callable[[Array], Array]


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear map: `weight` [out, in], `bias` [out]."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class DenseGate:
    """A small policy network: one logit per row, large where the row should leave.

    Linear, GELU, Linear; without `hidden` a single linear map (ConsistentEE page, section 1).
    """

    hidden: Map | None
    out: Map

    def __call__(self, state: Array) -> Array:
        """States [n, W] → logits [n]."""
        if self.hidden is not None:
            state = gelu(self.hidden(state))
        return self.out(state)[..., 0]


@dataclass(frozen=True, slots=True)
class ExitHead:
    """One exit's head; `query` is that of attention pooling.

    `has_gates` says whether the model has any: the last exit has none of its own, and whoever comes
    so far leaves there.
    """

    pooling: Pooling
    query: Array | None
    pooler: Map | None
    classifier: Map
    gate: Map | None
    has_gates: bool

    def pool(self, hidden: PackedTokens) -> Array:
        """Packed hidden states [T, H] → pooled [n, P]."""
        return pool_packed(self.pooling, hidden, self.query)

    def state(self, pooled: Array) -> Array:
        """What the classifier and the gate see, [n, W]: the pooled states [n, P], or tanh of the
        pooler's map of them."""
        return pooled if self.pooler is None else namespace(pooled).tanh(self.pooler(pooled))

    def exit_probability(self, state: Array) -> Array | None:
        """The gate's probability [n] that a row leaves here: 1 at the last exit, None without
        gates."""
        if not self.has_gates:
            return None
        if self.gate is None:
            xp = namespace(state)
            return xp.ones((state.shape[0],), dtype=state.dtype, **on_device_of(state))
        return sigmoid(self.gate(state))

    def answer(self, hidden: PackedTokens) -> HeadOutput:
        """What the exit says of packed hidden states; they are pooled in their own dtype, the rest
        is float32."""
        pooled = self.pool(hidden)
        xp = namespace(pooled)
        state = self.state(xp.astype(pooled, xp.float32, copy=False))
        return HeadOutput(self.classifier(state), self.exit_probability(state))


def exit_heads(config: MultiExitConfig, tensors: Mapping[str, Array]) -> list[ExitHead]:
    """The heads of all exits from the tensors of `exits.safetensors`."""

    def dense(name: str) -> Dense:
        return Dense(tensors[f"{name}.weight"], tensors[f"{name}.bias"])

    def gate(exit_index: int) -> DenseGate | None:
        if config.gate_hidden is None or exit_index == config.num_exits - 1:
            return None
        hidden = dense(f"gates.{exit_index}.hidden") if config.gate_hidden else None
        return DenseGate(hidden, dense(f"gates.{exit_index}.out"))

    poolers = _poolers(config)
    return [
        ExitHead(
            pooling=config.pooling,
            query=tensors.get(f"poolings.{index}.query"),
            pooler=dense(f"poolers.{min(index, poolers - 1)}") if poolers else None,
            classifier=dense(f"classifiers.{index}"),
            gate=gate(index),
            has_gates=config.has_gates,
        )
        for index in range(config.num_exits)
    ]


def head_shapes(config: MultiExitConfig) -> dict[str, tuple[int, ...]]:
    """The tensors of `exits.safetensors` by name, and their shapes."""
    shapes: dict[str, tuple[int, ...]] = {}

    def dense(name: str, inputs: int, outputs: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (outputs, inputs), (outputs,)

    if config.pooling == "attention":
        heads = config.attention_heads
        for index in range(config.num_exits):
            shapes[f"poolings.{index}.query"] = (heads, config.hidden_size // heads)
    for index in range(_poolers(config)):
        dense(f"poolers.{index}", config.pooled_size, config.hidden_size)
    for index in range(config.num_exits):
        dense(f"classifiers.{index}", config.state_size, config.num_labels)
    if config.gate_hidden is not None:
        for index in range(config.num_exits - 1):
            if config.gate_hidden:
                dense(f"gates.{index}.hidden", config.state_size, config.gate_hidden)
            dense(f"gates.{index}.out", config.gate_hidden or config.state_size, 1)
    return shapes


def _poolers(config: MultiExitConfig) -> int:
    return {"shared": 1, "per_exit": config.num_exits, "none": 0}[config.pooler]
