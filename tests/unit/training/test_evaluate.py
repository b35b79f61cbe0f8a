"""Evaluation and calibration of a small checkpoint: shapes, consistency, refusals, the picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offramp_model.checkpoint import load_checkpoint
from offramp_model.policies import POLICIES
from offramp_training.calibrate import calibrate_checkpoint
from offramp_training.data import load_split
from offramp_training.errors import DataError
from offramp_training.evaluate import (
    DEFAULT_POLICIES,
    Report,
    evaluate_checkpoint,
    store_report,
    write_json,
)
from offramp_training.plot import plot_report

PNG = b"\x89PNG\r\n\x1a\n"
POINT = {"threshold", "speedup", "mean_exit_layer", "accuracy", "macro_f1", "exit_counts"}


@pytest.fixture(scope="module")
def report(checkpoint: Path, data: Path) -> Report:
    return evaluate_checkpoint(checkpoint, load_split(str(data), "test"))


def test_the_json_has_the_agreed_shape(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constants)
    assert content.keys() == {"num_layers", "rows", "labels", "layers", "policies", "oracle"}
    assert (content["num_layers"], content["rows"]) == (3, 40)
    assert content["labels"] == ["pleasure", "dread", "craft"]
    assert [layer["exit_layer"] for layer in content["layers"]] == [1, 2, 3]
    assert content["policies"].keys() == set(DEFAULT_POLICIES)
    for policy in content["policies"].values():
        assert policy.keys() == {"points", "curve"}
        for point in policy["points"] + policy["curve"]:
            assert point.keys() == POINT
            assert sum(point["exit_counts"]) == 40
    assert content["oracle"].keys() == {"speedup", "accuracy"}


def test_points_are_the_smallest_speedup_that_suffices(report: Report) -> None:
    for one in report.policies.values():
        assert len(one.points) == len(one.requested)
        for wanted, point in zip(one.requested, one.points, strict=True):
            sufficient = [p.speedup for p in one.curve if p.speedup >= wanted - 1e-9]
            assert point.speedup == pytest.approx(min(sufficient))
        assert one.points[0].accuracy == report.full_accuracy
        # The layer loop and the vectorised curve agree about the same threshold.
        assert set(one.points) <= set(one.curve)


def test_fit_calibrates_every_policy_on_held_out_rows(checkpoint: Path, data: Path) -> None:
    opened = load_checkpoint(checkpoint)
    validation = load_split(str(data), "validation")
    assert {table.policy for table in opened.manifest.calibration} == set(POLICIES)
    for table in opened.manifest.calibration:
        assert table.data_fingerprint == validation.fingerprint
        assert table.data_fingerprint == opened.manifest.data.held_out_fingerprint
    assert opened.manifest.evaluation["split"] == "validation"
    assert (checkpoint / "curve.png").read_bytes().startswith(PNG)
    assert "| speed-up | accuracy |" in (checkpoint / "README.md").read_text()
    for name in ("model.safetensors", "exits.safetensors"):
        assert (checkpoint / name).stat().st_mode & 0o044 == 0o044


def test_calibration_replaces_its_own_tables_only(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    test_rows = load_split(str(data), "test")
    calibrate_checkpoint(copy, test_rows, policies=["entropy"])
    calibrate_checkpoint(copy, test_rows, policies=["entropy"], dtype="bfloat16")
    opened = load_checkpoint(copy)
    assert opened.table("entropy").split == "test"
    assert opened.table("entropy", dtype="bfloat16").rows == 40
    assert opened.table("energy").split == "validation"
    assert len(opened.manifest.calibration) == len(POLICIES) + 1


def test_training_rows_are_refused_under_any_name(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    train = load_split(str(data), "train")
    with pytest.raises(DataError, match="training rows"):
        calibrate_checkpoint(checkpoint, train)
    renamed = train.take(reversed(range(len(train))), split="validation")
    with pytest.raises(DataError, match="training rows"):
        calibrate_checkpoint(checkpoint, renamed)


def test_rows_of_another_task_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x", "label": name}) for name in ("a", "b")]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="the checkpoint's are pleasure, dread, craft"):
        evaluate_checkpoint(checkpoint, load_split(str(tmp_path), "test"))


@pytest.mark.parametrize("policies", [["entropy"], ["full_depth", "fixed_layer", "vote"]])
def test_the_plot_is_written(
    checkpoint: Path, data: Path, tmp_path: Path, policies: list[str]
) -> None:
    report = evaluate_checkpoint(checkpoint, load_split(str(data), "test"), policies)
    path = plot_report(report, tmp_path / "curve.png", title="verbs")
    assert path.read_bytes().startswith(PNG)


def test_stored_figures_are_part_of_a_checkpoint_that_loads(
    checkpoint: Path, report: Report, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    store_report(copy, report, "test")
    evaluation: dict[str, Any] = dict(load_checkpoint(copy).manifest.evaluation)
    assert (evaluation["split"], evaluation["rows"]) == ("test", 40)
    assert "curve" not in evaluation["policies"]["entropy"]
