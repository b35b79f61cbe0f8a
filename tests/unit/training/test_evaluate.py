"""Evaluation and calibration of a small checkpoint: shapes, consistency, refusals, the picture."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from offramp_model.calibration import CurvePoint
from offramp_model.checkpoint import CheckpointError, load_checkpoint
from offramp_model.policies import supported_policies
from offramp_training.calibrate import calibrate_checkpoint
from offramp_training.data import load_split
from offramp_training.errors import DataError
from offramp_training.evaluate import (
    Report,
    best_policy,
    default_policies,
    evaluate_checkpoint,
    store_report,
    write_json,
)
from offramp_training.plot import plot_report

PNG = b"\x89PNG\r\n\x1a\n"
POINT = {"threshold", "speedup", "mean_exit_layer", "accuracy", "macro_f1", "exit_counts"}


@pytest.fixture(scope="module")
def report(checkpoint: Path, data: Path) -> Report:
    return evaluate_checkpoint(load_checkpoint(checkpoint), load_split(str(data), "test"))


def test_the_json_has_the_agreed_shape(report: Report, tmp_path: Path) -> None:
    write_json(report, tmp_path / "report.json")

    def no_constants(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    content = json.loads((tmp_path / "report.json").read_text(), parse_constant=no_constants)
    assert content.keys() == {"num_layers", "rows", "labels", "layers", "policies", "oracle"}
    assert (content["num_layers"], content["rows"]) == (3, 40)
    assert content["labels"] == ["pleasure", "dread", "craft"]
    assert [layer["exit_layer"] for layer in content["layers"]] == [1, 2, 3]
    assert content["policies"].keys() == {
        "confidence", "margin", "entropy", "energy", "patience", "vote",
    }  # fmt: skip
    for policy in content["policies"].values():
        assert policy.keys() == {"points", "calibrated", "curve"}
        for point in policy["points"] + policy["curve"]:
            assert point.keys() == POINT
            assert sum(point["exit_counts"]) == 40
        assert policy["calibrated"][0]["requested"] == 1.0
        for point in policy["calibrated"]:
            assert point.keys() == POINT | {"requested"}
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
    supported = supported_policies(opened.model)
    assert "gate" not in supported
    assert {table.policy for table in opened.manifest.calibration} == set(supported)
    for table in opened.manifest.calibration:
        assert table.data_fingerprint == validation.fingerprint
        assert table.data_fingerprint == opened.manifest.data.held_out_fingerprint
    assert opened.manifest.evaluation["split"] == "validation"
    assert (checkpoint / "curve.png").read_bytes().startswith(PNG)
    for name in ("model.safetensors", "exits.safetensors"):
        assert (checkpoint / name).stat().st_mode & 0o044 == 0o044


def test_calibration_replaces_its_own_tables_only(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    test_rows = load_split(str(data), "test")
    opened = load_checkpoint(copy)
    for dtype in ("float32", "bfloat16"):
        opened = calibrate_checkpoint(opened, test_rows, policies=["entropy"], dtype=dtype)
    assert load_checkpoint(copy).manifest == opened.manifest
    assert opened.table("entropy").split == "test"
    assert opened.table("entropy", dtype="bfloat16").rows == 40
    assert opened.table("energy").split == "validation"
    assert len(opened.manifest.calibration) == len(supported_policies(opened.model)) + 1


def points(*pairs: tuple[float, float]) -> tuple[CurvePoint, ...]:
    return tuple(
        CurvePoint(
            threshold=0.5,
            speedup=speedup,
            mean_exit_layer=1.0,
            accuracy=accuracy,
            macro_f1=0.0,
            exit_counts=(),
        )
        for speedup, accuracy in pairs
    )


def test_the_best_policy_is_the_most_accurate_at_speedup_two() -> None:
    curves = {
        "fixed_layer": points((1, 1.0), (2, 1.0)),  # the yardstick does not compete
        "confidence": points((1, 0.9), (1.9, 0.99), (2.1, 0.7)),
        "entropy": points((1, 0.9), (2.0, 0.8), (3.0, 0.2)),
        "energy": points((1, 0.9), (2.0, 0.8)),
        "vote": points((1, 0.9), (1.8, 0.9)),  # does not get that far
    }
    assert best_policy(curves, "vote") == "entropy"  # of equals the first
    assert best_policy(curves, "energy") == "energy"  # or the objective's own
    assert best_policy(curves, "confidence") == "entropy"
    assert best_policy({"vote": curves["vote"]}, "vote") is None


def test_calibration_names_the_best_policy_on_its_own_rows(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    manifest = load_checkpoint(checkpoint).manifest
    tables = {table.policy: table.points for table in manifest.calibration}
    assert manifest.best_policy == best_policy(tables, manifest.exit_policy)
    assert manifest.best_policy in default_policies(manifest.model)
    assert f"calibration rows: `{manifest.best_policy}`" in (checkpoint / "README.md").read_text()

    opened = load_checkpoint(shutil.copytree(checkpoint, tmp_path / "copy"))
    other = next(name for name in default_policies(manifest.model) if name != manifest.best_policy)
    test_rows = load_split(str(data), "test")
    opened = calibrate_checkpoint(opened, test_rows, policies=[other], dtype="bfloat16")
    assert opened.manifest.best_policy == manifest.best_policy  # another dtype has no say
    opened = calibrate_checkpoint(opened, test_rows, policies=[other])
    assert opened.manifest.best_policy == other  # the other tables are of other rows
    assert opened.manifest.exit_policy == manifest.exit_policy


def test_training_rows_are_refused_under_any_name(
    checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    train = load_split(str(data), "train")
    with pytest.raises(DataError, match="training rows"):
        calibrate_checkpoint(load_checkpoint(checkpoint), train)
    renamed = train.take(reversed(range(len(train))), split="validation")
    with pytest.raises(DataError, match="training rows"):
        calibrate_checkpoint(load_checkpoint(checkpoint), renamed)


def test_a_policy_whose_inputs_are_missing_is_refused(checkpoint: Path, data: Path) -> None:
    opened, rows = load_checkpoint(checkpoint), load_split(str(data), "test")
    assert "gate" not in default_policies(opened.model)
    for measure in (evaluate_checkpoint, calibrate_checkpoint):
        with pytest.raises(CheckpointError, match=r"'gate' needs gates.*it supports: full_depth"):
            measure(opened, rows, policies=["entropy", "gate"])
    assert load_checkpoint(checkpoint).manifest == opened.manifest


def test_rows_of_another_task_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    lines = [json.dumps({"text": "x", "label": name}) for name in ("a", "b")]
    (tmp_path / "test.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError, match="the checkpoint's are pleasure, dread, craft"):
        evaluate_checkpoint(load_checkpoint(checkpoint), load_split(str(tmp_path), "test"))


def test_the_card_shows_what_a_request_gets(checkpoint: Path) -> None:
    manifest = load_checkpoint(checkpoint).manifest
    evaluation: dict[str, Any] = dict(manifest.evaluation)
    card = (checkpoint / "README.md").read_text()
    assert "thresholds that a request gets, calibrated on 48 rows of `validation`" in card
    points = evaluation["policies"][manifest.exit_policy]["calibrated"]
    assert len(points) > 2
    for point in points:
        row = f"| {point['requested']:g} | {point['speedup']:.2f} | {point['accuracy']:.4f} |"
        assert row in card


@pytest.mark.parametrize("policies", [["entropy"], ["full_depth", "fixed_layer", "vote"]])
@pytest.mark.parametrize(("suffix", "start"), [("png", PNG), ("svg", b"<?xml"), ("PDF", b"%PDF")])
def test_the_plot_is_of_the_kind_its_name_says(
    checkpoint: Path, data: Path, tmp_path: Path, policies: list[str], suffix: str, start: bytes
) -> None:
    test_rows = load_split(str(data), "test")
    report = evaluate_checkpoint(load_checkpoint(checkpoint), test_rows, policies)
    path = plot_report(report, tmp_path / f"curve.{suffix}", title="verbs")
    assert path.read_bytes().startswith(start)


def test_stored_figures_are_part_of_a_checkpoint_that_loads(
    checkpoint: Path, report: Report, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    store_report(load_checkpoint(copy), report, "test")
    evaluation: dict[str, Any] = dict(load_checkpoint(copy).manifest.evaluation)
    assert (evaluation["split"], evaluation["rows"]) == ("test", 40)
    assert "curve" not in evaluation["policies"]["entropy"]


def test_a_picture_that_fails_leaves_the_old_one(
    checkpoint: Path, report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(report: Report, path: Path, *, title: str = "") -> Path:
        path.write_bytes(b"half a pict")
        raise OSError("disk full")

    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    monkeypatch.setattr("offramp_training.plot.plot_report", fail)
    with pytest.raises(OSError, match="disk full"):
        store_report(load_checkpoint(copy), report, "test")
    assert (copy / "curve.png").read_bytes() == (checkpoint / "curve.png").read_bytes()
