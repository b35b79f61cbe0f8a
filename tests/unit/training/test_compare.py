"""Comparisons of small checkpoints: figures that agree with evaluation, refusals, files."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp_model.calibrating import trace
from offramp_model.checkpoint import Checkpoint, load_checkpoint, update_manifest
from offramp_model.policies import make_policy
from offramp_model.recorded import RecordedExits
from offramp_training.__main__ import main
from offramp_training.compare import (
    Comparison,
    compare_checkpoints,
    distinct_names,
    signal_aurocs,
    step_curve,
)
from offramp_training.config import make_recipe
from offramp_training.data import Dataset, load_split
from offramp_training.errors import DataError
from offramp_training.evaluate import evaluate_checkpoint
from offramp_training.fit import fit
from offramp_training.statistics import area


@pytest.fixture(scope="module")
def other(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A worse checkpoint, trained briefly and not calibrated."""
    recipe = make_recipe(
        {
            "model": {"backbone": str(backbone), "max_length": 16},
            "loop": {"epochs": 1, "batch_size": 16, "seed": 3},
        }
    )
    directory = tmp_path_factory.mktemp("out") / "brief"
    return fit(recipe, directory, data=str(data), calibrate=False)


@pytest.fixture(scope="module")
def test_rows(data: Path) -> Dataset:
    return load_split(str(data), "test")


@pytest.fixture(scope="module")
def comparison(checkpoint: Path, other: Path, test_rows: Dataset) -> Comparison:
    both = [load_checkpoint(checkpoint), load_checkpoint(other)]
    return compare_checkpoints(both, [test_rows, test_rows], draws=300)


def test_the_figures_are_those_of_evaluate(
    comparison: Comparison, checkpoint: Path, other: Path, test_rows: Dataset
) -> None:
    for directory, one, entry in zip(
        (checkpoint, other),
        comparison.checkpoints,
        comparison.as_dict()["checkpoints"],
        strict=True,
    ):
        report = evaluate_checkpoint(load_checkpoint(directory), test_rows)
        policy = report.policies[one.policy]
        assert one.curve == policy.curve
        assert one.layers == report.layers
        assert one.oracle == (report.oracle_speedup, report.oracle_accuracy)
        for speedup, point in zip(policy.requested, policy.points, strict=True):
            assert entry["accuracy"][f"{speedup:g}"] == point.accuracy
        assert entry["full_depth"] == report.full_accuracy
        assert entry["auc"] == area(step_curve(policy.curve))
        # Three layers: a request for 1.5 is met by the second, one for 2 by the first.
        assert entry["truncated"]["accuracy"]["1.5"] == report.layers[2]
        assert entry["truncated"]["accuracy"]["2"] == report.layers[1]


def test_the_best_policy_is_the_one_of_the_calibration_rows(
    comparison: Comparison, checkpoint: Path, other: Path, data: Path, test_rows: Dataset
) -> None:
    calibrated, brief = comparison.checkpoints
    manifest = load_checkpoint(checkpoint).manifest
    assert (calibrated.policy, calibrated.chosen_on) == (manifest.best_policy, "calibration rows")
    assert brief.chosen_on == "compared rows"  # it has no tables
    validation = load_split(str(data), "validation")
    again = compare_checkpoints([load_checkpoint(checkpoint)], [validation], draws=2)
    assert again.checkpoints[0].chosen_on == "compared rows"  # those it was calibrated on
    named = compare_checkpoints([load_checkpoint(other)], [test_rows], "vote", draws=2)
    assert (named.checkpoints[0].policy, named.checkpoints[0].chosen_on) == ("vote", "request")


def test_intervals_hold_their_figures_and_a_twin_makes_no_difference(
    checkpoint: Path, other: Path, test_rows: Dataset, tmp_path: Path
) -> None:
    twin = shutil.copytree(checkpoint, tmp_path / "twin")
    three = [load_checkpoint(path) for path in (checkpoint, twin, other)]
    compared = compare_checkpoints(three, [test_rows] * 3, "entropy", draws=300)
    assert compared == compare_checkpoints(three, [test_rows] * 3, "entropy", draws=300)
    for sure in compared.intervals:
        for figure in (sure.at_two, sure.area):
            assert figure.value is not None
            assert figure.low <= figure.value <= figure.high
            assert figure.low < figure.high
    own, same, worse = compared.intervals
    for difference in (own.at_two_difference, same.at_two_difference, same.area_difference):
        assert (difference.value, difference.low, difference.high) == (0.0, 0.0, 0.0)
    assert worse.area_difference.value == worse.area.value - own.area.value
    # Paired: surer than two intervals side by side.
    width = worse.area_difference.high - worse.area_difference.low
    assert width < (own.area.high - own.area.low) + (worse.area.high - worse.area.low)


def test_auroc_is_of_the_signal_against_being_right() -> None:
    """Surest where right at exit 1, surest where wrong at exit 2, no row wrong at exit 3."""
    sure, unsure = [9.0, 0.0], [1.0, 0.0]
    logits = torch.tensor([[sure, sure, unsure], [unsure, unsure, sure], [sure, unsure, sure]])
    labels, later = torch.tensor([0, 0, 1]), torch.tensor([0, 0, 0])
    recorded = RecordedExits(logits, (1, 2, 3))
    for name in ("confidence", "margin", "entropy", "energy"):
        seen = trace(recorded, make_policy(name))
        assert signal_aurocs(seen, labels)[:2] == [1.0, 0.0]
        assert signal_aurocs(seen, later) == [None, None, None]
    assert signal_aurocs(trace(recorded, make_policy("patience")), labels)[0] is None  # all tie
    broken = logits.clone()
    broken[1, 2] = torch.nan  # cannot leave there: the least sure of all
    seen = trace(RecordedExits(broken, (1, 2, 3)), make_policy("entropy"))
    wrong_at_the_last = torch.tensor([0, 0, 1])
    assert signal_aurocs(seen, wrong_at_the_last)[1] == 1.0


def test_an_exit_range_that_ends_early_has_no_figures_beyond(
    backbone: Path, data: Path, checkpoint: Path, test_rows: Dataset, tmp_path: Path
) -> None:
    model = {"backbone": str(backbone), "max_length": 16, "exit_layers": [2, 3]}
    recipe = make_recipe({"model": model, "loop": {"epochs": 1, "batch_size": 16}})
    late = load_checkpoint(fit(recipe, tmp_path / "late", data=str(data)))
    assert late.manifest.best_policy is None  # 1.5 is all it can
    both = [load_checkpoint(checkpoint), late]
    compared = compare_checkpoints(both, [test_rows] * 2, draws=20)
    one, sure = compared.checkpoints[1], compared.intervals[1]
    assert one.policy == late.manifest.exit_policy
    assert compared.as_dict()["checkpoints"][1]["accuracy"]["2"] is None
    assert [sure.at_two.value, sure.area.value, sure.area_difference.low] == [None] * 3


def test_other_rows_are_refused(checkpoint: Path, other: Path, test_rows: Dataset) -> None:
    both: list[Checkpoint] = [load_checkpoint(checkpoint), load_checkpoint(other)]
    fewer = test_rows.take(range(20))
    with pytest.raises(DataError, match="brief: its 'test' rows are not those of"):
        compare_checkpoints(both, [test_rows, fewer])
    with pytest.raises(DataError, match="is given twice"):
        compare_checkpoints([both[0], both[0]], [test_rows, test_rows])


def test_a_signal_that_is_the_same_for_all_rows_tells_nothing() -> None:
    logits = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(0))
    recorded, labels = RecordedExits(logits, (1, 2, 3)), torch.arange(20) % 2
    votes = signal_aurocs(trace(recorded, make_policy("vote")), labels)
    assert votes[0] is None  # one vote each
    assert votes[1] is not None
    assert None not in signal_aurocs(trace(recorded, make_policy("entropy")), labels)


def test_names_are_as_long_as_they_must_be(tmp_path: Path) -> None:
    assert distinct_names([Path("/a/x"), Path("/b/y")]) == ["x", "y"]
    assert distinct_names([Path("/a/x"), Path("/b/x"), Path("/b/y")]) == ["a/x", "b/x", "b/y"]


def test_the_command_writes_a_table_and_a_picture(
    checkpoint: Path,
    other: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = ["--data", str(data), "--split", "test", "--draws", "50"]
    files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.svg")]
    assert main(["compare", str(checkpoint), str(other), *rows, *files]) == 0
    shown = capsys.readouterr().out
    for part in ("40 rows of test", "area 1x-3x", "oracle", "bootstrap", "AUROC", "these very"):
        assert part in shown
    content: dict[str, Any] = json.loads((tmp_path / "c.json").read_text())
    assert [one["name"] for one in content["checkpoints"]] == ["verbs", "brief"]
    assert content["bootstrap"] == {"draws": 50, "seed": 0, "level": 0.95}
    assert content["checkpoints"][0]["layers"][0].keys() == {"exit_layer", "accuracy", "auroc"}
    assert (tmp_path / "c.svg").read_bytes().startswith(b"<?xml")


def test_the_command_refuses(
    checkpoint: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["compare", str(checkpoint), "--data", str(data)]
    assert main([*arguments, "--json", str(tmp_path / "no" / "c.json")]) == 2
    assert "cannot be written there" in capsys.readouterr().err
    copy = load_checkpoint(shutil.copytree(checkpoint, tmp_path / "copy"))
    model = copy.model.model_copy(update={"labels": ("a", "b", "c")})
    update_manifest(copy.directory, copy.manifest.model_copy(update={"model": model}))
    assert main(["compare", str(checkpoint), str(copy.directory), "--data", str(data)]) == 2
    assert "the checkpoint's are a, b, c" in capsys.readouterr().err
    for wrong in (["--draws", "0"], ["--policy", "luck"]):
        with pytest.raises(SystemExit):
            main([*arguments, *wrong])
