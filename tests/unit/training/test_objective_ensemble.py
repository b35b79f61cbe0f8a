"""The ensemble objective: acceptance cases, properties of loss and votes, recipes, real steps."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from offramp_model.calibrating import trace
from offramp_model.policies import VotePolicy
from offramp_model.recorded import RecordedExits
from offramp_model.tokenizer import TextTokenizer
from offramp_training.batches import EncodedRows
from offramp_training.config import DEFAULT_BACKBONE, Recipe, make_recipe, read_recipe
from offramp_training.data import load_splits
from offramp_training.errors import RecipeError
from offramp_training.model import build_model
from offramp_training.objectives import OBJECTIVES, Progress
from offramp_training.objectives.ensemble import (
    Ensemble,
    diversity,
    ensemble_loss,
    pair_cross_entropies,
)
from offramp_training.objectives.joint import joint_loss
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.optimiser import make_optimiser

ROOT = Path(__file__).parents[3]
CASES = json.loads((ROOT / "tests" / "oracles.json").read_text(encoding="utf-8"))["objectives"]
SEEDS = st.integers(0, 2**31)
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def cases(kind: str) -> list[Any]:
    found = [case for case in CASES["ensemble"] if case["kind"] == kind]
    assert found
    return [pytest.param(case, id=case["case"]) for case in found]


def given_logits(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    inputs = case["inputs"]
    logits = torch.tensor(inputs["logits"], dtype=dtype, requires_grad=True)
    return logits, torch.tensor(inputs["labels"])


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    names = ("min_level", "drop_last", "detach_target")
    return {name: case["inputs"][name] for name in names if name in case["inputs"]}


def draw(seed: int, exits: int = 4, rows: int = 5, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(exits, rows, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


def loss_of(logits: Tensor, labels: Tensor, weight: float, **options: Any) -> Tensor:
    return ensemble_loss(logits, exit_cross_entropies(logits, labels), weight, **options)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "ensemble", Ensemble)


# ---- acceptance cases ------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("case", cases("ensemble_loss"))
def test_loss(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = given_logits(case, dtype)
    options, weight = options_of(case), case["inputs"]["lambda"]
    expected, close = dict(case["expected"]), case["tolerance"]["abs"]
    level, drops = options.get("min_level", "batch"), options.get("drop_last", False)
    pairs = pair_cross_entropies(logits)
    found: dict[str, Any] = {
        "total": loss_of(logits, labels, weight, **options),
        "accuracy_term": exit_cross_entropies(logits, labels).mean(dim=1).sum(),
        "ce": exit_cross_entropies(logits, labels).mean(dim=1),
        "probabilities": logits.softmax(dim=-1),
        "diversity": diversity(pairs, level, drop_last=drops),
        "diversity_drop_last": diversity(pairs, level, drop_last=True),
    }
    if "X_1_2" in expected:
        forward, backward = pairs[0, 1, 0], pairs[1, 0, 0]
        entropy = pairs[0, 0, 0]
        found |= {"X_1_2": forward, "wrong_direction_X_2_1": backward}
        found |= {"kl_p1_p2": forward - entropy}
    for name, value in expected.items():
        wanted = torch.tensor(value, dtype=dtype)
        torch.testing.assert_close(found[name].detach(), wanted, atol=close, rtol=0)


@DTYPES
@pytest.mark.parametrize("case", cases("ensemble_pairs"))
def test_pairs(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = given_logits(case, dtype)
    expected, close = case["expected"], case["tolerance"]["abs"]
    pairs = pair_cross_entropies(logits).detach()
    entropies = exit_cross_entropies(logits, labels).mean(dim=1)
    assert entropies.tolist() == pytest.approx(expected["ce_batch_mean"], abs=close)
    assert entropies.sum().item() == pytest.approx(expected["ce_sum"], abs=close)
    for name, rows in expected["X_per_example"].items():
        earlier, later = (int(layer) - 1 for layer in name.split(","))
        found = pairs[earlier, later]
        assert found.tolist() == pytest.approx(rows, abs=close)
        assert found.mean().item() == pytest.approx(expected["X_batch_mean"][name], abs=close)


@DTYPES
@pytest.mark.parametrize("case", cases("ensemble_loss_gradient"))
def test_gradient(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits, labels = given_logits(case, dtype)
    loss_of(logits, labels, case["inputs"]["lambda"], **options_of(case)).backward()
    expected = torch.tensor(case["expected"]["d_logits"], dtype=dtype)
    torch.testing.assert_close(logits.grad, expected, atol=case["tolerance"]["abs"], rtol=0)


# ---- properties of the loss ------------------------------------------------------------------


@DTYPES
@given(seed=SEEDS, exits=st.integers(1, 6), level=st.sampled_from(["batch", "row"]))
def test_without_diversity_it_is_joint_training_bit_for_bit(
    dtype: torch.dtype, seed: int, exits: int, level: Any
) -> None:
    drawn, labels = draw(seed, exits)
    one = drawn.detach().to(dtype).requires_grad_()
    two = one.detach().clone().requires_grad_()
    total = loss_of(one, labels, 0.0, min_level=level)
    joint = joint_loss(exit_cross_entropies(two, labels), torch.ones(exits), "sum")
    assert torch.equal(total, joint)
    assert torch.equal(*torch.autograd.grad(total, one), *torch.autograd.grad(joint, two))


@given(seed=SEEDS, detach=st.booleans())
def test_the_gradient_of_a_pair_has_a_closed_form(seed: int, detach: bool) -> None:
    logits, _ = draw(seed, exits=2, rows=1)
    pair = pair_cross_entropies(logits, detach_target=detach)[0, 1, 0]
    (found,) = torch.autograd.grad(pair, logits)
    with torch.no_grad():
        log_p = logits.log_softmax(dim=-1)[:, 0]
        p = log_p.exp()
        of_target = torch.zeros(3) if detach else p[0] * (-log_p[1] - pair)
    torch.testing.assert_close(found[0, 0], of_target.double())
    torch.testing.assert_close(found[1, 0], p[1] - p[0])


@given(seed=SEEDS, level=st.sampled_from(["batch", "row"]), drop=st.booleans())
def test_detaching_changes_the_gradient_of_targets_only(seed: int, level: Any, drop: bool) -> None:
    # Of two exits the second is never a target; the first is nothing else.
    logits, labels = draw(seed, exits=2)

    def gradient(detach: bool) -> Tensor:
        loss = loss_of(logits, labels, 0.5, min_level=level, drop_last=drop, detach_target=detach)
        return torch.autograd.grad(loss, logits)[0]

    torch.testing.assert_close(gradient(True)[1], gradient(False)[1])
    assert torch.equal(gradient(True)[0], gradient(False)[0]) == drop


@given(seed=SEEDS, level=st.sampled_from(["batch", "row"]))
def test_the_order_of_rows_and_common_offsets_do_not_matter(seed: int, level: Any) -> None:
    logits, labels = draw(seed)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    offset = torch.randn(*logits.shape[:2], 1, generator=generator)
    loss = loss_of(logits, labels, 0.3, min_level=level)
    permuted = loss_of(logits[:, order], labels[order], 0.3, min_level=level)
    moved = loss_of(logits + offset, labels, 0.3, min_level=level)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(moved, loss)


@pytest.mark.parametrize("level", ["batch", "row"])
@pytest.mark.parametrize("drop", [False, True])
def test_one_exit_alone_has_no_diversity(level: Any, drop: bool) -> None:
    logits, labels = draw(0, exits=1)
    assert diversity(pair_cross_entropies(logits), level, drop_last=drop).item() == 0
    loss = loss_of(logits, labels, 1.0, min_level=level, drop_last=drop)
    loss.backward()
    assert logits.grad is not None
    assert torch.equal(loss, exit_cross_entropies(logits, labels).mean())


@given(seed=SEEDS)
def test_identical_exits_have_their_entropy_as_pair(seed: int) -> None:
    logits, _ = draw(seed, exits=1)
    p = logits.softmax(dim=-1)[0]
    pair = pair_cross_entropies(logits.expand(2, -1, -1))[0, 1]
    torch.testing.assert_close(pair, -(p * p.log()).sum(dim=-1))


@given(seed=SEEDS, weight=st.floats(0, 1), drop=st.booleans())
def test_a_minimum_per_row_never_gives_a_smaller_loss(seed: int, weight: float, drop: bool) -> None:
    logits, labels = draw(seed)
    row = loss_of(logits, labels, weight, min_level="row", drop_last=drop)
    batch = loss_of(logits, labels, weight, min_level="batch", drop_last=drop)
    assert row >= batch - 1e-12


@pytest.mark.parametrize("level", ["batch", "row"])
def test_of_two_earlier_exits_alike_the_first_takes_the_gradient(level: Any) -> None:
    logits, _ = draw(3, exits=1)
    last, _ = draw(4, exits=1)
    pairs = pair_cross_entropies(torch.cat([logits, logits, last])).detach().requires_grad_()
    (found,) = torch.autograd.grad(diversity(pairs, level), pairs)
    assert found[0, 2].sum().item() == pytest.approx(1)
    assert found[1, 2].abs().sum() == 0
    assert found.sum().item() == pytest.approx(2)  # nothing beyond the pairs (1,2) and (1,3)


@pytest.mark.parametrize("scale", [1e2, 1e4])
def test_loss_and_gradient_stay_finite(scale: float) -> None:
    drawn, labels = draw(0)
    logits = (drawn.detach() * scale).float().requires_grad_()
    loss = loss_of(logits, labels, 1.0)
    loss.backward()
    assert logits.grad is not None
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


# ---- properties of the votes that this objective trains for --------------------------------


def vote(labels: Tensor, tau: float, exponent: float, classes: int = 4) -> tuple[Tensor, Tensor]:
    """Exit layer and label of every row, whose exits say `labels` [E, N]."""
    logits = torch.nn.functional.one_hot(labels, classes).float()
    layers = tuple(range(1, len(labels) + 1))
    return trace(RecordedExits(logits, layers), VotePolicy(exponent)).outcome(tau)


def drawn_votes(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, (6, 32), generator=generator)


TAUS, EXPONENTS = st.floats(0.1, 3), st.sampled_from([0.0, 0.5, 0.75, 0.9])


@given(seed=SEEDS, tau=TAUS, more=st.floats(0, 1), exponent=EXPONENTS)
def test_a_higher_threshold_never_leaves_earlier(
    seed: int, tau: float, more: float, exponent: float
) -> None:
    labels = drawn_votes(seed)
    low, _ = vote(labels, tau, exponent)
    high, _ = vote(labels, tau + more, exponent)
    assert (high >= low).all()


@given(seed=SEEDS, tau=TAUS, exponent=EXPONENTS)
def test_testing_the_class_just_voted_for_is_enough(seed: int, tau: float, exponent: float) -> None:
    labels = drawn_votes(seed)
    exits, answers = vote(labels, tau, exponent)
    for row, voted in enumerate(labels.T.tolist()):
        votes = dict.fromkeys(voted, 0)
        expected = (len(voted), voted[-1])
        for layer, label in enumerate(voted, start=1):
            votes[label] += 1
            if votes[label] / float(layer) ** exponent >= tau:
                expected = (layer, label)
                break
        assert (int(exits[row]), int(answers[row])) == expected


@given(seed=SEEDS, exponent=EXPONENTS)
def test_where_votes_begin_and_end_to_matter(seed: int, exponent: float) -> None:
    labels = drawn_votes(seed)
    assert (vote(labels, 1.0, exponent)[0] == 1).all()
    exits, answers = vote(labels, 6 ** (1 - exponent) * (1 + 1e-9), exponent)
    assert (exits == 6).all()
    assert torch.equal(answers, labels[-1])


@given(tau=st.floats(1, 6), exponent=EXPONENTS)
def test_a_unanimous_row_leaves_where_the_closed_form_says(tau: float, exponent: float) -> None:
    exact = tau ** (1 / (1 - exponent))
    assume(abs(exact - round(exact)) > 1e-9)  # exact ties are among the acceptance cases
    exits, _ = vote(torch.full((6, 1), 2), tau, exponent)
    assert int(exits) == min(6, math.ceil(exact))


@given(seed=SEEDS, tau=TAUS, exponent=EXPONENTS, names=st.permutations(range(4)))
def test_renaming_classes_renames_answers(
    seed: int, tau: float, exponent: float, names: list[int]
) -> None:
    labels, renamed = drawn_votes(seed), torch.tensor(names)
    exits, answers = vote(labels, tau, exponent)
    exits_renamed, answers_renamed = vote(renamed[labels], tau, exponent)
    assert torch.equal(exits_renamed, exits)
    assert torch.equal(answers_renamed, renamed[answers])


# ---- options, recipes, real steps ------------------------------------------------------------


def test_options_keep_the_name_that_recipes_use(registered: None) -> None:
    recipe = make_recipe({"objective": {"name": "ensemble", "lambda": 0.5}})
    expected = {"lambda": 0.5, "min_level": "batch", "drop_last": False, "detach_target": False}
    assert recipe.objective.options() == expected
    assert recipe.as_dict()["objective"] == {"name": "ensemble", **expected}
    assert make_recipe(recipe.as_dict()) == recipe
    assert recipe.objective.exit_policy == "vote"
    assert Ensemble().lambda_ == 0.1


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"lambda": 1.5}, ["objective.lambda = 1.5", "to 1"]),
        ({"lambda": -0.1}, ["objective.lambda = -0.1", "from 0"]),
        ({"lambda": math.nan}, ["objective.lambda = nan", "from 0 to 1"]),
        ({"min_level": "exit"}, ["objective.min_level = 'exit'", "'batch' or 'row'"]),
        ({"drop_last": 3}, ["objective.drop_last = 3", "allowed: true or false"]),
        ({"detach_target": "now"}, ["objective.detach_target = 'now'", "allowed: true or false"]),
        ({"lambda_": 0.1}, ["objective.lambda_: unknown key", "min_level, drop_last"]),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], fragments: list[str], registered: None
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"objective": {"name": "ensemble", **options}})
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("data_set", ["sst2", "trec6", "clinc150", "mrpc"])
def test_the_recipes_are_sound(data_set: str, registered: None) -> None:
    recipe = read_recipe(ROOT / "training" / "recipes" / f"{data_set}-ensemble.toml")
    assert recipe.objective == Ensemble()
    assert (recipe.model.backbone, recipe.model.pooling) == (DEFAULT_BACKBONE, "mean")
    assert recipe.model.max_length == 128


def test_two_real_steps(backbone: Path, data: Path, recipe_table: dict[str, Any]) -> None:
    recipe: Recipe = make_recipe(recipe_table)
    splits = load_splits(str(data))
    model = build_model(backbone, recipe.model, splits["train"].label_names, seed=1)
    tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
    rows = EncodedRows.of(splits["train"], tokenizer, model.pad_id)
    (stage,) = Ensemble().stages(model, recipe)
    optimiser = make_optimiser(stage, recipe.optimiser)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = rows.batch(range(16))
    values = []
    model.train()
    for step in range(2):
        for loss in stage.losses(batch, Progress(0, step, 2, 2e-3)):
            loss.backward()
            optimiser.step()
            model.zero_grad()
            values.append(loss.item())
    model.eval()
    (after,) = stage.losses(batch, Progress(0, 2, 2, 2e-3))
    assert len(values) == 2
    assert after.item() < values[0]
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= set(stage.parameters()) - {"backbone.embeddings.position_embeddings.weight"}
