"""L2W-DEN: acceptance cases, its budgets and derivatives, and that a look ahead leaves no trace."""

import copy
import json
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from offramp_training.batches import Batch
from offramp_training.config import DEFAULT_BACKBONE, OptimiserSection, make_recipe, read_recipe
from offramp_training.errors import RecipeError
from offramp_training.model import MultiExitModel, build_model
from offramp_training.objectives import OBJECTIVES, Progress
from offramp_training.objectives.joint import JointStage
from offramp_training.objectives.l2w import L2W
from offramp_training.objectives.l2w_allocation import (
    NOBODY,
    allocate,
    budget_threshold_sweep,
    budget_thresholds,
    exits_at,
    mean_exit_layer,
    meta_objective,
    q_for_speedup,
    round_shares,
    shares,
    speedup_for_q,
)
from offramp_training.objectives.l2w_meta import (
    MetaGradient,
    Parameters,
    PseudoUpdate,
    WeightNetwork,
    clipped,
    loss_weights,
    lowest_weight,
    meta_gradient,
    optimiser_update,
    sgd_update,
    weighted_loss,
)
from offramp_training.objectives.l2w_stage import L2WStage, halves
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.optimiser import lr_factor, make_optimiser
from offramp_training.resume import load_tree, save_tree

ROOT = Path(__file__).parents[3]
CASES = json.loads((ROOT / "tests" / "oracles.json").read_text(encoding="utf-8"))["objectives"]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
SEEDS = st.integers(0, 2**31)
BUDGETS = st.floats(0.05, 1.95)
ROUNDINGS: Any = ("cumulative", "largest_remainder", "floor")
CENTRINGS: Any = ("mat", "col", "row")
KINDS = (
    *("shares", "speedup_for_q", "q_for_speedup", "round_shares", "allocation", "meta_loss"),
    *("budget_thresholds", "budget_thresholds_sweep", "centring", "centring_vjp", "wpn"),
    *("pseudo_update_quadratic", "l2w_meta_gradient", "cosine_schedule", "parameter_count"),
)


def cases(kind: str) -> list[Any]:
    found = [case for case in CASES["l2w_den"] if case["kind"] == kind]
    assert found
    return [pytest.param(case, id=case["case"]) for case in found]


def tolerance_of(case: dict[str, Any], dtype: torch.dtype = torch.float64) -> float:
    tolerance = case["tolerance"]
    if "abs" in tolerance:
        return float(tolerance["abs"])
    return float(tolerance["abs_float64" if dtype == torch.float64 else "abs_float32"])


def assert_near(found: Tensor, expected: Any, case: dict[str, Any]) -> None:
    found = found.detach()
    wanted = torch.tensor(expected, dtype=found.dtype).reshape(found.shape)
    torch.testing.assert_close(found, wanted, atol=tolerance_of(case, found.dtype), rtol=0)


def sets_of(exit_of_row: Tensor, exits: int) -> list[list[int]]:
    return [(exit_of_row == k).nonzero().flatten().tolist() for k in range(exits)]


def exit_of_row_from(sets: list[list[int]]) -> Tensor:
    exit_of_row = torch.full((sum(map(len, sets)),), -1)
    for k, rows in enumerate(sets):
        exit_of_row[rows] = k
    return exit_of_row


def test_every_kind_of_acceptance_case_is_tested_here() -> None:
    assert {case["kind"] for case in CASES["l2w_den"]} == set(KINDS)


# ---- budgets -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("shares"))
def test_shares(case: dict[str, Any]) -> None:
    found = shares(case["inputs"]["K"], case["inputs"]["q"])
    assert found == pytest.approx(case["expected"]["p"], abs=tolerance_of(case))


@pytest.mark.parametrize("case", cases("speedup_for_q"))
def test_speedup_for_q(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    layers = inputs.get("exit_layers") or range(1, inputs["K"] + 1)
    total = inputs.get("num_layers") or inputs["K"]
    found = [speedup_for_q(layers, total, q) for q in inputs["q"]]
    assert found == pytest.approx(case["expected"]["speedup"], abs=tolerance_of(case))


@pytest.mark.parametrize("case", cases("q_for_speedup"))
def test_q_for_speedup(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    found = [q_for_speedup(range(1, k + 1), k, inputs["speedup"]) for k in inputs["K"]]
    assert found == pytest.approx(case["expected"]["q"], abs=tolerance_of(case))


@pytest.mark.parametrize("case", cases("round_shares"))
def test_round_shares(case: dict[str, Any]) -> None:
    inputs, expected = case["inputs"], case["expected"]
    layers = range(1, inputs["K"] + 1)
    counts = round_shares(shares(inputs["K"], inputs["q"]), inputs["n"], inputs["rounding"])
    assert counts == expected["counts"]
    mean = sum(k * count for k, count in zip(layers, counts, strict=True)) / inputs["n"]
    assert mean == pytest.approx(expected["mean_exit"], abs=1e-4)
    if "ideal_mean_exit" in expected:
        ideal = mean_exit_layer(layers, inputs["q"])
        assert ideal == pytest.approx(expected["ideal_mean_exit"], abs=1e-4)


@given(st.integers(2, 24), BUDGETS, BUDGETS)
def test_shares_sum_to_one_and_a_larger_q_goes_deeper(exits: int, q: float, other: float) -> None:
    layers = range(1, exits + 1)
    assert math.fsum(shares(exits, q)) == pytest.approx(1)
    assert shares(exits, 1.0) == pytest.approx([1 / exits] * exits)
    low, high = sorted((q, other))
    assert mean_exit_layer(layers, low) <= mean_exit_layer(layers, high) + 1e-12


@given(st.lists(st.integers(1, 24), min_size=2, max_size=12, unique=True), st.floats(0.02, 0.98))
def test_q_for_speedup_is_the_inverse_of_speedup_for_q(layers: list[int], place: float) -> None:
    layers.sort()
    slowest, fastest = 1.0, layers[-1] / layers[0]
    speedup = slowest + place * (fastest - slowest)
    q = q_for_speedup(layers, layers[-1], speedup)
    assert speedup_for_q(layers, layers[-1], q) == pytest.approx(speedup, rel=1e-6)


@given(st.integers(1, 24), st.integers(0, 600), BUDGETS, st.sampled_from(ROUNDINGS))
def test_counts_sum_to_the_rows(exits: int, rows: int, q: float, rounding: Any) -> None:
    p = shares(exits, q)
    counts = round_shares(p, rows, rounding)
    assert len(counts) == exits
    assert sum(counts) == rows
    assert min(counts) >= 0
    if rounding == "cumulative":
        for k in range(exits):
            assert abs(sum(counts[: k + 1]) - rows * sum(p[: k + 1])) <= 0.5 + 1e-9
    elif rounding == "largest_remainder":
        assert all(abs(c - rows * share) < 1 for c, share in zip(counts, p, strict=True))


# ---- allocation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("allocation"))
@DTYPES
def test_allocation(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    confidences = torch.tensor(inputs["confidences"], dtype=dtype)
    rows, exits = confidences.shape
    p = shares(exits, inputs["q"])
    assert p == pytest.approx(expected.get("shares", p), abs=1e-6)
    counts = round_shares(p, rows, inputs["rounding"])
    assert counts == expected["counts"]
    assert sets_of(allocate(confidences, counts), exits) == expected["sets_0based"]


@pytest.mark.parametrize("case", cases("meta_loss"))
@DTYPES
def test_meta_objective(case: dict[str, Any], dtype: torch.dtype) -> None:
    losses = torch.tensor(case["inputs"]["ce"], dtype=dtype)
    exit_of_row = exit_of_row_from(case["inputs"]["sets_0based"])
    expected = case["expected"]
    found = meta_objective(losses, exit_of_row)
    assert_near(found, expected["L_meta_sum_of_means"], case)
    assert_near(found / losses.shape[1], expected["mean_over_exits"], case)
    assert_near(losses[range(len(losses)), exit_of_row].mean(), expected["sample_mean"], case)


def test_an_exit_without_rows_adds_nothing() -> None:
    losses = torch.arange(9.0).reshape(3, 3)
    exit_of_row = torch.tensor([0, 2, 2])
    assert float(meta_objective(losses, exit_of_row)) == 0.0 + (5.0 + 8.0) / 2


@given(SEEDS, st.integers(1, 40), st.integers(1, 8), BUDGETS, st.sampled_from(ROUNDINGS))
def test_the_sets_share_the_rows_and_permute_with_them(
    seed: int, rows: int, exits: int, q: float, rounding: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(rows, exits, generator=generator, dtype=torch.float64)
    counts = round_shares(shares(exits, q), rows, rounding)
    exit_of_row = allocate(scores, counts)
    assert torch.bincount(exit_of_row, minlength=exits).tolist() == counts
    order = torch.randperm(rows, generator=generator)
    assert torch.equal(allocate(scores[order], counts), exit_of_row[order])
    for k in range(exits - 1):  # no row left behind is surer than one that was taken
        taken, left = scores[exit_of_row == k, k], scores[exit_of_row > k, k]
        assert not taken.numel() or not left.numel() or taken.min() >= left.max()


def test_a_row_of_nan_goes_last() -> None:
    scores = torch.tensor([[math.nan, math.nan], [0.2, 0.9], [0.1, 0.9]])
    assert allocate(scores, [2, 1]).tolist() == [1, 0, 0]
    assert exits_at(scores, torch.tensor([0.1, 0.95, -1e8])[[0, 2]]).tolist() == [2, 1, 1]
    assert budget_thresholds(scores, 1.0)[0] == scores[1, 0]


def test_counts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"counts \[1, 1\] do not share 3 rows among 2 exits"):
        allocate(torch.rand(3, 2), [1, 1])


# ---- thresholds ----------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("budget_thresholds"))
@DTYPES
def test_budget_thresholds(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    confidences = torch.tensor(inputs["confidences"], dtype=dtype)
    rows, exits = confidences.shape
    floors = round_shares(shares(exits, inputs["q"]), rows, "floor")
    assert floors[:2] == expected["floors_1_2"]
    thresholds = budget_thresholds(confidences, inputs["q"])
    assert torch.equal(thresholds, torch.tensor(expected["thresholds"], dtype=dtype))
    leave_at = exits_at(confidences, thresholds)
    assert leave_at.tolist() == expected["exit_layers"]
    correct = torch.tensor(inputs["correct"])[range(rows), leave_at - 1]
    assert correct.double().mean() == expected["accuracy"]
    costs = torch.tensor(inputs["costs"])[leave_at - 1]
    assert costs.double().mean() == expected["cost"]


@pytest.mark.parametrize("case", cases("budget_thresholds_sweep"))
def test_budget_threshold_sweep(case: dict[str, Any]) -> None:
    confidences = torch.tensor(case["inputs"]["confidences"], dtype=torch.float64)
    expected = case["expected"]
    sweep = budget_threshold_sweep(confidences, case["inputs"]["q"])
    assert torch.equal(sweep, torch.tensor(expected["thresholds"], dtype=torch.float64))
    exits = [exits_at(confidences, thresholds) for thresholds in sweep]
    assert [found.tolist() for found in exits] == expected["exit_layers"]
    assert [float(found.double().mean()) for found in exits] == expected["cost"]
    assert exits[1][6] < exits[0][6]  # a larger q, and row 6 leaves earlier: hence `monotone`


@given(SEEDS, st.integers(1, 30), st.integers(2, 6), st.lists(BUDGETS, min_size=2, max_size=6))
def test_the_monotone_sweep_never_leaves_earlier_under_a_larger_q(
    seed: int, rows: int, exits: int, budgets: list[float]
) -> None:
    budgets.sort()
    confidences = torch.rand(rows, exits, generator=torch.Generator().manual_seed(seed))
    sweep = budget_threshold_sweep(confidences, budgets, monotone=True)
    assert bool((sweep.diff(dim=0) >= 0).all())
    leave_at = torch.stack([exits_at(confidences, thresholds) for thresholds in sweep])
    assert bool((leave_at.diff(dim=0) >= 0).all())
    plain = budget_threshold_sweep(confidences, budgets)
    assert torch.equal(plain[-1], sweep[-1])  # the largest q is as it was


def test_nobody_leaves_where_fewer_rows_are_left_than_asked_for() -> None:
    confidences = torch.tensor([[0.9, 0.8, 0.7]] * 4)  # ties: all leave at the first exit
    assert budget_thresholds(confidences, 1.0)[:2].tolist() == [confidences[0, 0], NOBODY]


# ---- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("centring"))
@DTYPES
def test_centring(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = case["inputs"]
    raw = torch.tensor(inputs["u"], dtype=dtype)
    assert_near(loss_weights(raw, inputs["eps"], inputs["mode"]), case["expected"]["W"], case)


@pytest.mark.parametrize("case", cases("wpn"))
@DTYPES
def test_weight_network(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    network = WeightNetwork(2, 2, hidden=3).to(dtype)
    with torch.no_grad():
        network.hidden.weight.copy_(torch.tensor(inputs["W1"]))
        network.hidden.bias.copy_(torch.tensor(inputs["b1"]))
        network.output.weight.copy_(torch.tensor(inputs["W2"]))
        network.output.bias.copy_(torch.tensor(inputs["b2"]))
    losses = torch.tensor(inputs["losses"], dtype=dtype)
    assert_near(network.hidden(losses), expected["hidden_pre_activation"], case)
    raw = network(losses)
    assert_near(raw, expected["u"], case)
    for centring, eps in (("mat", 0.3), ("col", 0.8)):
        weights = loss_weights(raw, eps, centring)  # type: ignore[arg-type]
        assert_near(weights, expected[f"W_{centring}_eps{eps}"], case)
        found = weighted_loss(losses, weights)
        assert_near(found, expected[f"weighted_loss_{centring}_eps{eps}"], case)
    plain = weighted_loss(losses, torch.ones_like(losses))
    assert_near(plain, expected["unweighted_loss"], case)
    assert_near(weighted_loss(losses, torch.ones_like(losses), "mean"), float(plain) / 2, case)


@pytest.mark.parametrize("case", cases("centring_vjp"))
@DTYPES
def test_the_gradient_goes_back_through_the_centring(
    case: dict[str, Any], dtype: torch.dtype
) -> None:
    upstream = torch.tensor(case["inputs"]["dJ_dW"], dtype=dtype)
    for centring, eps in (("mat", 0.3), ("col", 0.8)):
        raw = torch.zeros_like(upstream, requires_grad=True)
        loss_weights(raw, eps, centring).backward(upstream)  # type: ignore[arg-type]
        assert raw.grad is not None
        assert_near(raw.grad, case["expected"][f"dJ_du_{centring}_eps{eps}"], case)


@pytest.mark.parametrize("case", cases("parameter_count"))
def test_parameter_count(case: dict[str, Any]) -> None:
    exits, hidden = case["inputs"]["K"], case["inputs"]["hidden"]
    network = WeightNetwork(exits, exits, hidden)
    assert sum(p.numel() for p in network.parameters()) == case["expected"]["total"]


@given(SEEDS, st.integers(1, 9), st.integers(1, 6), st.floats(0, 1), st.sampled_from(CENTRINGS))
def test_weights_have_mean_one_stay_in_bounds_and_permute_with_the_rows(
    seed: int, rows: int, exits: int, eps: float, centring: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    raw = 2 * torch.rand(rows, exits, generator=generator, dtype=torch.float64) - 1
    weights = loss_weights(raw, eps, centring)
    means = {"mat": weights.mean(), "row": weights.mean(dim=0), "col": weights.mean(dim=1)}
    torch.testing.assert_close(means[centring], torch.ones_like(means[centring]))
    lowest = lowest_weight(eps, centring, rows, exits)
    assert weights.min() >= lowest - 1e-12
    assert weights.max() <= 2 - lowest + 1e-12
    order = torch.randperm(rows, generator=generator)
    torch.testing.assert_close(loss_weights(raw[order], eps, centring), weights[order])


def test_the_bound_of_the_weights_is_reached() -> None:
    raw = torch.tensor([[-1.0, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    for centring in CENTRINGS:
        lowest = float(loss_weights(raw, 0.8, centring).min())
        assert lowest == pytest.approx(lowest_weight(0.8, centring, 2, 3))


@given(SEEDS, st.floats(0.1, 10))
def test_scaling_the_weights_scales_the_gradient(seed: int, factor: float) -> None:
    network = TwoExits(CASES_BY_NAME["C8_network_all"], torch.float64)
    weights = torch.rand(2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    losses = network.train_losses(network.leaves)
    values = list(network.leaves.values())
    once = torch.autograd.grad(weighted_loss(losses, weights), values, retain_graph=True)
    scaled = torch.autograd.grad(weighted_loss(losses, factor * weights), values)
    for a, b in zip(once, scaled, strict=True):
        torch.testing.assert_close(factor * a, b)


# ---- the look ahead ------------------------------------------------------------------------------


class TwoExits:
    """The acceptance cases' network of sixteen numbers."""

    def __init__(self, case: dict[str, Any], dtype: torch.dtype) -> None:
        inputs = self.inputs = case["inputs"]
        theta = torch.tensor(inputs["theta"], dtype=dtype).reshape(4, 2, 2)
        names = ("A", "U1", "B", "U2")
        self.all = dict(zip(names, theta, strict=True))
        self.moved = [n for n in names if inputs["pseudo_update"] != "heads_only" or "U" in n]
        self.leaves = {name: self.all[name].clone().requires_grad_() for name in self.moved}
        self.weights = torch.tensor(inputs["W"], dtype=dtype)
        gains = torch.tensor(inputs.get("P", [1.0] * 16), dtype=dtype).reshape(4, 2, 2)
        self.gain = {name: inputs["lr"] * g for name, g in zip(names, gains, strict=True)}

    def logits(self, parameters: Parameters, rows: list[list[float]]) -> Tensor:
        p = self.all | parameters
        first = torch.tanh(torch.tensor(rows, dtype=self.weights.dtype) @ p["A"].T)
        second = torch.tanh(first @ p["B"].T)
        return torch.stack([first @ p["U1"].T, second @ p["U2"].T])

    def train_losses(self, parameters: Parameters) -> Tensor:
        labels = torch.tensor(self.inputs["train_y"])
        return exit_cross_entropies(self.logits(parameters, self.inputs["train_x"]), labels).T

    def meta_loss(self, parameters: Parameters) -> Tensor:
        logits = self.logits(parameters, self.inputs["meta_x"])
        losses = exit_cross_entropies(logits, torch.tensor(self.inputs["meta_y"])).T
        return meta_objective(losses, self.allocation(parameters))

    def confidences(self, parameters: Parameters) -> Tensor:
        return self.logits(parameters, self.inputs["meta_x"]).softmax(dim=-1).amax(dim=-1).T

    def allocation(self, parameters: Parameters) -> Tensor:
        counts = round_shares(shares(2, self.inputs["q"]), 4, "floor")
        return allocate(self.confidences(parameters), counts)

    def rule(self, gradients: Parameters) -> PseudoUpdate:
        base = {name: value.detach() for name, value in self.leaves.items()}
        return PseudoUpdate(base, {name: self.gain[name] for name in base}, self.inputs["lr"])

    def look_ahead(self, form: Any, weights: Tensor | None = None) -> MetaGradient:
        return meta_gradient(
            form,
            self.leaves,
            self.train_losses(self.leaves),
            self.weights if weights is None else weights,
            rule=self.rule,
            train_losses=self.train_losses,
            meta_loss=self.meta_loss,
        )

    def recomputed(self, weights: Tensor) -> float:
        """L_meta from the start, for weights that need no derivative."""
        loss = weighted_loss(self.train_losses(self.leaves), weights)
        found = torch.autograd.grad(loss, list(self.leaves.values()))
        gradients = dict(zip(self.leaves, found, strict=True))
        with torch.no_grad():
            return float(self.meta_loss(self.rule(gradients)(gradients)))


CASES_BY_NAME = {case["case"]: case for case in CASES["l2w_den"]}
NETWORK_CASES = pytest.mark.parametrize("case", cases("l2w_meta_gradient"))


@NETWORK_CASES
@DTYPES
def test_meta_gradient(case: dict[str, Any], dtype: torch.dtype) -> None:
    network, expected = TwoExits(case, dtype), case["expected"]
    losses = network.train_losses(network.leaves)
    assert_near(losses, expected["train_losses"], case)
    loss = weighted_loss(losses, network.weights)
    assert_near(loss, expected["L_tr"], case)
    gradient = dict(zip(("A", "U1", "B", "U2"), expected["gradient"], strict=False))
    found = torch.autograd.grad(loss, list(network.leaves.values()))
    for name, values in zip(network.leaves, found, strict=True):
        place = 4 * ("A", "U1", "B", "U2").index(name)
        gradient[name] = expected["gradient"][place : place + 4]
        assert_near(values, gradient[name], case)

    ahead = network.look_ahead("exact")
    assert_near(network.confidences(ahead.updated), expected["meta_confidences"], case)
    assert sets_of(network.allocation(ahead.updated), 2) == expected["allocation_0based"]
    assert_near(ahead.loss, expected["L_meta"], case)
    assert_near(ahead.weights, expected["dL_meta_dW"], case)
    for key in ("dJ_du_mat_eps0.3", "dJ_du_col_eps0.8"):
        if key in expected:
            _, _, centring, eps = key.split("_")
            raw = torch.zeros(2, 2, dtype=dtype, requires_grad=True)
            loss_weights(raw, float(eps[3:]), centring).backward(ahead.weights)  # type: ignore[arg-type]
            assert raw.grad is not None
            assert_near(raw.grad, expected[key], case)

    central = network.look_ahead("central")
    wanted = torch.tensor(expected["dL_meta_dW"], dtype=dtype)
    torch.testing.assert_close(central.weights, wanted, atol=1e-5, rtol=0)
    assert_near(central.loss, expected["L_meta"], case)
    if "g_meta_norm" in expected:
        values = list(central.updated.values())
        g_meta = torch.autograd.grad(network.meta_loss(central.updated), values)
        norm = torch.stack([part.norm() for part in g_meta]).norm()
        assert_near(norm, expected["g_meta_norm"], case)


@NETWORK_CASES
def test_the_derivative_is_that_of_computing_it_all_again(case: dict[str, Any]) -> None:
    network = TwoExits(case, torch.float64)
    exact = network.look_ahead("exact").weights
    for place in ((0, 0), (0, 1), (1, 0), (1, 1)):
        nudge = torch.zeros(2, 2, dtype=torch.float64)
        nudge[place] = 1e-5
        ahead = network.recomputed(network.weights + nudge)
        behind = network.recomputed(network.weights - nudge)
        assert (ahead - behind) / 2e-5 == pytest.approx(float(exact[place]), abs=1e-8)


@NETWORK_CASES
@given(seed=SEEDS)
def test_following_the_derivative_lowers_the_meta_loss(case: dict[str, Any], seed: int) -> None:
    network = TwoExits(case, torch.float64)
    generator = torch.Generator().manual_seed(seed)
    weights = network.weights + 0.1 * torch.randn(2, 2, generator=generator, dtype=torch.float64)
    for form in ("exact", "central"):
        slope = network.look_ahead(form, weights).weights
        step = weights - 1e-4 * slope / slope.norm()
        assert network.recomputed(step) < network.recomputed(weights)


def test_a_mean_over_exits_divides_the_derivative() -> None:
    network = TwoExits(CASES_BY_NAME["C8_network_all"], torch.float64)

    def look_ahead(form: Any, reduction: Any, lr: float) -> Tensor:
        losses = network.train_losses(network.leaves)
        return meta_gradient(
            form,
            network.leaves,
            losses,
            network.weights,
            rule=lambda gradients: sgd_update(network.leaves, lr),
            train_losses=network.train_losses,
            meta_loss=network.meta_loss,
            reduction=reduction,
        ).weights

    for form in ("exact", "central"):  # half the gradient at twice the rate: the same step
        mean, total = look_ahead(form, "mean", 1.0), look_ahead(form, "sum", 0.5)
        torch.testing.assert_close(mean, total)


def test_where_the_meta_loss_is_flat_the_derivative_is_zero() -> None:
    theta = {"theta": torch.ones(2, requires_grad=True)}
    ahead = meta_gradient(
        "central",
        theta,
        theta["theta"].square()[:, None],
        torch.ones(2, 1),
        rule=lambda gradients: sgd_update(theta, 0.1),
        train_losses=lambda p: p["theta"].square()[:, None],
        meta_loss=lambda p: 0 * p["theta"].sum(),
    )
    assert torch.equal(ahead.weights, torch.zeros(2, 1))


@pytest.mark.parametrize("case", cases("pseudo_update_quadratic"))
@DTYPES
@pytest.mark.parametrize("form", ["exact", "central"])
def test_pseudo_update_on_a_quadratic(case: dict[str, Any], dtype: torch.dtype, form: Any) -> None:
    inputs, expected = case["inputs"], case["expected"]
    centres, targets = (torch.tensor(inputs[key], dtype=dtype) for key in ("c", "meta_targets"))
    theta = {"theta": torch.tensor(inputs["theta"], dtype=dtype, requires_grad=True)}
    exit_of_row = exit_of_row_from(inputs["allocation_0based"])
    buffer = inputs["momentum_buffer"]
    update = sgd_update(
        theta,
        inputs["lr"],
        momentum=inputs["momentum"],
        buffers={"theta": None if buffer is None else torch.tensor(buffer, dtype=dtype)},
        weight_decay=inputs["weight_decay"],
    )

    def train_losses(parameters: Parameters) -> Tensor:
        return (parameters["theta"] - centres).square() / 2

    def meta_loss(parameters: Parameters) -> Tensor:
        return meta_objective((parameters["theta"] - targets).square() / 2, exit_of_row)

    def rule(gradients: Parameters) -> PseudoUpdate:
        assert_near(gradients["theta"], expected["gradient"], case)
        return update

    ahead = meta_gradient(
        form,
        theta,
        train_losses(theta),
        torch.tensor(inputs["W"], dtype=dtype),
        rule=rule,
        train_losses=train_losses,
        meta_loss=meta_loss,
    )
    assert_near(ahead.updated["theta"], expected["theta_hat"], case)
    assert_near(ahead.loss, expected["L_meta"], case)
    moved = ahead.updated["theta"].detach().requires_grad_()
    (g_meta,) = torch.autograd.grad(meta_loss({"theta": moved}), [moved])
    assert_near(g_meta, expected["g_meta"], case)
    assert_near(ahead.weights, expected["dL_meta_dW"], case)


# ---- the optimiser's own rule --------------------------------------------------------------------


def steps_of(optimiser: Any, parameters: list[Tensor], count: int) -> list[Tensor]:
    """A few real steps with made-up gradients; returns the gradients of the next."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        optimiser.step()
    return [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]


@pytest.mark.parametrize("done", [0, 3])
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.1}),
        (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
        # Without its first moment and decay, the diagonal is all there is to Adam's step.
        (torch.optim.AdamW, {"lr": 0.1, "betas": (0.0, 0.99), "weight_decay": 0.0}),
        (torch.optim.Adam, {"lr": 0.1, "betas": (0.0, 0.9)}),
    ],
)
def test_the_pseudo_update_is_the_optimisers_next_step(kind: Any, options: Any, done: int) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [
        torch.nn.Parameter(torch.randn(3, 2, generator=generator, dtype=torch.float64))
        for _ in range(2)
    ]
    groups = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": 0.03}]
    optimiser = kind(groups, **options)
    gradients = dict(zip("ab", steps_of(optimiser, parameters, done), strict=True))
    trained = dict(zip("ab", parameters, strict=True))
    values = {name: p.detach().clone() for name, p in trained.items()}
    before = copy.deepcopy(optimiser.state_dict())
    update = optimiser_update(optimiser, trained, values, gradients)
    found = update(gradients)
    assert update.rate == 0.1
    assert_same_tree(optimiser.state_dict(), before)
    for name, p in trained.items():
        p.grad = gradients[name]
    optimiser.step()
    for name, p in trained.items():
        torch.testing.assert_close(found[name], p.detach())


@given(SEEDS, st.floats(0.01, 100))
def test_a_clipped_pseudo_update_is_the_step_after_clipping(seed: int, clip_norm: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    parameters = [
        torch.nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))
        for _ in range(2)
    ]
    optimiser = torch.optim.AdamW(parameters, lr=0.1, betas=(0.0, 0.9), weight_decay=0.0)
    gradients = dict(zip("ab", steps_of(optimiser, parameters, 2), strict=True))
    trained = dict(zip("ab", parameters, strict=True))
    values = {name: p.detach().clone() for name, p in trained.items()}
    rule = clipped(lambda g: optimiser_update(optimiser, trained, values, g), clip_norm)
    found = rule(gradients)(gradients)
    for name, p in trained.items():
        p.grad = gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    optimiser.step()
    for name, p in trained.items():
        torch.testing.assert_close(found[name], p.detach())


def test_an_entry_that_never_had_a_gradient_does_not_fly_away() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimiser = torch.optim.AdamW([parameter], lr=1e-3)
    for _ in range(10):
        parameter.grad = torch.tensor([1.0, 0.0])
        optimiser.step()
    gradients = {"p": torch.tensor([1.0, 1.0])}
    values = {"p": parameter.detach()}
    update = optimiser_update(optimiser, {"p": parameter}, values, gradients)
    assert float(update.direction(gradients)["p"].abs().max()) < 0.01


def test_an_optimiser_with_another_rule_is_refused() -> None:
    parameter = torch.nn.Parameter(torch.zeros(2))
    values = {"p": parameter.detach()}
    for optimiser in (
        torch.optim.RMSprop([parameter], foreach=False),
        torch.optim.SGD([parameter], lr=0.1, momentum=0.9, nesterov=True),
        torch.optim.SGD([parameter], lr=0.1, momentum=0.9, dampening=0.5),
        torch.optim.AdamW([parameter], amsgrad=True),
    ):
        with pytest.raises(
            ValueError, match=r"no pseudo-update for \w+ as it is set; allowed: SGD"
        ):
            optimiser_update(optimiser, {"p": parameter}, values, values)


@pytest.mark.parametrize("case", cases("cosine_schedule"))
def test_cosine_schedule(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    section = OptimiserSection(schedule="cosine", warmup_ratio=0.0)
    rates = [inputs["lr0"] * lr_factor(t, inputs["total"], section) for t in inputs["steps"]]
    assert rates == pytest.approx(case["expected"]["lr"], abs=1e-9)


# ---- the stage -----------------------------------------------------------------------------------

LABELS = ("pleasure", "dread", "craft")
START = Progress(epoch=0, step=0, total_steps=100, lr=5e-5)


def make_batch(rows: int = 16, width: int = 7, seed: int = 0) -> Batch:
    """Token ids that give the label away, padded to several lengths."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (rows,), generator=generator)
    ids = torch.randint(8, 20, (rows, width), generator=generator)
    ids[:, 0] = 2
    ids[:, 2] = 5 + labels
    lengths = torch.randint(4, width + 1, (rows,), generator=generator)
    mask = (torch.arange(width) < lengths[:, None]).long()
    return Batch(torch.arange(rows), ids * mask, mask, torch.zeros_like(ids), labels)


@pytest.fixture
def model(backbone: Path) -> MultiExitModel:
    section = make_recipe({"model": {"backbone": str(backbone), "max_length": 16}}).model
    built = build_model(backbone, section, LABELS, seed=0)
    return built.train()


def make_stage(model: MultiExitModel, batch_size: int = 16, **options: Any) -> L2WStage:
    recipe = make_recipe({"loop": {"batch_size": batch_size, "seed": 3, "epochs": 2}})
    (stage,) = L2W(**options).stages(model, recipe)
    assert isinstance(stage, L2WStage)
    stage.optimiser = make_optimiser(stage, recipe.optimiser)
    return stage


def descend(stage: L2WStage, batch: Batch, progress: Progress = START) -> list[float]:
    """What the loop does with one batch."""
    found = []
    for loss in stage.losses(batch, progress):
        loss.backward()  # type: ignore[no-untyped-call]
        stage.optimiser.step()
        stage.model.zero_grad(set_to_none=True)
        found.append(float(loss.detach()))
    return found


def assert_same_tree(found: Any, expected: Any) -> None:
    """Equal to the last bit."""
    if isinstance(expected, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same_tree(found[key], value)
    elif isinstance(expected, list):
        for one, other in zip(found, expected, strict=True):
            assert_same_tree(one, other)
    else:
        assert found == expected


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"centring": "col", "eps": 0.8, "network_input": "both", "rounding": "floor"},
        {"centring": "row", "network_input": "confidence", "negative_weights": "clip"},
        {"pseudo_rule": "precond"},
        {"pseudo_rule": "precond", "pseudo_layers": 1, "reduction": "mean"},
        {"pseudo_layers": 0, "allocation_signal": "entropy", "q": [0.5, 0.75]},
        {"derivative": "exact", "allocation_signal": "energy"},
        {"derivative": "exact", "pseudo_rule": "precond", "allocation_signal": "margin"},
    ],
)
def test_a_meta_step_teaches_the_network_and_leaves_no_other_trace(
    model: MultiExitModel, options: Any
) -> None:
    stage = make_stage(model, **options)
    batch = make_batch()
    descend(stage, batch)  # so that the optimiser has a state
    weights = copy.deepcopy(model.state_dict())
    optimiser = copy.deepcopy(stage.optimiser.state_dict())
    network = copy.deepcopy(stage.network.state_dict())
    random = torch.get_rng_state()
    model.backbone.eval()
    model.train()
    step = stage.meta_step(*halves(batch), START)
    assert_same_tree(dict(model.state_dict()), dict(weights))
    assert_same_tree(stage.optimiser.state_dict(), optimiser)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.grad is None for p in model.parameters())
    assert all(module.training for module in model.modules())
    assert step == stage.newest
    assert sum(step.counts) == 8
    assert step.gradient_norm > 0
    assert step.gradient_norm > 10 * step.decay_norm  # it does not drown
    for name, p in stage.network.named_parameters():
        assert p.grad is not None, name
        assert bool(p.grad.any()), name
        assert not torch.equal(p, network[name]), name


@pytest.mark.parametrize("rule", ["sgd", "precond"])
@pytest.mark.parametrize("layers", ["all", 1, 0])
@pytest.mark.parametrize(
    ("dtype", "step", "tolerance"), [(torch.float64, 1e-4, 1e-5), (torch.float32, 1e-2, 1e-2)]
)
def test_both_forms_of_the_derivative_agree_on_an_encoder(
    model: MultiExitModel, rule: str, layers: Any, dtype: torch.dtype, step: float, tolerance: float
) -> None:
    model.to(dtype)
    options = {"pseudo_rule": rule, "pseudo_layers": layers, "difference_step": step}
    exact = make_stage(model, derivative="exact", **options)
    descend(exact, make_batch(seed=1))  # so that the optimiser has a state
    central = make_stage(model, **options)
    central.optimiser = exact.optimiser
    central.network.load_state_dict(exact.network.state_dict())
    found = []
    for stage in (exact, central):
        stage.meta_step(*halves(make_batch()), START)
        grads = [p.grad for p in stage.network.parameters() if p.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert float((found[1] - found[0]).norm() / found[0].norm()) < tolerance


def test_the_network_starts_from_draws_of_its_own(model: MultiExitModel) -> None:
    state = torch.get_rng_state()
    stage, again = make_stage(model), make_stage(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert_same_tree(dict(stage.network.state_dict()), dict(again.network.state_dict()))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stage.seed)  # what the exit heads are drawn with
        heads = WeightNetwork(3, 3, stage.options.hidden)
    assert not torch.equal(heads.hidden.weight, stage.network.hidden.weight)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_without_perturbation_it_is_joint_training_on_half_batches(
    model: MultiExitModel, reduction: Any
) -> None:
    twin = copy.deepcopy(model)
    batch = make_batch()
    stage = make_stage(model, eps=0, reduction=reduction)
    network = copy.deepcopy(stage.network.state_dict())
    torch.manual_seed(5)
    found = descend(stage, batch)
    joint = JointStage(twin, 1, torch.ones(3), "weighted" if reduction == "mean" else "sum")
    optimiser = make_optimiser(joint, OptimiserSection())
    torch.manual_seed(5)
    expected = []
    for half in halves(batch):
        (loss,) = joint.losses(half, START)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        twin.zero_grad(set_to_none=True)
        expected.append(float(loss.detach()))
    assert found == pytest.approx(expected, rel=1e-6)
    for p, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, other)
    assert_same_tree(dict(stage.network.state_dict()), dict(network))
    assert stage.newest is None


def test_the_weights_reach_the_loss_but_the_loss_does_not_reach_the_network(
    model: MultiExitModel,
) -> None:
    model.eval()
    stage = make_stage(model, eps=0.8, centring="col")
    batch = make_batch()
    losses = exit_cross_entropies(model.logits(batch), batch.labels).T.detach()
    weights = loss_weights(stage.network(losses), 0.8, "col").detach()
    loss = stage.weighted(batch)
    torch.testing.assert_close(loss.detach(), weighted_loss(losses, weights))
    loss.backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is None for p in stage.network.parameters())
    torch.testing.assert_close(weights.mean(dim=1), torch.ones(16))
    assert float(weights.std()) > 0


def test_a_few_steps_learn(model: MultiExitModel) -> None:
    stage = make_stage(model, interval=2, meta_lr=1e-2, pseudo_rule="precond")
    for group in stage.optimiser.param_groups:
        group["lr"] = 3e-3
    losses = [
        loss
        for number in range(12)
        for loss in descend(stage, make_batch(seed=number % 3), replace(START, step=2 * number))
    ]
    assert len(losses) == 24
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])


@pytest.mark.parametrize("interval", [1, 3])
def test_the_network_is_taught_every_interval_on_both_halves(
    model: MultiExitModel, interval: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = make_stage(model, interval=interval)
    seen: list[tuple[int, list[int], list[int]]] = []

    def spy(train: Batch, meta: Batch, progress: Progress) -> None:
        seen.append((progress.step, train.ids.tolist(), meta.ids.tolist()))

    monkeypatch.setattr(stage, "meta_step", spy)
    batch = make_batch()
    for number in range(4):
        descend(stage, batch, replace(START, step=2 * number))
    even, odd = list(range(0, 16, 2)), list(range(1, 16, 2))
    assert seen == [
        turn
        for number in range(0, 4, interval)
        for turn in ((2 * number, even, odd), (2 * number + 1, odd, even))
    ]


def test_the_networks_rate_follows_the_schedule(model: MultiExitModel) -> None:
    stage = make_stage(model, meta_lr=1e-3)
    stage.meta_step(*halves(make_batch()), replace(START, lr=1.25e-5))  # of 5e-5
    assert stage.meta_optimiser.param_groups[0]["lr"] == pytest.approx(0.25e-3)


@given(st.integers(2, 40))
def test_halves_are_equal_disjoint_and_alike_in_length(rows: int) -> None:
    batch = make_batch(rows)
    first, second = halves(batch)
    assert len(first) == len(second) == rows // 2
    together = sorted([*first.ids.tolist(), *second.ids.tolist()])
    assert together == list(range(rows - rows % 2))
    for field in fields(batch):
        assert torch.equal(getattr(first, field.name), getattr(batch, field.name)[first.ids])


def test_incomplete_batches_are_dropped(model: MultiExitModel) -> None:
    stage = make_stage(model)
    assert list(stage.losses(make_batch(15), START)) == []
    assert len(list(stage.losses(make_batch(16), START))) == stage.steps_per_batch == 2


def test_a_resumed_stage_goes_on_to_the_same_bits(model: MultiExitModel, tmp_path: Path) -> None:
    stage = make_stage(model, meta_lr=1e-2)
    descend(stage, make_batch())
    save_tree(tmp_path, stage.state_dict())
    twin = make_stage(copy.deepcopy(model), meta_lr=1e-2)
    twin.network.hidden.weight.data.zero_()
    twin.load_state_dict(load_tree(tmp_path))
    for one in (stage, twin):
        one.meta_step(*halves(make_batch(seed=1)), replace(START, step=2))
    assert_same_tree(twin.state_dict(), stage.state_dict())


def test_making_the_network_draws_nothing_from_the_run(model: MultiExitModel) -> None:
    before = torch.get_rng_state()
    first, second = make_stage(model), make_stage(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert_same_tree(dict(first.network.state_dict()), dict(second.network.state_dict()))


def test_one_of_several_budgets_is_drawn_by_step(model: MultiExitModel) -> None:
    stage = make_stage(model, q=(0.5, 0.75, 1.0))
    drawn = [stage._budget(step) for step in range(50)]
    assert set(drawn) == {0.5, 0.75, 1.0}
    assert drawn == [make_stage(model, q=(0.5, 0.75, 1.0))._budget(step) for step in range(50)]


def test_budgets_come_from_the_speed_up_unless_q_is_given(model: MultiExitModel) -> None:
    layers = (1, 2, 3)
    assert make_stage(model, q=0.75).budgets == (0.75,)
    (two,) = make_stage(model, speedup=2.0).budgets
    assert speedup_for_q(layers, 3, two) == pytest.approx(2.0)
    several = make_stage(model, speedup=(1.2, 1.5)).budgets
    assert [speedup_for_q(layers, 3, q) for q in several] == pytest.approx([1.2, 1.5])
    (default,) = make_stage(model, speedup=1.5).budgets
    assert default == pytest.approx(1.0)
    assert L2W().speedup == 2.0
    assert L2W(**L2W(q=0.75).model_dump()) == L2W(q=0.75)


def test_the_pseudo_update_moves_what_it_is_told_to(model: MultiExitModel) -> None:
    heads = {name for name, _ in model.named_parameters() if name.startswith("exits.")}
    assert make_stage(model, pseudo_layers=0).moved.keys() == heads
    last = make_stage(model, pseudo_layers=2).moved.keys()
    assert heads < last
    assert {name.split(".")[3] for name in last - heads} == {"1", "2"}
    everything = make_stage(model).moved.keys()
    assert any("embeddings" in name for name in everything)
    assert not any("pooler" in name for name in everything)


def test_a_patched_forward_is_not_used_to_look_ahead(model: MultiExitModel) -> None:
    plain = make_stage(model).meta_step(*halves(make_batch()), START)
    stage = make_stage(model)

    def coarse(*inputs: Tensor) -> Tensor:
        raise AssertionError("mixed precision")

    model.forward = coarse  # type: ignore[method-assign]
    assert stage.meta_step(*halves(make_batch()), START) == plain


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "l2w", L2W)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, r"objective\.eps = -0\.1; allowed: a number from 0 to 1"),
        ({"eps": 1.5}, r"objective\.eps = 1\.5; allowed: a number from 0 to 1"),
        ({"eps": math.nan}, r"objective\.eps = nan"),
        ({"q": 0.0}, r"objective\.q = 0\.0; allowed: a number from 0\.05 to 1\.95"),
        ({"q": 2.5}, r"objective\.q = 2\.5; allowed: .* to 1\.95, or a list of one"),
        ({"q": []}, r"objective\.q = .*or a list of one or more"),
        ({"speedup": 1.0}, r"objective\.speedup = 1\.0; .*above 1"),
        ({"speedup": 2.0, "q": 1.0}, r"objective\.q = 1\.0 and objective\.speedup = 2\.0; allowed"),
        ({"centring": "all"}, r"objective\.centring = 'all'; .*'mat', 'col' or 'row'"),
        ({"interval": 0}, r"objective\.interval = 0; allowed: a whole number from 1 on"),
        ({"hidden": 0}, r"objective\.hidden = 0"),
        ({"meta_lr": 0.0}, r"objective\.meta_lr = 0\.0; allowed: a number above 0"),
        ({"meta_weight_decay": -1.0}, r"objective\.meta_weight_decay = -1\.0"),
        ({"pseudo_lr": math.inf}, r"objective\.pseudo_lr = inf"),
        ({"pseudo_rule": "adam"}, r"objective\.pseudo_rule = 'adam'; .*'sgd' or 'precond'"),
        (
            {"pseudo_layers": -1},
            r"objective\.pseudo_layers = -1; .*'all', or a whole number from 0 on",
        ),
        ({"difference_step": 0.0}, r"objective\.difference_step = 0\.0"),
        ({"rounding": "up"}, r"objective\.rounding = 'up'; .*'cumulative'"),
        ({"nonsense": 1}, r"objective\.nonsense: unknown key; allowed: .*interval"),
    ],
)
def test_bad_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make_recipe({"objective": {"name": "l2w", **options}})


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("options", "loop", "message"),
    [
        (
            {"speedup": 3.0},
            {},
            r"objective\.speedup = 3; allowed with exits at layers 1, 2, 3 of 3: above 1 ",
        ),
        ({"pseudo_layers": 4}, {}, r"objective\.pseudo_layers = 4; .*allowed: 0 to 3, or 'all'"),
        ({}, {"batch_size": 15}, r"loop\.batch_size = 15; .*allowed: even numbers"),
        ({}, {"batch_tokens": 512}, r"loop\.batch_tokens = 512; .*allowed: loop\.batch_size only"),
        (
            {"eps": 0.8, "centring": "col", "negative_weights": "refuse"},
            {},
            r"objective\.eps = 0\.8 lets a weight fall to -0\.0667 .*: up to 0\.75",
        ),
    ],
)
def test_options_that_do_not_fit_are_refused(
    model: MultiExitModel, options: Any, loop: Any, message: str
) -> None:
    recipe = make_recipe({"objective": {"name": "l2w", **options}, "loop": loop})
    with pytest.raises(RecipeError, match=message):
        recipe.objective.stages(model, recipe)


def test_a_pseudo_step_that_leaves_the_numbers_is_refused(model: MultiExitModel) -> None:
    stage = make_stage(model, pseudo_lr=1e38)
    before = copy.deepcopy(stage.network.state_dict())
    with pytest.raises(RecipeError, match=r"objective\.pseudo_lr = 1e\+38: .*not finite; allowed"):
        stage.meta_step(*halves(make_batch()), START)
    assert_same_tree(dict(stage.network.state_dict()), dict(before))
    stage = make_stage(model, pseudo_rule="precond")
    stage.optimiser = None
    with pytest.raises(RuntimeError, match="needs the loop's optimiser"):
        stage.meta_step(*halves(make_batch()), START)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", ["sst2", "trec6", "clinc150", "mrpc"])
def test_recipes(name: str) -> None:
    recipe = read_recipe(ROOT / "training" / "recipes" / f"{name}-l2w.toml")
    assert recipe.objective.name == "l2w"
    assert recipe.objective.exit_policy == "confidence"
    assert recipe.objective.options() == L2W(interval=recipe.objective.interval).options()
    assert recipe.model.backbone == DEFAULT_BACKBONE
    assert recipe.model.pooling == "mean"
    assert recipe.loop.batch_size >= 128  # halves of 64
    text = (ROOT / "training" / "recipes" / f"{name}-l2w.toml").read_text(encoding="utf-8")
    assert f"{name}-l2w.toml" in text.splitlines()[1]


def test_losses_are_those_of_torch() -> None:
    logits = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0, 1, 2, 1])
    found = weighted_loss(exit_cross_entropies(logits, labels).T, torch.ones(4, 2))
    expected = sum(functional.cross_entropy(one, labels) for one in logits)
    torch.testing.assert_close(found, torch.as_tensor(expected))
