"""Recipes: what is refused, and in which words."""

from pathlib import Path
from typing import Any

import pytest

from offramp_training.config import (
    apply_override,
    make_recipe,
    parse_recipe,
    read_recipe,
    read_table,
)
from offramp_training.errors import RecipeError
from offramp_training.objectives import OBJECTIVES

RECIPES = Path(__file__).parents[3] / "training" / "recipes"


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.toml")), ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path: Path) -> None:
    assert read_recipe(path).objective.name in path.stem


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("stem", ["sst2-joint", "trec6-cosee", "mrpc-l2w", "snips-joint"])
def test_another_objective_takes_the_recipe_with_its_own_defaults(
    stem: str, objective: str
) -> None:
    own, path = stem.partition("-")[2], RECIPES / f"{stem}.toml"
    recipe = read_recipe(path, objective=objective)
    assert recipe.loop == read_recipe(path).loop
    if objective == own:
        assert recipe == read_recipe(path)
    else:
        assert recipe.objective == make_recipe({"objective": {"name": objective}}).objective
    set_too = read_recipe(path, ["objective.lambda=0.3"], objective="ensemble")
    assert set_too.objective.lambda_ == 0.3


def test_defaults_are_a_recipe() -> None:
    recipe = make_recipe({})
    assert recipe.objective.name == "joint"
    assert make_recipe(recipe.as_dict()) == recipe


@pytest.mark.parametrize(
    ("table", "parts"),
    [
        (
            {"lop": {}},
            [
                "lop: unknown key",
                "allowed: model, data, objective, distillation, policies, opt",
            ],
        ),
        ({"loop": {"epoch": 3}}, ["loop.epoch: unknown key", "allowed: epochs, batch_size"]),
        ({"policies": {"temperature": 0}}, ["policies.temperature = 0", "a number above 0"]),
        ({"policies": {"vote_exponent": 1}}, ["policies.vote_exponent = 1", "from 0", "below 1"]),
        ({"policies": {"vote_fallback": "none"}}, ["policies.vote_fallback", "'majority'"]),
        ({"loop": {"epochs": 0}}, ["loop.epochs = 0", "from 1"]),
        (
            {"loop": {"precision": "int8"}},
            ["loop.precision = 'int8'", "allowed: 'no', 'bf16' or 'fp16'"],
        ),
        ({"optimiser": {"lr": -1.0}}, ["optimiser.lr = -1.0", "a number above 0"]),
        ({"optimiser": {"lr": float("nan")}}, ["optimiser.lr = nan", "a finite number above 0"]),
        ({"model": {"pooling": "max"}}, ["model.pooling = 'max'", "'max_mean' or 'attention'"]),
        ({"model": {"exit_layers": [3, 1]}}, ["model.exit_layers = [3, 1]", "ascending"]),
        ({"objective": {"name": "magic"}}, ["objective.name = 'magic'", "joint"]),
        ({"objective": {"lambda": 1}}, ["objective.lambda: unknown key", "weights, reduction"]),
        ({"objective": {"reduction": "max"}}, ["objective.reduction = 'max'", "'weighted'"]),
        ({"objective": {"weights": "steep"}}, ["objective.weights = 'steep'", "'depth'"]),
        ({"loop": {"batch-size": 3}}, ["loop.batch-size: unknown key; allowed: epochs"]),
        ({"my-sec": {}}, ["my-sec: unknown key; allowed: model, data"]),
        ({"objective": {"a-b": 1}}, ["objective.a-b: unknown key", "weights, reduction"]),
        ({"objective": {"name": [1]}}, ["objective.name = [1]; allowed", "joint"]),
        ({"objective": "joint"}, ["objective = 'joint'", "a table"]),
    ],
)
def test_wrong_values_are_named(table: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe(table)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["model.attention_heads=8"], "model.attention_heads = 8 has no effect; allowed: with "
         "model.pooling = 'attention', which is 'mean'"),
        (["model.attention_heads=4"], "model.attention_heads = 4 has no effect"),  # the default
        (["model.pooling=cls", "model.attention_heads=8"], "'attention', which is 'cls'"),
        (["distillation.temperature=4"], "distillation.temperature = 4.0 has no effect; allowed: "
         "with distillation.self_weight or distillation.teacher_weight above 0"),
        (["distillation.temperature=2"], "distillation.temperature = 2.0 has no effect"),
        (["distillation.temperature=4", "distillation.self_weight=0"], "above 0"),
    ],
)  # fmt: skip
def test_what_would_have_no_effect_is_refused(
    tmp_path: Path, overrides: list[str], says: str
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text("[loop]\nepochs = 1\n", encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        read_recipe(recipe, overrides)
    assert says in str(caught.value)
    # The record of such a run, as a point of a sweep may leave it, can still be read.
    kept = parse_recipe(read_table(recipe, overrides))
    assert parse_recipe(kept.as_dict()) == kept


def test_what_has_an_effect_stays() -> None:
    heads = make_recipe({"model": {"pooling": "attention", "attention_heads": 8}})
    soft = make_recipe({"distillation": {"self_weight": 0.1, "temperature": 4.0}})
    for recipe in (heads, soft):
        assert make_recipe(recipe.as_dict()) == recipe


def test_overrides_are_toml_values_and_bare_words_are_strings() -> None:
    table: dict[str, Any] = {"loop": {"epochs": 2}}
    for override in (
        "loop.epochs=5",
        "optimiser.lr = 1e-4",
        "model.pooling=cls",
        'objective.name="joint"',
        "objective.weights=[1, 2, 3]",
        "model.exit_layers=[2, 4, 6]",
    ):
        apply_override(table, override)
    recipe = make_recipe(table)
    assert (recipe.loop.epochs, recipe.optimiser.lr, recipe.model.pooling) == (5, 1e-4, "cls")
    assert recipe.objective.weights == (1.0, 2.0, 3.0)
    assert recipe.model.exit_layers == (2, 4, 6)


@pytest.mark.parametrize("override", ["loop.epochs", "=3", "loop.=3", "loop.epochs.more=1"])
def test_malformed_overrides_are_refused(override: str) -> None:
    with pytest.raises(RecipeError, match="--set"):
        apply_override({"loop": {"epochs": 2}}, override)


def test_unreadable_recipes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(tmp_path / "none.toml")
    with pytest.raises(RecipeError, match="Is a directory"):
        read_recipe(tmp_path)
    broken = tmp_path / "broken.toml"
    broken.write_text("[loop\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="not TOML"):
        read_recipe(broken)
