"""The SLO controller: laws over made-up histories, then whole overloads in the simulator."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loading import load
from offramp_model.calibration import CalibrationTable, CurvePoint
from offramp_model.cost import StepTable
from offramp_service.jobs import Depth
from offramp_service.metrics import Metrics
from offramp_service.scheduler import Plan
from offramp_service.settings import Settings
from offramp_service.slo import (
    DECIDE_S,
    LEAST_SAMPLES,
    LET_GO,
    LET_GO_S,
    LONGEST_PATIENCE_S,
    PATIENCE_S,
    RAISE,
    WINDOW_S,
    LatencyWindow,
    Load,
    SloController,
)
from offramp_service.slo_watch import SloWatch

sim = load("service/bench/simulator.py")

TARGET_S = 0.1
SPEEDUPS = (1.0, *(1 + step / 50 for step in range(1, 101)))  # to 3
LAYERS = 6
TICK_S = 0.125
"""A decision each; exact in binary."""


class Service:
    """A made-up service of 100 layers a second: says what the controller is to see."""

    def __init__(self, controller: SloController, now: float = 0.0) -> None:
        self.controller, self.now, self.busy_s = controller, now, 1.0
        self.admitted = 0.0

    def tick(
        self,
        *,
        waits_s: float = 0.0,
        latency_s: float | None = None,
        comes: float = 1.01,
        dt: float = TICK_S,
    ) -> str | None:
        """Time passes; so much work is ahead, this is how long some requests took, and what comes
        in, as a share of what the service can do."""
        self.now += dt
        self.busy_s += dt
        self.admitted += 100 * comes * dt
        if latency_s is not None:
            for _ in range(LEAST_SAMPLES):
                self.controller.finished(self.now, latency_s)
        load = Load(100 * waits_s, self.admitted, round(100 * self.busy_s), self.busy_s)
        return self.controller.decide(self.now, load)

    def overload(self, ticks: int = 50) -> None:
        for _ in range(ticks):
            self.tick(waits_s=10 * TARGET_S, comes=2.0)


def controller(speedups: tuple[float, ...] = SPEEDUPS) -> SloController:
    return SloController(TARGET_S, speedups)


# -- the window ------------------------------------------------------------------------------------


@given(
    st.lists(st.floats(1e-4, 100), min_size=LEAST_SAMPLES, max_size=200),
    st.randoms(use_true_random=False),
)
def test_the_p95_is_the_exact_one_rounded_up_to_a_bin(
    took: list[float], rng: random.Random
) -> None:
    window = LatencyWindow()
    now = 0.0
    for latency in took:
        now += rng.random() * WINDOW_S / 1000
        window.add(now, latency)
    exact = sorted(took)[len(took) - 1 - len(took) // 20]
    assert window.p95_s is not None
    assert exact * (1 - 1e-9) <= window.p95_s <= exact * 1.05 * (1 + 1e-9)


def test_the_window_forgets_and_few_samples_tell_nothing() -> None:
    window = LatencyWindow()
    assert window.p95_s is None
    for number in range(LEAST_SAMPLES):
        assert window.p95_s is None
        window.add(number / 100, 1.0)
    assert window.p95_s == pytest.approx(1.0, rel=0.05)
    window.forget(WINDOW_S - 0.01)
    assert window.p95_s is not None
    window.forget(WINDOW_S + 1.01)
    assert window.p95_s is None
    for _ in range(100_000):  # memory is by slots and bins, not by samples
        window.add(WINDOW_S + 2, 1e9)
    assert len(window._slots) == 1
    assert window.p95_s is not None  # beyond all bins is in the last one


# -- laws of the floor -----------------------------------------------------------------------------

HISTORIES = st.lists(
    st.tuples(
        st.floats(0, 1),  # what waits, s
        st.none() | st.floats(1e-3, 1),  # latency of some requests
        st.sampled_from([0.01, 0.1, DECIDE_S, 0.3, 1.0, 7.0, 100.0]),  # time that passes
    ),
    max_size=80,
)


@given(HISTORIES, st.sampled_from([SPEEDUPS, (1.0,), (1.0, 2.5), (1.0, 1.4, 1.5, 4.0)]))
@settings(deadline=None)
def test_the_floor_stays_in_its_range_and_moves_no_faster_than_it_may(
    history: list[tuple[float, float | None, float]], speedups: tuple[float, ...]
) -> None:
    it = controller(speedups)
    service = Service(it)
    level, decided_at = 1.0, -math.inf
    for waits_s, latency_s, dt in history:
        floor = it.floor
        moved = service.tick(waits_s=waits_s, latency_s=latency_s, dt=dt)
        assert it.floor in speedups
        assert 1.0 <= it.floor <= it.ceiling == speedups[-1]
        assert moved == ("up" if it.floor > floor else "down" if it.floor < floor else None)
        if it._level != level:
            assert service.now - decided_at >= DECIDE_S
            assert it._level <= level * RAISE * (1 + 1e-9)
            steps = 1 + (service.now - decided_at) / LET_GO_S
            assert it._level >= level / LET_GO**steps * (1 - 1e-9)
        if it._decided_at == service.now:
            decided_at = service.now
        level = it._level


@given(st.floats(0.81, 90), st.booleans())
@settings(deadline=None)
def test_lasting_overload_raises_to_the_ceiling_and_never_back(
    times_target: float, by_forecast: bool
) -> None:
    it = controller()
    service = Service(it)
    floors = [it.floor]
    sign = {"waits_s" if by_forecast else "latency_s": times_target * TARGET_S}
    dt = TICK_S if by_forecast else TICK_S + times_target * TARGET_S
    for _ in range(20):
        service.tick(**sign, dt=dt)
        floors.append(it.floor)
    assert floors == sorted(floors)
    assert floors[-1] == it.ceiling


def test_from_full_depth_to_fast_enough_in_three_decisions() -> None:
    service = Service(controller())
    service.tick()
    service.overload(3)
    assert service.controller.floor >= 1.6


def test_a_queue_that_shrinks_by_itself_raises_nothing() -> None:
    it = controller()
    service = Service(it)
    service.overload(3)
    floor = it.floor
    assert floor > 1.0
    for _ in range(10):  # though its texts come out late
        service.tick(waits_s=1.0, comes=0.9, latency_s=0.1)
    assert it.floor == floor
    service.tick(waits_s=1.0, comes=1.1)
    assert it.floor > floor


def test_requests_from_before_a_raise_do_not_raise_again() -> None:
    """They waited behind what the raise could not change any more."""
    it = controller()
    service = Service(it)
    service.tick(latency_s=0.2)
    service.tick(latency_s=0.2)
    floor = it.floor
    assert floor > 1.0
    for _ in range(3):  # admitted before the raise, though they end after it
        service.tick(latency_s=2.0)
    assert it.floor == floor
    assert it.p95_s == pytest.approx(2.0, rel=0.05)  # yet they are what is reported
    for _ in range(2):
        service.tick(latency_s=0.15)
    assert it.floor > floor


def test_between_the_two_bounds_nothing_moves() -> None:
    service = Service(controller())
    service.overload()
    for _ in range(1000):
        service.tick(waits_s=0.65 * TARGET_S, latency_s=0.65 * TARGET_S)
    assert service.controller.floor == service.controller.ceiling


def test_it_lets_go_slowly_after_the_load_has_ended() -> None:
    it = controller()
    service = Service(it)
    service.overload()
    ended = service.now
    service.tick(latency_s=0.01)
    while it.floor == it.ceiling:
        service.tick(latency_s=0.01)
    assert service.now - ended >= PATIENCE_S
    while it.floor > 1.0:
        before = it.floor
        service.tick(latency_s=0.01)
        assert it.floor <= before
    slowest = math.log(it.ceiling) / math.log(LET_GO) * LET_GO_S
    assert service.now - ended == pytest.approx(PATIENCE_S + slowest, abs=WINDOW_S)


def test_a_silence_counts_as_calm() -> None:
    it = controller()
    service = Service(it)
    service.overload()
    service.tick()
    assert it.floor == it.ceiling
    assert service.tick(dt=3600.0) == "down"
    assert it.floor == 1.0


def test_who_had_to_raise_again_waits_longer_the_next_time() -> None:
    """A load that a floor of 2 carries and one below does not: the floor turns round ever more
    rarely."""
    it = controller()
    service = Service(it)
    floors = [it.floor]
    for _ in range(400):
        service.tick(latency_s=0.03 if it.floor >= 2.0 else 0.09, dt=1.0)
        floors.append(it.floor)
    falls = [place for place, (one, other) in enumerate(pairwise(floors)) if other < one]
    calms = [later - place for place, later in pairwise(falls) if later - place > 2 * LET_GO_S]
    assert calms == sorted(calms)
    assert calms[0] < 2 * PATIENCE_S + WINDOW_S < LONGEST_PATIENCE_S <= calms[-1]
    assert _turns(floors) <= 2 * (4 + 400 / LONGEST_PATIENCE_S)


def _turns(floors: list[float]) -> int:
    ups = [other > one for one, other in pairwise(floors) if one != other]
    return sum(one != other for one, other in pairwise(ups))


@pytest.mark.parametrize("speedups", [(), (2.0,), (1.0, 3.0, 2.0)])
def test_speedups_must_ascend_from_one(speedups: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"ascend from 1\.0"):
        controller(speedups)


# -- overload, on virtual time ---------------------------------------------------------------------


def _table() -> CalibrationTable:
    """A share of the rows leaves after each layer; the larger, the less accurate."""
    points = []
    for step in range(41):
        share = step / 50
        stays = [round(1000 * (1 - share) ** layer) for layer in range(LAYERS)]
        counts = [one - other for one, other in pairwise([*stays, 0])]
        mean = sum(stays) / 1000
        points.append(
            CurvePoint(
                threshold=math.inf if step == 0 else 1 - share,
                speedup=LAYERS / mean,
                mean_exit_layer=mean,
                accuracy=0.95 - 0.1 * share**2,
                macro_f1=0.9,
                exit_counts=tuple(counts),
            )
        )
    return CalibrationTable(
        policy="confidence", split="validation", rows=1000, data_fingerprint="-", points=points
    )


TABLE = _table()
DEVICES = {
    "330 texts a second": StepTable((30, 3000), (0.5e-3, 50e-3)),
    "60 texts a second": StepTable((30, 3000), (2.7e-3, 267e-3)),
    "with a price of a call": StepTable((30, 1000, 3000), (4e-3, 12e-3, 33e-3)),
}


def overload(costs: StepTable, peak: float, it: SloController | None, seed: int = 0) -> object:
    """5 s of a load of 0.6, 20 s of `peak`, 50 s of 0.6; of what full depth can carry."""
    rng = random.Random(seed)
    capacity = 68 / (LAYERS * costs(68 * 30))
    traffic, start = [], 0.0
    for load_, seconds in ((0.6, 5), (peak, 20), (0.6, 50)):
        rate = load_ * capacity
        texts = sim.poisson(
            rng, rate, int(1.1 * rate * seconds), classes=[(1.0, Depth.full(LAYERS))], tokens=[30]
        )
        traffic += [
            replace(one, arrives=start + one.arrives, hardness=rng.random())
            for one in texts
            if one.arrives < seconds
        ]
        start += seconds
    front = sim.Front(TABLE, 512, it)
    device = sim.Device(costs, tuple(range(1, LAYERS + 1)))
    sim.Simulation(Plan(2048, 512), device, traffic, costs_known=False, front=front).run()
    assert front.inside == 0
    assert len(front.answered) + len(front.refused) == len(traffic)
    return front


def late(front: object, since: float, until: float, target_s: float) -> float:
    took = [s for arrived, s in front.answered if since <= arrived < until]
    return sum(one > target_s for one in took) / len(took)


@pytest.mark.parametrize("costs", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("peak", [1.3, 1.6, 2.0])
def test_overload_bends_before_it_breaks(costs: StepTable, peak: float) -> None:
    target_s = 3 * LAYERS * costs(2048)  # of full batches
    speedups = tuple(point.speedup for point in TABLE.points if point.accuracy >= 0.92)
    it = SloController(target_s, speedups)
    front = overload(costs, peak, it)
    assert not front.refused
    assert late(front, 10, 25, target_s) <= 0.05
    assert late(front, 25, 75, target_s) <= 0.05
    assert min(point.accuracy for _, point in front.admitted) >= 0.92
    assert max(floor for _, floor in front.moves) <= speedups[-1]
    # It has let go at the end, but for a step or so that chance gave back.
    assert front.moves[-1][1] < 1.3


def test_without_it_the_same_overload_breaks() -> None:
    costs = DEVICES["330 texts a second"]
    front = overload(costs, 1.6, None)
    assert front.refused
    assert late(front, 10, 25, 4 * LAYERS * costs(2048)) > 0.9


def test_a_target_longer_than_the_queue_still_lets_nobody_be_refused() -> None:
    costs = DEVICES["330 texts a second"]
    it = SloController(60.0, tuple(point.speedup for point in TABLE.points))
    front = overload(costs, 1.6, it)
    assert front.moves
    assert not front.refused


@pytest.mark.parametrize("peak", [0.9, 1.0, 1.05, 1.2])
def test_a_constant_load_at_the_edge_does_not_make_it_flutter(peak: float) -> None:
    costs = DEVICES["330 texts a second"]
    it = SloController(4 * LAYERS * costs(2048), tuple(point.speedup for point in TABLE.points))
    front = overload(costs, peak, it, seed=1)
    assert _turns([1.0, *(floor for _, floor in front.moves)]) <= 6  # in 75 s


# -- at work in the service ------------------------------------------------------------------------


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def watching(metrics: Metrics, clock: Clock) -> Callable[..., SloWatch]:
    """A watch over a service whose requests the test makes up."""
    model = SimpleNamespace(
        floors=SPEEDUPS, default_speedup=1.0, expected_accuracy=lambda speedup: 1 - speedup / 100
    )

    def start(**how: object) -> SloWatch:
        watch = SloWatch(Settings(model_id="x", **how), model, Load, metrics, clock=clock)
        watch.show()
        return watch

    return start


def strain(watch: SloWatch, clock: Clock, took_s: float = 1.0, *, answered: bool = True) -> None:
    for _ in range(10):
        clock.now += 1.1 * took_s
        for _ in range(LEAST_SAMPLES):
            watch.ended(clock.now - took_s, answered=answered)


def test_enforcing_raises_and_tells(watching: Callable, clock: Clock, read: Callable) -> None:
    watch = watching(slo_p95_ms=100)
    assert (watch.floor(), read("speedup_floor"), read("slo_target_seconds")) == (1.0, 1.0, 0.1)
    assert math.isnan(read("slo_p95_seconds"))
    strain(watch, clock)
    floor = watch.floor()
    assert floor > 1.0
    assert read("speedup_floor") == floor
    assert read("slo_p95_seconds") == pytest.approx(1.0, rel=0.05)
    assert read("expected_accuracy") == pytest.approx(1 - floor / 100)
    assert read("controller_adjustments_total", direction="up") >= 1
    assert watch.describe() == {
        "target_p95_ms": 100,
        "mode": "enforce",
        "floor": floor,
        "ceiling": 3.0,
        "min_accuracy": None,
    }
    clock.now += 1
    watch.look()
    clock.now += 1000
    watch.look()  # a scrape is enough
    assert (watch.floor(), read("speedup_floor")) == (1.0, 1.0)
    assert read("controller_adjustments_total", direction="down") == 1


def test_observing_tells_and_raises_nobody(
    watching: Callable, clock: Clock, read: Callable
) -> None:
    watch = watching(slo_p95_ms=100, slo_controller="observe")
    strain(watch, clock)
    assert watch.floor() == 1.0
    assert watch.describe()["floor"] == read("speedup_floor") > 1.0
    assert read("expected_accuracy") == pytest.approx(0.99)


@pytest.mark.parametrize("how", [{}, {"slo_p95_ms": 100, "slo_controller": "off"}])
def test_off_does_nothing(how: dict, watching: Callable, clock: Clock, read: Callable) -> None:
    watch = watching(**how)
    strain(watch, clock)
    assert (watch.floor(), read("speedup_floor")) == (1.0, 1.0)
    assert math.isnan(read("slo_p95_seconds"))
    assert math.isnan(read("slo_target_seconds")) is not bool(how)
    assert watch.describe()["mode"] == "off"


def test_who_gave_up_counts_once_it_was_late(watching: Callable, clock: Clock) -> None:
    watch = watching(slo_p95_ms=100)
    strain(watch, clock, 0.09, answered=False)
    assert watch.floor() == 1.0
    strain(watch, clock, 0.11, answered=False)
    assert watch.floor() > 1.0


def test_another_checkpoint_goes_on_from_the_floor_that_was(
    watching: Callable, clock: Clock
) -> None:
    """An exchange under load lets nobody go; the newcomer keeps to its own ceiling."""
    before = watching(slo_p95_ms=100.0)
    strain(before, clock)
    assert before.floor() > 1.0
    after = watching(slo_p95_ms=100.0)
    assert after.floor() == 1.0
    after.show(before)
    assert after.floor() == before.floor()
    modest = SloController(0.1, (1.0, 1.01))
    modest.go_on_from(before._controller)
    assert modest.floor == 1.01
