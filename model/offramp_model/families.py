"""The BERT family: where each architecture keeps the same post-LayerNorm weights.

A table of names and of the few places where the families differ, nothing else: no tensors, no
arithmetic. Names are those that `save_pretrained` of the bare model writes.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class LayerNames:
    """Parameter prefixes of one layer, relative to the layer."""

    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    ffn_in: str
    ffn_out: str
    ffn_norm: str


_BERT_LAYER = LayerNames(
    query="attention.self.query",
    key="attention.self.key",
    value="attention.self.value",
    attention_out="attention.output.dense",
    attention_norm="attention.output.LayerNorm",
    ffn_in="intermediate.dense",
    ffn_out="output.dense",
    ffn_norm="output.LayerNorm",
)

_DISTILBERT_LAYER = LayerNames(
    query="attention.q_lin",
    key="attention.k_lin",
    value="attention.v_lin",
    attention_out="attention.out_lin",
    attention_norm="sa_layer_norm",
    ffn_in="ffn.lin1",
    ffn_out="ffn.lin2",
    ffn_norm="output_layer_norm",
)


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture's configuration and tensors are named.

    The `*_key` fields name entries of its `config.json`. Positions start at
    `pad_token_id + 1` in the RoBERTa line, at 0 elsewhere.
    """

    layer_prefix: str
    layer: LayerNames
    has_types: bool = True
    positions_after_padding: bool = False
    layers_key: str = "num_hidden_layers"
    width_key: str = "hidden_size"
    ffn_key: str = "intermediate_size"
    heads_key: str = "num_attention_heads"
    activation_key: str = "hidden_act"
    norm_eps_key: str | None = "layer_norm_eps"  # None: fixed at 1e-12


_BERT = Family("encoder.layer.{}.", _BERT_LAYER)
_ROBERTA = Family("encoder.layer.{}.", _BERT_LAYER, positions_after_padding=True)
_DISTILBERT = Family(
    "transformer.layer.{}.",
    _DISTILBERT_LAYER,
    has_types=False,
    layers_key="n_layers",
    width_key="dim",
    ffn_key="hidden_dim",
    heads_key="n_heads",
    activation_key="activation",
    norm_eps_key=None,
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "electra": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": _DISTILBERT,
}


def family_of(backbone: dict[str, Any]) -> Family:
    """The family of a backbone's `config.json`.

    Raises:
        ValueError: the architecture, or a variant of it, is not one that the encoder can run.
    """
    model_type = backbone.get("model_type")
    if model_type not in FAMILIES:
        raise ValueError(f"model_type {model_type!r} is not supported; known: {sorted(FAMILIES)}")
    positions = backbone.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise ValueError(f"position_embedding_type {positions!r} is not supported, only 'absolute'")
    if backbone.get("is_decoder"):
        raise ValueError("is_decoder is true: only encoders can be run")
    return FAMILIES[model_type]
