"""ConsistentEE's arithmetic: the acceptance cases, and the properties of its page."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from offramp_model.speed import count_exits, speedup_ratio
from offramp_training.config import make_recipe
from offramp_training.errors import RecipeError
from offramp_training.objectives.joint import exit_weights, joint_loss
from offramp_training.objectives.reinforce import (
    Baseline,
    advantages,
    exit_rewards,
    expected_reward,
    log_exit_probabilities,
    memorised_exits,
    policy_loss,
    sample_exits,
    sampled_cross_entropy,
)
from offramp_training.objectives.row_losses import exit_cross_entropies

CASES = json.loads((Path(__file__).parents[2] / "oracles.json").read_text(encoding="utf-8"))
BASELINES: tuple[Baseline, ...] = ("own_mean", "leave_one_out")


_dtype = torch.float64


@pytest.fixture(params=[torch.float64, torch.float32], ids=["float64", "float32"])
def tolerance(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """The cases' own in float32, rounding alone in float64."""
    monkeypatch.setitem(globals(), "_dtype", request.param)
    return 1e-11 if request.param == torch.float64 else 1e-5


def cases(kind: str) -> Any:
    found = [one for one in CASES["objectives"]["consistentee"] if one["kind"] == kind]
    assert found, kind
    return pytest.mark.parametrize("case", found, ids=lambda one: one["case"])


def column(values: list[float], *, grad: bool = False) -> Tensor:
    """One row's values by exit, [E, 1]; float64 but where `tolerance` asks for float32."""
    return torch.tensor(values, dtype=_dtype)[:, None].requires_grad_(grad)


def exits_of(layers: list[int]) -> Tensor:
    """Sampled 1-based layers of one row, [K, 1] 0-based."""
    return torch.tensor(layers)[:, None] - 1


def test_every_kind_of_case_is_looked_at() -> None:
    kinds = {one["kind"] for one in CASES["objectives"]["consistentee"]}
    assert kinds - {"parameter_count"} == {  # that one is with the gates, in the model's tests
        "memorised_layer",
        "reward",
        "preferred_exit",
        "exit_distribution",
        "expected_reward",
        "policy_loss",
        "joint_loss",
        "expected_policy_gradient",
        "stage1_loss",
    }


@cases("memorised_layer")
def test_memorised_layer(case: Any) -> None:
    right = torch.tensor(case["inputs"]["correct"]).bool()[:, None]
    assert memorised_exits(right).tolist() == [case["expected"]["memorised_layer"] - 1]


def rewards_of(inputs: Any, layers: list[int], ce: list[float], **options: Any) -> list[float]:
    """Rewards at some layers of a model whose last exit is at `num_layers`."""
    last = inputs["num_layers"]
    rewards = exit_rewards(
        column([*ce, 0.0]),
        torch.tensor([*layers, last]),
        torch.tensor([inputs["memorised_layer"]]),
        alpha=inputs["alpha"],
        **options,
    )
    values: list[float] = rewards[:-1, 0].tolist()
    return values


@cases("reward")
def test_reward(case: Any, tolerance: float) -> None:
    inputs, expected = case["inputs"], case["expected"]
    layers, ce = [inputs["exit_layer"]], [inputs["ce"]]
    (reward,) = rewards_of(inputs, layers, ce)
    assert reward == pytest.approx(expected["reward"], abs=tolerance)
    (plain,) = rewards_of(inputs, layers, ce, hardness=False)
    assert plain == pytest.approx(expected["reward_without_hardness"], abs=tolerance)


@cases("preferred_exit")
def test_preferred_exit(case: Any, tolerance: float) -> None:
    inputs = case["inputs"]
    rewards = rewards_of(inputs, inputs["layers"], inputs["ce"])
    assert rewards == pytest.approx(case["expected"]["rewards"], abs=tolerance)
    assert inputs["layers"][rewards.index(max(rewards))] == case["expected"]["exit_layer"]


@cases("exit_distribution")
def test_exit_distribution(case: Any, tolerance: float) -> None:
    expected = case["expected"]
    found = log_exit_probabilities(torch.logit(column(case["inputs"]["exit_probability"])))[:, 0]
    assert found.tolist() == pytest.approx(expected["log_P"], abs=tolerance)
    assert found.exp().tolist() == pytest.approx(expected["P"], abs=tolerance)
    for wrong in expected["log_P_3_if_last_layer_term_kept_pi3_0.9"].values():
        assert found[-1].item() != pytest.approx(wrong, abs=1e-3)


@cases("expected_reward")
def test_expected_reward(case: Any, tolerance: float) -> None:
    inputs, expected = case["inputs"], case["expected"]
    layers = torch.arange(1, inputs["num_layers"] + 1)
    rewards = exit_rewards(
        column(inputs["ce"]),
        layers,
        torch.tensor([inputs["memorised_layer"]]),
        alpha=inputs["alpha"],
    )
    assert rewards[:, 0].tolist() == pytest.approx(expected["rewards"], abs=tolerance)
    gates = column(inputs["gate_logits"], grad=True)
    reward = expected_reward(gates, rewards).sum()
    assert reward.item() == pytest.approx(expected["J"], abs=tolerance)
    (gradient,) = torch.autograd.grad(reward, gates)
    assert gradient[:, 0].tolist() == pytest.approx(expected["dJ_d_gate_logits"], abs=tolerance)


@cases("policy_loss")
def test_policy_loss(case: Any, tolerance: float) -> None:
    inputs, expected = case["inputs"], case["expected"]
    gates, rewards = column(inputs["gate_logits"], grad=True), column(inputs["rewards_by_layer"])
    exits = exits_of(inputs["exits"])
    loss = policy_loss(gates, rewards, exits, "own_mean")
    (gradient,) = torch.autograd.grad(loss, gates)
    assert loss.item() == pytest.approx(expected["policy_loss"], abs=tolerance)
    assert gradient[:, 0].tolist() == pytest.approx(expected["d_gate_logits"], abs=tolerance)
    earned = rewards.gather(0, exits)
    if "baseline" in expected:
        assert earned.mean().item() == pytest.approx(expected["baseline"], abs=tolerance)
        for baseline, key in (
            ("own_mean", "advantages"),
            ("leave_one_out", "leave_one_out_advantages"),
        ):
            over = advantages(earned, baseline)[:, 0].tolist()  # type: ignore[arg-type]
            assert over == pytest.approx(expected[key], abs=tolerance)
    else:  # all trajectories agree: exactly nothing to learn
        assert loss.item() == 0.0
        assert gradient.eq(0).all()


@cases("joint_loss")
def test_joint_loss(case: Any, tolerance: float) -> None:
    inputs, expected = case["inputs"], case["expected"]
    exits = exits_of(inputs["exits"])
    ce = sampled_cross_entropy(column(inputs["ce_by_layer"]), exits)
    gates, rewards = column(inputs["gate_logits"]), column(inputs["rewards_by_layer"])
    policy = policy_loss(gates, rewards, exits, "own_mean")
    assert ce.item() == pytest.approx(expected["ce_term"], abs=tolerance)
    assert policy.item() == pytest.approx(expected["policy_loss"], abs=tolerance)
    assert (ce + policy).item() == pytest.approx(expected["joint"], abs=tolerance)


def mean_gradient(
    gates: Tensor, rewards: Tensor, trajectories: int, baseline: Baseline
) -> list[float]:
    """Ascent gradient of the sampled loss, averaged over everything that can be drawn."""
    chances = log_exit_probabilities(gates.detach()).exp()[:, 0]
    total = torch.zeros_like(gates)
    for drawn in itertools.product(range(len(rewards)), repeat=trajectories):
        loss = policy_loss(gates, rewards, torch.tensor(drawn)[:, None], baseline)
        (gradient,) = torch.autograd.grad(loss, gates)
        total -= chances[list(drawn)].prod() * gradient
    values: list[float] = total[:, 0].tolist()
    return values


@cases("expected_policy_gradient")
def test_expected_policy_gradient(case: Any) -> None:
    inputs, expected = case["inputs"], case["expected"]
    gates, rewards = column(inputs["gate_logits"], grad=True), column(inputs["rewards_by_layer"])
    (exact,) = torch.autograd.grad(expected_reward(gates, rewards).sum(), gates)
    assert exact[:, 0].tolist() == pytest.approx(expected["exact"], abs=1e-11)
    for baseline, key in (("own_mean", "own_mean_baseline"), ("leave_one_out", "leave_one_out")):
        found = mean_gradient(gates, rewards, inputs["trajectories"], baseline)  # type: ignore[arg-type]
        assert found == pytest.approx(expected[key], abs=1e-11)


@cases("stage1_loss")
def test_stage_1_loss(case: Any, tolerance: float) -> None:
    losses = case["inputs"]["ce_by_layer"]
    # Two classes, one row: these logits have exactly these cross-entropies.
    logits = torch.tensor([[[0.0, math.log(math.expm1(ce))]] for ce in losses], dtype=_dtype)
    weights = exit_weights("depth", range(1, len(losses) + 1))
    row_losses = exit_cross_entropies(logits, torch.zeros(1, dtype=torch.long))
    loss = joint_loss(row_losses, weights, "weighted")
    assert loss.item() == pytest.approx(case["expected"]["loss"], abs=max(tolerance, 1e-7))


@given(ce=st.floats(0.01, 5), exits=st.integers(1, 12))
def test_stage_1_of_equal_losses_is_that_loss(ce: float, exits: int) -> None:
    logits = torch.tensor([0.0, math.log(math.expm1(ce))], dtype=torch.float64)
    weights = exit_weights("depth", range(1, exits + 1)).double()
    labels = torch.zeros(1, dtype=torch.long)
    loss = joint_loss(exit_cross_entropies(logits.expand(exits, 1, 2), labels), weights, "weighted")
    assert loss.item() == pytest.approx(ce, rel=1e-9)


def test_speed_up_is_a_ratio_of_sums() -> None:
    speedup = speedup_ratio(count_exits([3, 6, 12], 12))
    assert speedup == pytest.approx(1.714286, abs=1e-6)
    assert 1 - 1 / speedup == pytest.approx(0.416667, abs=1e-6)


correctness = st.lists(st.booleans(), min_size=1, max_size=12)


@given(right=correctness, flips=st.lists(st.booleans(), min_size=12, max_size=12))
def test_heads_before_the_memorised_layer_do_not_matter(
    right: list[bool], flips: list[bool]
) -> None:
    place = int(memorised_exits(torch.tensor(right)[:, None]))
    changed = [
        one ^ flip if exit_index < place - 1 else one
        for exit_index, (one, flip) in enumerate(zip(right, flips, strict=False))
    ]
    assert int(memorised_exits(torch.tensor(changed)[:, None])) == place
    if not right[-1]:
        assert place == len(right) - 1


def test_memorised_exits_of_many_rows_are_those_of_each() -> None:
    rows = list(itertools.product([False, True], repeat=5))
    together = memorised_exits(torch.tensor(rows).T)
    for row, found in zip(rows, together.tolist(), strict=True):
        after = [all(row[start:]) for start in range(5)]
        assert found == (after.index(True) if any(after) else 4)


@given(alpha=st.floats(0, 1), memorised=st.integers(1, 6), ce=st.floats(0, 5))
def test_a_later_exit_is_never_rewarded_more(alpha: float, memorised: int, ce: float) -> None:
    rewards = exit_rewards(
        column([ce] * 6), torch.arange(1, 7), torch.tensor([memorised]), alpha=alpha
    )
    assert (rewards.diff(dim=0) <= 0).all()
    if memorised == 6:
        assert rewards.eq(-column([ce] * 6)).all()


def test_layers_without_an_exit_count_in_the_cost() -> None:
    rewards = exit_rewards(column([0.0, 0.0]), torch.tensor([2, 6]), torch.tensor([3]), alpha=0.1)
    assert rewards[:, 0].tolist() == pytest.approx([-0.1, -0.3])


gate_values = st.lists(st.floats(-60, 60), min_size=1, max_size=11)


@given(values=gate_values)
def test_exit_probabilities_add_up(values: list[float]) -> None:
    chances = log_exit_probabilities(column(values)).exp()
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)
    low = log_exit_probabilities(torch.tensor(values, dtype=torch.bfloat16)[:, None])
    assert low.dtype == torch.float32


@given(values=gate_values, place=st.integers(0, 10))
def test_a_gate_that_is_certain_takes_all_that_comes(values: list[float], place: int) -> None:
    place %= len(values)
    values[place] = math.inf
    chances = log_exit_probabilities(column(values)).exp()[:, 0]
    assert chances[place + 1 :].eq(0).all()
    assert chances[0] == 1 or place > 0
    assert chances.sum().item() == pytest.approx(1, abs=1e-12)


def test_gates_that_never_open_leave_all_to_the_end() -> None:
    assert log_exit_probabilities(column([-math.inf] * 3)).exp()[:, 0].tolist() == [0, 0, 0, 1]


def test_the_gradient_of_a_trajectory_by_gate() -> None:
    chances = torch.tensor([0.2, 0.5, 0.7], dtype=torch.float64)
    for left_by, expected in enumerate(
        ([0.8, 0, 0], [-0.2, 0.5, 0], [-0.2, -0.5, 0.3], [-0.2, -0.5, -0.7])
    ):
        gates = torch.logit(chances)[:, None].requires_grad_()
        (gradient,) = torch.autograd.grad(log_exit_probabilities(gates)[left_by].sum(), gates)
        assert gradient[:, 0].tolist() == pytest.approx(expected, abs=1e-12)


def test_draws_follow_the_gates() -> None:
    torch.manual_seed(0)
    gates = torch.logit(torch.tensor([[0.2, 1.0, 0.0], [0.5, 0.3, 0.0]]))
    exits = sample_exits(gates, torch.rand(40_000, *gates.shape))
    assert exits.shape == (40_000, 3)
    shares = torch.stack([(exits == index).double().mean(dim=0) for index in range(3)])
    expected = torch.tensor([[0.2, 1.0, 0.0], [0.4, 0.0, 0.0], [0.4, 0.0, 1.0]]).double()
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert sample_exits(torch.full((2, 1), torch.nan), torch.rand(3, 2, 1)).eq(2).all()


@pytest.mark.parametrize("baseline", BASELINES)
def test_many_sampled_gradients_tend_to_the_exact_one(baseline: Baseline) -> None:
    torch.manual_seed(1)
    copies, trajectories = 60_000, 4  # many rows alike are many steps at once
    gates = torch.tensor([0.3, -0.8], dtype=torch.float64)
    rewards = torch.tensor([-0.9, -0.2, -0.4], dtype=torch.float64)
    many = gates[:, None].repeat(1, copies).requires_grad_()
    exits = sample_exits(many, torch.rand(trajectories, *many.shape))
    loss = policy_loss(many, rewards[:, None].expand(-1, copies), exits, baseline)
    (gradient,) = torch.autograd.grad(loss, many)
    one = gates[:, None].requires_grad_()
    (exact,) = torch.autograd.grad(expected_reward(one, rewards[:, None]).sum(), one)
    share = (trajectories - 1) / trajectories if baseline == "own_mean" else 1.0
    torch.testing.assert_close(-gradient.sum(dim=1), share * exact[:, 0], atol=2e-3, rtol=0)


@given(constant=st.floats(-100, 100), seed=st.integers(0, 99))
def test_a_constant_on_all_rewards_changes_nothing(constant: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gates = torch.randn(3, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    rewards = torch.randn(4, 5, generator=generator, dtype=torch.float64)
    exits = torch.randint(4, (6, 5), generator=generator)
    gradients = [
        torch.autograd.grad(policy_loss(gates, values, exits, "own_mean"), gates)[0]
        for values in (rewards, rewards + constant)
    ]
    torch.testing.assert_close(*gradients, atol=1e-10, rtol=0)


@pytest.mark.parametrize("baseline", BASELINES)
def test_equal_rewards_give_exactly_no_gradient(baseline: Baseline) -> None:
    gates = torch.randn(3, 50, requires_grad=True)
    exits = torch.randint(4, (1, 50)).expand(7, -1)
    loss = policy_loss(gates, torch.randn(4, 50), exits, baseline)
    loss.backward()
    assert gates.grad is not None
    assert gates.grad.eq(0).all()


def test_rewards_and_baseline_are_constants() -> None:
    ce = torch.rand(3, 4, requires_grad=True)
    rewards = exit_rewards(ce, torch.arange(1, 4), torch.ones(4), alpha=0.1)
    assert not rewards.requires_grad
    gates = torch.zeros(2, 4, requires_grad=True)
    policy_loss(gates, ce, torch.tensor([[0] * 4, [1] * 4]), "own_mean").backward()
    assert ce.grad is None
    assert gates.grad is not None


def test_heads_that_nobody_leaves_by_get_no_gradient() -> None:
    ce = torch.rand(4, 3, requires_grad=True)
    exits = torch.tensor([[0, 0, 2], [0, 2, 2]])
    sampled_cross_entropy(ce, exits).backward()
    # n / K of every row's trajectories, divided by the rows
    expected = torch.tensor([[2.0, 1, 0], [0, 0, 0], [0, 1, 2], [0, 0, 0]]) / 6
    torch.testing.assert_close(ce.grad, expected)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"trajectories": 1}, ["objective.trajectories = 1", "from 2"]),
        ({"theta": 0.0}, ["objective.theta = 0.0", "a number above 0"]),
        ({"theta": 1.0}, ["objective.theta = 1.0", "above 0 and below 1"]),
        ({"alpha": -0.1}, ["objective.alpha = -0.1", "from 0"]),
        ({"alpha": 11.0}, ["objective.alpha = 11.0", "to 10"]),
        ({"alpha": math.nan}, ["objective.alpha = nan"]),
        ({"baseline": "mean"}, ["objective.baseline = 'mean'", "'own_mean' or 'leave_one_out'"]),
        ({"stage3": "both"}, ["objective.stage3 = 'both'", "'joint' or 'alternate'"]),
        (
            {"stage1_epochs": 0},
            ["objective.stage1_epochs = 0", "a whole number from 1 on, or 'recipe'"],
        ),
        ({"stage2_lr": 0.0}, ["objective.stage2_lr = 0.0", "a number above 0", "'recipe'"]),
        ({"gate_hidden": -1}, ["objective.gate_hidden = -1", "from 0"]),
        ({"rounds": 0}, ["objective.rounds = 0", "from 1"]),
        ({"policy_weight": 0.0}, ["objective.policy_weight = 0.0", "a number above 0"]),
        ({"K": 8}, ["objective.K: unknown key", "trajectories"]),
    ],
)
def test_wrong_options_are_named(options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"objective": {"name": "consistentee", **options}})
    for part in parts:
        assert part in str(caught.value)


def test_the_recipe_is_its_own_record() -> None:
    recipe = make_recipe({"objective": {"name": "consistentee", "stage1_lr": "recipe"}})
    assert make_recipe(recipe.as_dict()) == recipe
    assert (recipe.objective.exit_policy, recipe.objective.exit_threshold) == ("gate", 0.5)
