"""Calibration tables: order, lookup, refusals, and what is measured."""

import dataclasses
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from offramp_model.calibrating import (
    curve,
    layer_accuracies,
    macro_f1,
    oracle,
    spread_thresholds,
    trace,
)
from offramp_model.calibration import CalibrationTable, CurvePoint, reachable_speedups
from offramp_model.policies import POLICIES, make_policy, never
from offramp_model.recorded import RecordedExits

EXITS = (1, 2, 3, 4, 5, 6)


def recorded(rows: int = 60, seed: int = 0, exits: tuple[int, ...] = EXITS) -> RecordedExits:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(exits), rows, 4, generator=generator) * 3
    return RecordedExits(logits, exits, torch.rand(len(exits), rows, generator=generator))


def labels(rows: int = 60) -> torch.Tensor:
    return torch.arange(rows) % 4


def make_table(name: str = "entropy", rows: int = 60) -> CalibrationTable:
    points = curve(recorded(rows), labels(rows), make_policy(name))
    return CalibrationTable(
        policy=name, split="validation", rows=rows, data_fingerprint="f", points=points
    )


@pytest.mark.parametrize("name", POLICIES)
@given(seed=st.integers(0, 1000))
def test_a_curve_starts_at_full_depth_and_is_monotone(name: str, seed: int) -> None:
    policy = make_policy(name)
    points = curve(recorded(seed=seed), labels(), policy, num_points=30)
    assert points[0].threshold == never(policy)
    assert points[0].speedup == 1.0
    speedups = [point.speedup for point in points]
    assert speedups == sorted(set(speedups))
    eager = [point.threshold for point in points]
    assert eager == sorted(eager, reverse=policy.direction != "below")
    full = recorded(seed=seed).logits[-1].argmax(-1)
    assert points[0].accuracy == pytest.approx(float((full == labels()).double().mean()))


def test_a_request_gets_the_smallest_speedup_that_is_enough() -> None:
    table = make_table()
    speedups = [point.speedup for point in table.points]
    assert table.threshold_for(1.0) == float("-inf")
    for request in (1.01, 1.5, 2.0, 3.3, table.max_speedup):
        point = table.point_for(request)
        assert point.speedup == min(s for s in speedups if s >= request - 1e-9)
        assert point.speedup < request * 1.1  # 200 points leave no large gaps in 60 rows


@pytest.mark.parametrize("request_", [0.99, 0.0, -1.0, 100.0, float("nan")])
def test_a_request_out_of_range_is_refused_with_the_range(request_: float) -> None:
    with pytest.raises(ValueError, match=r"outside the calibrated range 1\.0 to 6"):
        make_table().threshold_for(request_)


@pytest.mark.parametrize("name", ["confidence", "margin", "entropy", "energy"])
@given(seed=st.integers(0, 1000))
def test_a_last_bit_does_not_change_an_exit(name: str, seed: int) -> None:
    """The same text in another batch may get a signal that differs in the last bits."""
    seen = trace(recorded(seed=seed), make_policy(name))
    signal = seen.signal.float()
    noise = torch.tensor([-torch.inf, torch.inf])[torch.randint(2, signal.shape)]
    shaken = dataclasses.replace(seen, signal=torch.nextafter(signal, noise).double())
    stood_off = 0
    for point in curve(recorded(seed=seed), labels(), make_policy(name), num_points=20)[1:-1]:
        threshold = torch.tensor(point.threshold).float()
        below, above = signal[signal <= threshold], signal[signal >= threshold]
        steps = (float(above.min()) - float(below.max())) / float(threshold * 2**-23)
        if steps > 8:  # else two signals are neighbours, and there is no room between them
            stood_off += 1
            assert seen.outcome(point.threshold)[0].equal(shaken.outcome(point.threshold)[0])
    assert stood_off > 5


def test_neighbouring_signals_do_not_keep_a_threshold_from_standing_off() -> None:
    """Two signals without a float between them: the way beyond the second is halved."""
    first = torch.tensor(0.75)
    signals = torch.stack([first, torch.nextafter(first, torch.tensor(0.0)), torch.tensor(0.5)])
    seen = dataclasses.replace(
        trace(recorded(), make_policy("confidence")),
        signal=torch.stack([signals, torch.full((3,), 0.9)]).double(),
        can_leave=torch.ones(2, 3, dtype=torch.bool),
        exit_layers=(1, 2),
    )
    assert spread_thresholds(seen, 50) == [
        pytest.approx(0.625),
        pytest.approx(0.5),
    ]


def test_fixed_layer_has_one_point_an_exit() -> None:
    table = make_table("fixed_layer")
    assert [point.mean_exit_layer for point in table.points] == [6, 5, 4, 3, 2, 1]
    assert [point.accuracy for point in table.points] == pytest.approx(
        layer_accuracies(recorded(), labels())[::-1]
    )


def test_full_depth_cannot_be_sped_up() -> None:
    table = make_table("full_depth")
    assert len(table.points) == 1
    with pytest.raises(ValueError, match=r"1\.0 to 1"):
        table.threshold_for(1.5)


def test_thinned_exits_limit_the_speedup() -> None:
    points = curve(recorded(exits=(3, 6)), labels(), make_policy("confidence"))
    assert points[-1].speedup == pytest.approx(2.0)
    assert points[-1].exit_counts == (0, 0, 60, 0, 0, 0)
    assert reachable_speedups(points) == (1.0, 1.25, 1.5, 2.0)


def test_a_table_survives_json() -> None:
    table = make_table()
    text = table.model_dump_json()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert CalibrationTable.model_validate_json(text) == table


def test_a_bent_table_is_refused() -> None:
    table = make_table()
    points = list(table.points)
    points[3], points[4] = (
        points[3].model_copy(update={"threshold": points[4].threshold}),
        points[4].model_copy(update={"threshold": points[3].threshold}),
    )
    with pytest.raises(ValueError, match="thresholds must be monotone"):
        CalibrationTable(**(table.model_dump() | {"points": points}))
    with pytest.raises(ValueError, match=r"must ascend from 1\.0"):
        CalibrationTable(**(table.model_dump() | {"points": table.points[1:]}))
    backwards = [
        points[0],
        *(point.model_copy(update={"threshold": -point.threshold}) for point in table.points[1:]),
    ]
    with pytest.raises(ValueError, match="thresholds must be monotone"):
        CalibrationTable(**(table.model_dump() | {"points": backwards}))
    eager = [points[0].model_copy(update={"threshold": 0.0}), *table.points[1:]]
    with pytest.raises(ValueError, match="the first threshold must be -inf"):
        CalibrationTable(**(table.model_dump() | {"points": eager}))
    with pytest.raises(ValueError, match="unknown exit policy 'hope'"):
        CalibrationTable(**(table.model_dump() | {"policy": "hope"}))
    with pytest.raises(ValueError, match="must add up to the 61 rows"):
        CalibrationTable(**(table.model_dump() | {"rows": 61}))


def test_the_oracle_leaves_at_the_first_right_exit() -> None:
    logits = torch.zeros(3, 3, 2)
    logits[0, 0, 1] = 1.0  # row 0 is right at once
    logits[1, 1, 1] = 1.0  # row 1 at the second exit; row 2 never
    speedup, accuracy = oracle(RecordedExits(logits, (1, 2, 3)), torch.ones(3, dtype=torch.int64))
    assert speedup == pytest.approx(9 / (1 + 2 + 3))
    assert accuracy == pytest.approx(2 / 3)


def test_macro_f1_counts_every_class_alike() -> None:
    predicted = torch.tensor([0, 0, 0, 1, 2])
    true = torch.tensor([0, 0, 1, 1, 1])
    # class 0: 2·2/(3+2); class 1: 2·1/(1+3); class 2: never true, predicted once.
    assert macro_f1(predicted, true) == pytest.approx((0.8 + 0.5 + 0.0) / 3)


def test_points_refuse_impossible_values() -> None:
    with pytest.raises(ValueError, match="accuracy"):
        CurvePoint(
            threshold=0,
            speedup=1,
            mean_exit_layer=1,
            accuracy=1.5,
            macro_f1=0,
            exit_counts=(1,),
        )
