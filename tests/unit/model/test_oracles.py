"""The acceptance cases for signals, votes, exit simulation and speed-up."""

from typing import Any

import numpy as np
import pytest
import torch

from offramp_model import signals
from offramp_model.calibrating import ExitTrace, spread_thresholds, threshold_speedups, trace
from offramp_model.layer_loop import layer_loop, start_rows
from offramp_model.policies import VotePolicy
from offramp_model.recorded import RecordedExits, RecordedStack
from offramp_model.rows import RowSettings
from offramp_model.speed import count_exits, mean_exit_layer, speedup_ratio

NAMES = {
    "max_softmax": lambda z, t: signals.max_probability(z / t),
    "normalised_entropy": signals.normalised_entropy,
    "energy": signals.energy,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_signals(oracle_cases: Any, dtype: torch.dtype) -> None:
    for case in oracle_cases("cosee", "signals"):
        logits = torch.tensor(case["inputs"]["logits"], dtype=dtype)
        tolerance = case["tolerance"][f"abs_{str(dtype).removeprefix('torch.')}"]
        for name, function in NAMES.items():
            value = function(logits, case["inputs"]["temperature"])
            assert value.dtype == dtype
            assert torch.isfinite(value)
            assert float(value) == pytest.approx(case["expected"][name], abs=tolerance), case[
                "case"
            ]
        if case["case"].startswith("C1_50"):
            assert float(signals.energy(logits)) == pytest.approx(
                case["expected"]["energy"], rel=1e-5
            )
        if dtype == torch.float64:  # the served energy is the sigmoid of the paper's raw one
            raw = torch.logit(signals.energy(logits, case["inputs"]["temperature"]))
            assert float(raw) == pytest.approx(case["expected"]["energy_raw"], abs=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_energy_gradient(oracle_cases: Any, dtype: torch.dtype, tolerance: float) -> None:
    for case in oracle_cases("cosee", "energy_gradient"):
        logits = torch.tensor(case["inputs"]["logits"], dtype=dtype, requires_grad=True)
        signals.energy(logits, case["inputs"].get("temperature", 1)).sum().backward()
        (expected,) = case["expected"].values()
        torch.testing.assert_close(
            logits.grad, torch.tensor(expected, dtype=dtype), atol=tolerance, rtol=0
        )


def vote(labels: list[int], tau: float, exponent: float, min_layer: int, fallback: Any) -> Any:
    """Run one row whose exits say `labels` through the layer loop under the vote policy."""
    logits = torch.nn.functional.one_hot(torch.tensor(labels), max(labels) + 2).float()[:, None]
    stack = RecordedStack(RecordedExits(logits, tuple(range(1, len(labels) + 1))))
    policy = VotePolicy(exponent=exponent, fallback=fallback)
    settings = RowSettings.uniform(1, tau, min_layer=min_layer, max_layer=len(labels))
    rows = start_rows(stack, stack.batch(), policy, settings)
    (leavers,) = (one for one in layer_loop(stack, rows, policy) if len(one.row))
    return leavers


def first_exit_by_shortcut(
    labels: list[int], tau: float, exponent: float, min_layer: int
) -> dict[str, Any]:
    """What comes out if only the class just voted for is tested: wrong with a `min_layer`."""
    for layer, label in enumerate(labels, start=1):
        if layer >= min_layer and labels[:layer].count(label) >= tau * layer**exponent:
            return {"exit_layer": layer, "label": label, "by_vote": True}
    return {"exit_layer": len(labels), "label": labels[-1], "by_vote": False}


def test_votes(oracle_cases: Any) -> None:
    for case in oracle_cases("ensemble", "vote_exit"):
        inputs, expected = case["inputs"], case["expected"]
        arguments = (
            inputs["labels_per_layer"],
            inputs["tau"],
            inputs.get("p", 0.75),
            inputs.get("min_layer", 1),
        )
        leavers = vote(*arguments, "last")
        assert leavers.exit_layer == expected["exit_layer"], case["case"]
        assert int(leavers.label) == expected["label"], case["case"]
        assert bool(leavers.by_policy) == expected["by_vote"], case["case"]
        if "score_at_exit" in expected:
            assert float(leavers.signal) == pytest.approx(expected["score_at_exit"], abs=1e-5)
            most = float(leavers.signal) * leavers.exit_layer ** arguments[2]
            assert most == pytest.approx(max(expected["votes_at_exit"].values()))
        if "just_voted_class_shortcut" in expected:
            shortcut = first_exit_by_shortcut(*arguments)
            assert shortcut == expected["just_voted_class_shortcut"]  # and that is not our answer
            assert leavers.exit_layer != shortcut["exit_layer"]
        if "label_if_majority_fallback" in expected:
            majority = vote(*arguments, "majority")
            assert int(majority.label) == expected["label_if_majority_fallback"], case["case"]


def test_unanimous_votes(oracle_cases: Any) -> None:
    for case in oracle_cases("ensemble", "vote_exit_unanimous"):
        layers = case["inputs"]["num_layers"]
        for tau, expected in zip(
            case["inputs"]["taus"], case["expected"]["exit_layers"], strict=True
        ):
            leavers = vote([1] * layers, tau, case["inputs"]["p"], 1, "last")
            assert (leavers.exit_layer if bool(leavers.by_policy) else None) == expected
        logits = torch.tensor([1.0, 0.0]).expand(layers, 1, 2)
        seen = trace(
            RecordedExits(logits, tuple(range(1, layers + 1))), VotePolicy(case["inputs"]["p"])
        )
        breakpoints = seen.signal[:, 0].tolist()  # the thresholds at which anything changes
        assert breakpoints[-1] == pytest.approx(case["expected"]["tau_max"], abs=1e-5)
        if "breakpoints" in case["expected"]:
            assert breakpoints == pytest.approx(case["expected"]["breakpoints"], abs=1e-5)


def simulated(case: dict[str, Any], dtype: torch.dtype) -> ExitTrace:
    """The case's signals as a trace: rows × internal layers there, exits × rows here."""
    internal = torch.tensor(case["inputs"]["signals"], dtype=dtype).T
    last = torch.full((1, internal.shape[1]), torch.nan, dtype=dtype)
    signal = torch.cat([internal, last])
    return ExitTrace(
        signal=signal.double(),
        can_leave=~signal.isnan(),
        label=torch.zeros(signal.shape, dtype=torch.int64),
        end_label=torch.zeros(signal.shape[1], dtype=torch.int64),
        exit_layers=tuple(range(1, signal.shape[0] + 1)),
        direction=case["inputs"]["direction"],
        dtype=dtype,
        problem_type="single_label_classification",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_exit_simulation(oracle_cases: Any, dtype: torch.dtype) -> None:
    for case in oracle_cases("cosee", "exit_simulation"):
        seen = simulated(case, dtype)
        exit_layer, _ = seen.outcome(float(case["inputs"]["tau"]))
        assert exit_layer.tolist() == case["expected"]["exit_layers"], case["case"]
        if "speedup" in case["expected"]:
            counts = count_exits(exit_layer.tolist(), seen.exit_layers[-1])
            assert speedup_ratio(counts) == pytest.approx(case["expected"]["speedup"], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_sweep_knows_every_threshold(oracle_cases: Any, dtype: torch.dtype) -> None:
    for case in oracle_cases("cosee", "exit_simulation_sweep"):
        values, speedups = threshold_speedups(simulated(case, dtype))
        numpy_dtype = np.float32 if dtype == torch.float32 else np.float64
        expected = [
            np.nextafter(numpy_dtype(v), numpy_dtype(np.inf))
            for v in case["inputs"]["tau_is_nextafter_of"]
        ]
        assert values.tolist() == [float(v) for v in expected]
        assert (4 / speedups).tolist() == pytest.approx(case["expected"]["mean_exit_layer"])


def test_the_threshold_of_a_requested_speedup(oracle_cases: Any) -> None:
    for case in oracle_cases("cosee", "threshold_for_speedup"):
        seen = simulated(case, torch.float64)
        values, speedups = threshold_speedups(seen)
        index = int(np.searchsorted(speedups, case["inputs"]["target_speedup"]))
        assert values[index] == np.nextafter(case["expected"]["tau_is_nextafter_of"], np.inf)
        assert speedups[index] == case["expected"]["speedup"]
        # What is stored stands off from the signals and gives the same exits.
        exits, _ = seen.outcome(float(values[index]))
        assert any(seen.outcome(t)[0].equal(exits) for t in spread_thresholds(seen, 50))


def test_speedup(oracle_cases: Any) -> None:
    for case in oracle_cases("common", "speedup"):
        layers, expected = case["inputs"]["exit_layers"], case["expected"]
        speedup = speedup_ratio(count_exits(layers, case["inputs"]["num_layers"]))
        assert speedup == pytest.approx(expected["speedup"], abs=1e-5)
        if "layers_saved" in expected:
            assert 1 - 1 / speedup == pytest.approx(expected["layers_saved"], abs=1e-5)
        if "mean_of_ratios_wrong" in expected:
            assert speedup != pytest.approx(expected["mean_of_ratios_wrong"], abs=1e-2)
    for case in oracle_cases("common", "speedup_from_counts"):
        counts = case["inputs"]["exit_counts"]
        assert speedup_ratio(counts) == pytest.approx(case["expected"]["speedup"], abs=1e-6)
        assert mean_exit_layer(counts) == pytest.approx(case["expected"]["mean_exit_layer"])
        if "inverse" in case["expected"]:
            assert 1 / speedup_ratio(counts) == pytest.approx(case["expected"]["inverse"], abs=1e-6)


@pytest.mark.parametrize("scale", [1.0, 1e2, 1e4])
def test_signals_stay_finite(scale: float) -> None:
    logits = torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * scale
    for function in (
        signals.max_probability,
        signals.margin,
        signals.normalised_entropy,
        signals.energy,
    ):
        assert torch.isfinite(function(logits)).all()
        assert torch.isnan(function(logits * torch.nan)).all()
        assert function(logits.bfloat16()).dtype == torch.float32
