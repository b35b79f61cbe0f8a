"""The scheduler: which texts are computed next, together, and which have come too late.

Decisions only. It knows no tensors, threads, promises or HTTP, and no clock: whoever drives it says
what time it is. The batcher drives it with the real clock and the real engine,
`service/bench/simulator.py` with a made-up clock and a cost table.

Waiting texts stand in the order of their latest start: the last moment at which a text can begin
and still meet its deadline, at the depth that 95 % of its class do not exceed. A text without a
deadline has a horizon instead, the same for all, so texts without deadlines are first come, first
served; and a later text can overtake only until the horizon has passed, so none starves.

A batch runs to completion before the next one starts. In backlog mode (off unless asked for, and
only where the cost table has a flat part) groups wait at their exits for younger ones to catch up.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise

from offramp_service.cost import UNKNOWN_COST, CostTable, waiting_to_merge_pays
from offramp_service.jobs import Course, Depth, DispatchReason, Job, Left

# Batches' worth of texts among which the members of one batch are looked for.
_LOOK_AHEAD = 4
# Batches' worth of waiting tokens at which backlog mode begins and ends.
_BACKLOG_BEGINS, _BACKLOG_ENDS = 2.0, 1.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler is told once. `horizon_s` stands in for a missing deadline."""

    max_batch_tokens: int
    max_batch_texts: int
    horizon_s: float = 1.0
    group_alike: bool = False  # prefer texts of one class and length, where nobody is made late
    merge_backlog: bool = False
    layers_per_step: float = 1.0  # from exit to exit


@dataclass(eq=False, slots=True)
class Group:
    """A batch under way: texts that have run the same layers and run on together."""

    jobs: list[Job]  # in the engine's order, those that left included
    layer: int = 0
    skipped: int = 0  # turns in which another group ran
    inside: dict[int, Job] = field(init=False)  # those that have not left, by place
    course: Course = field(init=False)  # filled by who computes it

    def __post_init__(self) -> None:
        self.inside = dict(enumerate(self.jobs))

    @property
    def texts(self) -> int:
        return len(self.inside)

    @property
    def tokens(self) -> int:
        return sum(job.tokens for job in self.inside.values())

    def passed(self, left: Left) -> None:
        """Its texts ran to an exit: note who left there, and forget whom nobody waits for."""
        self.layer = left.exit_layer
        gone = {index for index, _ in left.answers}
        self.inside = {
            index: job
            for index, job in self.inside.items()
            if index not in gone and not job.abandoned
        }

    def take_in(self, other: "Group") -> None:
        """Go on together with a group that has run as many layers."""
        offset = len(self.jobs)
        self.jobs += other.jobs
        self.inside |= {offset + index: job for index, job in other.inside.items()}


@dataclass(frozen=True, slots=True)
class Step:
    """Run a group to its next exit.

    `opened` says that the group is new, and why its batch was closed; `joined` is another at the
    same exit that it takes in first.
    """

    group: Group
    opened: DispatchReason | None = None
    joined: Group | None = None


class Scheduler:
    """The waiting texts and the groups under way. Not thread-safe: its owner holds a lock."""

    def __init__(self, plan: Plan, cost: CostTable = UNKNOWN_COST) -> None:
        self.plan = plan
        self.groups: list[Group] = []
        self._waiting: list[tuple[float, int, Job]] = []  # (latest start, arrival, text), sorted
        self._places: dict[Job, tuple[float, int]] = {}
        self._arrivals = 0
        self._tokens = 0
        self._work = 0.0
        self._free_at = 0.0  # when what was started is expected to be done
        self._backlog = False
        self.learn(cost)

    def learn(self, cost: CostTable) -> None:
        """What layers cost from now on."""
        self.cost = cost
        self.merging = self.plan.merge_backlog and cost.merging_can_pay

    # -- the waiting texts -------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, job: Job) -> bool:
        return job in self._places

    @property
    def waiting_tokens(self) -> int:
        return self._tokens

    @property
    def waiting_work(self) -> float:
        """Layer executions that the waiting texts are expected to need."""
        return self._work

    def add(self, jobs: Iterable[Job]) -> None:
        for job in jobs:
            place = (self.latest_start(job), self._arrivals)
            self._arrivals += 1
            self._places[job] = place
            insort(self._waiting, (*place, job))
            self._tokens += job.tokens
            self._work += job.controls.depth.mean

    def take_out(self, job: Job) -> None:
        del self._waiting[bisect_left(self._waiting, self._places.pop(job))]
        self._tokens -= job.tokens
        # Sums of floats drift; an empty queue holds no work.
        self._work = self._work - job.controls.depth.mean if self._waiting else 0.0

    def latest_start(self, job: Job) -> float:
        """The place in the queue: the last moment at which it can begin and be in time."""
        if job.deadline is None:
            return job.queued_at + self.plan.horizon_s
        return job.deadline - job.controls.depth.late * self.cost.at(job.tokens)

    def predicted_end(self, jobs: Sequence[Job], now: float) -> float:
        """When texts that arrive now will have been answered, unless somebody overtakes them.

        Those ahead are taken at their mean depth, the new ones at their late one.
        """
        last = max(self.latest_start(job) for job in jobs)
        depth = jobs[0].controls.depth
        tokens, budget = sum(job.tokens for job in jobs), self.plan.max_batch_tokens
        for _, _, other in self._waiting[: bisect_left(self._waiting, (last, self._arrivals))]:
            tokens += other.tokens
        full, rest = divmod(tokens, budget)
        mean = self._work / len(self._waiting) if self._waiting else depth.mean
        before = max(now, self._free_at) + full * mean * self.cost.at(budget)
        return before + depth.late * self.cost.at(rest)

    def expire(self, now: float) -> list[Job]:
        """Texts whose deadline has passed, waiting or under way; none of them is computed on."""
        waiting = [job for _, _, job in self._waiting if job.too_late(now)]
        for job in waiting:
            self.take_out(job)
        running = [
            job
            for group in self.groups
            for job in group.inside.values()
            if not job.expired and job.too_late(now)
        ]
        for job in (*waiting, *running):
            job.expired = True
        return waiting + running

    # -- what to do next ---------------------------------------------------------------------

    def next_step(self, now: float) -> Step | None:
        """What the engine should do now; None if there is nothing to do."""
        if self._in_backlog():
            return self._choose(now)
        if self.groups:
            return self._join(self._deepest())
        self._free_at = now
        return self._open(now)

    def close(self, group: Group) -> None:
        """A group is done with, one way or the other."""
        self.groups.remove(group)

    def _open(self, now: float) -> Step | None:
        jobs, reason = self._form_batch(now)
        if not jobs:
            return None
        for job in jobs:
            job.started_at = now
        group = Group(jobs)
        self.groups.append(group)
        self._free_at = max(self._free_at, now) + expected_seconds(jobs, self.cost)
        return Step(group, opened=reason)

    # -- forming a batch ---------------------------------------------------------------------

    def _form_batch(self, now: float) -> tuple[list[Job], DispatchReason]:
        """As many as fit the budget and make no member late, in the order of the queue."""
        jobs: list[Job] = []
        tokens, due, late = 0, float("inf"), 0
        for job in self._candidates(now):
            if job.abandoned:
                self.take_out(job)
                continue
            if jobs and tokens + job.tokens > self.plan.max_batch_tokens:
                return jobs, "tokens"
            if len(jobs) == self.plan.max_batch_texts:
                return jobs, "full"
            due_with, late_with = self._most_pressing(due, late, job)
            # The first is taken however little time it has; it can only lose by waiting.
            if jobs and now + late_with * self.cost.at(tokens + job.tokens) > due_with:
                return jobs, "deadline"
            due, late = due_with, late_with
            self.take_out(job)
            jobs.append(job)
            tokens += job.tokens
        return jobs, "idle"

    def _most_pressing(self, due: float, late: int, job: Job) -> tuple[float, int]:
        """Earliest deadline among the members so far, and the depth that must be done by then."""
        if job.deadline is None:
            return due, late
        return min(due, job.deadline), max(late, job.controls.depth.late)

    def _candidates(self, now: float) -> list[Job]:
        """The queue's beginning. Grouping may put texts forward that are like the first one, but
        not past those that would be late if they waited for another batch."""
        budget = self.plan.max_batch_tokens
        if not self.plan.group_alike or self._tokens <= budget:
            return [job for _, _, job in self._waiting]
        seen: list[tuple[float, int, Job]] = []
        tokens = 0
        for entry in islice(self._waiting, _LOOK_AHEAD * self.plan.max_batch_texts):
            seen.append(entry)
            tokens += entry[2].tokens
            if tokens > _LOOK_AHEAD * budget:
                break
        first = seen[0][2]
        mean = self._work / len(self._waiting)
        cannot_wait = now + mean * self.cost.at(budget)

        def unlike(entry: tuple[float, int, Job]) -> tuple[float, int]:
            latest_start, _, job = entry
            if latest_start <= cannot_wait or job is first:
                return (-1.0, 0)
            deeper = abs(job.controls.depth.mean - first.controls.depth.mean)
            return (deeper, abs(job.tokens - first.tokens))

        return [job for _, _, job in sorted(seen, key=unlike)]

    # -- backlog mode ------------------------------------------------------------------------

    def _in_backlog(self) -> bool:
        """Is so much waiting that merging may pay? With hysteresis, so that it does not flutter."""
        if not self.merging:
            return False
        limit = _BACKLOG_ENDS if self._backlog else _BACKLOG_BEGINS
        self._backlog = self._tokens > limit * self.plan.max_batch_tokens
        return self._backlog

    def _choose(self, now: float) -> Step | None:
        """Who cannot wait; else the deepest that fills the device; else whom a deeper group had
        better wait for; else the deepest. Never the shallowest first."""
        options = self._options(now)
        chosen = (
            self._cannot_wait(options)
            or self._deepest_beyond_knee(options)
            or self._awaited(options)
            or options[-1]
        )
        step = self._open(now) if chosen.group is None else self._join(chosen.group)
        for option in options:
            if option.group is not None:
                option.group.skipped = 0 if option is chosen else option.group.skipped + 1
        return step

    def _options(self, now: float) -> list["_Option"]:
        """The queue, then the groups from the shallowest on."""
        options = []
        if self._waiting:
            tokens = min(self._tokens, self.plan.max_batch_tokens)
            texts = min(len(self._waiting), self.plan.max_batch_texts)
            options.append(_Option(None, 0, tokens, texts, self._waiting[0][0] - now))
        for group in sorted(self.groups, key=lambda group: group.layer):
            slack = self.slack(group, now)
            options.append(_Option(group, group.layer, group.tokens, group.texts, slack))
        return options

    def slack(self, group: Group, now: float) -> float:
        """How long a group can wait before its most pressing text is late, at the depth that its
        class goes on average. Every turn in which it was skipped takes one away."""
        per_layer = self.cost.at(group.tokens)
        slacks = [
            self._due(job) - now - job.controls.depth.ahead(group.layer) * per_layer
            for job in group.inside.values()
        ]
        return min(slacks, default=0.0) - group.skipped * self._step_s(group.tokens)

    def _due(self, job: Job) -> float:
        return job.queued_at + self.plan.horizon_s if job.deadline is None else job.deadline

    def _step_s(self, tokens: float) -> float:
        return self.plan.layers_per_step * self.cost.at(tokens)

    def _cannot_wait(self, options: Sequence["_Option"]) -> "_Option | None":
        pressing = min(options, key=lambda option: option.slack)
        others = [self._step_s(one.tokens) for one in options if one is not pressing]
        return pressing if pressing.slack < max(others, default=0.0) else None

    def _deepest_beyond_knee(self, options: Sequence["_Option"]) -> "_Option | None":
        full = [option for option in options if option.tokens >= self.cost.knee]
        return full[-1] if full else None

    def _awaited(self, options: Sequence["_Option"]) -> "_Option | None":
        for younger, older in pairwise(options):
            assert older.group is not None  # only the queue is none, and it is the youngest
            if waiting_to_merge_pays(
                self.cost,
                tokens=older.tokens,
                texts=older.texts,
                younger_tokens=younger.tokens,
                younger_texts=younger.texts,
                layers_behind=older.layer - younger.layer,
                layers_ahead=_layers_ahead(older.group),
                slack_s=older.slack,
            ):
                return younger
        return None

    def _deepest(self) -> Group:
        return max(self.groups, key=lambda group: group.layer)

    def _join(self, group: Group) -> Step:
        """Run it, together with another that has come as far, if both fit one batch."""
        plan = self.plan
        for other in self.groups:
            if (
                other is not group
                and other.layer == group.layer
                and group.tokens + other.tokens <= plan.max_batch_tokens
                and group.texts + other.texts <= plan.max_batch_texts
            ):
                group.take_in(other)
                self.groups.remove(other)
                return Step(group, joined=other)
        return Step(group)


@dataclass(frozen=True, slots=True)
class _Option:
    """A group that could run next; `group` None is the batch that the queue would give."""

    group: Group | None
    layer: int
    tokens: int
    texts: int
    slack: float


def _layers_ahead(group: Group) -> float:
    """Expected further layers, on average over its texts."""
    ahead = [job.controls.depth.ahead(group.layer) for job in group.inside.values()]
    return sum(ahead) / len(ahead) if ahead else 0.0


def expected_seconds(jobs: Sequence[Job], cost: CostTable) -> float:
    """How long a batch is expected to take while it shrinks as its classes do."""
    classes: dict[Depth, tuple[int, int]] = {}  # texts, tokens
    for job in jobs:
        texts, tokens = classes.get(job.controls.depth, (0, 0))
        classes[job.controls.depth] = texts + 1, tokens + job.tokens
    seconds = 0.0
    for layer in range(max(len(depth.inside) for depth in classes)):
        inside = [
            (texts * depth.inside[layer], tokens * depth.inside[layer])
            for depth, (texts, tokens) in classes.items()
            if layer < len(depth.inside)
        ]
        texts_left, tokens_left = (sum(column) for column in zip(*inside, strict=True))
        # With less than one text left on average, the layer runs as often as that.
        seconds += min(1.0, texts_left) * cost.at(tokens_left)
    return seconds
