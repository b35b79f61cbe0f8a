"""Rows with sets of labels: read, learnt, calibrated, evaluated, exported; each against a slow twin
or torch's own."""

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st

from loading import load
from offramp_model.calibration import REQUESTED_SPEEDUPS
from offramp_model.checkpoint import load_checkpoint
from offramp_model.labels import bits_of, ids_of
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import record_exits, replay
from offramp_training.__main__ import main
from offramp_training.batches import Batch
from offramp_training.calibrate import calibrate_checkpoint
from offramp_training.config import make_recipe
from offramp_training.data import Dataset, check_classes, load_split, load_splits
from offramp_training.errors import DataError, RecipeError
from offramp_training.evaluate import evaluate_checkpoint
from offramp_training.fit import choose_rows, fit
from offramp_training.objectives import MULTI_LABEL_OBJECTIVES, OBJECTIVES
from offramp_training.objectives.row_losses import (
    Distillation,
    RowLogits,
    binary_divergences,
    exit_binary_cross_entropies,
)

SETS = "multi_label_classification"
fixtures = load("tests/unit/training/conftest.py")
EMPTY = torch.empty(0)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    fixtures.write_rows(path, rows)
    return path


def lines_of(*labels: Any) -> list[dict[str, Any]]:
    return [{"text": f"text {number}", "label": label} for number, label in enumerate(labels)]


def sets(dataset: Dataset) -> list[list[int]]:
    return [dataset.ids_of(row) for row in dataset.rows]


# ---- reading -------------------------------------------------------------------------------------


def test_lists_of_numbers_or_names_make_a_multi_label_set(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines_of([0, 2], [], [1]))
    train = load_split(str(tmp_path), "train")
    assert (train.problem_type, train.label_names) == (SETS, ("0", "1", "2"))
    assert sets(train) == [[0, 2], [], [1]]
    assert train.labels == [0b101, 0, 0b010]
    write(tmp_path / "train.jsonl", lines_of(["wet", "cold"], ["dry"], []))
    train = load_split(str(tmp_path), "train")
    assert train.label_names == ("cold", "dry", "wet")
    assert sets(train) == [[0, 2], [1], []]
    (tmp_path / "dataset_info.json").write_text('{"label_names": ["wet", "dry", "cold", "new"]}')
    assert sets(load_split(str(tmp_path), "train")) == [[0, 2], [1], []]


def test_one_label_may_be_all_there_is(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines_of(["spam"], [], ["spam"]))
    train = load_split(str(tmp_path), "train")
    assert (train.label_names, train.labels) == (("spam",), [1, 0, 1])
    write(tmp_path / "train.jsonl", lines_of([0], [], [0]))
    assert load_split(str(tmp_path), "train").label_names == ("0",)


def test_text_cells_hold_names_with_a_bar_between(tmp_path: Path) -> None:
    rows = ["text,label", *(f"text {n},{('a|b', 'a', '', 'b | c')[n % 4]}" for n in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(rows) + "\n")
    splits = load_splits(str(tmp_path / "rows.csv"))
    assert splits["train"].label_names == ("a", "b", "c")
    every = {
        row.text: [(0, 1), (0,), (), (1, 2)][int(row.text.split()[1]) % 4]
        for split in splits.values()
        for row in split.rows
    }
    assert len(every) == 40
    for split in splits.values():
        assert split.problem_type == SETS
        assert [tuple(one) for one in sets(split)] == [every[row.text] for row in split.rows]
    # What is asked for is not guessed: then a bar is part of a name, and an empty cell is missing.
    with pytest.raises(DataError, match=r"rows\.csv:4: no 'label'"):
        load_splits(str(tmp_path / "rows.csv"), problem_type="single_label_classification")


def test_parquet_has_lists_or_text(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    texts = [f"text {n}" for n in range(12)]
    path = tmp_path / "rows.parquet"
    for labels in ([[0, 1], [1], []] * 4, ["x|y", "y", ""] * 4):
        parquet.write_table(arrow.table({"text": texts, "label": labels}), path)
        train = load_split(str(path), "train")
        assert train.problem_type == SETS
        assert {tuple(one) for one in sets(train)} == {(0, 1), (1,), ()}


def test_one_row_of_a_csv_alone_does_not_say_what_it_is(tmp_path: Path) -> None:
    rows = ["text,label", *(f"text {n},{'ab'[n % 2]}" for n in range(12))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    path = str(tmp_path / "rows.csv")
    assert load_split(path, "train").problem_type == "single_label_classification"
    asked = load_split(path, "train", None, ("a", "b", "c"), SETS)
    assert {tuple(one) for one in sets(asked)} == {(0,), (1,)}


def test_the_recipe_may_say_what_rows_are(tmp_path: Path) -> None:
    rows = ["text,label", *(f"text {n},{('a|b', 'c')[n % 2]}" for n in range(40))]
    (tmp_path / "rows.csv").write_text("\n".join(rows))
    names = {}
    for said in (None, SETS, "single_label_classification"):
        recipe = make_recipe({"data": {"problem_type": said}} if said else {})
        chosen = choose_rows(recipe, str(tmp_path / "rows.csv"))
        assert chosen.train.problem_type == chosen.held_out.problem_type == (said or SETS)
        names[said] = chosen.train.label_names
    assert names[None] == names[SETS] == ("a", "b", "c")
    assert names["single_label_classification"] == ("a|b", "c")
    with pytest.raises(
        RecipeError, match=r"data\.problem_type = 'both'; allowed: 'single_label_cl"
    ):
        make_recipe({"data": {"problem_type": "both"}})


@pytest.mark.parametrize(
    ("bad", "what"),
    [
        (1, "'label' = 1 is one label, in multi-label data; allowed: a list of labels, which may"),
        ("a", "'label' = 'a' is one label, in multi-label data"),
        (None, "no 'label'; the row has: text, label"),
        ([0, 2], "'label' = 2; allowed: a whole number from 0 to 1, or a name: a, b"),
        ([True], "'label' = True; allowed"),
        ([[0]], "'label' = [0]; allowed"),
        (["c"], "'label' = 'c'; allowed: a whole number from 0 to 1, or a name: a, b"),
        ([0, 0], "'label' = [0, 0] names a label twice"),
        ([0, "a"], "'label' = [0, 'a'] names a label twice"),
        ([0, 1, 1], "(not a 0 or 1 for every label there is)"),
        (["\ud800"], "'label' is not Unicode at character 1"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_bad_set_is_refused_with_file_and_line(
    tmp_path: Path, bad: Any, what: str, first: bool
) -> None:
    labels = [bad, [0, 1]] if first else [[0, 1], bad]
    write(tmp_path / "train.jsonl", lines_of(*labels))
    (tmp_path / "dataset_info.json").write_text('{"label_names": ["a", "b"]}')
    with pytest.raises(DataError) as caught:
        load_splits(str(tmp_path))
    assert f"train.jsonl:{1 if first else 2}: " in str(caught.value)
    assert what in str(caught.value)


def test_too_many_labels_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines_of([f"name {n}" for n in range(64)], []))
    with pytest.raises(DataError, match="64 labels; allowed in multi-label data: up to 63"):
        load_splits(str(tmp_path))
    write(tmp_path / "train.jsonl", lines_of([f"name {n}" for n in range(63)], ["name 62"]))
    assert load_split(str(tmp_path), "train").labels == [2**63 - 1, bits_of([59])]


def test_the_fingerprint_covers_the_set_and_not_its_order(tmp_path: Path) -> None:
    def fingerprint(*labels: Any) -> str:
        write(tmp_path / "train.jsonl", lines_of(*labels))
        return load_split(str(tmp_path), "train").fingerprint

    first = fingerprint([0, 1], [1])
    assert fingerprint([1, 0], [1]) == first
    assert fingerprint([1], [1, 0]) != first
    assert fingerprint([0, 1], []) != first
    assert fingerprint([0], [1]) != fingerprint(0, 1)


def test_every_label_needs_a_row(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", lines_of(["a"], [], ["a", "c"]))
    (tmp_path / "dataset_info.json").write_text('{"label_names": ["a", "b", "c"]}')
    with pytest.raises(DataError, match="no training row with 'label' = b; allowed: one or more"):
        check_classes(load_split(str(tmp_path), "train"), "here")


# ---- losses --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), labels=st.sampled_from([1, 3, 63]))
def test_binary_cross_entropy_is_torchs(seed: int, labels: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 5, labels, generator=generator) * 5
    members = torch.rand(5, labels, generator=generator) > 0.6
    bits = torch.tensor([bits_of(row.nonzero().flatten().tolist()) for row in members])
    found = exit_binary_cross_entropies(logits.requires_grad_(), bits)
    assert found.shape == (4, 5)
    for exit_ in range(4):
        expected = torch.nn.BCEWithLogitsLoss()(logits[exit_], members.float())
        torch.testing.assert_close(found[exit_].mean(), expected)
    slow = [
        -sum(math.log(p if m else 1 - p) for p, m in zip(ps, ms, strict=True)) / labels
        for ps, ms in zip(logits[0].double().sigmoid().tolist(), members.tolist(), strict=True)
    ]
    assert found[0].tolist() == pytest.approx(slow, rel=1e-3, abs=1e-6)


def test_extreme_logits_cost_no_nan() -> None:
    logits = torch.tensor([[[1e4, -1e4]]]).requires_grad_()
    cost = exit_binary_cross_entropies(logits, torch.tensor([0b10]))
    assert cost.item() == pytest.approx(1e4)
    apart = binary_divergences(logits, torch.tensor([[-1e4, 1e4]]), 1.0)
    assert apart.item() == pytest.approx(1e4)
    (gradient,) = torch.autograd.grad(cost.sum() + apart.sum(), logits)
    assert gradient.isfinite().all()


@given(seed=st.integers(0, 2**31), temperature=st.sampled_from([1.0, 2.0, 4.0]))
def test_distillation_is_of_each_labels_yes_or_no(seed: int, temperature: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 3, 4, generator=generator, dtype=torch.float64).requires_grad_()
    teacher = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    bits = torch.tensor([0b0101, 0, 0b1111])
    batch = Batch(torch.arange(3), EMPTY, EMPTY, EMPTY, bits)
    distillation = Distillation(0.3, 0.2, temperature, RowLogits(range(3), teacher), SETS)
    found = distillation.row_losses(logits, batch)
    hard = exit_binary_cross_entropies(logits, bits)

    def kl(target: torch.Tensor, exit_: torch.Tensor) -> torch.Tensor:
        p, q = torch.sigmoid(target.detach() / temperature), torch.sigmoid(exit_ / temperature)
        each = p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log()
        return temperature**2 * each.mean(dim=-1)

    first = 0.5 * hard[0] + 0.3 * kl(logits[1], logits[0]) + 0.2 * kl(teacher, logits[0])
    last = 0.8 * hard[1] + 0.2 * kl(teacher, logits[1])
    torch.testing.assert_close(found, torch.stack([first, last]))
    assert torch.equal(Distillation(problem_type=SETS).row_losses(logits, batch), hard)


# ---- a whole run ---------------------------------------------------------------------------------


def make_set_rows(count: int, seed: int) -> list[dict[str, Any]]:
    """Sentences whose verbs, none to three, give their labels away."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        labels = [label for label in fixtures.VERBS if rng.random() < 0.5]
        verbs = [rng.choice(fixtures.VERBS[label]) for label in labels]
        rng.shuffle(verbs)
        words = (rng.choice(fixtures.SUBJECTS), *verbs, rng.choice(fixtures.OBJECTS), str(number))
        rows.append({"text": " ".join(words), "label": labels})
    return rows


@pytest.fixture(scope="session")
def set_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verb-sets")
    for split, count, seed in (("train", 320, 1), ("validation", 80, 2), ("test", 60, 3)):
        write(directory / f"{split}.jsonl", make_set_rows(count, seed))
    names = {"label_names": ["pleasure", "dread", "craft"]}
    (directory / "dataset_info.json").write_text(json.dumps(names))
    return directory


def table_for(backbone: Path, **sections: Any) -> dict[str, Any]:
    return {
        "model": {"backbone": str(backbone), "max_length": 16, **sections.pop("model", {})},
        "optimiser": {"lr": 3e-3, "head_lr": 3e-3},
        "loop": {"epochs": 12, "batch_size": 16},
        **sections,
    }


@pytest.fixture(scope="session")
def trained(backbone: Path, set_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `cls` pooling, so that it can be exported for other servers, too."""
    recipe = make_recipe(table_for(backbone, model={"pooling": "cls"}))
    return fit(recipe, tmp_path_factory.mktemp("out") / "verb-sets", data=str(set_data))


def test_it_learns_and_leaves_early(trained: Path, set_data: Path) -> None:
    checkpoint = load_checkpoint(trained)
    assert checkpoint.model.problem_type == SETS
    assert json.loads((trained / "config.json").read_text())["problem_type"] == SETS
    report = evaluate_checkpoint(checkpoint, load_split(str(set_data), "test"))
    assert report.full_accuracy > 0.9, "it did not learn what verbs give away"
    policies = {"confidence", "margin", "entropy", "patience"}
    assert report.policies.keys() == policies
    assert {table.policy for table in checkpoint.manifest.calibration} == policies | {
        *("full_depth", "fixed_layer")
    }
    for name in ("confidence", "margin", "entropy"):
        at = report.policies[name].calibrated[1.5]
        assert at.speedup > 1.3
        assert at.accuracy > 0.85
    card = (trained / "README.md").read_text()
    assert "any number of labels" in card
    assert "Accuracy is the share of rows whose whole set of labels is right" in card


def test_the_figures_are_those_of_a_loop_over_rows(trained: Path, set_data: Path) -> None:
    """Exits, exact match and F1 of what requests get, counted by hand from each exit's logits."""
    checkpoint, rows = load_checkpoint(trained), load_split(str(set_data), "test")
    report = evaluate_checkpoint(checkpoint, rows)
    logits = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(rows.inputs)).logits
    for point in report.policies["confidence"].calibrated.values():
        counts, right, hits, wrong = [0, 0, 0], 0, [0, 0, 0], [0, 0, 0]
        for n, true in enumerate(sets(rows)):
            for e in range(3):
                p = [1 / (1 + math.exp(-z)) for z in logits[e, n].double().tolist()]
                if e == 2 or min(max(one, 1 - one) for one in p) > point.threshold:
                    break
            said = [label for label in range(3) if p[label] > 0.5]
            counts[e] += 1
            right += said == true
            for label in range(3):
                hits[label] += label in said and label in true
                wrong[label] += (label in said) != (label in true)
        f1 = [2 * h / (2 * h + w) for h, w in zip(hits, wrong, strict=True)]
        assert point.exit_counts == tuple(counts)
        assert point.accuracy == pytest.approx(right / len(rows))
        assert point.macro_f1 == pytest.approx(sum(f1) / 3)


def test_calibration_measures_the_thresholds_it_gives(trained: Path, set_data: Path) -> None:
    checkpoint, rows = load_checkpoint(trained), load_split(str(set_data), "validation")
    checkpoint = calibrate_checkpoint(checkpoint, rows, policies=["entropy", "patience"])
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(rows.inputs))
    for name in ("entropy", "patience"):
        table, policy = checkpoint.table(name), make_supported_policy(name, checkpoint.model)
        for speedup in REQUESTED_SPEEDUPS:
            if speedup > table.max_speedup:
                continue
            point = table.point_for(speedup)
            outcome = replay(recorded, policy, point.threshold)
            said = [ids_of(bits) for bits in outcome.label.tolist()]
            right = [a == b for a, b in zip(said, sets(rows), strict=True)]
            assert point.accuracy == pytest.approx(sum(right) / len(rows))
            assert point.speedup == pytest.approx(3 * len(rows) / int(outcome.exit_layer.sum()))


def test_other_policies_and_other_rows_are_refused(
    trained: Path, set_data: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate = ["evaluate", str(trained), "--split", "test", "--data"]
    assert main([*evaluate, str(set_data), "--policy", "vote"]) == 2
    assert "'vote' is for one label a text, and this checkpoint" in capsys.readouterr().err
    assert main([*evaluate, str(data)]) == 2
    assert "is one label, in multi-label data; allowed: a list" in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(set(OBJECTIVES) - set(MULTI_LABEL_OBJECTIVES)))
def test_other_objectives_are_refused_before_anything_is_written(
    backbone: Path, set_data: Path, tmp_path: Path, name: str
) -> None:
    recipe = make_recipe(table_for(backbone, objective={"name": name}))
    with pytest.raises(RecipeError, match=f"objective.name = '{name}'.*allowed: joint"):
        fit(recipe, tmp_path / "out", data=str(set_data))
    assert not any(tmp_path.iterdir())


def test_a_teacher_must_be_of_the_same_kind(
    backbone: Path, trained: Path, data: Path, set_data: Path, tmp_path: Path
) -> None:
    distilled = {"teacher": str(trained), "teacher_weight": 0.5, "self_weight": 0.2}
    short = {"epochs": 1, "batch_size": 64, "max_train_rows": 64}
    recipe = make_recipe(table_for(backbone, distillation=distilled, loop=short))
    with pytest.raises(RecipeError, match=f"its problem_type is {SETS}; allowed: that of the data"):
        fit(recipe, tmp_path / "no", data=str(data))
    made = fit(recipe, tmp_path / "yes", data=str(set_data), calibrate=False)
    assert load_checkpoint(made).model.is_multi_label


def test_onnx_says_what_the_checkpoint_says(trained: Path, set_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    export = ["export", str(trained), "--format", "onnx", "--output"]
    assert main([*export, str(tmp_path / "float32")]) == 0
    int8 = ["--quantize", "int8", "--data", str(set_data)]
    assert main([*export, str(tmp_path / "int8"), *int8]) == 0
    before, after = load_checkpoint(trained), load_checkpoint(tmp_path / "float32")
    rows = load_split(str(set_data), "test")
    encodings = before.tokenizer().encode(rows.inputs)
    theirs, ours = (record_exits(one.any_stack(), encodings) for one in (before, after))
    assert ours.problem_type == SETS
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    assert ours.said.equal(theirs.said)
    flips = load_checkpoint(tmp_path / "int8").manifest.graphs.flips
    assert flips is not None
    assert flips.source_accuracy > 0.9
    assert flips.label_flips < 0.2
    calibrated = calibrate_checkpoint(after, load_split(str(set_data), "validation"))
    assert calibrated.table("entropy", backend="onnx").rows == 80


def test_final_head_is_transformers_multi_label_model(
    trained: Path, set_data: Path, tmp_path: Path
) -> None:
    command = ["export", str(trained), "--format", "final-head", "--output", str(tmp_path / "out")]
    assert main(command) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["problem_type"] == SETS
    classify = transformers.pipeline("text-classification", str(tmp_path / "out"), top_k=None)
    rows, checkpoint = load_split(str(set_data), "test"), load_checkpoint(trained)
    texts = rows.inputs[:8]
    logits = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts)).logits[-1]
    for answer, expected in zip(classify(list(texts)), logits.sigmoid().tolist(), strict=True):
        scores = {one["label"]: one["score"] for one in answer}
        assert [scores[name] for name in rows.label_names] == pytest.approx(expected, abs=1e-4)


def test_a_killed_run_goes_on_to_the_same_weights(
    backbone: Path, set_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = {"epochs": 1, "batch_size": 32, "checkpoint_every_steps": 3}
    recipe = make_recipe(table_for(backbone, loop=short))
    whole = fit(recipe, tmp_path / "whole", data=str(set_data), calibrate=False)
    from offramp_training.loop import Run

    step: Callable[[Run], None] = Run.step

    def killed(run: Run) -> None:
        if run.position.steps == 5:
            raise KeyboardInterrupt
        step(run)

    monkeypatch.setattr(Run, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        fit(recipe, tmp_path / "resumed", data=str(set_data), calibrate=False)
    monkeypatch.setattr(Run, "step", step)
    resumed = fit(recipe, tmp_path / "resumed", data=str(set_data), calibrate=False)
    assert load_checkpoint(resumed).version == load_checkpoint(whole).version
