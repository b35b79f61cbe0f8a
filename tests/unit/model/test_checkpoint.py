"""Writing, reading and refusing checkpoints."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file

from offramp_model.calibration import CalibrationTable, CurvePoint
from offramp_model.checkpoint import (
    CheckpointError,
    file_sha256,
    load_checkpoint,
    update_manifest,
    write_checkpoint,
)
from offramp_model.config import MultiExitConfig, Pooling
from offramp_model.recorded import record_exits


def edit_manifest(directory: Path, **changes: Any) -> None:
    path = directory / "offramp.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def rewrite(directory: Path, name: str, change: Any) -> None:
    """Change a tensor file and make its hash right again, so that only the content is wrong."""
    tensors = load_file(directory / name)
    change(tensors)
    save_file(tensors, directory / name)
    hashes = json.loads((directory / "offramp.json").read_text())["sha256"]
    edit_manifest(directory, sha256=hashes | {name: file_sha256(directory / name)})


def table(threshold: float = float("-inf")) -> CalibrationTable:
    point = CurvePoint(
        threshold=threshold,
        speedup=1.0,
        mean_exit_layer=4.0,
        accuracy=0.5,
        macro_f1=0.5,
        exit_counts=(0, 0, 0, 2),
    )
    return CalibrationTable(
        policy="entropy", split="validation", rows=2, data_fingerprint="x", points=(point,)
    )


@pytest.mark.parametrize("pooler", ["none", "shared", "per_exit"])
@pytest.mark.parametrize("pooling", get_args(Pooling))
def test_what_is_written_is_read(
    tmp_path: Path, write_tiny: Any, pooler: Any, pooling: Any
) -> None:
    config = MultiExitConfig(
        num_layers=4,
        hidden_size=16,
        exit_layers=(2, 4),
        labels=("a", "b", "c"),
        max_length=32,
        pooler=pooler,
        pooling=pooling,
    )
    directory = write_tiny(tmp_path / "model", config)
    checkpoint = load_checkpoint(directory)
    assert checkpoint.model == config
    encodings = checkpoint.tokenizer().encode(["w5 w6", ("w7", "w8 w9")])
    assert [e.type_ids for e in encodings] == [[0, 0, 0, 0], [0, 0, 0, 1, 1, 1]]
    recorded = record_exits(checkpoint.stack(), encodings)
    assert recorded.logits.shape == (2, 2, 3)
    assert torch.isfinite(recorded.logits).all()
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"


def test_opening_draws_nothing(tmp_path: Path, write_tiny: Any) -> None:
    """A run that opens a teacher drops the units that it drops without one."""
    directory = write_tiny(tmp_path / "c")
    state = torch.get_rng_state()
    checkpoint = load_checkpoint(directory)
    assert torch.get_rng_state().equal(state)
    checkpoint.stack()
    assert torch.get_rng_state().equal(state)


def test_bfloat16_stays_close(tmp_path: Path, write_tiny: Any) -> None:
    checkpoint = load_checkpoint(write_tiny(tmp_path / "model"))
    encodings = checkpoint.tokenizer().encode(["w5 w6 w7 w8"])
    exact = record_exits(checkpoint.stack(), encodings).logits
    coarse = record_exits(checkpoint.stack(dtype=torch.bfloat16), encodings).logits
    assert 0 < float((coarse - exact).norm() / exact.norm()) < 5e-2


def test_a_failed_write_leaves_nothing(tmp_path: Path, write_tiny: Any) -> None:
    checkpoint = load_checkpoint(write_tiny(tmp_path / "model"))

    def fail(part: Path) -> None:
        (part / "config.json").write_text("{}")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write_checkpoint(tmp_path / "other", fill=fail, exits={}, manifest=checkpoint.manifest)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_an_existing_checkpoint_is_not_overwritten(tmp_path: Path, write_tiny: Any) -> None:
    write_tiny(tmp_path / "model")
    before = (tmp_path / "model" / "offramp.json").read_bytes()
    with pytest.raises(CheckpointError, match="already exists and is not empty"):
        write_tiny(tmp_path / "model")
    assert (tmp_path / "model" / "offramp.json").read_bytes() == before


def test_a_new_table_is_stored_with_its_infinities(tmp_path: Path, write_tiny: Any) -> None:
    checkpoint = load_checkpoint(write_tiny(tmp_path / "model"))
    with pytest.raises(
        CheckpointError, match="no calibration of entropy/torch/float32; it has: none"
    ):
        checkpoint.table("entropy")
    update_manifest(
        checkpoint.directory, checkpoint.manifest.model_copy(update={"calibration": (table(),)})
    )
    stored = json.loads((checkpoint.directory / "offramp.json").read_text())  # strict JSON
    assert stored["calibration"][0]["points"][0]["threshold"] == "-Infinity"
    again = load_checkpoint(checkpoint.directory)
    assert again.table("entropy") == table()
    with pytest.raises(CheckpointError, match="it has: entropy/torch/float32"):
        again.table("entropy", dtype="bfloat16")


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "exits.safetensors"]
)
def test_a_missing_file_is_named(tmp_path: Path, write_tiny: Any, name: str) -> None:
    directory = write_tiny(tmp_path / "model")
    (directory / name).unlink()
    with pytest.raises(CheckpointError, match=f"has no {name}"):
        load_checkpoint(directory)


def test_a_directory_without_a_manifest_is_no_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"it has no offramp\.json"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "exits.safetensors"])
def test_a_damaged_file_is_named(tmp_path: Path, write_tiny: Any, name: str) -> None:
    directory = write_tiny(tmp_path / "model")
    content = bytearray((directory / name).read_bytes())
    content[-1] ^= 1
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{name} is damaged or was replaced"):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version 2, this build reads 1"),
        ({"exit_policy": "hope"}, "unknown exit_policy 'hope'; known: full_depth"),
        ({"best_policy": "luck"}, "unknown best_policy 'luck'; known: full_depth"),
        ({"colour": "blue"}, "colour: Extra inputs are not permitted"),
        ({"seed": "many"}, "seed: Input should be a valid integer"),
        ({"sha256": {}}, r"no sha256 of model\.safetensors"),
    ],
)
def test_a_bad_manifest_is_refused(
    tmp_path: Path, write_tiny: Any, changes: dict[str, Any], message: str
) -> None:
    directory = write_tiny(tmp_path / "model")
    edit_manifest(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(directory)


def test_a_manifest_that_is_not_json_is_refused(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    (directory / "offramp.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"offramp\.json cannot be read"):
        load_checkpoint(directory)


def test_labels_and_heads_must_agree(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    model = json.loads((directory / "offramp.json").read_text())["model"]
    edit_manifest(directory, model=model | {"labels": ["a", "b"]})
    with pytest.raises(CheckpointError, match=r"shape \(3,\), but 2 labels .* ask for \(2,\)"):
        load_checkpoint(directory)


def test_missing_and_unknown_heads_are_named(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    rewrite(directory, "exits.safetensors", lambda t: t.update(gate=torch.zeros(1)))
    with pytest.raises(CheckpointError, match="a tensor gate that the manifest does not know"):
        load_checkpoint(directory)
    rewrite(directory, "exits.safetensors", lambda t: (t.pop("gate"), t.pop("classifiers.2.bias")))
    with pytest.raises(CheckpointError, match=r"has no tensor classifiers\.2\.bias"):
        load_checkpoint(directory)


def test_a_missing_encoder_tensor_is_named(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    name = "encoder.layer.1.output.dense.bias"
    rewrite(directory, "model.safetensors", lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=name):
        load_checkpoint(directory).stack()


def test_a_wrongly_shaped_encoder_tensor_is_named(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    name = "encoder.layer.1.intermediate.dense.weight"
    rewrite(
        directory, "model.safetensors", lambda tensors: tensors.update({name: torch.zeros(32, 8)})
    )
    with pytest.raises(CheckpointError, match=rf"{name}.*\(32, 8\)"):
        load_checkpoint(directory).stack()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers = 7, but the exits were made for"),
        ({"layer_norm_eps": None}, "layer_norm_eps is None"),
        ({"num_attention_heads": None}, "num_attention_heads is None"),
        ({"num_attention_heads": 3}, "num_attention_heads = 3 does not divide hidden_size = 16"),
        ({"intermediate_size": True}, "intermediate_size is True"),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', supported: "),
        ({"is_decoder": True}, "only encoders can be run"),
    ],
)
def test_a_backbone_that_cannot_be_run_is_refused(
    tmp_path: Path, write_tiny: Any, changes: dict[str, Any], message: str
) -> None:
    path = write_tiny(tmp_path / "model") / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(CheckpointError, match=message):
        load_checkpoint(path.parent)


def test_tables_of_another_depth_are_refused(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    point = table().points[0].model_copy(update={"exit_counts": (0, 2)})
    other = table().model_copy(update={"points": (point,)})
    edit_manifest(directory, calibration=[json.loads(other.model_dump_json())])
    with pytest.raises(CheckpointError, match="not of a model with 4 layers"):
        load_checkpoint(directory)


def test_ids_beyond_the_embeddings_are_refused(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["one more"] = 50
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"ids up to 50, but .* for 50 ids only"):
        load_checkpoint(directory).stack()


def test_a_broken_tokenizer_is_refused(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    (directory / "tokenizer.json").write_text("[]")
    with pytest.raises(CheckpointError, match="is not a tokenizer"):
        load_checkpoint(directory).tokenizer()


def test_more_tokens_than_positions_are_refused(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    model = json.loads((directory / "offramp.json").read_text())["model"]
    edit_manifest(directory, model=model | {"max_length": 41})
    with pytest.raises(CheckpointError, match="positions for 40 tokens only"):
        load_checkpoint(directory).stack()


def test_the_version_follows_the_weights(tmp_path: Path, write_tiny: Any) -> None:
    directory = write_tiny(tmp_path / "model")
    version = load_checkpoint(directory).version
    edit_manifest(directory, seed=5)
    assert load_checkpoint(directory).version == version
    rewrite(directory, "exits.safetensors", lambda t: t["classifiers.0.bias"].add_(1))
    assert load_checkpoint(directory).version != version
