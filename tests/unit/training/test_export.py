"""`offramp-train export --format onnx`: the same answers, whole directories, int8 that is int8."""

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import onnx
import pytest

from offramp_model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.policies import make_policy
from offramp_model.recorded import record_exits
from offramp_model.rows import Encoding, RowSettings, TokenBatch
from offramp_model.signals import normalised_entropy
from offramp_training.__main__ import main
from offramp_training.data import Columns, load_split
from offramp_training.export import spread


@pytest.fixture(scope="module")
def exported(
    checkpoint: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Both dtypes, as the command writes them."""
    there = tmp_path_factory.mktemp("exported")
    export = ["export", str(checkpoint), "--format", "onnx", "--output"]
    assert main([*export, str(there / "float32")]) == 0
    assert main([*export, str(there / "int8"), "--quantize", "int8", "--data", str(data)]) == 0
    return {"float32": there / "float32", "int8": there / "int8"}


def encodings_of(checkpoint: Checkpoint, data: Path) -> list[Encoding]:
    columns = Columns("text", None, "label")
    rows = load_split(str(data), "test", columns, checkpoint.model.labels)
    return checkpoint.tokenizer().encode(rows.inputs)


def test_float32_says_what_the_checkpoint_says(
    checkpoint: Path, exported: dict[str, Path], data: Path
) -> None:
    before, after = load_checkpoint(checkpoint), load_checkpoint(exported["float32"])
    assert (after.backend, after.dtype) == ("onnx", "float32")
    assert after.manifest.graphs is not None
    assert after.manifest.graphs.source == before.version != after.version
    encodings = encodings_of(before, data)
    ours = record_exits(after.any_stack(threads=1), encodings).logits
    theirs = record_exits(before.any_stack(), encodings).logits
    assert float((ours - theirs).norm() / theirs.norm()) < 1e-5
    names = {path.name for path in exported["float32"].iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "exits.safetensors"} <= names
    assert {"embeddings.onnx", "segment-1.onnx", "segment-2.onnx", "segment-3.onnx"} <= names
    assert "model.safetensors" not in names


def kinds(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def test_every_linear_layer_is_int8_and_nothing_else(exported: dict[str, Path]) -> None:
    for layer in (1, 2, 3):
        small = kinds(exported["int8"] / f"segment-{layer}.onnx")
        assert small["MatMulIntegerToFloat"] == 6  # query, key, value, output, two of the FFN
        assert small["QuantizeLinear"] == 4  # query, key and value share theirs
        assert small["Gemm"] == small["MatMul"] == small["DynamicQuantizeLinear"] == 0
        assert small["LayerNormalization"] == 2
        plain = kinds(exported["float32"] / f"segment-{layer}.onnx")
        assert (plain["Gemm"], plain["MatMulIntegerToFloat"]) == (6, 0)
        graph = onnx.load(exported["int8"] / f"segment-{layer}.onnx").graph
        stored = {one.name: one.data_type for one in graph.initializer}
        weights = [name for name in stored if name.endswith(("q.weight", "ffn_out.weight"))]
        assert len(weights) == 2
        assert {stored[name] for name in weights} == {onnx.TensorProto.INT8}


def test_int8_stays_close_and_says_on_which_rows(
    checkpoint: Path, exported: dict[str, Path], data: Path
) -> None:
    before, after = load_checkpoint(checkpoint), load_checkpoint(exported["int8"])
    assert after.dtype == "int8"
    assert after.manifest.graphs is not None
    measured = after.manifest.graphs.activations
    assert measured is not None
    assert measured.data_fingerprint == before.manifest.data.held_out_fingerprint
    flips = after.manifest.graphs.flips
    assert flips is not None
    assert flips.rows >= measured.rows
    assert flips.label_flips <= 0.05
    assert abs(flips.accuracy - flips.source_accuracy) <= flips.label_flips
    encodings = encodings_of(before, data)
    ours = record_exits(after.any_stack(threads=1), encodings).logits
    theirs = record_exits(before.any_stack(), encodings).logits
    assert 1e-4 < float((ours - theirs).norm() / theirs.norm()) < 5e-2


def test_an_int8_answer_is_the_same_alone_and_in_any_batch(
    exported: dict[str, Path], data: Path
) -> None:
    opened = load_checkpoint(exported["int8"])
    stack, policy = opened.any_stack(threads=1), make_policy("entropy")
    encodings = encodings_of(opened, data)
    first = normalised_entropy(record_exits(stack, encodings).logits[0]).sort().values
    threshold = float(first[len(first) // 2 - 1 : len(first) // 2 + 1].mean())  # half leave there

    def answers(rows: list[int]) -> dict[int, tuple[int, int]]:
        asked = RowSettings.uniform(len(rows), threshold, max_layer=3)
        batch = TokenBatch.pack([encodings[row] for row in rows])
        found = {}
        for left in layer_loop(stack, start_rows(stack, batch, policy, asked), policy):
            for place, label in zip(left.row.tolist(), left.label.tolist(), strict=True):
                found[rows[place]] = left.exit_layer, label
        return found

    alone = {row: answers([row])[row] for row in range(len(encodings))}
    assert len({layer for layer, _ in alone.values()}) > 1
    rng = random.Random(0)
    for _ in range(50):
        rows = rng.sample(range(len(encodings)), rng.randint(2, len(encodings)))
        assert answers(rows) == {row: alone[row] for row in rows}


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


def test_calibration_is_of_the_backend_and_dtype(
    exported: dict[str, Path],
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    int8 = shutil.copytree(exported["int8"], tmp_path / "int8")
    with pytest.raises(CheckpointError, match="no calibration of entropy/onnx/int8; it has: "):
        load_checkpoint(int8).table("entropy", backend="onnx", dtype="int8")
    rows = ("--data", data, "--split", "held_out")
    assert main(["calibrate", str(int8), *map(str, rows), "--backend", "onnx"]) == 0
    capsys.readouterr()
    opened = load_checkpoint(int8)
    assert opened.table("entropy", backend="onnx", dtype="int8").rows > 0
    assert opened.table("entropy").backend == "torch"  # it came along
    assert "cannot be run in float32; backend onnx has: int8" in refused(
        capsys, "calibrate", int8, *rows, "--dtype", "float32"
    )
    assert "is for onnx" in refused(capsys, "calibrate", int8, *rows, "--backend", "torch")
    assert "is for torch; offramp-train export makes" in refused(
        capsys, "calibrate", checkpoint, *rows, "--backend", "onnx"
    )
    assert main(["inspect", str(int8)]) == 0
    shown = " ".join(capsys.readouterr().out.split())  # folded to the terminal's width
    assert "ONNX, int8, of weights" in shown
    assert "of labels flip" in shown


def test_what_is_wrong_is_named(
    exported: dict[str, Path],
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    copy = shutil.copytree(exported["float32"], tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"holds ONNX graphs and no model\.safetensors"):
        load_checkpoint(copy).stack()
    with pytest.raises(CheckpointError, match="holds no ONNX graphs; make them"):
        load_checkpoint(checkpoint).onnx_stack()
    onnx_again = ("export", copy, "--format", "onnx", "--output", tmp_path / "again")
    assert "holds ONNX graphs" in refused(capsys, *onnx_again)
    occupied = ("export", checkpoint, "--format", "onnx", "--output", copy)
    assert "already exists and is not empty" in refused(capsys, *occupied)
    assert not list(tmp_path.glob(".*")), "a temporary file was left behind"
    with (copy / "segment-2.onnx").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x7f")
    with pytest.raises(CheckpointError, match=r"segment-2\.onnx is damaged or was replaced"):
        load_checkpoint(copy)
    (copy / "segment-2.onnx").unlink()
    with pytest.raises(CheckpointError, match=r"has no segment-2\.onnx"):
        load_checkpoint(copy)
    manifest = json.loads((copy / "offramp.json").read_text())
    assert set(manifest["sha256"]) >= {"embeddings.onnx", "exits.safetensors"}


def test_activations_are_measured_on_rows_from_everywhere() -> None:
    texts = [str(number) for number in range(1000)]
    chosen = spread(texts, 10)
    assert chosen == [str(number) for number in range(0, 1000, 100)]
    assert spread(texts[:3], 10) == texts[:3]
