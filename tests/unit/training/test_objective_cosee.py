"""COSEE: acceptance cases, the properties of its parts, its memory across epochs and kills."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from offramp_model import signals as exit_signals
from offramp_model.config import MultiExitConfig
from offramp_model.heads import ExitHeads
from offramp_model.policies import make_policy
from offramp_model.recorded import RecordedExits, replay
from offramp_model.speed import count_exits, speedup_ratio
from offramp_model.tokenizer import TextTokenizer
from offramp_training import seeds
from offramp_training.batches import EncodedRows
from offramp_training.config import DEFAULT_BACKBONE, make_recipe, read_recipe
from offramp_training.data import load_splits
from offramp_training.errors import RecipeError
from offramp_training.fit import fit
from offramp_training.model import build_model
from offramp_training.objectives import OBJECTIVES, Progress
from offramp_training.objectives.cosee import (
    Cosee,
    CoseeStage,
    SignalRange,
    beta_at,
    cosee_cross_entropy,
    folded_weights,
    osc_loss,
    osc_terms,
    signal_of,
    simulated_exits,
    weight_table,
)
from offramp_training.objectives.joint import joint_loss
from offramp_training.objectives.row_losses import exit_cross_entropies
from offramp_training.optimiser import make_optimiser
from offramp_training.resume import load_tree, save_tree

ROOT = Path(__file__).parents[3]
CASES = json.loads((ROOT / "tests" / "oracles.json").read_text(encoding="utf-8"))["objectives"]
SEEDS = st.integers(0, 2**31)
SIGNALS: Any = ("energy", "entropy", "confidence")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32])


def cases(kind: str) -> list[Any]:
    found = [case for case in CASES["cosee"] if case["kind"] == kind]
    assert found
    return [pytest.param(case, id=case["case"]) for case in found]


def case_named(name: str) -> dict[str, Any]:
    (found,) = (case for case in CASES["cosee"] if case["case"] == name)
    return found


def rows_first(table: Any, dtype: torch.dtype) -> Tensor:
    """A table of the acceptance cases, rows x exits there, as exits x rows."""
    return torch.tensor(table, dtype=dtype).T.contiguous()


def assert_near(found: Tensor, expected: Any, case: dict[str, Any]) -> None:
    found = found.detach()
    tolerance = case["tolerance"]
    if tolerance == "exact":
        close = 0.0
    else:
        close = tolerance["abs_float64" if found.dtype == torch.float64 else "abs_float32"]
    wanted = torch.tensor(expected, dtype=found.dtype)
    torch.testing.assert_close(found, wanted, atol=close, rtol=0)


def draw(seed: int, exits: int = 5, rows: int = 6, classes: int = 3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(exits, rows, classes, generator=generator, dtype=torch.float64)
    return logits.requires_grad_(), torch.randint(classes, (rows,), generator=generator)


class FixedLogits(torch.nn.Module):
    """A model whose logits are its only parameter."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(logits.detach().float())

    def logits(self, batch: Any) -> Tensor:
        return self.table


def make_stage(
    logits: Tensor, seed: int = 0, epochs: int = 3, temperature: float = 1.0, **options: Any
) -> CoseeStage:
    model: Any = FixedLogits(logits)
    return CoseeStage(model, epochs, Cosee(**options), seed, temperature=temperature)


def loss_of(stage: CoseeStage, labels: Tensor, step: int = 0, total: int = 10) -> Tensor:
    batch: Any = SimpleNamespace(labels=labels)
    (loss,) = stage.losses(batch, Progress(0, step, total, 1e-3))
    return loss


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, "cosee", Cosee)


# ---- acceptance cases ------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("case", cases("signals"))
def test_signals_are_those_of_serving(case: dict[str, Any], dtype: torch.dtype) -> None:
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype)
    temperature = case["inputs"]["temperature"]
    names = {"energy": "energy", "entropy": "normalised_entropy", "confidence": "max_softmax"}
    for signal in SIGNALS:
        assert_near(signal_of(logits, signal, temperature), case["expected"][names[signal]], case)


@DTYPES
@pytest.mark.parametrize("case", cases("exit_simulation"))
def test_exit_simulation(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    signals = rows_first(inputs["signals"], dtype)
    thresholds = torch.tensor([float(inputs["tau"])], dtype=dtype)
    (exits,) = simulated_exits(signals, thresholds, inputs["direction"]).tolist()
    assert exits == expected["exit_layers"]
    if "speedup" in expected:
        counts = count_exits(exits, len(signals) + 1)
        assert speedup_ratio(counts) == pytest.approx(expected["speedup"], abs=1e-6)


@DTYPES
@pytest.mark.parametrize("case", cases("exit_simulation_sweep"))
def test_exit_simulation_just_above_each_signal(case: dict[str, Any], dtype: torch.dtype) -> None:
    signals = rows_first(case["inputs"]["signals"], dtype)
    values = torch.tensor(case["inputs"]["tau_is_nextafter_of"], dtype=dtype)
    thresholds = torch.nextafter(values, torch.full_like(values, torch.inf))
    exits = simulated_exits(signals, thresholds, case["inputs"]["direction"])
    assert_near(exits.to(dtype).mean(dim=1), case["expected"]["mean_exit_layer"], case)


@DTYPES
@pytest.mark.parametrize("case", cases("threshold_for_speedup"))
def test_a_threshold_for_a_speedup(case: dict[str, Any], dtype: torch.dtype) -> None:
    signals = rows_first(case["inputs"]["signals"], dtype)
    value = torch.tensor([case["expected"]["tau_is_nextafter_of"]], dtype=dtype)
    thresholds = torch.cat([value, torch.nextafter(value, value + 1)])
    below, at = simulated_exits(signals, thresholds, case["inputs"]["direction"]).tolist()
    assert speedup_ratio(count_exits(at, 4)) == case["expected"]["speedup"]
    assert speedup_ratio(count_exits(below, 4)) < case["inputs"]["target_speedup"]


@DTYPES
@pytest.mark.parametrize("case", cases("weight_table"))
def test_weight_table(case: dict[str, Any], dtype: torch.dtype) -> None:
    table = weight_table(case["inputs"]["num_layers"], case["inputs"]["beta"], dtype)
    assert_near(table, case["expected"]["table"], case)


@DTYPES
@pytest.mark.parametrize("case", cases("weight_table_rows"))
def test_weight_table_rows(case: dict[str, Any], dtype: torch.dtype) -> None:
    table = weight_table(case["inputs"]["num_layers"], case["inputs"]["beta"], dtype)
    rows = [row - 1 for row in case["inputs"]["rows"]]
    assert_near(table[rows], case["expected"]["rows"], case)


@pytest.mark.parametrize("case", cases("beta_schedule"))
def test_beta_schedule(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    found = [beta_at(inputs["beta_0"], t, inputs["total_optimizer_steps"]) for t in inputs["steps"]]
    assert found == pytest.approx(case["expected"]["beta"], abs=1e-12)


@pytest.mark.parametrize("case", cases("beta_schedule_micro"))
def test_beta_advances_with_optimiser_steps(
    case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage takes the loop's count of optimiser steps; its own calls do not matter."""
    inputs = case["inputs"]
    used = []

    def spy(exits: Tensor, num_exits: int, beta: float) -> Tensor:
        used.append(beta)
        return folded_weights(exits, num_exits, beta)

    monkeypatch.setattr("offramp_training.objectives.cosee.folded_weights", spy)
    logits, labels = draw(0)
    stage = make_stage(logits, beta_0=inputs["beta_0"])
    for micro_batch in inputs["micro_batches"]:
        step = micro_batch // inputs["accumulation"]
        loss_of(stage, labels, step, inputs["total_optimizer_steps"])
    assert used == pytest.approx(case["expected"]["beta"], abs=1e-12)


def weighted_ce(inputs: dict[str, Any], thresholds: list[float], dtype: torch.dtype) -> Any:
    """Folded weights [E, B] and cross-entropies [E, B] of a case."""
    signals, ce = rows_first(inputs["signals"], dtype), rows_first(inputs["ce"], dtype)
    direction = inputs.get("direction", "below")
    exits = simulated_exits(signals, torch.tensor(thresholds, dtype=dtype), direction)
    return folded_weights(exits, len(ce), float(inputs["beta"]), dtype), ce


@DTYPES
@pytest.mark.parametrize("case", cases("cosee_ce"))
def test_weighted_cross_entropy(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    weights, ce = weighted_ce(inputs, inputs["thresholds"], dtype)
    assert_near(cosee_cross_entropy(ce, weights), expected["L_CE"], case)
    if "folded_weights" in expected:
        assert_near(weights.T, expected["folded_weights"], case)
    for threshold, value in zip(inputs["thresholds"], expected["L_CE_per_threshold"], strict=True):
        weights, ce = weighted_ce(inputs, [threshold], dtype)
        assert_near(cosee_cross_entropy(ce, weights), value, case)


@DTYPES
@pytest.mark.parametrize("case", cases("cosee_ce_per_sample"))
def test_weighted_cross_entropy_of_each_row(case: dict[str, Any], dtype: torch.dtype) -> None:
    weights, ce = weighted_ce(case["inputs"], [case["inputs"]["tau"]], dtype)
    for row, value in enumerate(case["expected"]["weighted_ce"]):
        here = slice(row, row + 1)
        assert_near(cosee_cross_entropy(ce[:, here], weights[:, here]), value, case)


@DTYPES
@pytest.mark.parametrize("case", cases("cosee_ce_gradient"))
def test_weights_are_constants(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs, expected = case["inputs"], case["expected"]
    logits = torch.tensor(inputs["logits"], dtype=dtype)[:, None].requires_grad_()
    signals = signal_of(logits[:-1], inputs["signal"])
    thresholds = torch.tensor(inputs["thresholds"], dtype=dtype)
    exits = simulated_exits(signals, thresholds, "below")
    weights = folded_weights(exits, len(logits), inputs["beta"], dtype)
    ce = exit_cross_entropies(logits, torch.tensor([inputs["label"]]))
    loss = cosee_cross_entropy(ce, weights)
    loss.backward()
    assert logits.grad is not None
    assert exits.flatten().tolist() == expected["exit_layers"]
    assert not weights.requires_grad
    assert_near(signals[:, 0], expected["signals"], case)
    assert_near(weights[:, 0], expected["weights"], case)
    assert_near(ce[:, 0], expected["ce"], case)
    assert_near(loss, expected["L_CE"], case)
    assert_near(logits.grad[:, 0], expected["d_logits"], case)


def osc_inputs(case: dict[str, Any], dtype: torch.dtype) -> tuple[Tensor, Tensor, float, Any]:
    inputs = case["inputs"]
    signals = rows_first(inputs["signals"], dtype).requires_grad_()
    right = rows_first(inputs["correct"], dtype).bool()
    return signals, right, inputs["eps"], inputs.get("direction", "below")


@DTYPES
@pytest.mark.parametrize("case", cases("osc"))
def test_osc(case: dict[str, Any], dtype: torch.dtype) -> None:
    signals, *rest = osc_inputs(case, dtype)
    terms, mixed = osc_terms(signals, *rest)
    for place, value in enumerate(case["expected"]["per_layer"]):
        assert bool(mixed[place]) == (value is not None)
        if value is not None:
            assert_near(terms[place], value, case)
    loss = osc_loss(signals, *rest)
    assert_near(loss, case["expected"]["L_OSC"], case)
    loss.backward()
    assert signals.grad is not None
    assert signals.grad[~mixed].abs().sum() == 0
    if "L_OSC_paper_normaliser" in case["expected"]:
        paper = osc_loss(signals, *rest, "paper")
        assert_near(paper, case["expected"]["L_OSC_paper_normaliser"], case)


@DTYPES
@pytest.mark.parametrize("case", cases("osc_gradient"))
def test_osc_gradient(case: dict[str, Any], dtype: torch.dtype) -> None:
    signals, *rest = osc_inputs(case, dtype)
    place = case["inputs"]["layer"] - 1
    terms, _ = osc_terms(signals, *rest)
    (gradient,) = torch.autograd.grad(terms[place], signals)
    assert_near(gradient[place], case["expected"]["d_signals_layer1"], case)


@DTYPES
@pytest.mark.parametrize("case", cases("cosee_total"))
def test_total(case: dict[str, Any], dtype: torch.dtype) -> None:
    inputs = case["inputs"]
    ce_inputs = case_named(inputs["L_CE_case"])["inputs"]
    weights, ce = weighted_ce(ce_inputs, ce_inputs["thresholds"], dtype)
    osc = osc_loss(*osc_inputs(case_named(inputs["L_OSC_case"]), dtype))
    total = cosee_cross_entropy(ce, weights) + inputs["alpha"] * osc
    assert_near(total, case["expected"]["total"], case)


@pytest.mark.parametrize("case", cases("threshold_range"))
def test_range_of_each_epoch(case: dict[str, Any]) -> None:
    seen_in = case["inputs"]["signal_min_max_per_epoch"]
    signal_range = SignalRange()
    for epoch, expected in enumerate(case["expected"]["range_per_epoch"]):
        signal_range.next_epoch()
        assert signal_range.limits == tuple(torch.tensor(expected).tolist())
        for extreme in seen_in[epoch] if epoch < len(seen_in) else []:  # two batches of one row
            signal_range.see(torch.tensor([[extreme]]))


@pytest.mark.parametrize("case", cases("parameter_count"))
def test_new_parameters(case: dict[str, Any]) -> None:
    inputs = case["inputs"]
    layers = inputs["new_exits"] + 1
    heads = ExitHeads(
        MultiExitConfig(
            num_layers=layers,
            hidden_size=inputs["hidden_size"],
            exit_layers=tuple(range(1, layers + 1)),
            labels=tuple(f"label {number}" for number in range(inputs["classes"])),
            pooler="shared",
        )
    )
    new = sum(p.numel() for p in heads.classifiers[:-1].parameters())
    assert new == case["expected"]["total"]


# ---- properties of the parts -----------------------------------------------------------------


@given(seed=SEEDS, signal=st.sampled_from(SIGNALS), place=st.integers(0, 46))
def test_the_simulation_is_the_layer_loop(seed: int, signal: Any, place: int) -> None:
    logits = draw(seed, rows=12)[0].detach().float()
    policy = make_policy(signal)
    signals = signal_of(logits[:-1], signal)
    # Well between two signals: the last bit of a signal may depend on the shape it is computed in.
    low, high = signals.flatten().sort().values[place : place + 2]
    assume(high - low > 1e-5)
    threshold = (low + high) / 2
    (found,) = simulated_exits(signals, threshold[None], policy.direction)
    recorded = RecordedExits(logits, tuple(range(1, len(logits) + 1)))
    assert torch.equal(found, replay(recorded, policy, float(threshold)).exit_layer)


@given(seed=SEEDS, signal=st.sampled_from(SIGNALS))
def test_an_easier_threshold_never_leaves_later(seed: int, signal: Any) -> None:
    signals = signal_of(draw(seed)[0].detach(), signal)[:-1]
    direction = make_policy(signal).direction
    thresholds = torch.cat([signals.flatten(), torch.tensor([-torch.inf, 0.0, 1.0, torch.inf])])
    exits = simulated_exits(signals, thresholds.sort().values, direction)
    steps = exits.diff(dim=0)
    assert (steps <= 0 if direction == "below" else steps >= 0).all()
    never = exits[0] if direction == "below" else exits[-1]
    assert (never == len(signals) + 1).all()


def test_a_nan_signal_never_leaves() -> None:
    signals = torch.tensor([[torch.nan], [0.5], [torch.nan]])
    assert simulated_exits(signals, torch.tensor([0.6, 0.4]), "below").tolist() == [[2], [4]]
    assert simulated_exits(signals, torch.tensor([0.6, 0.4]), "above").tolist() == [[4], [2]]


@given(exits=st.integers(1, 12), beta=st.floats(0, 50))
def test_weight_table_properties(exits: int, beta: float) -> None:
    table = weight_table(exits, beta, torch.float64)
    torch.testing.assert_close(table.sum(dim=1), torch.ones(exits, dtype=torch.float64))
    torch.testing.assert_close(table.flip(0, 1), table)
    assert (table.diagonal()[:, None] >= table).all()
    uniform = torch.full((exits, exits), 1 / exits, dtype=torch.float64)
    torch.testing.assert_close(weight_table(exits, 0.0, torch.float64), uniform)
    assert torch.equal(weight_table(exits, math.inf), torch.eye(exits))


@given(seed=SEEDS, beta=st.floats(0, 12), count=st.integers(1, 6))
def test_folding_is_the_mean_over_thresholds(seed: int, beta: float, count: int) -> None:
    logits, labels = draw(seed)
    signals = signal_of(logits[:-1], "energy")
    thresholds = torch.rand(count, generator=torch.Generator().manual_seed(seed)) / 4
    exits = simulated_exits(signals, thresholds, "below")

    def loss(of: Tensor) -> Tensor:
        weights = folded_weights(of, len(logits), beta, torch.float64)
        return cosee_cross_entropy(exit_cross_entropies(logits, labels), weights)

    one_by_one = torch.stack([loss(exits[[k]]) for k in range(count)]).mean()
    torch.testing.assert_close(loss(exits), one_by_one)
    folded, looped = (torch.autograd.grad(x, logits)[0] for x in (loss(exits), one_by_one))
    torch.testing.assert_close(folded, looped)


@given(seed=SEEDS, offset=st.floats(0.01, 5))
def test_only_energy_sees_a_common_offset(seed: int, offset: float) -> None:
    logits, labels = (x.detach() for x in draw(seed))
    moved = logits + offset
    for signal in ("entropy", "confidence"):
        torch.testing.assert_close(signal_of(moved, signal), signal_of(logits, signal))
    ce = exit_cross_entropies(logits, labels)
    torch.testing.assert_close(exit_cross_entropies(moved, labels), ce)
    assert (signal_of(moved, "energy") < signal_of(logits, "energy")).all()


@given(seed=SEEDS, signal=st.sampled_from(SIGNALS), scale=st.floats(0, 1e4))
def test_signals_stay_finite(seed: int, signal: Any, scale: float) -> None:
    logits = draw(seed)[0].detach()
    logits = (logits / logits.abs().max() * scale).float().requires_grad_()
    values = signal_of(logits, signal)
    values.sum().backward()
    assert logits.grad is not None
    assert values.isfinite().all()
    assert logits.grad.isfinite().all()


@given(
    seed=SEEDS,
    direction=st.sampled_from(["below", "above"]),
    norm=st.sampled_from(["contributing", "paper"]),
)
def test_osc_sees_neither_order_nor_level(seed: int, direction: Any, norm: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    signals = torch.rand(4, 9, generator=generator, dtype=torch.float64)
    right = torch.rand(4, 9, generator=generator) < 0.7
    order = torch.randperm(9, generator=generator)
    level = torch.rand(4, 1, generator=generator)
    loss = osc_loss(signals, right, 0.3, direction, norm)
    permuted = osc_loss(signals[:, order], right[:, order], 0.3, direction, norm)
    torch.testing.assert_close(permuted, loss)
    torch.testing.assert_close(osc_loss(signals + level, right, 0.3, direction, norm), loss)


@given(seed=SEEDS, low=st.floats(0, 1, width=32), high=st.floats(0, 1, width=32))
def test_thresholds_lie_in_the_range(seed: int, low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    signal_range = SignalRange()
    signal_range.see(torch.tensor([[low, high]]))
    signal_range.next_epoch()
    drawn = signal_range.draw(64, torch.Generator().manual_seed(seed))
    assert ((drawn >= low) & (drawn <= high)).all()


def test_an_epoch_of_nan_leaves_the_whole_range() -> None:
    signal_range = SignalRange()
    signal_range.see(torch.tensor([[torch.nan]]))
    signal_range.next_epoch()
    assert signal_range.limits == (0.0, 1.0)
    signal_range.see(torch.tensor([[0.25]]))
    signal_range.see(torch.tensor([[torch.nan]]))
    signal_range.next_epoch()
    assert signal_range.limits == (0.25, 0.25)


# ---- the stage -------------------------------------------------------------------------------


@given(seed=SEEDS, signal=st.sampled_from(SIGNALS), step=st.integers(0, 9))
def test_without_its_two_terms_it_is_the_mean_of_joint_training(
    seed: int, signal: Any, step: int
) -> None:
    logits, labels = draw(seed)
    stage = make_stage(logits, signal=signal, beta_0=0, alpha=0)
    table = stage.model.table
    loss = loss_of(stage, labels, step)
    joint = joint_loss(exit_cross_entropies(table, labels), torch.ones(5), "sum") / 5
    torch.testing.assert_close(loss, joint)
    found, expected = (torch.autograd.grad(x, table)[0] for x in (loss, joint))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("signal", SIGNALS)
@pytest.mark.parametrize("norm", ["contributing", "paper"])
def test_the_stage_puts_the_parts_together(signal: Any, norm: Any) -> None:
    logits, labels = draw(11)
    options = {"beta_0": 4.0, "alpha": 0.7, "eps": 0.2, "temperature": 1.5, "num_thresholds": 3}
    stage = make_stage(logits, seed=9, signal=signal, osc_norm=norm, **options)
    stage.begin_epoch(0)
    thresholds = torch.rand(3, generator=seeds.generator(9, "cosee thresholds"))
    table = stage.model.table
    functions = {
        "energy": exit_signals.energy(table[:-1], 1.5),
        "entropy": exit_signals.normalised_entropy(table[:-1], 1.5),
        "confidence": exit_signals.max_probability(table[:-1] / 1.5),
    }
    signals = functions[signal]
    direction: Any = "above" if signal == "confidence" else "below"
    exits = simulated_exits(signals, thresholds, direction)
    ce = cosee_cross_entropy(exit_cross_entropies(table, labels), folded_weights(exits, 5, 2.0))
    right = table[:-1].argmax(dim=-1) == labels
    expected = ce + 0.7 * osc_loss(signals, right, 0.2, direction, norm)
    torch.testing.assert_close(loss_of(stage, labels, step=5, total=10), expected)


def test_the_signal_term_reaches_internal_exits_only() -> None:
    logits, labels = draw(2, rows=16)
    gradients = []
    for alpha in (0.0, 1.0):
        stage = make_stage(logits, alpha=alpha)
        loss_of(stage, labels).backward()
        gradients.append(stage.model.table.grad)
    without, along = gradients
    assert torch.equal(along[-1], without[-1])
    assert (along[:-1] != without[:-1]).flatten(1).any(dim=1).all()
    # Cross-entropy never moves a common offset of the logits; the energy term does.
    assert without.sum(dim=-1).abs().max() < 1e-6
    assert along[:-1].sum(dim=-1).abs().max() > 1e-3


def test_each_epoch_draws_from_the_signals_of_the_one_before() -> None:
    logits, labels = draw(4)
    stage = make_stage(logits)
    spans = []
    for epoch in range(3):
        stage.begin_epoch(epoch)
        spans.append(stage.range.limits)
        for scale in (1.0, 0.5):
            stage.model.table.data = logits.detach().float() * scale / (epoch + 1)
            loss_of(stage, labels)
    first = torch.cat([signal_of(logits.detach()[:-1].float() * s, "energy") for s in (1.0, 0.5)])
    second = torch.cat([signal_of(logits.detach()[:-1].float() * s, "energy") for s in (0.5, 0.25)])
    assert spans[0] == (0.0, 1.0)
    assert spans[1] == pytest.approx((first.min().item(), first.max().item()))
    assert spans[2] == pytest.approx((second.min().item(), second.max().item()))


def test_one_exit_alone_is_plain_training() -> None:
    logits, labels = draw(0, exits=1)
    stage = make_stage(logits, alpha=1.0)
    for epoch in range(2):
        stage.begin_epoch(epoch)
        loss = loss_of(stage, labels, step=epoch)
        torch.testing.assert_close(loss, exit_cross_entropies(stage.model.table, labels).mean())
    loss.backward()
    assert stage.range.limits == (0.0, 1.0)


def test_a_batch_that_is_all_right_can_be_descended() -> None:
    logits, _ = draw(1)
    stage = make_stage(logits[:1].expand(4, -1, -1), alpha=1.0)
    loss = loss_of(stage, logits[0].argmax(dim=-1))
    loss.backward()
    assert stage.model.table.grad.isfinite().all()


@given(seed=st.integers(0, 2**32 - 1), batches=st.integers(0, 4))
def test_a_resumed_stage_draws_the_same_thresholds(
    tmp_path_factory: pytest.TempPathFactory, seed: int, batches: int
) -> None:
    logits, labels = draw(seed)
    stage = make_stage(logits, seed)
    stage.begin_epoch(0)
    loss_of(stage, labels)
    stage.begin_epoch(1)
    for _ in range(batches):
        loss_of(stage, labels)
    directory = tmp_path_factory.mktemp("point")
    save_tree(directory, stage.state_dict())
    resumed = make_stage(logits, seed=1)
    resumed.load_state_dict(load_tree(directory))
    expected = [stage.range.draw(5, stage.generator) for _ in range(3)]
    found = [resumed.range.draw(5, resumed.generator) for _ in range(3)]
    assert torch.equal(torch.stack(found), torch.stack(expected))
    stage.begin_epoch(2)
    resumed.begin_epoch(2)
    assert resumed.range.limits == stage.range.limits


def test_thresholds_follow_the_recipes_seed_and_nothing_else() -> None:
    logits, _ = draw(0)
    stages = [make_stage(logits, seed) for seed in (3, 3, 4)]
    drawn = []
    for stage in stages:
        torch.rand(len(drawn))  # the global generator has no say
        drawn.append(stage.range.draw(5, stage.generator))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# ---- options, recipes, real steps ------------------------------------------------------------


def test_options(registered: None) -> None:
    recipe = make_recipe({"objective": {"name": "cosee", "signal": "entropy"}})
    assert recipe.objective.options() == {
        "signal": "entropy",
        "num_thresholds": 5,
        "beta_0": 10.0,
        "alpha": 0.1,
        "eps": 0.3,
        "osc_norm": "contributing",
    }
    assert make_recipe(recipe.as_dict()) == recipe
    for signal in SIGNALS:
        assert Cosee(signal=signal).exit_policy == make_policy(signal).name


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        ({"signal": "margin"}, ["objective.signal = 'margin'", "'energy', 'entropy'"]),
        ({"num_thresholds": 0}, ["objective.num_thresholds = 0", "from 1"]),
        ({"num_thresholds": 2.5}, ["objective.num_thresholds = 2.5", "a whole number from 1 on"]),
        ({"beta_0": -1}, ["objective.beta_0 = -1", "from 0"]),
        ({"beta_0": math.inf}, ["objective.beta_0 = inf", "a finite number from 0 on"]),
        ({"alpha": -0.1}, ["objective.alpha = -0.1", "from 0"]),
        ({"eps": -0.1}, ["objective.eps = -0.1", "from 0"]),
        ({"osc_norm": "all"}, ["objective.osc_norm = 'all'", "'contributing' or 'paper'"]),
        ({"lambda": 0.1}, ["objective.lambda: unknown key", "beta_0, alpha, eps, osc_norm"]),
    ],
)
def test_bad_options_are_refused(
    options: dict[str, Any], fragments: list[str], registered: None
) -> None:
    with pytest.raises(RecipeError) as caught:
        make_recipe({"objective": {"name": "cosee", **options}})
    for fragment in fragments:
        assert fragment in str(caught.value)


@pytest.mark.parametrize("data_set", ["sst2", "trec6", "clinc150", "mrpc"])
def test_the_recipes_are_sound(data_set: str, registered: None) -> None:
    recipe = read_recipe(ROOT / "training" / "recipes" / f"{data_set}-cosee.toml")
    assert recipe.objective == Cosee()
    assert (recipe.model.backbone, recipe.model.pooling) == (DEFAULT_BACKBONE, "mean")
    assert recipe.model.max_length == 128
    optimiser = recipe.optimiser
    assert (optimiser.lr, optimiser.weight_decay, optimiser.warmup_ratio) == (2e-5, 0.0, 0.0)


def test_two_real_steps(backbone: Path, data: Path, recipe_table: dict[str, Any]) -> None:
    recipe = make_recipe(recipe_table)
    splits = load_splits(str(data))
    model = build_model(backbone, recipe.model, splits["train"].label_names, seed=1)
    tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
    rows = EncodedRows.of(splits["train"], tokenizer, model.pad_id)
    (stage,) = Cosee(alpha=1.0).stages(model, recipe)
    optimiser = make_optimiser(stage, recipe.optimiser)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = rows.batch(range(16))
    model.train()
    stage.begin_epoch(0)
    for step in range(2):
        for loss in stage.losses(batch, Progress(0, step, 2, 2e-3)):
            assert loss.isfinite()
            loss.backward()
            optimiser.step()
            model.zero_grad()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved >= set(stage.parameters()) - {"backbone.embeddings.position_embeddings.weight"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("killed_at", [7, 15])  # in the first epoch, in the second
def test_a_killed_run_ends_with_the_same_bits(
    tmp_path: Path,
    data: Path,
    recipe_table: dict[str, Any],
    registered: None,
    monkeypatch: pytest.MonkeyPatch,
    killed_at: int,
) -> None:
    recipe = make_recipe({**recipe_table, "objective": {"name": "cosee", "alpha": 1.0}})
    original = CoseeStage.losses
    drawn: list[Tensor] = []
    draw_thresholds = SignalRange.draw

    def recorded_draw(self: SignalRange, *arguments: Any) -> Tensor:
        drawn.append(draw_thresholds(self, *arguments))
        return drawn[-1]

    monkeypatch.setattr(SignalRange, "draw", recorded_draw)
    whole = fit(recipe, tmp_path / "whole", data=str(data), calibrate=False)
    expected = list(drawn)
    assert len(expected) == 20
    drawn.clear()

    def losses(self: CoseeStage, *arguments: Any) -> Iterator[Tensor]:
        if len(drawn) == killed_at - 1:
            raise Killed
        return original(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(CoseeStage, "losses", losses)
        with pytest.raises(Killed):
            fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    drawn.clear()
    resumed = fit(recipe, tmp_path / "killed", data=str(data), calibrate=False)
    assert 0 < len(drawn) < 20
    assert torch.equal(torch.stack(drawn), torch.stack(expected[-len(drawn) :]))
    for name in ("model.safetensors", "exits.safetensors"):
        one, two = load_file(whole / name), load_file(resumed / name)
        assert [key for key in one if not torch.equal(one[key], two[key])] == []
