"""Distillation: its loss against numbers worked out by hand, and that every objective trains on it
and on nothing else when it is off."""

import json
import shutil
from collections.abc import Callable, Iterator
from math import log, sqrt
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from offramp_model.checkpoint import load_checkpoint
from offramp_model.recorded import record_exits
from offramp_model.tokenizer import TextTokenizer
from offramp_training.batches import Batch, EncodedRows
from offramp_training.config import make_recipe
from offramp_training.data import load_split
from offramp_training.errors import OutputError, RecipeError
from offramp_training.fit import choose_rows, first_stage_identity, fit, run_identity
from offramp_training.grid import parse_grid
from offramp_training.inspect import inspect_checkpoint
from offramp_training.model import build_model
from offramp_training.objectives import OBJECTIVES, Progress, Stage
from offramp_training.objectives.consistentee import HeadsStage, JointStage3, PolicyStage, WarmUp
from offramp_training.objectives.joint import JointStage
from offramp_training.objectives.l2w_stage import L2WStage, halves
from offramp_training.objectives.row_losses import (
    Distillation,
    RowLogits,
    divergences,
    exit_cross_entropies,
)
from offramp_training.optimiser import make_optimiser
from offramp_training.sweep import sweep
from offramp_training.teacher import hashes_of, last_exit, make_distillation, open_teacher

SEEDS = st.integers(0, 2**31)
LABELS = ("pleasure", "dread", "craft")
EMPTY = torch.zeros(0)

# Two exits, one row, two classes; softmax gives (3/4, 1/4), then (1/5, 4/5). Label 0. At T = 2 the
# odds are square roots: (3, 1) -> (sqrt 3, 1), (1, 4) -> (1, 2).
LOGITS = torch.tensor([[[log(3.0), 0.0]], [[0.0, log(4.0)]]], dtype=torch.float64)
CE = (log(4 / 3), log(5))
KL_1 = 0.2 * log(0.2 / 0.75) + 0.8 * log(0.8 / 0.25)
EARLY = sqrt(3) / (1 + sqrt(3))
KL_2 = log(1 / 3 / EARLY) / 3 + 2 * log(2 / 3 / (1 - EARLY)) / 3


def draw(seed: int, exits: int = 4, rows: int = 5, classes: int = 3) -> tuple[Tensor, Batch]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(exits, rows, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), batch_of(torch.randint(classes, (rows,), generator=generator))


def batch_of(labels: Tensor, ids: Tensor | None = None) -> Batch:
    return Batch(torch.arange(len(labels)) if ids is None else ids, EMPTY, EMPTY, EMPTY, labels)


def teacher_of(logits: Tensor) -> RowLogits:
    return RowLogits(range(len(logits)), logits.detach())


# ---- the loss ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("temperature", "kl"), [(1.0, KL_1), (2.0, 4 * KL_2)])
def test_losses_by_hand(temperature: float, kl: float) -> None:
    batch = batch_of(torch.tensor([0]))
    itself = Distillation(self_weight=0.3, temperature=temperature)
    assert itself.row_losses(LOGITS, batch).flatten().tolist() == pytest.approx(
        [0.7 * CE[0] + 0.3 * kl, CE[1]]
    )
    teacher = teacher_of(LOGITS[1])  # says what the last exit says
    taught = Distillation(teacher_weight=0.2, temperature=temperature, teacher=teacher)
    assert taught.row_losses(LOGITS, batch).flatten().tolist() == pytest.approx(
        [0.8 * CE[0] + 0.2 * kl, 0.8 * CE[1]]
    )
    both = Distillation(0.3, 0.2, temperature, teacher)
    assert both.row_losses(LOGITS, batch).flatten().tolist() == pytest.approx(
        [0.5 * CE[0] + 0.5 * kl, 0.8 * CE[1]]
    )


@given(seed=SEEDS, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_without_weights_it_is_cross_entropy_bit_for_bit(seed: int, dtype: torch.dtype) -> None:
    drawn, batch = draw(seed)
    one, two = (drawn.detach().to(dtype).requires_grad_() for _ in range(2))
    found = Distillation(0.0, 0.0, 2.0).row_losses(one, batch)
    expected = exit_cross_entropies(two, batch.labels)
    assert torch.equal(found, expected)
    assert torch.equal(
        *torch.autograd.grad(found.sum(), one), *torch.autograd.grad(expected.sum(), two)
    )


@given(seed=SEEDS, weight=st.floats(0.01, 1), temperature=st.floats(0.5, 8))
def test_the_target_gets_no_gradient(seed: int, weight: float, temperature: float) -> None:
    logits, batch = draw(seed)
    losses = Distillation(weight, 0.0, temperature).row_losses(logits, batch)
    (gradient,) = torch.autograd.grad(losses[:-1].sum(), logits, retain_graph=True)
    assert gradient[-1].abs().max() == 0
    p, hot = logits.softmax(-1), torch.nn.functional.one_hot(batch.labels, 3)
    soft = (logits / temperature).softmax(-1)
    expected = (1 - weight) * (p - hot) + weight * temperature * (soft - soft[-1])
    torch.testing.assert_close(gradient[:-1], expected[:-1])
    # The last exit learns as if there were no others.
    (last,) = torch.autograd.grad(losses[-1].sum(), logits)
    torch.testing.assert_close(last[-1], (p - hot)[-1].to(last))


@given(seed=SEEDS, temperature=st.floats(0.5, 8))
def test_a_divergence_is_never_negative_and_zero_for_like_answers(
    seed: int, temperature: float
) -> None:
    logits, _ = draw(seed)
    found = divergences(logits, logits[0], temperature)
    assert torch.equal(found[0], torch.zeros(5, dtype=torch.float64))
    assert found.min() >= -1e-12
    moved = divergences(logits + 7, logits[0] - 3, temperature)  # an offset says nothing
    torch.testing.assert_close(moved, found)


@given(seed=SEEDS)
def test_gradients_keep_their_size_at_high_temperatures(seed: int) -> None:
    """Hinton et al. 2015, section 2.1: at high T the gradient tends to (z - v) / C, centred."""
    logits, _ = draw(seed)
    target = draw(seed + 1)[0][0].detach()
    (found,) = torch.autograd.grad(divergences(logits, target, 1e4).sum(), logits)
    z, v = (x - x.mean(dim=-1, keepdim=True) for x in (logits.detach(), target))
    torch.testing.assert_close(found, (z - v) / 3, rtol=1e-2, atol=1e-3)


def test_a_held_target_stays_when_the_last_exit_moves() -> None:
    logits, batch = draw(0)
    distillation = Distillation(0.4, 0.0, 2.0)
    moved = torch.cat([logits[:-1], logits[-1:] + torch.randn(1, 5, 3)])
    held = distillation.row_losses(moved, batch, logits[-1])
    assert torch.equal(held[:-1], distillation.row_losses(logits, batch)[:-1])
    assert not torch.equal(distillation.row_losses(moved, batch)[:-1], held[:-1])


def test_a_teachers_answers_are_found_by_id() -> None:
    answers = RowLogits([7, 2, 30], torch.tensor([[7.0], [2.0], [30.0]]))
    assert answers.of(torch.tensor([30, 7, 30])).flatten().tolist() == [30, 7, 30]
    with pytest.raises(KeyError):
        answers.of(torch.tensor([3]))
    with pytest.raises(ValueError, match="3 ids, 2 different"):
        RowLogits([1, 2, 1], torch.zeros(3, 1))


# ---- the objectives ------------------------------------------------------------------------------

TABLES: dict[str, dict[str, Any]] = {
    "joint": {},
    "ensemble": {},
    "cosee": {},
    "l2w": {"interval": 2},
    "consistentee": {"stage1_epochs": 1, "stage2_epochs": 1, "stage3_lr": 1e-3},
}


def test_every_objective_is_here() -> None:
    assert TABLES.keys() == OBJECTIVES.keys()


@pytest.fixture
def make_stages(
    backbone: Path, data: Path, recipe_table: dict[str, Any]
) -> Callable[..., tuple[list[Stage], EncodedRows]]:
    """An objective's stages over a fresh model, the same one every time, without dropout."""

    def make(name: str, **options: Any) -> tuple[list[Stage], EncodedRows]:
        recipe = make_recipe({**recipe_table, "objective": {"name": name, **options}})
        model = build_model(backbone, recipe.model, LABELS, seed=0)
        tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
        rows = EncodedRows.of(load_split(str(data), "train"), tokenizer, 0)
        stages = recipe.objective.stages(model, recipe)
        for stage in stages:
            stage.optimiser = make_optimiser(stage, recipe.optimiser)
        if name == "consistentee":
            stages[1].prepare(lambda: rows.in_order(64))  # memorised layers
        model.eval()
        return stages, rows

    return make


def gradients_of(stage: Stage, rows: EncodedRows) -> tuple[float, dict[str, Tensor]]:
    """Of the stage's first loss, from the same draws."""
    stage.prepare(lambda: rows.in_order(64))
    torch.manual_seed(0)
    stage.model.zero_grad(set_to_none=True)
    loss = next(iter(stage.losses(rows.batch(range(16)), Progress(0, 1, 10, 1e-3))))
    loss.backward()  # type: ignore[no-untyped-call]
    named = stage.model.named_parameters()
    return float(loss.detach()), {k: p.grad for k, p in named if p.grad is not None}


@pytest.mark.parametrize("name", TABLES)
def test_off_it_leaves_every_stage_as_it_was_bit_for_bit(
    make_stages: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    found = [gradients_of(stage, rows) for stage, rows in each(make_stages(name))]
    monkeypatch.setattr(
        Stage,
        "row_losses",
        lambda _, logits, batch, *__: exit_cross_entropies(logits, batch.labels),
    )
    for (loss, gradients), (stage, rows) in zip(found, each(make_stages(name)), strict=True):
        plain_loss, plain = gradients_of(stage, rows)
        assert loss == plain_loss
        assert [key for key in plain if not torch.equal(plain[key], gradients[key])] == []


def each(made: tuple[list[Stage], EncodedRows]) -> Iterator[tuple[Stage, EncodedRows]]:
    stages, rows = made
    return ((stage, rows) for stage in stages)


@pytest.mark.parametrize("on", ["self", "teacher"])
@pytest.mark.parametrize(
    ("name", "options"),
    [(name, {}) for name in TABLES] + [("consistentee", {"stage3": "alternate"})],
)
def test_it_reaches_every_stage_that_trains_classifiers_and_no_gate(
    make_stages: Any, name: str, options: dict[str, Any], on: str
) -> None:
    for place in range(3 if name == "consistentee" else 1):
        results = []
        for distils in (False, True):
            stages, rows = make_stages(name, **options)
            stage = stages[place]
            if distils and on == "self":
                stage.distillation = Distillation(0.5, 0.0, 2.0)
            elif distils:
                answers = torch.randn(160, 3, generator=torch.Generator().manual_seed(1))
                stage.distillation = Distillation(0.0, 0.5, 2.0, teacher_of(answers))
            results.append(gradients_of(stage, rows))
        (plain_loss, plain), (loss, found) = results
        assert (loss == plain_loss) == isinstance(stage, PolicyStage)
        changed = {key for key in plain if not torch.equal(plain[key], found[key])}
        assert {key for key in changed if key.startswith("exits.gates.")} == set()
        assert ("exits.classifiers.0.weight" in changed) != isinstance(stage, PolicyStage)
        if isinstance(stage, WarmUp | JointStage | JointStage3):
            assert any(key.startswith("backbone.") for key in changed)
        if on == "self" and isinstance(stage, HeadsStage):  # from its own share of labels only
            assert not any("classifiers.2." in key for key in changed)


def test_both_forms_of_the_meta_gradient_agree(make_stages: Any) -> None:
    """The look ahead takes the derivative of the very losses that are descended: the targets stay
    where they are while the parameters are moved."""
    found: dict[str, Tensor] = {}
    for form, step in (("exact", 1e-3), ("central", 1e-4)):
        (stage,), rows = make_stages("l2w", derivative=form, difference_step=step)
        assert isinstance(stage, L2WStage)
        stage.model.double()
        answers = torch.randn(160, 3, generator=torch.Generator().manual_seed(1))
        stage.distillation = Distillation(0.5, 0.2, 2.0, teacher_of(answers))
        stage.meta_step(*halves(rows.batch(range(16))), Progress(0, 0, 10, 1e-3))
        grads = [p.grad.flatten() for p in stage.network.parameters() if p.grad is not None]
        found[form] = torch.cat(grads)
    difference = (found["central"] - found["exact"]).norm() / found["exact"].norm()
    assert float(difference) < 1e-4


# ---- runs ----------------------------------------------------------------------------------------


def weights(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors") | load_file(checkpoint / "exits.safetensors")


def same_bits(one: Path, two: Path) -> bool:
    left, right = weights(one), weights(two)
    return left.keys() == right.keys() and all(left[key].equal(right[key]) for key in left)


def altered(checkpoint: Path, target: Path, file: str, change: Callable[[Any], object]) -> Path:
    """The same checkpoint elsewhere, with a change to one of its JSON files."""
    shutil.copytree(checkpoint, target)
    content = json.loads((target / file).read_text())
    change(content)
    (target / file).write_text(json.dumps(content))
    return target


def swap_words(tokenizer: Any) -> None:
    words = tokenizer["model"]["vocab"]
    words["love"], words["hate"] = words["hate"], words["love"]


@pytest.mark.parametrize("name", TABLES)
def test_every_objective_trains_with_both(
    tmp_path: Path, data: Path, checkpoint: Path, recipe_table: dict[str, Any], name: str
) -> None:
    recipe_table["objective"] = {"name": name, **TABLES[name]}
    recipe_table["loop"] |= {"epochs": 1, "max_train_rows": 64}
    recipe_table["data"] = {"held_out": 20}  # ids with gaps
    plain = fit(make_recipe(recipe_table), tmp_path / "plain", data=str(data), calibrate=False)
    recipe_table["distillation"] = {
        "self_weight": 0.3,
        "teacher": str(checkpoint),
        "teacher_weight": 0.5,
    }
    made = fit(make_recipe(recipe_table), tmp_path / "made", data=str(data), calibrate=False)
    assert not same_bits(made, plain)
    assert all(value.isfinite().all() for value in weights(made).values())
    assert load_checkpoint(made).manifest.objective.name == name


def test_a_checkpoint_says_what_it_was_distilled_from(
    tmp_path: Path, data: Path, checkpoint: Path, recipe_table: dict[str, Any], capsys: Any
) -> None:
    recipe_table["loop"] |= {"epochs": 1, "max_train_rows": 32}
    recipe_table["distillation"] = {"teacher": f"{checkpoint}/", "teacher_weight": 0.25}
    made = fit(make_recipe(recipe_table), tmp_path / "out", data=str(data), calibrate=False)
    manifest = load_checkpoint(made).manifest
    assert manifest.objective.parameters["distillation"] == {
        "self_weight": 0.0,
        "teacher": checkpoint.name,
        "teacher_weight": 0.25,
        "temperature": 2.0,
        "teacher_sha256": hashes_of(load_checkpoint(checkpoint)),
    }
    assert str(checkpoint.parent) not in (made / "offramp.json").read_text()
    make_recipe(dict(manifest.objective.parameters))  # reads back
    words = f"teacher {checkpoint.name} (weight 0.25), temperature 2"
    assert f"Distilled from {words}." in (made / "README.md").read_text()
    inspect_checkpoint(made, Console(width=160))
    assert f"distilled from  {words}" in capsys.readouterr().out
    inspect_checkpoint(checkpoint, Console(width=160))  # one that was not
    assert "distilled from" not in capsys.readouterr().out


def test_a_teacher_reads_texts_with_its_own_tokenizer(
    tmp_path: Path, data: Path, checkpoint: Path
) -> None:
    rows = load_split(str(data), "train").take([5, 9, 40, 3])
    opened = load_checkpoint(checkpoint)
    expected = record_exits(opened.stack(), opened.tokenizer().encode(rows.inputs)).logits[-1]
    state = torch.get_rng_state()
    assert torch.equal(last_exit(opened, rows, torch.device("cpu")), expected)
    assert torch.equal(torch.get_rng_state(), state)

    other = altered(checkpoint, tmp_path / "other", "tokenizer.json", swap_words)
    swapped = last_exit(load_checkpoint(other), rows, torch.device("cpu"))
    has_one = torch.tensor([" love " in row.text or " hate " in row.text for row in rows.rows])
    same = (swapped == expected).all(dim=1)
    assert has_one.any()
    assert torch.equal(same, ~has_one)


def test_a_killed_run_with_a_teacher_ends_with_the_same_bits(
    tmp_path: Path,
    data: Path,
    checkpoint: Path,
    recipe_table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(Exception):
        pass

    original, seen = JointStage.losses, 0

    def losses(self: JointStage, *arguments: Any) -> Iterator[Tensor]:
        nonlocal seen
        seen += 1
        if seen == 15:  # of 20, after a point at 12
            raise Killed
        return original(self, *arguments)

    soft = {"self_weight": 0.3, "teacher_weight": 0.4}
    recipe_table["distillation"] = {**soft, "teacher": str(checkpoint)}
    recipe = make_recipe(recipe_table)
    whole = fit(recipe, tmp_path / "whole", data=str(data), calibrate=False)
    with monkeypatch.context() as patch:
        patch.setattr(JointStage, "losses", losses)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    points = tmp_path / "killed.fit" / "resume"
    kept = {
        tuple(v.shape) for path in points.rglob("*.safetensors") for v in load_file(path).values()
    }
    assert (160, 3) not in kept  # the teacher's answers are no part of a point

    # Another teacher's run is another run; the same teacher elsewhere is the same one.
    recipe_table["distillation"] = {**soft, "teacher": str(whole)}
    with pytest.raises(OutputError, match="unfinished run with another teacher;"):
        fit(make_recipe(recipe_table), tmp_path / "killed", data=str(data))
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    recipe_table["distillation"] = {**soft, "teacher": str(moved)}
    resumed = fit(make_recipe(recipe_table), tmp_path / "killed", data=str(data), calibrate=False)
    assert same_bits(resumed, whole)


# ---- refusals and grids --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "parts"),
    [
        ({"self_weigth": 1}, ["distillation.self_weigth: unknown key; allowed: self_weight"]),
        ({"self_weight": 1.5}, ["distillation.self_weight = 1.5", "allowed: a number from 0 to 1"]),
        (
            {"self_weight": -0.1},
            ["distillation.self_weight = -0.1", "allowed: a number from 0 to 1"],
        ),
        ({"temperature": 0}, ["distillation.temperature = 0", "allowed: a number above 0"]),
        (
            {"temperature": float("inf")},
            ["distillation.temperature = inf", "allowed: a finite number above 0"],
        ),
        (
            {"self_weight": 0.6, "teacher": "x", "teacher_weight": 0.5},
            ["self_weight = 0.6 and distillation.teacher_weight = 0.5; allowed: at most 1"],
        ),
        ({"teacher": "x"}, ["distillation.teacher = 'x' and distillation.teacher_weight = 0.0"]),
        (
            {"teacher_weight": 0.5},
            ["teacher = None", "teacher_weight = 0.5; allowed: a checkpoint"],
        ),
        ({"teacher_sha256": {}}, ["distillation.teacher_sha256 without distillation.teacher"]),
    ],
)
def test_wrong_values_are_named(section: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"distillation": section})
    for part in parts:
        assert part in str(caught.value)


def test_wrong_teachers_are_refused_before_anything_is_written(
    tmp_path: Path, backbone: Path, data: Path, checkpoint: Path, recipe_table: dict[str, Any]
) -> None:
    reordered = altered(
        checkpoint,
        tmp_path / "reordered",
        "offramp.json",
        lambda manifest: manifest["model"].update(labels=["dread", "pleasure", "craft"]),
    )
    too_long = altered(
        checkpoint,
        tmp_path / "too long",
        "offramp.json",
        lambda manifest: manifest["model"].update(max_length=64),
    )
    output = tmp_path / "runs" / "out"

    def refused(what: str, **section: Any) -> None:
        table = {**recipe_table, "distillation": {"teacher_weight": 0.5, **section}}
        with pytest.raises(RecipeError, match=what):
            fit(make_recipe(table), output, data=str(data))
        assert not output.parent.exists()

    refused(r"distillation\.teacher = .*it has no offramp\.json; allowed: the dir", teacher="none")
    refused(r"is not an offramp checkpoint", teacher=str(backbone))
    refused(
        "its labels are dread, pleasure, craft; allowed: .* order, pleasure, dread, craft",
        teacher=str(reordered),
    )
    refused(
        r"distillation\.teacher = '.*too long': max_length is 64, but .*; allowed: the directory",
        teacher=str(too_long),
    )
    refused(
        r"distillation\.teacher_sha256 = \{'model.safetensors': 'x'\}; allowed: none, or those of",
        teacher=str(checkpoint),
        teacher_sha256={"model.safetensors": "x"},
    )
    recipe_table["model"]["exit_layers"] = [3]
    refused(
        r"self_weight = 0\.2; no exit comes before the last of model\.exit_layers = \[3\]",
        teacher=str(checkpoint),
        self_weight=0.2,
    )


def test_what_the_teacher_is_counts_not_where_it_lies(
    tmp_path: Path, data: Path, checkpoint: Path, recipe_table: dict[str, Any]
) -> None:
    def identity(**section: Any) -> dict[str, Any]:
        recipe = make_recipe({**recipe_table, "distillation": section})
        rows = choose_rows(recipe, str(data))
        recipe, _ = open_teacher(recipe, rows.train.label_names)
        first_stage = first_stage_identity(recipe, rows)
        assert first_stage["teacher"] == run_identity(recipe, rows)["teacher"]
        return run_identity(recipe, rows)

    opened = load_checkpoint(checkpoint)
    hashes = hashes_of(opened)
    assert hashes.items() > opened.manifest.sha256.items()
    there = identity(teacher=str(checkpoint), teacher_weight=0.5)
    moved = shutil.copytree(checkpoint, tmp_path / "moved")
    assert there["teacher"] == hashes
    assert there == identity(teacher=str(moved), teacher_weight=0.5, teacher_sha256=hashes)
    assert identity()["teacher"] is None
    changes: dict[str, tuple[str, Callable[[Any], object]]] = {
        "tokenizer.json": ("tokenizer.json", swap_words),
        "config.json": ("config.json", lambda config: config.update(layer_norm_eps=0.1)),
        "offramp.json:model": ("offramp.json", lambda m: m["model"].update(max_length=8)),
        "": ("offramp.json", lambda manifest: manifest.update(evaluation={}, calibration=[])),
    }
    for key, (file, change) in changes.items():
        other = altered(checkpoint, tmp_path / f"other {key}", file, change)
        found = identity(teacher=str(other), teacher_weight=0.5)["teacher"]
        assert {name for name in hashes if found[name] != hashes[name]} == {key} - {""}
    recipe = make_recipe(
        {**recipe_table, "distillation": {"teacher": str(checkpoint), "teacher_weight": 0.5}}
    )
    with pytest.raises(ValueError, match="no identity without the hashes"):
        run_identity(recipe, choose_rows(recipe, str(data)))


def test_a_teacher_is_opened_once_and_runs_only_for_stages_that_are_left(
    tmp_path: Path,
    data: Path,
    checkpoint: Path,
    recipe_table: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Killed(Exception):
        pass

    def die(*_: Any) -> None:
        raise Killed

    done: list[str] = []
    for name, function in (("opened", load_checkpoint), ("ran", last_exit)):

        def watched(*arguments: Any, name: str = name, function: Any = function) -> Any:
            done.append(name)
            return function(*arguments)

        monkeypatch.setattr(f"offramp_training.teacher.{function.__name__}", watched)
    options = {"stage1_epochs": 1, "stage2_epochs": 1, "stage3_epochs": 1}
    recipe_table["objective"] = {"name": "consistentee", **options}
    recipe_table["loop"] |= {"max_train_rows": 32}
    recipe_table["distillation"] = {"teacher": str(checkpoint), "teacher_weight": 0.5}
    recipe, output = make_recipe(recipe_table), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("offramp_training.fit.calibrate_checkpoint", die)
        with pytest.raises(Killed):
            fit(recipe, output, data=str(data))
    assert done == ["opened", "ran"]
    fit(recipe, output, data=str(data))
    assert done == ["opened", "ran", "opened"]  # only calibration was left
    done.clear()
    grid = parse_grid(["loop.seed=[0]"])
    (one,) = sweep(recipe_table, grid, tmp_path / "sweep", data=str(data))
    assert one.finished
    assert done == ["opened", "opened", "ran"]  # by the check of the whole sweep, and by fit


def test_a_sweep_over_its_weights(
    tmp_path: Path, data: Path, checkpoint: Path, recipe_table: dict[str, Any]
) -> None:
    recipe_table["loop"] |= {"epochs": 1, "max_train_rows": 32}
    grid = parse_grid(["distillation.self_weight=[0.0, 0.5]"])
    ranked = sweep(recipe_table, grid, tmp_path / "sweep", data=str(data))
    assert [one.finished for one in ranked] == [True, True]
    assert all(result.state == "done" for one in ranked for result in one.results)
    teachers = parse_grid([f'distillation.teacher=["{checkpoint}", "{tmp_path / "none"}"]'])
    recipe_table["distillation"] = {"teacher_weight": 0.5}
    with pytest.raises(RecipeError, match=r"^point .*: distillation\.teacher = .*none"):
        sweep(recipe_table, teachers, tmp_path / "other", data=str(data))
    assert not (tmp_path / "other").exists()


def test_no_teacher_and_no_weights_ask_for_nothing(data: Path) -> None:
    recipe, rows = make_recipe({}), load_split(str(data), "train")
    assert open_teacher(recipe, rows.label_names) == (recipe, None)
    made = make_distillation(recipe.distillation, None, rows, torch.device("cpu"))
    assert made == Distillation(0.0, 0.0, 2.0, None)
