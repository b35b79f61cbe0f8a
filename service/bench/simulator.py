"""A discrete-event simulation of the service: the real scheduler, a made-up clock and device.

`offramp_service.scheduler` decides, exactly as it does in the service; only time and the device are
pretended. A layer takes what a cost table says, a text leaves at the layer that was drawn for it
beforehand, whatever becomes of its batch, and a client is gone at its deadline. So a run of hours
takes seconds, and the same seed gives the same run. Behind a `Front`, the service's SLO controller
decides at admission how deep a text may go. Several workers do not slow each other down here.

It knows no threads, tensors or HTTP. What the front costs (tokenisation, the event loop) is not in
it.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from offramp_model.calibration import CalibrationTable, CurvePoint
from offramp_model.cost import StepTable
from offramp_service.jobs import Answer, Controls, Depth, Job, Left
from offramp_service.scheduler import Group, Plan, Scheduler, Step
from offramp_service.slo import Load, SloController


@dataclass(frozen=True, slots=True)
class Device:
    """What running costs: a layer by the table; compaction, where it saves more than it costs; a
    wait of the host for the device at every exit, where there is one."""

    costs: StepTable
    exit_layers: tuple[int, ...]
    compacts: bool = True
    move_s: float = 0.0  # per compaction or joining of two groups
    move_token_s: float = 0.0  # and for each token moved
    sync_s: float = 0.0

    def pays(self, layers: int, carried: float, left: float) -> bool:
        price = {"launch_seconds": self.move_s, "seconds_per_token": self.move_token_s}
        return self.compacts and self.costs.moving_pays(
            layers=layers, carried=carried, left=left, **price
        )

    def moving(self, tokens: float) -> float:
        return self.move_s + self.move_token_s * tokens


@dataclass(frozen=True, slots=True)
class Text:
    """One text: when it comes, how large it is, where it will leave, and how long its client waits.

    Those of one `request` come together; None is a request of its own. `hardness` in [0, 1) is its
    place among texts by depth, for a `Front`.
    """

    arrives: float
    tokens: int
    depth: Depth
    exit_layer: int
    deadline_s: float | None = None
    request: int | None = None
    hardness: float = 0.0


@dataclass(slots=True)
class Outcome:
    """What became of the texts, by their place in the traffic, and what it cost."""

    answered: dict[int, float] = field(default_factory=dict)  # seconds from arrival
    exit_layers: dict[int, int] = field(default_factory=dict)
    refused: list[int] = field(default_factory=list)  # at once: they would have been late
    given_up: list[int] = field(default_factory=list)  # at their deadline
    starts: list[int] = field(default_factory=list)  # in the order in which they were taken
    text_layers: int = 0  # run for texts that somebody waited for
    ends: float = 0.0
    longest_pause_s: float = 0.0  # of a group between two of its steps
    joined: int = 0
    shadows_compared: int = 0
    shadows_dropped: int = 0
    shadow_layers: int = 0
    longest_shadow_s: float = 0.0  # of a stretch, during which no client's text can start


@dataclass(slots=True)
class Front:
    """Admission as in the service, for texts that all ask for speed-up 1: room for so many, and the
    floor of a controller, if there is one. It notes what was decided, and what came of it."""

    table: CalibrationTable
    max_texts: int
    controller: SloController | None
    inside: int = 0
    layers_ahead: float = 0.0
    layers_admitted: float = 0.0
    layers_run: int = 0
    busy_s: float = 0.0
    admitted: list[tuple[float, CurvePoint]] = field(default_factory=list)
    refused: list[float] = field(default_factory=list)  # when
    answered: list[tuple[float, float]] = field(default_factory=list)  # arrival, seconds
    moves: list[tuple[float, float]] = field(default_factory=list)  # when, the floor from then on

    def admit(self, text: Text) -> Text | None:
        """The text as deep as it goes now, or None: there is no room."""
        self._decide(text.arrives)
        if self.inside == self.max_texts:
            self.refused.append(text.arrives)
            return None
        point = self.table.point_for(self.controller.floor if self.controller is not None else 1.0)
        self.admitted.append((text.arrives, point))
        depth = Depth.of(point.exit_counts, 1, len(point.exit_counts))
        self.inside += 1
        self.layers_ahead += depth.mean
        self.layers_admitted += depth.mean
        return replace(text, depth=depth, exit_layer=_exit_of(depth, text.hardness))

    def left(self, now: float, text: Text) -> None:
        """A text was answered."""
        self.inside -= 1
        self.layers_ahead = self.layers_ahead - text.depth.mean if self.inside else 0.0
        self.answered.append((text.arrives, now - text.arrives))
        if self.controller is not None:
            self.controller.finished(now, now - text.arrives)
            self._decide(now)

    def worked(self, layers: int, seconds: float) -> None:
        """The engine ran so many text-layers."""
        self.layers_run += layers
        self.busy_s += seconds

    def _decide(self, now: float) -> None:
        room_taken = self.inside / self.max_texts
        done = (self.layers_run, self.busy_s)
        load = Load(self.layers_ahead, self.layers_admitted, *done, room_taken)
        if self.controller is not None and self.controller.decide(now, load) is not None:
            self.moves.append((now, self.controller.floor))


class _Client:
    """Waits until its deadline."""

    def __init__(self, world: "Simulation") -> None:
        self._world = world
        self.due: float | None = None

    @property
    def abandoned(self) -> bool:
        return self.due is not None and self._world.now > self.due


class _Nobody:
    """Waits for a shadow text."""

    abandoned = False


class SimulatedCourse:
    """A batch under way on the device: each `next` lets the time of a stretch pass."""

    def __init__(self, world: "Simulation", jobs: Sequence[Job]) -> None:
        self._world, self._device = world, world.device
        self._shadow = jobs[0] not in world.numbers
        self._jobs = list(jobs)
        self._inside = set(range(len(jobs)))
        self._carried = float(sum(job.tokens for job in jobs))
        self._passed = 0  # exits

    def __next__(self) -> Left:
        world, device, jobs = self._world, self._device, self._jobs
        self._inside = {place for place in self._inside if not jobs[place].abandoned}
        if not self._inside:
            raise StopIteration
        exit_layer = device.exit_layers[self._passed]
        before = device.exit_layers[self._passed - 1] if self._passed else 0
        tokens = float(sum(jobs[place].tokens for place in self._inside))
        if tokens < self._carried and device.pays(exit_layer - before, self._carried, tokens):
            world.spend(device.moving(tokens))
            self._carried = tokens
        world.spend((exit_layer - before) * device.costs(self._carried) + device.sync_s)
        run = len(self._inside)
        if self._shadow:
            world.outcome.shadow_layers += run * (exit_layer - before)
        else:
            world.outcome.text_layers += run * (exit_layer - before)
        leavers = [place for place in self._inside if world.leaves_at(jobs[place]) <= exit_layer]
        self._inside.difference_update(leavers)
        self._passed += 1
        answer = Answer(0, [], [], exit_layer, 0.0, "criterion")
        return Left(exit_layer, run, [(place, answer) for place in leavers])

    def take_in(self, other: "SimulatedCourse") -> None:
        offset = len(self._jobs)
        self._jobs += other._jobs
        self._inside |= {offset + place for place in other._inside}
        self._carried += other._carried
        self._world.spend(self._device.moving(self._carried))


@dataclass(slots=True)
class _Worker:
    """What it is at, when that ends, and what will have come of it."""

    number: int
    step: Step | None = None
    began: float = 0.0
    ends: float = 0.0
    left: Left | None = None


class Simulation:
    """One run: traffic in, outcome out."""

    def __init__(
        self,
        plan: Plan,
        device: Device,
        traffic: Sequence[Text],
        *,
        costs_known: bool = True,
        refuses: bool = True,
        shadow_rate: float = 0.0,
        front: Front | None = None,
    ) -> None:
        self.device, self.now, self.outcome = device, 0.0, Outcome()
        self._traffic = sorted(enumerate(traffic), key=lambda pair: pair[1].arrives)
        self._scheduler = Scheduler(plan, device.costs if costs_known else None)
        self._refuses, self._shadow_rate, self._front = refuses, shadow_rate, front
        self._draws = random.Random(0)
        self.numbers: dict[Job, int] = {}  # of clients' texts
        self._texts = dict(self._traffic)
        self._come = 0
        self._last_ran: dict[Group, float] = {}
        self._workers = [_Worker(number) for number in range(plan.workers)]
        self._spent = 0.0  # by the step that is being started

    def offer(self, number: int, text: Text) -> None:
        """A text more, that comes after all others. For who deals texts out as they come."""
        self._traffic.append((number, text))
        self._texts[number] = text

    def advance(self, until: float) -> None:
        """Let time pass: to the end of the step that is under way then, or until nothing is left
        to do."""
        while self.now < until and self._go_on():
            pass

    def run(self) -> Outcome:
        """To the end of the traffic."""
        self.advance(float("inf"))
        self.outcome.ends = self.now
        ended = self.outcome.answered.keys() | set(self.outcome.refused)
        self.outcome.given_up = [number for number, _ in self._traffic if number not in ended]
        return self.outcome

    def _go_on(self) -> bool:
        """Somebody takes a step; or, if nobody can, time passes until a step ends or a text comes
        for whom there is somebody."""
        self._admit()
        idle = [worker for worker in self._workers if worker.step is None]
        for worker in idle:
            step = self._scheduler.next_step(self.now, worker.number)
            if step is not None:
                (self._begin_shadow if step.group.shadow else self._begin)(worker, step)
                return True
        busy = [worker for worker in self._workers if worker.step is not None]
        first = min(busy, key=lambda worker: worker.ends, default=None)
        comes = self._traffic[self._come][1].arrives if self._come < len(self._traffic) else None
        if idle and comes is not None and (first is None or comes < first.ends):
            self.now = comes
        elif first is not None:
            self.now = first.ends
            self._admit()  # who came meanwhile came before who leaves now
            self._end(first)
        else:
            return False
        return True

    def spend(self, seconds: float) -> None:
        self._spent += seconds

    def leaves_at(self, job: Job) -> int:
        number = self.numbers.get(job)
        return self.device.exit_layers[-1] if number is None else self._texts[number].exit_layer

    def _admit(self) -> None:
        while self._come < len(self._traffic) and self._traffic[self._come][1].arrives <= self.now:
            request = self._let_in(self._next_request())
            if not request:
                continue
            now = request[0][1].arrives
            jobs = [self._job(number, text) for number, text in request]
            if self._refuses and (deadline := jobs[0].deadline) is not None:
                end = now + self._scheduler.seconds_until_answered(jobs, self.now)
                if end > deadline:
                    self.outcome.refused += [number for number, _ in request]
                    continue
            self._scheduler.add(jobs, now)

    def _let_in(self, request: list[tuple[int, Text]]) -> list[tuple[int, Text]]:
        """What the front admits of a request; all of it where there is none."""
        if self._front is None:
            return request
        inside = []
        for number, text in request:
            admitted = self._front.admit(text)
            if admitted is None:
                self.outcome.refused.append(number)
            else:
                self._texts[number] = admitted
                inside.append((number, admitted))
        return inside

    def _next_request(self) -> list[tuple[int, Text]]:
        """The next text to come, with those of its request."""
        first = self._traffic[self._come]
        end = self._come + 1
        if first[1].request is not None:
            while end < len(self._traffic) and self._traffic[end][1].request == first[1].request:
                end += 1
        request = self._traffic[self._come : end]
        self._come = end
        return request

    def _job(self, number: int, text: Text) -> Job:
        layers = self.device.exit_layers[-1]
        controls = Controls(0.0, 1, layers, text.depth, deadline_s=text.deadline_s)
        job = Job([0] * text.tokens, [], controls)
        client = _Client(self)
        job.waiter, job.index, job.queued_at = client, 0, text.arrives
        job.deadline = None if text.deadline_s is None else text.arrives + text.deadline_s
        client.due = job.deadline
        self.numbers[job] = number
        return job

    def _start(self, worker: _Worker, step: Step) -> None:
        """Let it run to its next exit; what comes of it is seen when that time has passed."""
        self._spent = 0.0
        if step.joined is not None:
            step.group.course.take_in(step.joined.course)
        worker.step, worker.left = step, next(step.group.course, None)
        worker.began, worker.ends = self.now, self.now + self._spent

    def _end(self, worker: _Worker) -> None:
        step, left = worker.step, worker.left
        assert step is not None
        worker.step = None
        self._last_ran[step.group] = self.now
        if left is None:
            self._scheduler.close(step.group)
        elif step.group.shadow:
            self._end_shadow(step.group, left, self.now - worker.began)
        else:
            self._hand_out(step.group, left, self.now - worker.began)

    def _begin(self, worker: _Worker, step: Step) -> None:
        """As the batcher does."""
        group, outcome = step.group, self.outcome
        if step.opened is not None:
            outcome.starts += [self.numbers[job] for job in group.jobs]
            group.course = SimulatedCourse(self, group.jobs)
        for waited in (group, step.joined):
            if waited is not None and waited in self._last_ran:
                pause = self.now - self._last_ran[waited]
                outcome.longest_pause_s = max(outcome.longest_pause_s, pause)
        outcome.joined += step.joined is not None
        self._start(worker, step)

    def _hand_out(self, group: Group, left: Left, seconds: float) -> None:
        outcome = self.outcome
        if self._front is not None:
            layers = left.texts_run * (left.exit_layer - group.layer)
            self._front.worked(layers, seconds / len(self._workers))
        group.passed(left)
        for place, _ in left.answers:
            job = group.jobs[place]
            number = self.numbers[job]
            assert number not in outcome.exit_layers, "a text was answered twice"
            if not job.abandoned:
                outcome.answered[number] = self.now - job.queued_at
                if self._front is not None:
                    self._front.left(self.now, self._texts[number])
            outcome.exit_layers[number] = left.exit_layer
            if left.exit_layer < self.device.exit_layers[-1]:
                self._sample(job)

    def _sample(self, job: Job) -> None:
        """Perhaps run a text that left early again."""
        if self._draws.random() >= self._shadow_rate:
            return
        layers = self.device.exit_layers[-1]
        again = Job(job.ids, [], Controls(0.0, 1, layers, Depth.full(layers)))
        again.waiter, again.index, again.queued_at, again.deadline = _Nobody(), 0, self.now, None
        self.outcome.shadows_dropped += not self._scheduler.add_shadow(again)

    def _begin_shadow(self, worker: _Worker, step: Step) -> None:
        group = step.group
        if group.inside:  # else it only comes to its end, which costs nothing
            assert not self._scheduler.queue, "a shadow ran while a client's text waited"
            assert not self._scheduler.groups, "a shadow ran while a client's text was under way"
        if step.opened is not None:
            group.course = SimulatedCourse(self, group.jobs)
        self._start(worker, step)

    def _end_shadow(self, group: Group, left: Left, seconds: float) -> None:
        outcome = self.outcome
        outcome.longest_shadow_s = max(outcome.longest_shadow_s, seconds)
        outcome.shadows_compared += len(left.answers)
        group.passed(left)


def poisson(
    rng: random.Random,
    rate: float,
    count: int,
    *,
    classes: Sequence[tuple[float, Depth]],
    tokens: Sequence[int],
    deadline_s: float | None = None,
    with_deadline: float = 1.0,
) -> list[Text]:
    """`count` texts that come independently of each other, `rate` a second.

    `classes` are depths with their shares of the traffic, `tokens` the lengths to draw from, and
    `with_deadline` the share of texts that have `deadline_s`.
    """
    shares = [share for share, _ in classes]
    now, texts = 0.0, []
    for _ in range(count):
        now += rng.expovariate(rate)
        (_, depth) = rng.choices(classes, shares)[0]
        due = deadline_s if deadline_s is not None and rng.random() < with_deadline else None
        texts.append(Text(now, rng.choice(tokens), depth, draw(rng, depth), due))
    return texts


def draw(rng: random.Random, depth: Depth) -> int:
    """The layer at which one text of a class leaves."""
    return _exit_of(depth, rng.random())


def _exit_of(depth: Depth, hardness: float) -> int:
    """A text that is harder than such a share of a class leaves later than they."""
    return max(1, sum(share > hardness for share in depth.inside))
