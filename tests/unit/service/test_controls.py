"""From speed-ups, thresholds, headers and bounds to what a row carries."""

from pathlib import Path
from types import ModuleType

import pytest
from starlette.datastructures import Headers

from loading import load
from offramp_kernels.contract import MAX_ROWS
from offramp_service.controls import Asked, ControlDesk, full_depth
from offramp_service.errors import InvalidInput
from offramp_service.quality import SpeedupCorrection
from offramp_service.served_model import ServedModel, SettingsError, load_model
from offramp_service.settings import Settings

INF = float("inf")


@pytest.fixture(scope="module")
def support() -> ModuleType:
    return load("tests/unit/service/support.py")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, support: ModuleType) -> Path:
    return support.write_tiny_checkpoint(tmp_path_factory.mktemp("service") / "tiny")


@pytest.fixture(scope="module")
def model(directory: Path) -> ServedModel:
    return load_model(Settings(model_id=directory))


@pytest.fixture(scope="module")
def desk(model: ServedModel) -> ControlDesk:
    return ControlDesk(model, 30_000)


def headers(**values: str) -> Headers:
    return Headers({name.replace("_", "-"): value for name, value in values.items()})


def test_one_never_leaves_early_and_more_follows_the_table(
    desk: ControlDesk, model: ServedModel
) -> None:
    assert desk.resolve(Asked(speedup=1.0), {}).threshold == INF
    assert desk.resolve(Asked(), {}).threshold == INF  # the default
    two = desk.resolve(Asked(speedup=2.0), {})
    assert model.table is not None
    assert two.threshold == model.table.threshold_for(2.0)
    assert two.depth.mean == pytest.approx(model.table.point_for(2.0).mean_exit_layer)
    assert two.depth.mean <= 2.0 + 1e-9
    assert desk.resolve(Asked(speedup=model.max_speedup), {}).depth.mean >= 1.0


def test_a_higher_speedup_never_asks_for_a_stricter_threshold(desk: ControlDesk) -> None:
    thresholds = [desk.resolve(Asked(speedup=1 + step / 20), {}).threshold for step in range(60)]
    assert thresholds == sorted(thresholds, reverse=True)


def test_what_is_expected_is_what_calibration_has_for_the_speedup_asked_for(
    desk: ControlDesk, model: ServedModel
) -> None:
    assert desk.resolve(Asked(speedup=1.0), {}).expected is None
    assert desk.resolve(Asked(threshold=0.5), {}).expected is None
    two = desk.resolve(Asked(speedup=2.0, max_layer=3), {})
    assert two.expected is two.depth
    assert full_depth(model).threshold == INF
    assert full_depth(model).depth.mean == model.num_layers


def test_a_correction_moves_the_lookup_within_bounds_and_not_what_is_expected(
    desk: ControlDesk, model: ServedModel
) -> None:
    correction = SpeedupCorrection()
    corrected = ControlDesk(model, 30_000, correction=correction)
    assert corrected.resolve(Asked(speedup=2.0), {}) == desk.resolve(Asked(speedup=2.0), {})
    for _ in range(100):
        correction.learn(0.5)
    plain, moved = (one.resolve(Asked(speedup=2.0), {}) for one in (desk, corrected))
    assert moved.threshold == desk.resolve(Asked(speedup=2.0 * correction.factor), {}).threshold
    assert moved.threshold < plain.threshold
    assert moved.depth.mean < plain.depth.mean
    assert (moved.speedup, moved.expected) == (2.0, plain.expected)
    most = Asked(speedup=model.max_speedup)
    assert corrected.resolve(most, {}) == desk.resolve(most, {})
    for untouched in (Asked(speedup=1.0), Asked(threshold=0.5), Asked()):
        assert corrected.resolve(untouched, {}) == desk.resolve(untouched, {})


def test_body_over_header_over_default_and_threshold_over_speedup(
    desk: ControlDesk, model: ServedModel
) -> None:
    both = headers(X_Speedup="2", X_Exit_Threshold="0.7")
    assert desk.resolve(Asked(), both).threshold == 0.7
    assert desk.resolve(Asked(), headers(x_speedup="2.0")).speedup == 2.0
    assert desk.resolve(Asked(speedup=3.0), both).speedup == 3.0
    raw = desk.resolve(Asked(speedup=3.0, threshold=0.6), both)
    assert (raw.threshold, raw.speedup) == (0.6, None)
    assert 1.0 <= raw.depth.mean <= 4.0


def test_bounds(desk: ControlDesk) -> None:
    bounded = desk.resolve(Asked(min_layer=2, max_layer=3), {})
    assert (bounded.min_layer, bounded.max_layer, bounded.depth.mean) == (2, 3, 3)


@pytest.mark.parametrize(
    ("asked", "given", "param", "message"),
    [
        (Asked(speedup=0.5), {}, "speedup", "speedup is 0.5, allowed is 1 to 4"),
        (Asked(speedup=99.0), {}, "speedup", "speedup is 99"),
        (Asked(speedup=float("nan")), {}, "speedup", "speedup is nan"),
        (Asked(speedup=INF), {}, "speedup", "speedup is inf"),
        (Asked(threshold=1.5), {}, "threshold", "threshold is 1.5, allowed is 0 to 1"),
        (Asked(threshold=float("nan")), {}, "threshold", "threshold is nan"),
        (Asked(min_layer=0), {}, "min_layer", "min_layer is 0, allowed is 1 to 4"),
        (Asked(max_layer=5), {}, "max_layer", "max_layer is 5, allowed is 1 to 4"),
        (Asked(min_layer=10**400), {}, "min_layer", f"min_layer is {10**39}, allowed is 1 to 4"),
        (Asked(min_layer=3, max_layer=2), {}, "min_layer", "min_layer 3 is above max_layer 2"),
        (Asked(), {"x-speedup": "fast"}, "X-Speedup", "X-Speedup is 'fast'"),
        (Asked(), {"x-speedup": "nan"}, "X-Speedup", "allowed is a number"),
        (Asked(), {"x-speedup": "1_0"}, "X-Speedup", "allowed is a number"),
        (Asked(), {"x-speedup": "9"}, "X-Speedup", "X-Speedup is 9, allowed is 1 to 4"),
        (Asked(), {"x-exit-threshold": "inf"}, "X-Exit-Threshold", "allowed is a number"),
        (Asked(), {"x-exit-threshold": "-1"}, "X-Exit-Threshold", "allowed is 0 to 1"),
    ],
)
def test_what_is_out_of_range_is_named(
    desk: ControlDesk, asked: Asked, given: dict[str, str], param: str, message: str
) -> None:
    with pytest.raises(InvalidInput) as error:
        desk.resolve(asked, Headers(given))
    assert (error.value.status, error.value.param) == (422, param)
    assert message in error.value.message


def test_a_ceiling_falls_to_an_exit_at_or_before_it(tmp_path: Path, support: ModuleType) -> None:
    sparse = support.write_tiny_checkpoint(tmp_path / "sparse", exit_layers=(2, 4))
    desk = ControlDesk(load_model(Settings(model_id=sparse)), 30_000)
    assert desk.resolve(Asked(max_layer=3), {}).max_layer == 2
    for impossible in (Asked(max_layer=1), Asked(min_layer=3, max_layer=3)):
        with pytest.raises(InvalidInput, match="exits are after layers 2, 4"):
            desk.resolve(impossible, {})


def test_load_raises_a_speedup_and_never_lowers_one(model: ServedModel) -> None:
    floor = model.floors[len(model.floors) // 2]
    desk = ControlDesk(model, 30_000, lambda: floor)
    raised = desk.resolve(Asked(speedup=1.0), {})
    assert model.table is not None
    assert raised.threshold == model.table.threshold_for(floor)
    assert (raised.speedup, raised.effective_speedup) == (1.0, floor)
    for given in (desk.resolve(Asked(), {}), desk.resolve(Asked(), headers(x_speedup="1.0"))):
        assert given == raised
    most = desk.resolve(Asked(speedup=model.max_speedup), {})
    assert most.effective_speedup == most.speedup == model.max_speedup
    raw = desk.resolve(Asked(threshold=0.9), {})
    assert (raw.threshold, raw.speedup, raw.effective_speedup) == (0.9, None, None)
    bounded = desk.resolve(Asked(min_layer=3, max_layer=3), {})
    assert (bounded.min_layer, bounded.max_layer, bounded.depth.mean) == (3, 3, 3)
    with pytest.raises(InvalidInput):
        desk.resolve(Asked(speedup=model.max_speedup + 1), {})


def test_the_floor_may_take_what_is_accurate_enough_and_allowed(
    directory: Path, model: ServedModel
) -> None:
    assert model.table is not None
    points = {point.speedup: point for point in model.table.points}
    assert model.floors == tuple(points)  # no bound: all
    least = points[1.0].accuracy
    bounded = load_model(Settings(model_id=directory, min_accuracy=least, max_speedup=3.0))
    assert bounded.floors[0] == 1.0
    assert all(one <= 3.0 and points[one].accuracy >= least for one in bounded.floors)
    assert bounded.floors[-1] == max(
        one for one in points if one <= 3.0 and points[one].accuracy >= least
    )
    assert bounded.expected_accuracy(1.0) == least


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"min_accuracy": 0.99}, r"--min-accuracy 0\.99: at speed-up 1 .* accuracy is 0\."),
        ({"exit_policy": "margin", "slo_p95_ms": 50}, "--slo-p95-ms 50: goes by a calibration"),
        ({"exit_policy": "margin", "min_accuracy": 0.1}, r"--min-accuracy 0\.1: goes by a calib"),
    ],
)
def test_a_target_needs_a_calibration_that_reaches_the_accuracy(
    directory: Path, how: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_model(Settings(model_id=directory, **how))


def test_another_policy_has_its_own_units(directory: Path) -> None:
    desk = ControlDesk(load_model(Settings(model_id=directory, exit_policy="entropy")), 30_000)
    assert desk.resolve(Asked(), {}).threshold == -INF
    mild, strong = (desk.resolve(Asked(speedup=s), {}).threshold for s in (1.5, 3.0))
    assert 0 < mild < strong <= 1


def test_without_a_calibration_only_thresholds_can_be_asked_for(directory: Path) -> None:
    desk = ControlDesk(load_model(Settings(model_id=directory, exit_policy="margin")), 30_000)
    assert desk.resolve(Asked(threshold=0.5), {}).depth.mean == 4
    assert desk.resolve(Asked(speedup=1.0), {}).threshold == INF
    with pytest.raises(InvalidInput, match="allowed is 1 to 1"):
        desk.resolve(Asked(speedup=1.5), {})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"exit_policy": "guess"}, "unknown exit policy 'guess'; known: full_depth"),
        (
            {"exit_policy": "gate"},
            "--exit-policy: exit policy 'gate' needs gates.*it supports: full",
        ),
        ({"max_input_length": 64}, "--max-input-length 64: this checkpoint takes 32"),
        ({"max_batch_tokens": 16}, "--max-batch-tokens 16 does not hold one text of 32"),
        ({"min_speedup": 9.0}, "--min-speedup 9.0: this checkpoint is calibrated up to 4"),
        ({"default_speedup": 9.0}, "--default-speedup 9.0 is outside 1 to 4"),
    ],
)
def test_settings_that_do_not_fit_the_checkpoint(
    directory: Path, wrong: dict[str, object], message: str
) -> None:
    with pytest.raises(SettingsError, match=message):
        load_model(Settings(model_id=directory, **wrong))


def test_a_batch_holds_no_more_texts_than_the_kernels_take(
    directory: Path, model: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    assert model.max_batch_texts == MAX_ROWS
    assert load_model(Settings(model_id=directory, max_batch_requests=7)).max_batch_texts == 7
    beyond = load_model(Settings(model_id=directory, max_batch_requests=MAX_ROWS + 1))
    assert beyond.max_batch_texts == MAX_ROWS
    assert f"at most {MAX_ROWS}" in caplog.text


def test_the_operators_bounds(directory: Path) -> None:
    model = load_model(Settings(model_id=directory, min_speedup=1.5, max_speedup=2.5))
    assert (model.min_speedup, model.max_speedup, model.default_speedup) == (1.5, 2.5, 1.5)
    capped = load_model(Settings(model_id=directory, max_speedup=50.0))
    assert capped.max_speedup == 4.0


def test_a_drop_names_the_fastest_that_keeps_it(model: ServedModel) -> None:
    assert model.table is not None
    points, desk = model.table.points, ControlDesk(model, 30_000, lambda: model.max_speedup)
    full = points[0].accuracy
    before = 0.0
    for drop in (0.0, 0.01, 0.02, 0.05, 0.1, 0.3, 1.0):
        given = desk.resolve(Asked(max_accuracy_drop=drop), {})
        assert given.speedup == max(
            point.speedup for point in points if full - point.accuracy <= drop + 1e-9
        )
        assert given.speedup >= before
        assert given.effective_speedup == given.speedup  # load raises nobody who names an accuracy
        before = given.speedup
    assert desk.resolve(Asked(threshold=0.9, max_accuracy_drop=0.1), {}).threshold == 0.9
    correction = SpeedupCorrection()
    correction.factor = 1.25
    corrected = ControlDesk(model, 30_000, correction=correction)
    for drop in (0.0, 0.02):
        asked = Asked(max_accuracy_drop=drop)
        assert corrected.resolve(asked, {}).threshold == desk.resolve(asked, {}).threshold


def test_a_drop_below_the_operators_least_is_refused(directory: Path) -> None:
    desk = ControlDesk(load_model(Settings(model_id=directory, min_speedup=3.5)), 30_000)
    with pytest.raises(InvalidInput, match=r"allows no speed-up from 3\.5 on"):
        desk.resolve(Asked(max_accuracy_drop=0.0), {})


@pytest.mark.parametrize("priority", [-101, 101, 10**30])
def test_priorities_have_a_range(desk: ControlDesk, priority: int) -> None:
    assert desk.resolve(Asked(priority=-100), {}).priority == -100
    with pytest.raises(InvalidInput, match="allowed is -100 to 100") as error:
        desk.resolve(Asked(priority=priority), {})
    assert error.value.param == "priority"
