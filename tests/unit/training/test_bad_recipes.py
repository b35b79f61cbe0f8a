"""What cannot be trained is refused by `fit` and `sweep` before anything is written or learnt, and
the one line that says so has the key, the value and all that is allowed."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from offramp_training.__main__ import main
from offramp_training.config import make_recipe
from offramp_training.fit import check_recipe, choose_rows
from offramp_training.loop import Run

EVERY_LABEL = tuple(range(3)) * 8


@dataclass(frozen=True)
class Bad:
    """A recipe and rows with one thing wrong, and what its refusal must say."""

    says: tuple[str, ...]  # key = value, then what is allowed
    settings: tuple[str, ...] = ()  # of the recipe, as --set takes them
    grid: str = ""  # the same as two points of a sweep, of which the first may be right
    train: tuple[Any, ...] = EVERY_LABEL  # the label of each row
    validation: tuple[Any, ...] | None = (0, 1, 2)
    names: tuple[str, ...] | None = None


def bad_option(objective: str, key: str, value: Any, right: Any, *says: str) -> Bad:
    text = json.dumps(value) if value == value else "nan"
    return Bad(
        (f"objective.{key} = {value!r}; allowed: ", *says),
        (f"objective.name={objective}", f"objective.{key}={text}"),
        f"objective.{key}=[{json.dumps(right)}, {text}]",
    )


def lambdas() -> dict[str, Bad]:
    return {
        f"lambda {value}": bad_option("ensemble", "lambda", value, 0.1, "a number from 0 to 1")
        for value in (-0.1, 1.001, 7, "much", "0.3", True, float("nan"))
    }


def trajectories() -> dict[str, Bad]:
    return {
        f"K {value}": bad_option(
            "consistentee", "trajectories", value, 8, "a whole number from 2 to 1024"
        )
        for value in (1, 0, -8, 2.5, True)
    }


def thetas() -> dict[str, Bad]:
    return {
        f"theta {value}": bad_option(
            "consistentee", "theta", value, 0.5, "a number above 0 and below 1"
        )
        for value in (0, 1, 1.5, -0.5, float("nan"))
    }


def budgets() -> dict[str, Bad]:
    q = "a number from 0.05 to 1.95, or a list of one or more, each a number from 0.05 to 1.95"
    above_1 = "a number above 1, or a list of one or more, each a number above 1"
    values = (0.049, 1.96, 0, [], [0.5, 2], float("nan"))
    many = {f"q {value}": bad_option("l2w", "q", value, 0.9, q) for value in values}
    many |= {
        f"speedup {value}": bad_option("l2w", "speedup", value, 1.5, above_1)
        for value in (1, 0.5, -2, [2, 1])
    }
    fast = "allowed with exits at layers 1, 2, 3 of 3: above 1 and below 3"
    late = "allowed with exits at layers 2, 3 of 3: above 1 and below 1.5"
    objective = "objective.name=l2w"
    return many | {
        "speedup that one layer does not give": Bad(
            ("objective.speedup = 3; ", fast),
            (objective, "objective.speedup=3"),
            "objective.speedup=[2.0, 3.0]",
        ),
        "speedup that one of several budgets does not give": Bad(
            ("objective.speedup = 4; ", fast),
            (objective, "objective.speedup=[2, 4]"),
            "objective.speedup=[[2.0], [2.0, 4.0]]",
        ),
        "speedup that these exits do not give": Bad(
            ("objective.speedup = 2; ", late),
            (objective, "objective.speedup=2", "model.exit_layers=[2, 3]"),
            "model.exit_layers=[[1, 2, 3], [2, 3]]",
        ),
        "two budgets": Bad(
            ("objective.q = 0.9 and objective.speedup = 2.0; ", "allowed: one of the two"),
            (objective, "objective.q=0.9", "objective.speedup=2"),
            "objective.q=[0.9, 0.8]",
        ),
    }


def objectives() -> dict[str, Bad]:
    known = "allowed: consistentee, cosee, ensemble, joint, l2w"
    return {
        "objective that is none": Bad(
            ("objective.name = 'magic'; ", known),
            ("objective.name=magic",),
            'objective.name=["joint", "magic"]',
        ),
        "objective that is no name": Bad(
            ("objective.name = 3; ", known), ("objective.name=3",), "objective.name=[3, 4]"
        ),
    }


def with_label(label: Any) -> tuple[Any, ...]:
    return (*EVERY_LABEL[:5], label, *EVERY_LABEL[6:])


def label_ids() -> dict[str, Bad]:
    """The wrong one is in line 6."""
    names = ("bad", "so so", "good")
    numbers, or_a_name = "a whole number from 0 to 2", ", or a name: bad, so so, good"
    place = "train.jsonl:6: "
    return {
        "label above the names": Bad(
            (f"{place}'label' = 3; allowed: ", numbers + or_a_name),
            train=with_label(3),
            names=names,
        ),
        "label below 0": Bad(
            (f"{place}'label' = -1; allowed: ", numbers + or_a_name),
            train=with_label(-1),
            names=names,
        ),
        "label below 0 without names": Bad(
            (f"{place}'label' = -1; allowed: ", numbers), train=with_label(-1)
        ),
        "label above the names in the validation rows": Bad(
            ("validation.jsonl:2: 'label' = 3; allowed: ", numbers + or_a_name),
            validation=(0, 3, 2),
            names=names,
        ),
        "label that is no name": Bad(
            (f"{place}'label' = 'awful'; allowed: ", numbers + or_a_name),
            train=with_label("awful"),
            names=names,
        ),
        "label between two": Bad(
            (f"{place}'label' = 1.5; allowed: ", numbers), train=with_label(1.5)
        ),
        "labels far above the rows": Bad(
            ("the largest label is 700", "allowed: numbers from 0 on, or names"),
            train=with_label(700),
        ),
    }


def empty_classes() -> dict[str, Bad]:
    two = tuple(label for label in EVERY_LABEL if label != 1)
    names = ("bad", "so so", "good")
    return {
        "class that a gap leaves empty": Bad(
            ("train: no training row with 'label' = 1; ", "each of 0, 1, 2"),
            train=two,
        ),
        "labels from 1 on": Bad(
            ("train: no training row with 'label' = 0; ", "each of 0, 1, 2"),
            train=(1, 2) * 12,
            validation=(1, 2),
        ),
        "class that is declared": Bad(
            ("train: no training row with 'label' = so so; ", "each of bad, so so, good"),
            train=two,
            validation=(0, 1, 2),
            names=names,
        ),
        "class that only validation rows have": Bad(
            ("train: no training row with 'label' = meh; ", "each of bad, good, meh"),
            train=("bad", "good") * 12,
            validation=("bad", "meh"),
        ),
        # Two rows, of three classes.
        "class that sampling leaves empty": Bad(
            ("loop.max_train_rows = 2: no training row with 'label' = ", "each of 0, 1, 2"),
            ("loop.max_train_rows=2",),
            "loop.max_train_rows=[24, 2]",
        ),
        "class that holding out leaves empty": Bad(
            ("data.held_out = 22: no training row with 'label' = ", "each of 0, 1, 2"),
            ("data.held_out=22",),
            "data.held_out=[1, 22]",
        ),
    }


CASES = (
    objectives()
    | lambdas()
    | trajectories()
    | thetas()
    | budgets()
    | label_ids()
    | empty_classes()
    | {
        "one exit and gates": Bad(
            ("model.exit_layers = [3]; ", "allowed: two layers or more, the last of them 3"),
            ("objective.name=consistentee", "model.exit_layers=[3]"),
            "model.exit_layers=[[1, 3], [3]]",
        ),
        "one exit and a budget": Bad(
            ("model.exit_layers = [3]; ", "allowed: two layers or more, the last of them 3"),
            ("objective.name=l2w", "objective.q=0.9", "model.exit_layers=[3]"),
            "model.exit_layers=[[1, 3], [3]]",
        ),
        "no whole batch": Bad(
            ("loop.batch_size = 32; ", "there are 24 training rows, allowed: up to that"),
            ("objective.name=l2w", "objective.speedup=1.5", "loop.batch_size=32"),
            "loop.batch_size=[16, 32]",
        ),
    }
)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def bad(request: pytest.FixtureRequest) -> Bad:
    case: Bad = request.param
    return case


@pytest.fixture
def arguments(bad: Bad, backbone: Path, tmp_path: Path) -> list[str]:
    rows = tmp_path / "rows"
    rows.mkdir()
    for split in ("train", "validation"):
        labels = getattr(bad, split)
        lines = [{"text": f"row {n}, of {split}", "label": one} for n, one in enumerate(labels)]
        (rows / f"{split}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    if bad.names:
        (rows / "dataset_info.json").write_text(json.dumps({"label_names": bad.names}))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f"[model]\nbackbone = {str(backbone)!r}\nmax_length = 16\n[loop]\nbatch_size = 8\n"
    )
    settings = [part for setting in bad.settings for part in ("--set", setting)]
    return [str(recipe), "--data", str(rows), "--output", str(tmp_path / "out"), *settings]


def assert_refused(
    command: list[str],
    says: tuple[str, ...],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[Any] = []
    monkeypatch.setattr(Run, "step", lambda *arguments: steps.append(arguments))
    before = sorted(tmp_path.rglob("*"))
    assert main(command) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("offramp-train: ")
    assert shown.err.count("\n") == 1
    for part in says:
        assert part in shown.err
    assert sorted(tmp_path.rglob("*")) == before
    assert steps == []


def test_fit_refuses_it(
    bad: Bad,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert_refused(["fit", *arguments], bad.says, tmp_path, capsys, monkeypatch)


def test_sweep_refuses_all_its_points_for_one(
    bad: Bad,
    arguments: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    grid = ["--grid", bad.grid] if bad.grid else ["--seeds", "0,1"]
    assert_refused(["sweep", *arguments, *grid], bad.says, tmp_path, capsys, monkeypatch)


def test_held_out_rows_may_lack_a_class(backbone: Path, tmp_path: Path) -> None:
    for split, labels in (("train", EVERY_LABEL), ("validation", (0, 2))):
        lines = (json.dumps({"text": f"row {n}", "label": one}) for n, one in enumerate(labels))
        (tmp_path / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    recipe = make_recipe({"model": {"backbone": str(backbone), "max_length": 16}})
    rows = choose_rows(recipe, str(tmp_path))
    check_recipe(recipe, rows)
    assert rows.held_out.label_names == ("0", "1", "2")
