"""Resume points: state survives the disk, and a killed run ends with the same bits."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offramp_model.checkpoint import load_checkpoint
from offramp_training.config import make_recipe
from offramp_training.errors import BackboneError, DataError, OutputError
from offramp_training.fit import fit, is_finished
from offramp_training.objectives.joint import JointStage
from offramp_training.resume import ResumePoints, load_tree, rng_state, save_tree, set_rng_state


class Killed(Exception):
    pass


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "exits.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def test_a_tree_survives_the_disk(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "m": shared, "v": shared}, 7: {}},
        "groups": [{"lr": 0.1 + 0.2, "betas": (0.9, 0.999), "foreach": None, "fused": True}],
        "name": "adamw",
        "bytes": torch.arange(5, dtype=torch.uint8),
    }
    save_tree(tmp_path, tree)
    again = load_tree(tmp_path)
    assert again["groups"] == tree["groups"]
    assert again["groups"][0]["betas"] == (0.9, 0.999)
    assert list(again["state"]) == [0, 7]
    assert torch.equal(again["state"][0]["v"], shared)
    assert again["bytes"].dtype == torch.uint8


def test_what_is_neither_json_nor_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/a/0 is a set"):
        save_tree(tmp_path, {"a": [{1, 2}]})


def test_an_optimiser_goes_on_to_the_same_bits(tmp_path: Path) -> None:
    def step(parameter: torch.nn.Parameter, optimiser: torch.optim.Optimizer, value: float) -> None:
        parameter.grad = torch.full_like(parameter, value)
        optimiser.step()

    first = torch.nn.Parameter(torch.linspace(-1, 1, 9))
    optimiser = torch.optim.AdamW([{"params": [first], "lr": 0.1, "base_lr": 0.1}], fused=True)
    step(first, optimiser, 0.3)
    save_tree(tmp_path, {"optimiser": optimiser.state_dict(), "parameter": first})
    step(first, optimiser, -0.7)

    state = load_tree(tmp_path)
    second = torch.nn.Parameter(state["parameter"])
    resumed = torch.optim.AdamW([{"params": [second], "lr": 9.0, "base_lr": 9.0}], fused=True)
    resumed.load_state_dict(state["optimiser"])
    step(second, resumed, -0.7)
    assert torch.equal(first, second)


def test_random_numbers_go_on_where_they_stopped(tmp_path: Path) -> None:
    save_tree(tmp_path, rng_state())
    expected = torch.rand(4)
    set_rng_state(load_tree(tmp_path))
    assert torch.equal(torch.rand(4), expected)


def test_only_whole_points_are_found_and_only_the_newest_is_kept(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path / "resume")
    assert points.load() is None
    assert not points
    for step in range(12):
        points.save({"step": step})
    (tmp_path / "resume" / ".part-000000020").mkdir()  # as a kill while writing leaves it
    assert points
    assert points.load() == {"step": 11}
    assert [path.name for path in (tmp_path / "resume").iterdir()] == ["point-000000012"]


@pytest.mark.parametrize("killed_in", ["os.fsync", "pathlib.Path.rename", "shutil.rmtree"])
def test_a_kill_at_any_moment_leaves_the_old_point_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_in: str
) -> None:
    def kill(path: Any, *_: Any, **__: Any) -> None:
        if ".part" not in str(path) or killed_in != "shutil.rmtree":
            raise Killed

    points = ResumePoints(tmp_path / "resume")
    points.save({"step": 7, "weights": torch.ones(3)})
    with monkeypatch.context() as patch:
        patch.setattr(killed_in, kill)
        with pytest.raises(Killed):
            points.save({"step": 7, "weights": torch.zeros(3)})
    expected = torch.zeros(3) if killed_in == "shutil.rmtree" else torch.ones(3)
    assert torch.equal(points.load()["weights"], expected)
    points.save({"step": 8})
    assert points.load() == {"step": 8}
    assert len(list((tmp_path / "resume").iterdir())) == 1


def test_a_damaged_point_is_passed_over_or_named(tmp_path: Path) -> None:
    points = ResumePoints(tmp_path)
    points.save({"step": 1})
    newest = tmp_path / "point-000000002"
    newest.mkdir()
    (newest / "state.json").write_text("{")
    assert points.load() == {"step": 1}
    shutil.rmtree(tmp_path / "point-000000001")
    with pytest.raises(OutputError, match="point-000000002 is damaged; allowed: --overwrite"):
        points.load()


def kill_at(monkeypatch: pytest.MonkeyPatch, batch_number: int) -> None:
    """The stage raises when asked for the losses of its n-th batch."""
    original = JointStage.losses
    seen = 0

    def losses(self: JointStage, *arguments: Any) -> Iterator[torch.Tensor]:
        nonlocal seen
        seen += 1
        if seen == batch_number:
            raise Killed
        return original(self, *arguments)

    monkeypatch.setattr(JointStage, "losses", losses)


@pytest.mark.parametrize(
    "loop",
    [
        {},
        {"precision": "bf16"},
        {"epochs": 30, "evaluate_every_steps": 2, "patience": 3},
        {"evaluate_every_steps": 3, "batch_tokens": 120},  # points fall on evaluations
    ],
    ids=lambda loop: "-".join(loop) or "plain",
)
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path,
    data: Path,
    recipe_table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    loop: dict[str, Any],
) -> None:
    recipe_table["loop"].update(loop)
    recipe = make_recipe(recipe_table)
    whole = fit(recipe, tmp_path / "whole", data=str(data), calibrate=False)
    for batch_number in (2, 9, 5):  # before the first point, in epoch 1, in epoch 2
        with monkeypatch.context() as patch:
            kill_at(patch, batch_number)
            with pytest.raises(Killed):
                fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
        assert not (tmp_path / "killed").exists()
    resumed = fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    assert_same_bits(weights(resumed), weights(whole))
    assert not (tmp_path / "killed.fit").exists()


def test_the_same_seed_gives_the_same_bits_and_another_does_not(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any]
) -> None:
    recipe_table["loop"]["epochs"] = 1
    results = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        recipe_table["loop"]["seed"] = seed
        recipe = make_recipe(recipe_table)
        results.append(weights(fit(recipe, tmp_path / name, data=str(data), calibrate=False)))
    assert_same_bits(results[0], results[1])
    assert not torch.equal(results[0]["classifiers.0.weight"], results[2]["classifiers.0.weight"])


def test_another_recipe_does_not_take_up_the_run(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, 8)
        with pytest.raises(Killed):
            fit(make_recipe(recipe_table), tmp_path / "out", data=str(data))
    recipe_table["optimiser"]["lr"] = 1e-3
    with pytest.raises(OutputError, match="unfinished run with another recipe"):
        fit(make_recipe(recipe_table), tmp_path / "out", data=str(data))
    recipe_table["optimiser"]["lr"] = 2e-3
    recipe_table["data"] = {"held_out": 20}
    with pytest.raises(OutputError, match="recipe and another training data"):
        fit(make_recipe(recipe_table), tmp_path / "out", data=str(data))
    fit(make_recipe(recipe_table), tmp_path / "out", data=str(data), overwrite=True)


def test_a_refused_run_changes_nothing(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, output = make_recipe(recipe_table), tmp_path / "out"
    nowhere = make_recipe({**recipe_table, "model": {"backbone": str(tmp_path / "none")}})
    with pytest.raises(BackboneError):
        fit(nowhere, output, data=str(data))
    assert list(tmp_path.iterdir()) == []

    before = weights(fit(recipe, output, data=str(data), calibrate=False))
    with pytest.raises(DataError):
        fit(recipe, output, data=str(tmp_path / "none"), overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]

    for batch_number in (2, 8):  # before the first resume point there is nothing to go on from
        with pytest.raises(OutputError, match="finished checkpoint"):
            fit(recipe, output, data=str(data))
        with monkeypatch.context() as patch:
            kill_at(patch, batch_number)
            with pytest.raises(Killed):
                fit(recipe, output, data=str(data), overwrite=True)
    points = sorted((tmp_path / "out.fit" / "resume").rglob("*"))
    assert points
    with pytest.raises(BackboneError):
        fit(nowhere, output, data=str(data), overwrite=True)
    assert sorted((tmp_path / "out.fit" / "resume").rglob("*")) == points
    assert_same_bits(weights(output), before)
    # Without --overwrite it goes on, and takes the place of the older one at the end.
    assert_same_bits(weights(fit(recipe, output, data=str(data), calibrate=False)), before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_kill_while_calibrating_is_made_good(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    recipe, output = make_recipe(recipe_table), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("offramp_training.fit.evaluate_checkpoint", kill)
        with pytest.raises(Killed):
            fit(recipe, output, data=str(data))
    assert not output.exists()
    kill_at(monkeypatch, 1)  # nothing is trained again
    assert (fit(recipe, output, data=str(data)) / "curve.png").is_file()
    assert load_checkpoint(output).manifest.evaluation["rows"] == 48


def test_outputs_that_cannot_be_made(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe(recipe_table)
    (tmp_path / "file").write_text("")
    for output, what in (
        (Path(), "ends in a name"),
        (Path("x/.."), "ends in a name"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "file" / "below" / "it", "Not a directory"),
    ):
        with pytest.raises(OutputError, match=what):
            fit(recipe, output, data=str(data))
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "volume")
    with pytest.raises(OutputError, match="is a mount point; give a directory below it"):
        fit(recipe, tmp_path / "volume", data=str(data))


@pytest.mark.slow
@pytest.mark.timeout(180)
def test_sigkill_and_the_same_command_again(
    tmp_path: Path, data: Path, recipe_table: dict[str, Any]
) -> None:
    model, rate = recipe_table["model"], recipe_table["optimiser"]
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"[model]\nbackbone = {str(model['backbone'])!r}\nmax_length = 16\n"
        f"[optimiser]\nlr = {rate['lr']}\nhead_lr = {rate['head_lr']}\n"
        "[loop]\nepochs = 30\nbatch_size = 16\ncheckpoint_every_steps = 5\nthreads = 1\n",
        encoding="utf-8",
    )

    def command(output: Path) -> list[str]:
        fit_it = ["fit", str(recipe), "--data", str(data), "--output", str(output)]
        return [sys.executable, "-m", "offramp_training", *fit_it, "--no-calibrate"]

    environment = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
    killed = subprocess.Popen(command(tmp_path / "killed"), env=environment)
    while not list(tmp_path.glob("killed.fit/resume/point-*")) and killed.poll() is None:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed").exists()
    for name in ("killed", "whole"):
        subprocess.run(command(tmp_path / name), env=environment, check=True)
    assert_same_bits(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_kill_while_the_rest_is_cleared_away_leaves_a_finished_run(
    backbone: Path, data: Path, recipe_table: dict[str, Any], tmp_path: Path
) -> None:
    """The checkpoint is in place; what dies is the deletion of the resume points."""
    output, rmtree = tmp_path / "out", shutil.rmtree

    def dies(path: Path, *arguments: Any, **options: Any) -> None:
        if output.exists() and Path(path) == tmp_path / "out.fit":
            next(Path(path).rglob("state.json")).unlink()
            raise KeyboardInterrupt
        rmtree(path, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", dies)
        with pytest.raises(KeyboardInterrupt):
            fit(make_recipe(recipe_table), output, data=str(data), calibrate=False)
    assert is_finished(output)
    fit(make_recipe(recipe_table), output, data=str(data), calibrate=False, overwrite=True)
    assert is_finished(output)
    assert not (tmp_path / "out.fit").exists()
