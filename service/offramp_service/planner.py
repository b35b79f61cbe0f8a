"""How many replicas a load needs: arithmetic over a cost table, exit shares and arrivals.

The engine takes what waits the moment it is free, so a replica is a queue served in batches: what
came while one batch ran is the next one, up to the most that a batch holds. Several workers are
taken for as many such queues, among which requests are dealt out. Three steps:

1. `Batches`: how long batches of every size take, and when whom of them leaves, from made-up
   batches of texts with the traffic's lengths and exits.
2. `waiting`: how many texts wait when the engine becomes free, in the long run; exact for arrivals
   that are independent of each other (an embedded Markov chain).
3. `Replica.forecast`: what a request that comes at any moment sees: the rest of the batch that
   runs, those before it, its own batch up to its exit. In front of it all stands the event loop.

It knows no scheduler, no clock and no torch. `service/bench/bench_plan.py` holds it against the
scheduler itself in the simulator.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Mix = tuple[tuple[int, float], ...]
"""Whole numbers with their shares, which add up to 1."""
Bottleneck = Literal["engine", "latency", "front", "unreachable"]

FRONT_S, FRONT_TEXT_S = 0.00046, 0.000047
"""Event loop: for a request, and for each of its texts. From the HTTP ceiling of
docs/results/service.md, 1,952 requests of one text or 507 of 32 a second."""
FULL_FRONT = 0.8
"""Of the event loop's time; beyond it, its own queue is most of the latency."""
FULL_ENGINE = 0.9
"""A replica that can carry such a share of its capacity is limited by that."""

_MADE_UP, _MADE_UP_TEXTS = 256, 65_536  # batches; fewer, down to 32, where they are large
_REQUESTS = 40_000  # whose latencies make a distribution
_KINDS_OF_BATCH = 8  # durations told apart for a number of texts
_QUEUE = 4  # batches that may wait; with more the replica is overloaded
_SPILL = 1e-3  # of the moments at which more than that wait
_FEW, _RARE = 64, 1e-6  # texts that are looked at first; more, if they are not as good as all
_STEPS = 12  # halvings in the search for the rate


@dataclass(frozen=True)
class Traffic:
    """What comes: sizes of requests, lengths of texts, and the share that leaves after each layer
    (an entry for each of them, from 1 to L)."""

    exit_shares: tuple[float, ...]
    tokens: Mix
    texts: Mix = ((1, 1.0),)

    def __post_init__(self) -> None:
        if min(self.exit_shares) < 0 or abs(sum(self.exit_shares) - 1) > 1e-6:
            raise ValueError(f"exit shares must add up to 1, got {self.exit_shares}")
        for name, mix in (("tokens", self.tokens), ("texts", self.texts)):
            if min(number for number, _ in mix) < 1 or min(share for _, share in mix) <= 0:
                raise ValueError(f"{name} must be at least 1, with shares above 0, got {mix}")
            if abs(sum(share for _, share in mix) - 1) > 1e-6:
                raise ValueError(f"shares of {name} must add up to 1, got {mix}")

    @property
    def mean_tokens(self) -> float:
        return sum(tokens * share for tokens, share in self.tokens)

    @property
    def mean_texts(self) -> float:
        return sum(texts * share for texts, share in self.texts)

    @property
    def mean_layers(self) -> float:
        return sum(layer * share for layer, share in enumerate(self.exit_shares, 1))


@dataclass(frozen=True)
class Machine:
    """One replica on one kind of machine: seconds of a layer by live tokens, as measured in one of
    its engine's workers, and how much that takes at once."""

    name: str
    layer_seconds: Callable[[float], float]
    max_batch_tokens: int
    max_batch_texts: int
    price: float | None = None  # of one, in any unit
    workers: int = 1  # batches that are computed at a time
    front_s: float = FRONT_S
    front_text_s: float = FRONT_TEXT_S


@dataclass(frozen=True)
class Forecast:
    """What one replica does at a rate of requests a second; infinite latencies are overload."""

    rate: float
    load: float  # share of what its engine could do in full batches
    busy: float  # share of the time in which its engine works; batches are small at low load
    front: float  # share of the event loop's time
    mean_batch: float  # texts
    queued_layer_work: float  # layer executions that wait, on average: offramp_queue_layer_work
    p50_s: float
    p95_s: float
    p99_s: float

    def percentile(self, which: int) -> float:
        return {50: self.p50_s, 95: self.p95_s, 99: self.p99_s}[which]


@dataclass(frozen=True)
class Plan:
    """What a load needs on one kind of machine."""

    machine: str
    replicas: int | None  # None: no number is enough
    price: float | None  # of all of them
    bottleneck: Bottleneck
    carries: float  # requests a second of one replica within the target; nothing kept free
    capacity: float  # requests a second of its engine in full batches, however late
    empty: Forecast  # a replica with next to nothing to do
    forecast: Forecast | None  # each of the replicas, at its share of the load


def plan(
    replica: "Replica",
    *,
    rate: float,
    slo_s: float,
    percentile: int = 99,
    headroom: float = 0.0,
) -> Plan:
    """The fewest replicas on which so many percent of requests are answered within `slo_s`, while
    a share of what each could carry is kept free.

    Requests are dealt out at random, which is the worst that a balancer does.
    """
    machine = replica.machine
    empty, carries = replica.forecast(replica.ceiling / 2**_STEPS), 0.0
    if empty.percentile(percentile) <= slo_s:
        carries = replica.carries(slo_s, percentile)
    if carries == 0:
        return Plan(machine.name, None, None, "unreachable", 0.0, replica.capacity, empty, None)
    replicas = math.ceil(rate / (carries * (1 - headroom)))
    return Plan(
        machine=machine.name,
        replicas=replicas,
        price=None if machine.price is None else replicas * machine.price,
        bottleneck=replica.bottleneck(carries),
        carries=carries,
        capacity=replica.capacity,
        empty=empty,
        forecast=replica.forecast(rate / replicas),
    )


def cheapest(plans: Sequence[Plan]) -> Plan | None:
    """By price if every kind has one, else by number; None if no kind is enough."""
    possible = [one for one in plans if one.replicas is not None]
    if not possible:
        return None
    priced = all(one.price is not None for one in possible)
    return min(possible, key=lambda one: (one.price if priced else 0.0, one.replicas))


class Batches:
    """Made-up batches of every size up to the largest, always the same ones: a batch of n texts is
    the first n of a row. So what one more text costs is seen without noise."""

    def __init__(self, machine: Machine, traffic: Traffic) -> None:
        self.most = max(1, _fitting(machine, traffic))
        draws = np.random.default_rng(0)
        self.count = max(32, min(_MADE_UP, _MADE_UP_TEXTS // self.most) // 8 * 8)
        layers = len(traffic.exit_shares)
        lengths, shares = zip(*traffic.tokens, strict=True)
        tokens = self._spread(draws, np.array(lengths), shares)
        self.exits: Ints = self._spread(draws, np.arange(layers), traffic.exit_shares)
        runs = self.exits[:, :, None] >= np.arange(layers)
        live = np.cumsum(tokens[:, :, None] * runs, axis=1)
        table = [machine.layer_seconds(count) if count else 0.0 for count in range(live.max() + 1)]
        # Seconds from a batch's start to the end of each layer, by batch, texts - 1 and layer.
        self.until: Floats = np.cumsum(np.array(table)[live], axis=2)
        # By batch and texts - 1.
        self.seconds: Floats = self.until[:, :, -1]
        self.mean: Floats = self.seconds.mean(axis=0)
        self.last_exits: Ints = np.maximum.accumulate(self.exits, axis=1)

    def _spread(self, draws: np.random.Generator, values: Ints, shares: Sequence[float]) -> Ints:
        """By batch and text: at each place in a batch every value as often as is its share."""
        quantiles = (np.arange(self.count) + 0.5) / self.count
        column = values[np.searchsorted(np.cumsum(_exactly(shares)), quantiles)]
        return draws.permuted(np.tile(column[:, None], self.most), axis=0)

    @cached_property
    def durations(self) -> Floats:
        """As many for each number of texts, equally likely."""
        ordered = np.sort(self.seconds, axis=0)
        parts = ordered.reshape(_KINDS_OF_BATCH, -1, self.most)
        return np.asarray(parts.mean(axis=1))


class Replica:
    """One replica under one kind of traffic, at any rate of requests."""

    def __init__(self, machine: Machine, traffic: Traffic) -> None:
        self.machine = machine
        self._traffic, self._batches = traffic, Batches(machine, traffic)
        self._front = [machine.front_s + machine.front_text_s * texts for texts, _ in traffic.texts]
        shares = [share for _, share in traffic.texts]
        self._mean_front = sum(s * share for s, share in zip(self._front, shares, strict=True))
        most = self._batches.most
        each = float(most / self._batches.mean[-1]) / traffic.mean_texts
        self.capacity = machine.workers * each
        by_front = FULL_FRONT / self._mean_front if self._mean_front else math.inf
        self.ceiling = min(self.capacity, by_front)
        self.forecast = lru_cache(maxsize=256)(self._forecast)

    def carries(self, slo_s: float, percentile: int) -> float:
        """The largest rate at which so many percent are answered in time; 0 if there is none.

        Halving always looks at the same rates first, so a longer time never carries less.
        """
        low, high = 0.0, 1.0
        for _ in range(_STEPS):
            middle = (low + high) / 2
            in_time = self.forecast(middle * self.ceiling).percentile(percentile) <= slo_s
            low, high = (middle, high) if in_time else (low, middle)
        return low * self.ceiling

    def bottleneck(self, carries: float) -> Bottleneck:
        if carries < FULL_ENGINE * self.ceiling:
            return "latency"
        return "engine" if self.ceiling == self.capacity else "front"

    def _forecast(self, rate: float) -> Forecast:
        batches, traffic = self._batches, self._traffic
        load, front = rate / self.capacity, rate * self._mean_front
        late = math.inf
        overload = Forecast(rate, load, 1.0, front, batches.most, late, late, late, late)
        if load >= 1 or front >= 1:
            return overload
        each = rate / self.machine.workers
        shares = waiting(batches, traffic.texts, each)
        if shares is None:
            return overload
        sizes = np.minimum(np.arange(len(shares)), batches.most)
        sizes[0] = 1  # whoever comes first; a request of several is a little more
        working = shares * batches.mean[sizes - 1]
        cycle = working.sum() + shares[0] / each
        waits, seconds = self._latencies(each, shares[0] / each / cycle, working / working.sum())
        p50, p95, p99 = (float(one) for one in np.percentile(seconds, (50, 95, 99)))
        return Forecast(
            rate=rate,
            load=load,
            busy=float(working.sum() / cycle),
            front=front,
            mean_batch=float(shares @ sizes),
            # Little's law.
            queued_layer_work=rate * traffic.mean_texts * float(waits.mean()) * traffic.mean_layers,
            p50_s=p50,
            p95_s=p95,
            p99_s=p99,
        )

    def _latencies(self, rate: float, idle: float, working: Floats) -> tuple[Floats, Floats]:
        """How long requests that come at any moment wait for their worker, and until their answer.
        `working` are the shares of the engine's busy time by how many waited when the batch that
        runs was formed."""
        draws, batches = np.random.default_rng(1), self._batches
        most = batches.most
        sizes, shares = zip(*self._traffic.texts, strict=True)
        kind = draws.choice(len(sizes), _REQUESTS, p=_exactly(shares))
        own = np.array(sizes)[kind]
        workers = self.machine.workers
        found_idle = draws.random(_REQUESTS) < 1 - _all_busy(workers, 1 - idle)

        # The batch that runs: the longer, the likelier to be met. How far it has come is uniform.
        queue = draws.choice(len(working), _REQUESTS, p=working)
        size = np.clip(queue, 1, most)
        chances = np.cumsum(batches.seconds / batches.seconds.sum(axis=0), axis=0)
        runs = (
            (draws.random(_REQUESTS) > chances[:, size - 1]).sum(axis=0).clip(max=batches.count - 1)
        )
        passed = draws.random(_REQUESTS) ** (1 / workers)  # of the one that is done first
        whole = batches.seconds[runs, size - 1]
        before = np.maximum(queue - most, 0) + self._come(draws, rate, whole * passed)
        before[found_idle] = 0
        wait = np.where(found_idle, 0.0, whole * (1 - passed))

        # Full batches that go before the one with its last text.
        place = before + own
        ahead = -(-place // most) - 1
        for turn in range(int(ahead.max())):
            full = batches.seconds[draws.integers(batches.count, size=_REQUESTS), -1]
            wait += np.where(ahead > turn, full / workers, 0.0)
        place -= ahead * most
        together = np.minimum(place + self._come(draws, rate, wait), most)
        mine = np.minimum(own, place)

        batch = draws.integers(batches.count, size=_REQUESTS)
        one = batches.exits[batch, draws.integers(together)]
        layer = np.where(mine == 1, one, batches.last_exits[batch, mine - 1])
        engine = wait + batches.until[batch, together - 1, layer]
        return wait, engine + self._in_front(draws, rate, np.array(self._front)[kind])

    def _come(self, draws: np.random.Generator, rate: float, seconds: Floats) -> Ints:
        """Texts that come meanwhile."""
        texts = np.zeros(_REQUESTS, dtype=np.int64)
        for size, share in self._traffic.texts:
            texts += size * draws.poisson(rate * share * seconds)
        return texts

    def _in_front(self, draws: np.random.Generator, rate: float, own: Floats) -> Floats:
        """Seconds in the event loop, which all workers have in common, `rate` being that of one:
        its own, and of those before it (an M/D/1 queue, whose tail is exponential)."""
        busy = rate * self.machine.workers * self._mean_front
        if not busy:
            return own
        waits = draws.random(_REQUESTS) < busy
        return own + waits * draws.exponential(self._mean_front / (2 * (1 - busy)), _REQUESTS)


def _all_busy(workers: int, busy: float) -> float:
    """How often a newcomer finds no worker idle, each being busy for a share of the time (Erlang's
    C formula, which takes no account of batches)."""
    offered = workers * busy
    terms = [1.0]
    for number in range(1, workers + 1):
        terms.append(terms[-1] * offered / number)
    last = terms.pop() / max(1 - busy, 1e-9)
    return last / (sum(terms) + last)


def waiting(batches: Batches, texts: Mix, rate: float) -> Floats | None:
    """Shares of the moments at which the engine becomes free, by how many texts wait then. None if
    there are more and more."""
    largest = max(size for size, _ in texts)
    limit = _QUEUE * max(batches.most, largest, 16)
    longest = min(limit, max(_FEW, _QUEUE * largest))
    mean = sum(size * share for size, share in texts)
    while True:
        slowest = batches.seconds[:, min(longest, batches.most) - 1].max()
        if longest == limit or rate * mean * slowest < longest:
            shares = _in_the_long_run(batches, texts, rate, longest)
            spilt = shares[-longest // 16 :].sum()
            if spilt < _RARE:
                return shares
            if longest == limit:
                return shares if spilt < _SPILL else None
        longest = min(limit, 2 * longest)


def _in_the_long_run(batches: Batches, texts: Mix, rate: float, longest: int) -> Floats:
    """Shares as above, as if no more than `longest` could wait."""
    most = batches.most
    come = _arrivals(batches.durations[:, :longest], texts, rate, longest)
    moves = np.zeros((longest + 1, longest + 1))
    for queue in range(1, longest + 1):
        left = max(0, queue - most)
        moves[queue, left:] = come[min(queue, most) - 1, : longest + 1 - left]
    for size, share in texts:  # the engine is idle until a request comes
        left = max(0, size - most)
        moves[0, left:] += share * come[min(size, most) - 1, : longest + 1 - left]
    moves[:, -1] += 1 - moves.sum(axis=1)
    # shares = shares · moves, which add up to 1.
    equations = moves.T - np.eye(longest + 1)
    equations[-1] = 1.0
    shares = np.linalg.solve(equations, np.eye(longest + 1)[-1]).clip(min=0.0)
    return np.asarray(shares / shares.sum())


def _arrivals(durations: Floats, texts: Mix, rate: float, longest: int) -> Floats:
    """Chances of 0, 1, … `longest` texts while a batch of each size runs: Poisson requests of the
    given sizes, through their generating function."""
    points = 2 * (longest + 1)
    size_of = np.zeros(points)
    for size, share in texts:
        size_of[size] += share
    unlike = np.fft.rfft(size_of) - 1
    transform = np.mean(np.exp(rate * durations[:, :, None] * unlike), axis=0)
    chances = np.fft.irfft(transform, points, axis=1)[:, : longest + 1]
    return np.asarray(chances.clip(min=0.0))


def _fitting(machine: Machine, traffic: Traffic) -> int:
    """Texts in a full batch: by their number, or by their tokens."""
    return int(min(machine.max_batch_texts, machine.max_batch_tokens / traffic.mean_tokens))


def _exactly(shares: Sequence[float]) -> Floats:
    """As numpy wants them: adding up to 1 in the last digit."""
    given = np.array(shares, dtype=float)
    return np.asarray(given / given.sum())
