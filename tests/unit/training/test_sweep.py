"""Sweeps: the grid, refusals before any run, resuming, failures, ranking, deleted weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from offramp_model.checkpoint import load_checkpoint
from offramp_training.__main__ import main
from offramp_training.compare import step_curve
from offramp_training.data import load_split
from offramp_training.errors import OutputError, RecipeError, TrainingError
from offramp_training.evaluate import evaluate_checkpoint
from offramp_training.grid import make_points, parse_grid
from offramp_training.results import METRICS, Configuration, Result
from offramp_training.statistics import accuracy_at, area
from offramp_training.sweep import sweep


class Killed(BaseException):
    """As a signal: no handler of ordinary errors sees it."""


@pytest.fixture
def table(recipe_table: dict[str, Any]) -> dict[str, Any]:
    recipe_table["loop"] |= {"epochs": 1, "max_train_rows": 48}
    return recipe_table


# ---- the grid ------------------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_seeds_change_fastest() -> None:
    grid = parse_grid(['model.pooling=["cls", "mean"]', " optimiser . lr = [1e-4, 0.01]"], "0, 7")
    points = make_points({"loop": {"epochs": 3}}, grid)
    assert [point.name for point in points[:3]] == [
        "model.pooling=cls,optimiser.lr=0.0001,loop.seed=0",
        "model.pooling=cls,optimiser.lr=0.0001,loop.seed=7",
        "model.pooling=cls,optimiser.lr=0.01,loop.seed=0",
    ]
    assert len(points) == 8
    last = points[-1]
    assert (last.recipe.model.pooling, last.recipe.optimiser.lr) == ("mean", 0.01)
    assert (last.recipe.loop.seed, last.recipe.loop.epochs) == (7, 3)
    assert last.configuration == {"model.pooling": "mean", "optimiser.lr": 0.01}
    assert make_points({}, parse_grid([], "3"))[0].configuration == {}


def test_a_point_may_leave_a_key_without_effect_but_not_all_of_them() -> None:
    for key, table, others in (
        ("model.pooling", {"model": {"attention_heads": 8}}, ("mean", "attention")),
        ("distillation.self_weight", {"distillation": {"temperature": 4.0}}, (0.0, 0.5)),
    ):
        assert len(make_points(table, {key: list(others)})) == 2
        with pytest.raises(RecipeError, match=r" has no effect; allowed: with (model|distill)"):
            make_points(table, {key: [others[0]], "loop.seed": [0, 1]})


def test_any_value_names_a_directory_of_its_own() -> None:
    weights = [[1.0, 2.0, 3.0], [1.0, 2.0, 4.0]]
    backbones = ["/somewhere/else", "/somewhere_else", "x" * 300, "x" * 301]
    for key, values in (("objective.weights", weights), ("model.backbone", backbones)):
        names = [point.name for point in make_points({}, parse_grid([f"{key}={values}"]))]
        assert len(set(names)) == len(values)
        for name in names:
            assert not set(name) & set('/\\ "[]')
            assert len(name) < 120


@pytest.mark.parametrize(
    ("axes", "seeds", "what"),
    [
        ([], None, "nothing to sweep; allowed: --grid section.key="),
        (["loop.epochs"], None, "--grid loop.epochs: allowed: section.key=[value"),
        (["loop.epochs=3"], None, "--grid loop.epochs=3: allowed"),
        (["loop.epochs=[]"], None, "loop.epochs=[]: allowed"),
        (["loop.=[1]"], None, "allowed: section.key="),
        (["model.pooling=[cls, mean]"], None, "in TOML"),
        (["loop.epochs=[1, 2, 1]"], None, "loop.epochs = [1, 2, 1]: a value is there twice"),
        (["loop.seed=[1]"], "0,1", "loop.seed is in the grid twice"),
        ([], "0,x", "--seeds 0,x: allowed: whole numbers"),
        ([], "1,1", "a value is there twice"),
    ],
)
def test_grids_that_are_none(axes: list[str], seeds: str | None, what: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_grid(axes, seeds)
    assert what in str(caught.value)


@pytest.mark.parametrize(
    ("axis", "what"),
    [
        ("loop.epochs=[1, 0]", "point loop.epochs=0: loop.epochs = 0; allowed: "),
        ("loop.epoch=[1]", "point loop.epoch=1: loop.epoch: unknown key; allowed: epochs"),
        ("loop.seed.x=[1]", "seed is a value, not a section"),
        ('loop.epochs=["1", 1]', "two points would be called loop.epochs=1"),
        # Only the backbone can tell:
        ("model.exit_layers=[[1, 3], [1, 2]]", "model.exit_layers = [1, 2]; the backbone has 3"),
        ("objective.weights=[[1, 1]]", "has 2 weights; the model has 3 exits"),
        # Only the rows can tell:
        ("data.held_out=[20, 900]", "point data.held_out=900: data.held_out = 900"),
    ],
)
def test_every_point_is_checked_before_the_first_one_runs(
    table: dict[str, Any],
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    axis: str,
    what: str,
) -> None:
    monkeypatch.delattr("offramp_training.sweep.fit")
    table["loop"]["seed"] = 1
    with pytest.raises(TrainingError) as caught:
        sweep(table, parse_grid([axis]), tmp_path / "out", data=str(data))
    assert what in str(caught.value)
    assert list(tmp_path.iterdir()) == []


# ---- whole runs ----------------------------------------------------------------------------------


def test_the_command_trains_measures_ranks_and_skips(
    backbone: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, output = tmp_path / "recipe.toml", tmp_path / "out"
    recipe.write_text(
        f"[model]\nbackbone = {str(backbone)!r}\nmax_length = 16\n[loop]\nepochs = 1\n"
        "batch_size = 16\n",
        encoding="utf-8",
    )
    command = ["sweep", str(recipe), "--data", str(data), "--objective", "joint", "--output",
               str(output), "--grid", "optimiser.head_lr=[1e-5, 5e-2]", "--seeds", "0,1",
               "--set", "loop.max_train_rows=64", "--metric", "full_depth"]  # fmt: skip
    assert main(command) == 0
    shown = capsys.readouterr()
    assert "point 4 of 4: optimiser.head_lr=0.05,loop.seed=1" in shown.err
    assert "by full_depth" in shown.out
    assert "2/2" in shown.out
    content = json.loads((output / "sweep.json").read_text())
    means = [one["metrics"]["full_depth"]["mean"] for one in content["configurations"]]
    assert means == sorted(means, reverse=True)
    rows = load_split(str(data), "validation")
    for point in content["points"]:
        assert (point["state"], point["attempts"], point["rows"]) == ("done", 1, 48)
        assert point["seconds"] > 0
        checkpoint = load_checkpoint(output / point["name"])
        assert checkpoint.manifest.seed == point["settings"]["loop.seed"]
        assert point["policy"] == checkpoint.manifest.best_policy
        policy = point["policy"]
        report = evaluate_checkpoint(checkpoint, rows, [policy])
        curve = step_curve(report.policies[policy].curve)
        figures = [report.full_accuracy, *(accuracy_at(curve, s) for s in (1.5, 2, 3)), area(curve)]
        assert point["metrics"] == dict(zip(METRICS, figures, strict=True))

    monkeypatch.delattr("offramp_training.sweep.fit")
    assert main(command) == 0  # nothing is left to do
    assert json.loads((output / "sweep.json").read_text()) == content
    assert main([*command, "--set", "loop.epochs=2"]) == 2
    assert "was run with another recipe or other rows" in capsys.readouterr().err
    assert main([*command, "--metric", "luck"]) == 2
    assert "--metric luck; allowed: full_depth, accuracy_at_1.5" in capsys.readouterr().err


def test_a_killed_point_goes_on_and_a_finished_one_is_only_measured(
    table: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid, runs = parse_grid([], "0,1"), []

    def again() -> list[dict[str, Any]]:
        sweep(table, grid, tmp_path / "out", data=str(data))
        points: list[dict[str, Any]] = json.loads((tmp_path / "out" / "sweep.json").read_text())[
            "points"
        ]
        return points

    def kill(*_: Any, **__: Any) -> None:
        runs.append(sorted(path.name for path in (tmp_path / "out").glob("*")))
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("offramp_training.fit.calibrate_checkpoint", kill)  # trained, not written
        with pytest.raises(Killed):
            again()
    assert runs == [["loop.seed=0.fit", "sweep.json"]]
    with monkeypatch.context() as patch:
        patch.setattr("offramp_training.sweep.load_checkpoint", kill)  # written, not measured
        with pytest.raises(Killed):
            again()
    assert runs[1:] == [["loop.seed=0", "sweep.json"]]
    line = json.loads((tmp_path / "out" / "sweep.json").read_text())["points"][0]
    assert (line["state"], line["attempts"], line["all_seconds"]) == ("waiting", 2, True)
    content = json.loads((tmp_path / "out" / "sweep.json").read_text())
    content["points"][0]["state"] = "started"  # as SIGKILL leaves it
    (tmp_path / "out" / "sweep.json").write_text(json.dumps(content))
    first, second = again()
    assert (first["state"], first["attempts"], first["all_seconds"]) == ("done", 3, False)
    assert (second["state"], second["attempts"], second["all_seconds"]) == ("done", 1, True)


# ---- with a stand-in for training ----------------------------------------------------------------


Runner = Callable[..., list[Configuration]]


@pytest.fixture
def run(
    table: dict[str, Any], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Runner:
    """A sweep over `optimiser.lr` in which a point is worth what `worth` says, and no time."""

    def run(worth: dict[tuple[float, int], Any], **options: Any) -> list[Configuration]:
        def stand_in(recipe: Any, output: Path, **_: Any) -> None:
            what = worth[recipe.optimiser.lr, recipe.loop.seed]
            if isinstance(what, BaseException):
                raise what
            output.mkdir(parents=True)
            for name in ("offramp.json", "model.safetensors", "exits.safetensors", "README.md"):
                (output / name).write_text("{}")

        def measure(point: Any, *_: Any) -> dict[str, Any]:
            figure = worth[point.recipe.optimiser.lr, point.recipe.loop.seed]
            metrics = dict.fromkeys(METRICS, 0.1) | {"accuracy_at_2": figure}
            return {"policy": "entropy", "metrics": metrics}

        monkeypatch.setattr("offramp_training.sweep.fit", stand_in)
        monkeypatch.setattr("offramp_training.sweep._measure", measure)
        rates = list(dict.fromkeys(rate for rate, _ in worth))
        seeds = ",".join(dict.fromkeys(str(seed) for _, seed in worth))
        grid = parse_grid([f"optimiser.lr={rates}"], seeds)
        return sweep(table, grid, tmp_path / "out", data=str(data), **options)

    return run


def with_weights(tmp_path: Path) -> list[str]:
    return sorted(path.parent.name for path in (tmp_path / "out").glob("*/exits.safetensors"))


def test_configurations_are_ranked_by_the_mean_over_seeds(run: Runner) -> None:
    ranked = run({(0.1, 0): 0.9, (0.1, 1): 0.5, (0.2, 0): 0.8, (0.2, 1): 0.8,
                  (0.3, 0): None, (0.3, 1): 0.99})  # fmt: skip
    assert [one.settings["optimiser.lr"] for one in ranked] == [0.2, 0.1, 0.3]
    assert [one.mean("accuracy_at_2") for one in ranked] == [0.8, 0.7, None]
    assert [one.finished for one in ranked] == [True] * 3
    by_another = run({(0.1, 0): 0.9, (0.2, 0): 0.8}, metric="auc")
    assert [one.settings["optimiser.lr"] for one in by_another] == [0.1, 0.2]  # equal: as given


def test_a_failing_point_is_recorded_and_tried_again(run: Runner, tmp_path: Path) -> None:
    broken = {(0.1, 0): FloatingPointError("loss is nan\nat step 3"), (0.2, 0): 0.6}
    ranked = run(broken)
    assert [one.settings["optimiser.lr"] for one in ranked] == [0.2, 0.1]
    failed = ranked[1].results[0]
    assert (failed.state, failed.error) == ("failed", "FloatingPointError: loss is nan")
    mended = run({(0.1, 0): 0.7, (0.2, 0): AssertionError("is done, must not run")})
    assert mended[0].settings == {"optimiser.lr": 0.1}
    assert (mended[0].results[0].attempts, mended[0].results[0].error) == (2, None)
    assert mended[1].results[0].state == "done"


def test_the_command_says_that_points_failed(
    backbone: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("[no memory]")

    (tmp_path / "r.toml").write_text(f"[model]\nbackbone = {str(backbone)!r}\nmax_length = 16\n")
    monkeypatch.setattr("offramp_training.sweep.fit", fail)
    command = ["sweep", str(tmp_path / "r.toml"), "--data", str(data), "--seeds", "0,1"]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr()
    assert "failed: loop.seed=1: RuntimeError: [no memory]" in shown.out
    assert "2 of 2 points failed; the same command tries them again" in shown.err

    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("offramp_training.sweep.fit", interrupt)
    assert main([*command, "--output", str(tmp_path / "out")]) == 130
    assert "interrupted; the same command goes on from there" in capsys.readouterr().err


def test_only_the_weights_of_the_best_configuration_stay(run: Runner, tmp_path: Path) -> None:
    worth = {(0.1, 0): 0.7, (0.1, 1): 0.7, (0.2, 0): 0.9, (0.2, 1): 0.8, (0.3, 0): 0.99}
    ranked = run({**worth, (0.3, 1): KeyError("x")} | {(0.3, 0): 0.1}, keep="best")
    assert with_weights(tmp_path) == [f"optimiser.lr=0.2,loop.seed={seed}" for seed in (0, 1)]
    assert [one.done[0].weights for one in ranked] == [True, False, False]
    left = {path.name for path in (tmp_path / "out" / "optimiser.lr=0.1,loop.seed=0").iterdir()}
    assert left == {"offramp.json", "README.md"}
    # What has no weights is done all the same.
    run({key: AssertionError("must not run") for key in worth}
        | {(0.3, 1): 0.2}, keep="best")  # fmt: skip
    assert len(with_weights(tmp_path)) == 2


def test_weights_stay_while_a_configuration_is_not_finished(run: Runner, tmp_path: Path) -> None:
    worth = {(0.1, 0): 0.5, (0.1, 1): 0.5, (0.2, 0): 0.9, (0.2, 1): Killed()}
    with pytest.raises(Killed):
        run(worth, keep="best")
    assert len(with_weights(tmp_path)) == 3  # one seed may have been luck
    run({**worth, (0.2, 1): 0.0}, keep="best")
    assert with_weights(tmp_path) == [f"optimiser.lr=0.1,loop.seed={seed}" for seed in (0, 1)]


def test_what_lies_in_the_way_is_refused(run: Runner, tmp_path: Path) -> None:
    output = tmp_path / "out"
    (output / "optimiser.lr=0.1,loop.seed=0").mkdir(parents=True)
    (output / "optimiser.lr=0.1,loop.seed=0" / "offramp.json").write_text("{}")
    with pytest.raises(OutputError, match=r"is a checkpoint that .* does not know"):
        run({(0.1, 0): 0.5})
    for text in ("{", "[]", '{"points": [{"name": "x"}]}'):
        (output / "sweep.json").write_text(text)
        with pytest.raises(OutputError, match="is not a table of results"):
            run({(0.1, 0): 0.5})


def test_a_result_survives_its_table() -> None:
    result = Result(name="a", settings={"x": [1, 2.5, "y"]}, identity="i", metrics={"auc": None})
    assert Result.model_validate_json(result.model_dump_json()) == result
