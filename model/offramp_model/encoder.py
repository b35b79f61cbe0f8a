"""The BERT family as a `LayerStack` in plain torch, without a single padding token.

Layout, chosen by measurement (`docs/results/engine.md`: SST-2 validation texts, MiniLM-L6, batches
of 32, 2 cores, fp32; throughput relative to batches padded to their longest text):

    padded to the longest                            1.0
    length-sorted padded groups of 8                 1.6
    packed tokens, attention padded per batch        1.8
    packed tokens, attention per run of one length   2.1   <- this module

Tokens are packed [T, H], so every linear layer, norm and activation runs on real tokens only.
Rows are sorted by length, so rows of one length are a contiguous [rows, length, ...] view, and
attention runs once per such run, with no mask at all. What is given up: one attention call per
distinct length, some 10 µs each, which is repaid from the first avoided padding column on.

The module reads transformers' tensor names but never imports transformers. It knows nothing about
policies or which rows leave.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from offramp_model.backbone import activation_of, check_backbone, norm_eps_of, size_of
from offramp_model.config import MultiExitConfig, ProblemType
from offramp_model.families import Family, family_of
from offramp_model.heads import ExitHeads
from offramp_model.policies import HeadOutput
from offramp_model.rows import PackedTokens, TokenBatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What it can compute in, by the names of flags and tables."""

TensorSource = Callable[[str], Tensor]
"""Name in `model.safetensors` → tensor; raises KeyError with the name if it is missing."""

TOKEN_STEP = 16
"""Half precision on a CPU goes through oneDNN, which prepares a primitive for every number of
tokens that it meets and keeps a thousand: compaction makes new numbers all the time. So they are
rounded up there (`docs/results/engine.md`); nobody looks at the rows without a text."""

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": partial(F.gelu, approximate="tanh"),
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


@dataclass(frozen=True, slots=True)
class Linear:
    weight: Tensor  # [out, in]
    bias: Tensor  # [out]

    def __call__(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, slots=True)
class Norm:
    weight: Tensor  # [H]
    bias: Tensor  # [H]
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


@dataclass(frozen=True, slots=True)
class Layer:
    """One post-LayerNorm encoder layer over packed tokens."""

    qkv: Linear  # query, key and value in one product, [3H, H]
    attention_out: Linear
    attention_norm: Norm
    ffn_in: Linear
    ffn_out: Linear
    ffn_norm: Norm
    num_heads: int
    activation: Callable[[Tensor], Tensor]

    def __call__(self, hidden: PackedTokens) -> PackedTokens:
        x = hidden.values
        x = self.attention_norm(self.attention_out(self._attend(hidden)).add_(x))
        x = self.ffn_norm(self.ffn_out(self.activation(self.ffn_in(x))).add_(x))
        return hidden.replace(x)

    def _attend(self, hidden: PackedTokens) -> Tensor:
        qkv = self.qkv(hidden.values)  # (T, 3H)
        context = torch.empty_like(hidden.values)  # (T, H)
        for run in hidden.runs:
            shape = (run.rows, run.length, 3, self.num_heads, -1)
            q, k, v = qkv[run.start : run.stop].view(shape).permute(2, 0, 3, 1, 4)
            attended = F.scaled_dot_product_attention(q, k, v)  # (rows, heads, length, dim)
            context[run.start : run.stop] = attended.transpose(1, 2).flatten(2).flatten(0, 1)
        return context


@dataclass(frozen=True, slots=True)
class Embeddings:
    """Word + position (+ type) embeddings, LayerNorm, and ELECTRA's projection if there is one."""

    words: Tensor  # [V, E]
    positions: Tensor  # [P, E]
    types: Tensor | None  # [2, E]
    norm: Norm
    projection: Linear | None  # E → H
    first_position: int

    @property
    def max_positions(self) -> int:
        return self.positions.shape[0] - self.first_position

    def __call__(self, batch: TokenBatch) -> Tensor:
        device = self.words.device
        x = F.embedding(torch.from_numpy(batch.input_ids).to(device), self.words)
        positions = torch.from_numpy(batch.positions).to(device) + self.first_position
        x = x + F.embedding(positions, self.positions)
        if self.types is not None:
            # A family with a single type (RoBERTa) was never trained on a second one.
            types = torch.from_numpy(batch.type_ids).to(device).clamp(max=self.types.shape[0] - 1)
            x = x + F.embedding(types, self.types)
        x = self.norm(x)
        return x if self.projection is None else self.projection(x)


class BackboneReader:
    """Reads a backbone's tensors under its family's names, checks shapes, casts to the dtype."""

    def __init__(
        self,
        source: TensorSource,
        family: Family,
        backbone: dict[str, Any],
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self._source, self._family, self._backbone = source, family, backbone
        self._device, self._dtype = device, dtype
        self._width = size_of(backbone, family.width_key)
        self._inner = size_of(backbone, family.ffn_key)
        self._heads = size_of(backbone, family.heads_key)
        self._activation = _ACTIVATIONS[activation_of(backbone, family)]
        self._eps = norm_eps_of(backbone, family)

    def tensor(self, name: str, *shape: int | None) -> Tensor:
        """One tensor; None in `shape` stands for any size."""
        tensor = self._source(name)
        fits = len(shape) == tensor.ndim and all(
            expected in (None, actual)
            for expected, actual in zip(shape, tensor.shape, strict=False)
        )
        if not fits:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but config.json asks for {shape}"
            )
        return tensor.to(self._device, self._dtype)

    def linear(self, *names: str, inputs: int, outputs: int) -> Linear:
        """One linear layer; several names of the same shape are stacked along the output."""
        weights = [self.tensor(f"{name}.weight", outputs, inputs) for name in names]
        biases = [self.tensor(f"{name}.bias", outputs) for name in names]
        return Linear(torch.cat(weights), torch.cat(biases))

    def norm(self, name: str, width: int) -> Norm:
        weight, bias = self.tensor(f"{name}.weight", width), self.tensor(f"{name}.bias", width)
        return Norm(weight, bias, self._eps)

    def layer(self, layer_index: int) -> Layer:
        prefix = self._family.layer_prefix.format(layer_index)
        names, width, inner = self._family.layer, self._width, self._inner
        qkv = [prefix + name for name in (names.query, names.key, names.value)]
        return Layer(
            qkv=self.linear(*qkv, inputs=width, outputs=width),
            attention_out=self.linear(prefix + names.attention_out, inputs=width, outputs=width),
            attention_norm=self.norm(prefix + names.attention_norm, width),
            ffn_in=self.linear(prefix + names.ffn_in, inputs=width, outputs=inner),
            ffn_out=self.linear(prefix + names.ffn_out, inputs=inner, outputs=width),
            ffn_norm=self.norm(prefix + names.ffn_norm, width),
            num_heads=self._heads,
            activation=self._activation,
        )

    def embeddings(self) -> Embeddings:
        # ELECTRA may embed into a smaller width and project.
        inner = int(self._backbone.get("embedding_size") or self._width)
        padding = int(self._backbone.get("pad_token_id") or 0)
        types, projection = None, None
        if self._family.has_types:
            types = self.tensor("embeddings.token_type_embeddings.weight", None, inner)
        if inner != self._width:
            projection = self.linear("embeddings_project", inputs=inner, outputs=self._width)
        return Embeddings(
            words=self.tensor("embeddings.word_embeddings.weight", None, inner),
            positions=self.tensor("embeddings.position_embeddings.weight", None, inner),
            types=types,
            norm=self.norm("embeddings.LayerNorm", inner),
            projection=projection,
            first_position=padding + 1 if self._family.positions_after_padding else 0,
        )


class PackedEncoder:
    """A `LayerStack` over the weights of a BERT-family backbone and its exit heads.

    `embeddings`, `layers`, `heads` and `config` are what it runs, for whoever writes the same in
    another form.

    Args:
        backbone: the backbone's `config.json`.
        source: where its tensors come from, by name.
        heads: the exit heads; they stay in fp32 whatever the encoder's dtype, in which they pool.
        config: exits, pooling and labels.
        device: where to run.
        dtype: float32, bfloat16 or float16, of encoder weights and hidden states.

    Raises:
        ValueError: the architecture is not supported, or disagrees with `config`.
        KeyError: a tensor is missing.
    """

    def __init__(
        self,
        backbone: dict[str, Any],
        source: TensorSource,
        heads: ExitHeads,
        config: MultiExitConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        check_backbone(backbone, config)
        family = family_of(backbone)
        reader = BackboneReader(source, family, backbone, device, dtype)
        self.config = config
        self.activation = str(backbone[family.activation_key])  # its name in `config.json`
        self.heads = heads.to(device).float().eval().requires_grad_(False)
        self._exits = [self.heads.head(index) for index in range(config.num_exits)]
        self.embeddings = reader.embeddings()
        self.layers = [reader.layer(index) for index in range(config.num_layers)]
        words = self.embeddings.words
        self._rounds_up = words.device.type == "cpu" and words.dtype != torch.float32

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    @property
    def num_labels(self) -> int:
        return self.config.num_labels

    @property
    def problem_type(self) -> ProblemType:
        return self.config.problem_type

    @property
    def exit_layers(self) -> tuple[int, ...]:
        return self.config.exit_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding table: ids are 0 … vocab_size - 1."""
        return self.embeddings.words.shape[0]

    @property
    def max_positions(self) -> int:
        """Longest text, in tokens with specials, that the position table allows."""
        return self.embeddings.max_positions

    @torch.inference_mode()
    def embed(self, batch: TokenBatch) -> PackedTokens:
        """Token ids → hidden states before the first layer."""
        values = self.embeddings(batch)
        return PackedTokens(values, torch.from_numpy(batch.cu_seqlens).to(values.device))

    @torch.inference_mode()
    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        tokens = len(hidden.values)
        if self._rounds_up and tokens % TOKEN_STEP:
            hidden = hidden.replace(F.pad(hidden.values, (0, 0, 0, -tokens % TOKEN_STEP)))
        for layer_index in self.config.segment(exit_layer):
            hidden = self.layers[layer_index](hidden)
        return hidden.replace(hidden.values[:tokens])

    @torch.inference_mode()
    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput:
        return self._exits[self.config.exit_index(exit_layer)].answer(hidden)
