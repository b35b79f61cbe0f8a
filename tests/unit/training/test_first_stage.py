"""A first stage that several runs share: the bits of each run alone, whatever dies on the way."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from offramp_model.checkpoint import load_checkpoint
from offramp_training.__main__ import main
from offramp_training.config import make_recipe
from offramp_training.first_stage import FirstStage
from offramp_training.fit import choose_rows, first_stage_identity, fit, run_identity
from offramp_training.grid import parse_grid
from offramp_training.loop import Run
from offramp_training.objectives import OBJECTIVES
from offramp_training.objectives.consistentee import JointStage3, PolicyStage, WarmUp
from offramp_training.sweep import sweep

ALPHAS = (0.05, 0.4)
BATCHES = 3  # of each stage


class Killed(BaseException):
    """As a signal: no handler of ordinary errors sees it."""


def make_table(backbone: Path, **options: Any) -> dict[str, Any]:
    stages = {"stage1_epochs": 1, "stage2_epochs": 1, "stage3_epochs": 1, "stage2_lr": 1e-2}
    return {
        "model": {"backbone": str(backbone), "max_length": 16},
        "objective": {"name": "consistentee", **stages, "stage2_batch_size": 16, **options},
        "loop": {"max_train_rows": 48, "checkpoint_every_steps": 2, "seed": 3},
    }


@pytest.fixture
def table(backbone: Path) -> dict[str, Any]:
    return make_table(backbone)


@pytest.fixture(scope="module")
def alone(
    backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[float, Path]:
    """A checkpoint of each alpha, trained as if there were no other."""
    directory = tmp_path_factory.mktemp("alone")
    return {
        alpha: fit(
            make_recipe(make_table(backbone, alpha=alpha)), directory / f"{alpha}", data=str(data)
        )
        for alpha in ALPHAS
    }


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "exits.safetensors")


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert one.keys() == two.keys()
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


def run_each(monkeypatch: pytest.MonkeyPatch, stage: type, action: Callable[[Any], None]) -> None:
    """`action(stage)` before each of the stage's batches."""
    losses = stage.losses  # type: ignore[attr-defined]

    def watched(self: Any, *arguments: Any) -> Any:
        action(self)
        return losses(self, *arguments)

    monkeypatch.setattr(stage, "losses", watched)


def kill_at(monkeypatch: pytest.MonkeyPatch, stage: type, alpha: float, batch: int) -> None:
    seen = []

    def kill(stage: Any) -> None:
        seen.append(stage)
        if stage.options.alpha == alpha and len(seen) == batch:
            raise Killed

    run_each(monkeypatch, stage, kill)


def lines(output: Path) -> dict[str, dict[str, Any]]:
    points = json.loads((output / "sweep.json").read_text())["points"]
    return {point["name"]: point for point in points}


ONE, TWO = (f"objective.alpha={alpha}" for alpha in ALPHAS)


# ---- the sweep -----------------------------------------------------------------------------------


def test_a_sweep_over_alpha_warms_up_once_and_each_point_is_as_if_alone(
    table: dict[str, Any],
    alone: dict[float, Path],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, output = tmp_path / "recipe.toml", tmp_path / "out"
    sections = (
        f"[{name}]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in section.items())
        for name, section in table.items()
    )
    recipe.write_text("".join(sections), encoding="utf-8")
    warm_ups: list[Any] = []
    run_each(monkeypatch, WarmUp, warm_ups.append)
    command = ["sweep", str(recipe), "--data", str(data), "--output", str(output)]
    assert main([*command, "--grid", f"objective.alpha={list(ALPHAS)}"]) == 0
    assert len(warm_ups) == BATCHES
    for alpha in ALPHAS:
        point = output / f"objective.alpha={alpha}"
        assert_same_bits(weights(point), weights(alone[alpha]))
        assert load_checkpoint(point).manifest == load_checkpoint(alone[alpha]).manifest
    assert {name: one["first_stage"] for name, one in lines(output).items()} == {
        ONE: "own",
        TWO: ONE,
    }
    shown = capsys.readouterr()
    assert f"first stage: that of {ONE}" in shown.err
    assert "* seconds without the first stage, which another point trained:" in shown.out
    assert f"{TWO}: {ONE}" in shown.out
    assert sorted(path.name for path in output.iterdir()) == [ONE, TWO, "sweep.json"]


def test_a_sweep_that_dies_anywhere_ends_the_same(
    table: dict[str, Any],
    alone: dict[float, Path],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    output = tmp_path / "out"

    def again() -> None:
        sweep(table, parse_grid([f"objective.alpha={list(ALPHAS)}"]), output, data=str(data))

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    def fail(stage: Any) -> None:
        if stage.options.alpha == ALPHAS[1]:
            raise MemoryError

    with monkeypatch.context() as patch:  # in the stage to be shared
        kill_at(patch, WarmUp, ALPHAS[0], BATCHES)
        with pytest.raises(Killed):
            again()
    assert not (output / ".first-stages").exists()
    with monkeypatch.context() as patch:  # between the points
        patch.setattr("offramp_training.sweep._outcome", die)
        with pytest.raises(Killed):
            again()
    assert not (output / f"{TWO}.fit").exists()
    with monkeypatch.context() as patch:  # in the stage after it
        kill_at(patch, PolicyStage, ALPHAS[1], BATCHES)
        with pytest.raises(Killed):
            again()
    with monkeypatch.context() as patch:
        run_each(patch, JointStage3, fail)
        again()
    failed = lines(output)[TWO]
    assert (failed["state"], failed["error"]) == ("failed", "MemoryError: no reason given")
    assert len(list((output / ".first-stages").iterdir())) == 1  # a next attempt may need it
    with monkeypatch.context() as patch:
        run_each(patch, WarmUp, die)
        again()
    assert [(one["state"], one["first_stage"]) for one in lines(output).values()] == [
        ("done", "own"),
        ("done", ONE),
    ]
    for alpha in ALPHAS:
        assert_same_bits(weights(output / f"objective.alpha={alpha}"), weights(alone[alpha]))
    assert not (output / ".first-stages").exists()


def test_a_first_stage_is_shared_with_the_same_teacher_only(
    table: dict[str, Any], checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    other = shutil.copytree(checkpoint, tmp_path / "other")  # of the same weights
    manifest = json.loads((other / "offramp.json").read_text())
    manifest["model"]["max_length"] = 4
    (other / "offramp.json").write_text(json.dumps(manifest))
    table["distillation"] = {"teacher_weight": 0.7}
    points = [(checkpoint, 0.05), (moved, 0.4), (other, 0.4)]
    grid = {
        "distillation.teacher": [str(checkpoint), str(moved), str(other)],
        "objective.alpha": [alpha for _, alpha in points[:2]],
    }
    output = tmp_path / "out"
    sweep(table, grid, output, data=str(data))
    made = json.loads((output / "sweep.json").read_text())["points"]
    by_point = {tuple(one["settings"].values()): one for one in made}
    first, second, third = (by_point[str(teacher), alpha] for teacher, alpha in points)
    assert first["first_stage"] == "own"
    assert second["first_stage"] == first["name"]
    assert third["first_stage"] == by_point[str(other), 0.05]["name"]
    assert by_point[str(other), 0.05]["first_stage"] == "own"

    table["distillation"]["teacher"] = str(moved)
    table["objective"]["alpha"] = 0.4
    by_itself = fit(make_recipe(table), tmp_path / "alone", data=str(data), calibrate=False)
    assert_same_bits(weights(output / second["name"]), weights(by_itself))
    with pytest.raises(AssertionError):
        assert_same_bits(weights(output / third["name"]), weights(by_itself))


# ---- one run with another's stage ----------------------------------------------------------------


@pytest.fixture
def share(table: dict[str, Any], data: Path, tmp_path: Path) -> Callable[..., FirstStage]:
    """`fit` of one alpha with a place to share the first stage in."""

    def share(alpha: float, **loop: Any) -> FirstStage:
        table["objective"]["alpha"] = alpha
        recipe = make_recipe({**table, "loop": table["loop"] | loop})
        first_stage = FirstStage(tmp_path / "shared", f"run {alpha}")
        output = tmp_path / f"{alpha}"
        fit(recipe, output, data=str(data), calibrate=False, first_stage=first_stage)
        return first_stage

    return share


@pytest.mark.parametrize("published", [False, True])
def test_a_kill_while_the_stage_is_kept_costs_nothing(
    share: Callable[..., FirstStage],
    alone: dict[float, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    published: bool,
) -> None:
    rename = Path.rename

    def kill(path: Path, target: Path) -> Path:
        if target.parent.name != "shared":
            return rename(path, target)
        if published:
            rename(path, target)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", kill)
        with pytest.raises(Killed):
            share(ALPHAS[0])
    assert share(ALPHAS[0]).trained_by == "run 0.05"
    assert share(ALPHAS[1]).trained_by == "run 0.05"
    for alpha in ALPHAS:
        assert_same_bits(weights(tmp_path / f"{alpha}"), weights(alone[alpha]))


def test_a_run_that_was_killed_in_its_own_first_stage_takes_a_finished_one(
    share: Callable[..., FirstStage],
    alone: dict[float, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        kill_at(patch, WarmUp, ALPHAS[1], BATCHES)
        with pytest.raises(Killed):
            share(ALPHAS[1])
    share(ALPHAS[0])
    warm_ups: list[Any] = []
    run_each(monkeypatch, WarmUp, warm_ups.append)
    assert share(ALPHAS[1]).trained_by == "run 0.05"
    assert warm_ups == []
    assert_same_bits(weights(tmp_path / f"{ALPHAS[1]}"), weights(alone[ALPHAS[1]]))


def test_a_damaged_one_is_made_anew(
    share: Callable[..., FirstStage], alone: dict[float, Path], tmp_path: Path
) -> None:
    share(ALPHAS[0])
    (kept,) = (tmp_path / "shared").iterdir()
    (kept / "state.json").write_text("{")
    assert share(ALPHAS[1]).trained_by == "run 0.4"
    assert FirstStage(tmp_path / "shared", "x").take() is not None
    assert_same_bits(weights(tmp_path / f"{ALPHAS[1]}"), weights(alone[ALPHAS[1]]))


# ---- a limit on time -----------------------------------------------------------------------------


def test_time_counts_as_if_alone_and_a_stage_that_it_cut_is_nobody_elses(
    share: Callable[..., FirstStage],
    table: dict[str, Any],
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Run, "seconds", property(lambda run: 60.0 * run.position.steps))
    share(ALPHAS[0], max_minutes=BATCHES - 1)
    assert not (tmp_path / "shared").exists()
    assert "out of time: not trained: gates, joint" in capsys.readouterr().err

    within_stage_2 = BATCHES + 1
    share(0.1, max_minutes=within_stage_2)
    assert share(ALPHAS[1], max_minutes=within_stage_2).trained_by == "run 0.1"
    assert "out of time: not trained: joint" in capsys.readouterr().err
    recipe = make_recipe({**table, "loop": table["loop"] | {"max_minutes": within_stage_2}})
    by_itself = fit(recipe, tmp_path / "by itself", data=str(data), calibrate=False)
    assert_same_bits(weights(tmp_path / f"{ALPHAS[1]}"), weights(by_itself))

    # Less time than the kept stage took: alone, this run would not get that far.
    cut = share(0.2, max_minutes=BATCHES - 1)
    assert cut.trained_by == "run 0.2"
    assert_same_bits(weights(tmp_path / "0.2"), weights(tmp_path / f"{ALPHAS[0]}"))


# ---- what plays no role in a first stage ---------------------------------------------------------


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_what_is_not_in_a_first_stage_are_options(name: str) -> None:
    recipe = make_recipe({"objective": {"name": name}})
    assert set(recipe.objective.not_in_first_stage) <= recipe.objective.options().keys()


OTHERS: dict[str, Any] = {
    "alpha": 5.0,
    "hardness": False,
    "trajectories": 3,
    "baseline": "leave_one_out",
    "theta": 0.9,
    "policy_weight": 3.0,
    "rounds": 2,
    "stage2_epochs": 3,
    "stage2_batch_size": 7,
    "stage2_lr": 1e-5,
    "stage3": "alternate",
    "stage3_epochs": 4,
    "stage3_batch_size": 5,
    "stage3_lr": 1e-6,
}


def test_the_options_named_change_no_bit_of_the_first_stage(
    table: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OTHERS.keys() == set(make_recipe(table).objective.not_in_first_stage)

    def stop(*_: Any) -> None:
        raise Killed

    monkeypatch.setattr(PolicyStage, "prepare", stop)
    ends = []
    for number, options in enumerate(({}, OTHERS)):
        objective = table["objective"] | options
        first_stage = FirstStage(tmp_path / f"kept {number}", "a run")
        with pytest.raises(Killed):
            fit(
                make_recipe({**table, "objective": objective}),
                tmp_path / f"{number}",
                data=str(data),
                first_stage=first_stage,
            )
        kept = first_stage.take()
        assert kept is not None
        ends.append(kept[1])
    assert_same_bits(ends[0]["model"], ends[1]["model"])
    assert_same_bits(*({"rng": end["rng"][0]["cpu"]} for end in ends))
    assert ends[0]["stage"]["memory"] == ends[1]["stage"]["memory"] == {}
    assert_same_bits(*({"draws": end["stage"]["generator"]} for end in ends))


def test_two_first_stages_are_the_same_if_nothing_else_differs(
    table: dict[str, Any], data: Path
) -> None:
    def identities(section: str, **values: Any) -> tuple[Any, Any]:
        recipe = make_recipe({**table, section: table.get(section, {}) | values})
        rows = choose_rows(recipe, str(data))
        return run_identity(recipe, rows), first_stage_identity(recipe, rows)

    whole, first_stage = identities("loop")
    for option, value in OTHERS.items():
        other, same = identities("objective", **{option: value})
        assert (other != whole, same == first_stage) == (True, True), option
    for values in ({"max_minutes": 3.0}, {"checkpoint_every_steps": 9}):
        assert identities("loop", **values) == (whole, first_stage)
    assert identities("loop", threads=1)[0] == whole
    for section, values in (
        ("loop", {"threads": 1}),  # sums in another order
        ("loop", {"seed": 4}),
        ("loop", {"max_train_rows": 47}),
        ("optimiser", {"head_lr": 1e-3}),
        ("objective", {"stage1_lr": 1e-3}),
        ("objective", {"gate_hidden": 16}),
        ("data", {"held_out": 20}),
    ):
        assert identities(section, **values)[1] != first_stage, values
