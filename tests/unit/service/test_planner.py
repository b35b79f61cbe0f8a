"""The planner's arithmetic: what must hold of any machine, and that it says what the scheduler does
in the simulator."""

import math
import random
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loading import load
from offramp_model.cost import StepTable
from offramp_service.jobs import Depth
from offramp_service.planner import (
    Batches,
    Forecast,
    Machine,
    Mix,
    Replica,
    Traffic,
    _in_the_long_run,
    cheapest,
    plan,
    waiting,
)
from offramp_service.scheduler import Plan

sim = load("service/bench/simulator.py")

CPU = StepTable((16, 64, 256, 1024), (0.7e-3, 1.2e-3, 4e-3, 16e-3))
FLAT = StepTable((16, 1024, 8192), (17e-6, 31e-6, 245e-6))
TABLES = {"cpu": CPU, "flat": FLAT}
EARLY = (0.3, 0.3, 0.2, 0.1, 0.05, 0.05)
FULL = (0.0, 0.0, 0.0, 0.0, 0.0, 1.0)


def machine(table: str = "cpu", texts: int = 16, front_ms: float = 0.0, **other: object) -> Machine:
    return Machine(
        name=table,
        layer_seconds=TABLES[table],
        max_batch_tokens=2048,
        max_batch_texts=texts,
        front_s=front_ms / 1000,
        front_text_s=0.0,
        **other,  # type: ignore[arg-type]
    )


def traffic(exits: tuple[float, ...] = EARLY, texts: Mix = ((1, 1.0),)) -> Traffic:
    return Traffic(exits, ((8, 0.25), (24, 0.5), (48, 0.25)), texts)


@lru_cache
def replica_of(
    table: str, exits: tuple[float, ...], texts: int = 16, front_ms: float = 0.0
) -> Replica:
    return Replica(machine(table, texts, front_ms), traffic(exits))


WORLDS = st.builds(
    replica_of,
    st.sampled_from(sorted(TABLES)),
    st.sampled_from((EARLY, FULL)),
    st.sampled_from((1, 3, 16)),
    st.sampled_from((0.0, 0.4)),
)


# -- what must hold --------------------------------------------------------------------------------


@given(
    table=st.sampled_from(sorted(TABLES)),
    exits=st.sampled_from((EARLY, FULL)),
    rates=st.lists(st.floats(1, 1e5), min_size=2, max_size=4),
    slos=st.lists(st.floats(1e-4, 2.0), min_size=2, max_size=4),
)
@settings(max_examples=8, deadline=None)
def test_more_load_or_less_time_never_needs_fewer_replicas(
    table: str, exits: tuple[float, ...], rates: list[float], slos: list[float]
) -> None:
    replica = replica_of(table, exits)

    def needed(rate: float, slo_s: float) -> float:
        found = plan(replica, rate=rate, slo_s=slo_s).replicas
        return math.inf if found is None else found

    by_rate = [needed(rate, max(slos)) for rate in sorted(rates)]
    assert by_rate == sorted(by_rate)
    by_slo = [needed(max(rates), slo_s) for slo_s in sorted(slos, reverse=True)]
    assert by_slo == sorted(by_slo)


@given(replica=WORLDS, load=st.floats(0.01, 0.9))
@settings(max_examples=15, deadline=None)
def test_a_forecast_is_possible(replica: Replica, load: float) -> None:
    one = replica.forecast(load * replica.ceiling)
    assert one.p50_s <= one.p95_s <= one.p99_s
    if one.p99_s == math.inf:
        return
    assert 0 < one.load <= 1
    # Batches that are not full cost more by the text, so engines are busier than loaded.
    assert one.load - 1e-4 <= one.busy <= 1
    assert one.mean_batch >= 1 - 1e-9
    assert one.queued_layer_work >= 0


@given(replica=WORLDS)
@settings(max_examples=5, deadline=None)
def test_what_a_replica_carries_is_in_time_and_a_little_more_is_not(replica: Replica) -> None:
    slo_s = 3 * replica.forecast(1e-6 * replica.ceiling).p99_s
    carries = replica.carries(slo_s, 99)
    assert 0 < carries < replica.ceiling
    assert replica.forecast(carries).p99_s <= slo_s
    assert replica.forecast(carries + replica.ceiling / 2**12).p99_s > slo_s


def test_an_overloaded_replica_has_no_latency() -> None:
    replica = Replica(machine(), traffic())
    for share in (1.0, 1.5):
        assert replica.forecast(share * replica.capacity).p50_s == math.inf
    assert waiting(Batches(machine(), traffic()), ((1, 1.0),), 1.2 * replica.capacity) is None


def test_shares_of_the_queue_add_up_and_an_idle_machine_has_none() -> None:
    batches = Batches(machine(), traffic())
    for share in (0.1, 0.6, 0.9):
        shares = waiting(batches, ((1, 1.0),), share * 16 / batches.mean[-1])
        assert shares is not None
        assert shares.sum() == pytest.approx(1)
        assert (shares >= 0).all()
    nearly_none = waiting(batches, ((1, 1.0),), 1e-3)
    assert nearly_none is not None
    assert nearly_none[0] == pytest.approx(1, abs=1e-4)


def test_large_batches_are_reckoned_as_far_as_needed() -> None:
    """Hundreds of texts a batch: with few that wait, fewer are looked at, to the same result."""
    large = Machine("large", FLAT, max_batch_tokens=8192, max_batch_texts=4096)
    batches, single = Batches(large, traffic()), ((1, 1.0),)
    assert batches.most == 315  # of 26 tokens
    for share in (0.01, 0.5, 0.9):
        rate = share * batches.most / batches.mean[-1]
        found = waiting(batches, single, rate)
        assert found is not None
        every = _in_the_long_run(batches, single, rate, 4 * batches.most)
        assert abs(found - every[: len(found)]).sum() < 1e-5
        assert len(found) < len(every)


def test_a_lone_text_takes_its_layers() -> None:
    only = Traffic((0.0, 0.25, 0.0, 0.0, 0.0, 0.75), ((64, 1.0),))
    empty = Replica(machine(), only).forecast(1e-3)
    assert empty.p50_s == pytest.approx(6 * CPU(64))
    assert empty.mean_batch == pytest.approx(1, abs=1e-3)


def test_early_exits_carry_more() -> None:
    slo_s = 0.1
    deep, early = (Replica(machine(), traffic(exits)).carries(slo_s, 99) for exits in (FULL, EARLY))
    # Half as many layers, and smaller batches behind each of them.
    assert early > 1.5 * deep


def test_the_token_budget_limits_batches_too() -> None:
    short = Machine("few tokens", CPU, max_batch_tokens=100, max_batch_texts=16)
    assert Batches(short, traffic()).most == 3  # of 26 tokens on average
    assert Batches(machine(texts=16), traffic()).most == 16


def test_what_stands_in_the_way_is_named() -> None:
    def ask(slo_s: float, front_ms: float = 0.0) -> str:
        return plan(
            Replica(machine(front_ms=front_ms), traffic()), rate=100, slo_s=slo_s
        ).bottleneck

    assert ask(2.0) == "engine"
    assert ask(0.02) == "latency"
    assert ask(2.0, front_ms=20) == "front"
    assert ask(1e-4) == "unreachable"
    none = plan(Replica(machine(), traffic()), rate=100, slo_s=1e-4)
    assert none.replicas is none.forecast is None
    assert none.empty.p99_s > 1e-4


def test_the_front_takes_its_share_of_time_and_of_the_rate() -> None:
    replica = Replica(machine(front_ms=2), traffic())
    assert replica.ceiling == pytest.approx(0.8 / 2e-3)
    without, behind = (
        Replica(machine(front_ms=ms), traffic()).forecast(100.0) for ms in (0.0, 2.0)
    )
    assert behind.front == pytest.approx(0.2)
    assert without.p50_s + 2e-3 <= behind.p50_s < without.p50_s + 3e-3


def test_headroom_and_price() -> None:
    lean, roomy = (
        plan(Replica(machine(price=2.0), traffic()), rate=5000, slo_s=0.1, headroom=share)
        for share in (0.0, 0.5)
    )
    assert lean.replicas is not None
    assert roomy.replicas == pytest.approx(2 * lean.replicas, abs=1)
    assert lean.price == 2 * lean.replicas
    assert cheapest([roomy, lean]) is lean
    dear = plan(Replica(machine("flat", price=1e6), traffic()), rate=5000, slo_s=0.1)
    assert dear.replicas == 1
    assert cheapest([dear, lean]) is lean
    unpriced = plan(Replica(machine("flat"), traffic()), rate=5000, slo_s=0.1)
    assert cheapest([unpriced, lean]) is unpriced  # fewer, as long as not all have a price
    assert cheapest([plan(Replica(machine(), traffic()), rate=1, slo_s=1e-5)]) is None


@pytest.mark.parametrize(
    ("exits", "tokens", "texts", "says"),
    [
        ((0.5, 0.4), ((8, 1.0),), ((1, 1.0),), "exit shares"),
        ((0.5, 0.5), ((0, 1.0),), ((1, 1.0),), "tokens"),
        ((0.5, 0.5), ((8, 0.5),), ((1, 1.0),), "tokens"),
        ((0.5, 0.5), ((8, 1.0),), ((1, 0.5), (2, 0.6)), "texts"),
    ],
)
def test_traffic_that_does_not_add_up_is_refused(
    exits: tuple[float, ...], tokens: Mix, texts: Mix, says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        Traffic(exits, tokens, texts)


# -- against the scheduler -------------------------------------------------------------------------


def simulated(
    one: Machine, what: Traffic, rate: float, count: int, requests: Mix
) -> tuple[float, float, float]:
    """p50 and p99 of requests, and the mean batch, of the scheduler itself."""
    rng = random.Random(0)
    inside = tuple(1 - sum(what.exit_shares[:k]) for k in range(len(what.exit_shares)))
    depth = Depth(inside)
    lengths, shares = zip(*what.tokens, strict=True)
    sizes, of_sizes = zip(*requests, strict=True)
    now, texts, arrivals = 0.0, [], []
    for number in range(count):
        now += rng.expovariate(rate)
        arrivals.append(now)
        texts += [
            sim.Text(
                now, rng.choices(lengths, shares)[0], depth, sim.draw(rng, depth), None, number
            )
            for _ in range(rng.choices(sizes, of_sizes)[0])
        ]
    device = sim.Device(one.layer_seconds, tuple(range(1, len(inside) + 1)))
    limits = Plan(one.max_batch_tokens, one.max_batch_texts, one.workers)
    outcome = sim.Simulation(limits, device, texts).run()
    ends: dict[int, float] = {}
    for place, took in outcome.answered.items():
        request = texts[place].request
        ends[request] = max(ends.get(request, 0.0), took)
    took = sorted(ends.values())
    return took[len(took) // 2], took[int(0.99 * len(took))], len(texts)


@pytest.mark.parametrize("table", sorted(TABLES))
@pytest.mark.parametrize("exits", [EARLY, FULL])
@pytest.mark.parametrize("load", [0.3, 0.8])
def test_latencies_are_the_schedulers(table: str, exits: tuple[float, ...], load: float) -> None:
    one, what = machine(table), traffic(exits)
    replica = Replica(one, what)
    forecast = replica.forecast(load * replica.capacity)
    p50_s, p99_s, _ = simulated(one, what, forecast.rate, 4000, ((1, 1.0),))
    assert forecast.p50_s == pytest.approx(p50_s, rel=0.12)
    assert forecast.p99_s == pytest.approx(p99_s, rel=0.12)


def test_latencies_of_lists_are_the_schedulers() -> None:
    """Single texts pass lists in the service, by a little; the planner has everybody in turn."""
    requests = ((1, 0.8), (8, 0.2))
    one, what = machine(), traffic(texts=requests)
    replica = Replica(one, what)
    forecast = replica.forecast(0.5 * replica.capacity)
    p50_s, p99_s, _ = simulated(one, what, forecast.rate, 4000, requests)
    assert forecast.p50_s == pytest.approx(p50_s, rel=0.25)
    assert forecast.p99_s == pytest.approx(p99_s, rel=0.25)


def test_several_workers_are_an_engine_that_is_so_many_times_as_large() -> None:
    """And a text that meets nobody takes as long as with one."""
    one, two = (Replica(machine(workers=number), traffic()) for number in (1, 2))
    assert two.capacity == pytest.approx(2 * one.capacity)
    assert two.forecast(1e-3).p50_s == pytest.approx(one.forecast(1e-3).p50_s, rel=0.01)
    rate = 0.5 * one.capacity
    assert two.forecast(2 * rate).busy == pytest.approx(one.forecast(rate).busy)
    assert two.forecast(2 * rate).p99_s < one.forecast(rate).p99_s  # whoever is free takes it


@pytest.mark.parametrize("exits", [EARLY, FULL])
def test_latencies_with_two_workers_are_the_schedulers(exits: tuple[float, ...]) -> None:
    one, what = machine(workers=2), traffic(exits)
    replica = Replica(one, what)
    forecast = replica.forecast(0.3 * replica.capacity)
    p50_s, p99_s, _ = simulated(one, what, forecast.rate, 4000, ((1, 1.0),))
    assert forecast.p50_s == pytest.approx(p50_s, rel=0.12)
    assert forecast.p99_s == pytest.approx(p99_s, rel=0.12)


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("table", sorted(TABLES))
def test_replicas_are_within_a_fifth_of_the_schedulers(table: str, workers: int) -> None:
    one, what = machine(table, workers=workers), traffic()
    replica = Replica(one, what)
    slo_s, rate = 3 * replica.forecast(1.0).p99_s, 20 * replica.capacity
    planned = plan(replica, rate=rate, slo_s=slo_s).replicas
    assert planned is not None

    def late(replicas: float) -> bool:
        return simulated(one, what, rate / replicas, 4000, ((1, 1.0),))[1] > slo_s

    assert late(planned / 1.2)
    assert not late(planned / 0.8)


def test_forecasts_are_the_same_every_time() -> None:
    def ask() -> Forecast:
        return Replica(machine(), traffic()).forecast(300.0)

    assert ask() == ask()
