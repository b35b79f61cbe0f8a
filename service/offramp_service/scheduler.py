"""The scheduler: which texts are computed next, and together.

Decisions only. It knows no tensors, threads, promises or HTTP, and no clock: whoever drives it says
what time it is. The batcher drives it with the real clock and the real engine, the simulator
(`service/bench/simulator.py`) with a made-up clock and a cost table.

Waiting texts stand in the order of their latest start (`job_queue.py`). A batch is taken from the
front and runs to completion before its worker starts the next one; several workers, each with a
batch of its own, share what there is. In backlog mode (one worker; off unless asked for, and only
where a layer's cost has a flat part) batches stand at their exits like queues of their own, and a
deeper one may wait for a younger one to catch up.

Shadow texts (`shadow.py`) have a place of their own, and are run only while no client's text waits
or is under way.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import TYPE_CHECKING

from offramp_service.job_queue import HORIZON_S, JobQueue, place_of
from offramp_service.jobs import Course, Depth, DispatchReason, Job, Left

if TYPE_CHECKING:  # its package brings torch
    from offramp_model.cost import StepTable

LOOK_AHEAD = 4
"""Batches' worth of waiting texts among which the members of one batch are looked for."""
BACKLOG_BEGINS, BACKLOG_ENDS = 2.0, 1.0
"""Batches' worth of waiting texts; two figures, so that the mode does not flutter."""
MOST_GROUPS = 8
"""Batches under way at a time; each holds its hidden states."""
JOINING = 0.05
"""Of a layer; two batches that save less by joining are not worth moving."""
LEAST_SHARE = 128
"""Tokens: a few texts, which one worker computes sooner together than two do apart. Of 0, 64, 128
and 256, this one had the shortest latencies under load on two cores (docs/results/service.md)."""
LEAST_KNEE = 128
"""Tokens: with a knee of a few texts, the flat part is the price of a call, not an idle device."""
SHADOW_TEXTS, SHADOW_TOKENS = 8, 256
"""Of a shadow batch. Where there is one worker, a client's text that arrives while one runs has to
wait for its stretch to the next exit (in the device lane: for all of it), which is why it is kept
far below what the engine takes at once; a single longer text runs alone."""
MOST_SHADOWS = 64
"""That wait. A server that is never idle drops the others, which costs precision and nobody's
time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What the scheduler is told once; `layers_per_step` are those from exit to exit, `workers` how
    many batches are computed at a time."""

    max_batch_tokens: int
    max_batch_texts: int
    workers: int = 1
    group_alike: bool = False  # prefer texts of one class and length, where nobody is made late
    merge_backlog: bool = False
    layers_per_step: float = 1.0


@dataclass(eq=False, slots=True)
class Group:
    """A batch under way: texts that have run the same layers and run on together."""

    jobs: list[Job]  # in the engine's order, those that left included
    worker: int | None = 0  # in whose hands it is; None: it stands aside
    layer: int = 0
    skipped: int = 0  # turns in which another group ran
    shadow: bool = False  # of second runs, that no client waits for
    inside: dict[int, Job] = field(init=False)  # those that have not left, by place
    course: Course = field(init=False)  # filled by who computes it

    def __post_init__(self) -> None:
        self.inside = dict(enumerate(self.jobs))

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

    `opened` says that the group is new, and what ended its forming; `joined` is another at the
    same exit that it takes in first.
    """

    group: Group
    opened: DispatchReason | None = None
    joined: Group | None = None


class Scheduler:
    """The waiting texts and the groups under way. Not thread-safe: its owner holds a lock."""

    def __init__(self, plan: Plan, costs: "StepTable | None" = None) -> None:
        self.plan, self.queue = plan, JobQueue()
        self.groups: list[Group] = []
        self.shadows: deque[Job] = deque()  # that wait, in order of arrival
        self._shadow: Group | None = None  # under way; not among the groups, which never meet it
        # When what each worker has started is expected to be done.
        self._free_at = [0.0] * plan.workers
        self._backlog = False
        self.learn(costs)

    def learn(self, costs: "StepTable | None", *, can_join: bool = True) -> None:
        """What layers cost from now on, None if nobody knows; and can batches be joined at all?"""
        self.costs, self._can_join = costs, can_join

    @property
    def why_not_merging(self) -> str | None:
        """Why backlog mode would be of no use here, or None if it pays."""
        if self.costs is None:
            return "what a layer costs has not been measured"
        if not self._can_join:
            return "a batch in the device lane runs to its end"
        if self.plan.workers > 1:
            return "batches are computed side by side, and do not wait for each other"
        if self.costs.knee < LEAST_KNEE:
            return (
                f"from {self.costs.knee} tokens on a layer costs more the more it has, so batches "
                f"that wait for each other only lose time (a knee of {LEAST_KNEE} is needed)"
            )
        return None

    @property
    def merges(self) -> bool:
        """Backlog mode is asked for, and pays."""
        return self.plan.merge_backlog and self.why_not_merging is None

    # -- the waiting texts -------------------------------------------------------------------

    def add(self, jobs: Sequence[Job], now: float) -> None:
        """Queue the texts of one request, at the place of the most urgent."""
        self.queue.add(jobs, place_of(jobs, now, self.costs))

    def add_shadow(self, job: Job) -> bool:
        """Keep a text for when nobody waits; False if there is no room for it."""
        if len(self.shadows) >= MOST_SHADOWS:
            return False
        self.shadows.append(job)
        return True

    def seconds_until_answered(self, jobs: Sequence[Job], now: float) -> float:
        """How long the texts of a request that arrives now would take, at best: what has been
        started, those who go before them, they themselves. 0 where costs are unknown."""
        if self.costs is None:
            return 0.0
        costs, plan = self.costs, self.plan
        place = place_of(jobs, now, costs)
        work_s, tokens = self.queue.work_before(place, jobs, costs, plan.max_batch_tokens)
        shares = -(-tokens // LEAST_SHARE)
        alone = max(job.controls.depth.mean * costs(job.tokens) for job in jobs)
        return max(
            self._seconds_until_done(work_s, shares, now),
            self._seconds_until_done(alone, 1, now),
        )

    def seconds_until_room(self, now: float, *, texts: int = 0, tokens: int = 0) -> float | None:
        """How long until so many of the waiting texts and tokens are done with, if nobody else
        comes: what has been started, and that share of the queue. None where costs are unknown."""
        if self.costs is None:
            return None
        queue, budget = self.queue, self.plan.max_batch_tokens
        if not queue:
            return self._seconds_until_done(0.0, 1, now)
        share = min(1.0, max(texts / len(queue), tokens / queue.tokens))
        work_s = share * queue.seconds_for_all(self.costs, budget)
        return self._seconds_until_done(work_s, self.plan.workers, now)

    # -- what to do next ---------------------------------------------------------------------

    def next_step(self, now: float, worker: int = 0) -> Step | None:
        """What a worker, its last step done, should do now; None if there is nothing to do."""
        if self._shadow is not None and self._shadow.worker == worker:
            self._shadow.worker = None
        step = self._decide(now, worker)
        if step is not None:
            step.group.worker = worker
        # Noted here, because admission asks from another thread while groups change.
        if self.costs is not None:
            self._free_at = [now + seconds for seconds in self._seconds_begun(self.costs)]
        return step

    def _seconds_begun(self, costs: "StepTable") -> list[float]:
        """How long each worker has to do with what it has begun."""
        left = [0.0] * self.plan.workers
        for group in self.groups:
            assert group.worker is not None  # only shadows stand aside
            left[group.worker] += expected_seconds(group.inside.values(), costs, group.layer)
        shadow = self._shadow
        if shadow is not None and shadow.worker is not None:
            stretch_s = self._step_s(costs, shadow.tokens)
            if not self._can_join:
                stretch_s = expected_seconds(shadow.inside.values(), costs, shadow.layer)
            left[shadow.worker] += stretch_s
        return left

    def _seconds_until_done(self, work_s: float, shares: int, now: float) -> float:
        """When so much work ends, shared out among as many workers, those who are free first."""
        free = sorted(max(0.0, at - now) for at in self._free_at)
        end = free[0] + work_s
        for workers in range(2, min(shares, len(free)) + 1):
            if end <= free[workers - 1]:
                break
            end = (sum(free[:workers]) + work_s) / workers
        return end

    def _decide(self, now: float, worker: int) -> Step | None:
        mine = [group for group in self.groups if group.worker == worker]
        shadow = self._shadow if self._shadow is not None and self._shadow.worker is None else None
        under_way = mine if shadow is None else [*mine, shadow]
        if empty := next((group for group in under_way if not group.inside), None):
            return Step(empty)  # costs nothing: it comes to its end
        if shadow is not None and not self._can_join:
            return Step(shadow)  # in the device lane it cannot stand aside, and has to end first
        if self._in_backlog():
            return self._choose(now)
        if mine:
            return self._join(max(mine, key=lambda group: group.layer))
        return self._open(now) or self._run_shadow(now)

    def close(self, group: Group) -> None:
        """A group is done with, one way or the other."""
        if group is self._shadow:
            self._shadow = None
        else:
            self.groups.remove(group)

    def let_go(self, worker: int = 0) -> int:
        """What a worker has in hands will not go on, nor do shadow texts that stand aside; returns
        how many of these there were."""
        self.groups = [group for group in self.groups if group.worker != worker]
        if self._shadow is None or self._shadow.worker not in (worker, None):
            return 0
        shadows, self._shadow = len(self._shadow.inside), None
        return shadows

    def _run_shadow(self, now: float) -> Step | None:
        """Nobody waits: the shadow batch goes on from where it stands, or a new one starts."""
        if self.groups:
            return None  # another worker's; whoever is done last comes here again
        if self._shadow is not None:
            return Step(self._shadow) if self._shadow.worker is None else None
        jobs: list[Job] = []
        tokens = 0
        while self.shadows and len(jobs) < SHADOW_TEXTS:
            tokens += self.shadows[0].tokens
            if jobs and tokens > SHADOW_TOKENS:
                break
            job = self.shadows.popleft()
            if not job.abandoned:
                job.started_at = now
                jobs.append(job)
        if not jobs:
            return None
        self._shadow = Group(jobs, shadow=True)
        return Step(self._shadow, opened="idle")

    def _open(self, now: float) -> Step | None:
        jobs, reason = self._form_batch(now)
        while not jobs and self.queue:  # all that were looked at had been given up, and are gone
            jobs, reason = self._form_batch(now)
        if not jobs:
            return None
        for job in jobs:
            job.started_at = now
        group = Group(jobs)
        self.groups.append(group)
        return Step(group, opened=reason)

    # -- forming a batch ---------------------------------------------------------------------

    def _form_batch(self, now: float) -> tuple[list[Job], DispatchReason]:
        """As many as fit the budget, in the order of the queue or of likeness; beyond what is
        efficient, no more than let every member be in time, and leave other workers their share."""
        jobs: list[Job] = []
        tokens, limit_s = 0, float("inf")
        efficient = self.costs.efficient if self.costs else 0
        budget = self._share()
        for job in self._candidates(now, budget):
            with_it = tokens + job.tokens
            if jobs and with_it > budget:
                return jobs, "tokens" if budget == self.plan.max_batch_tokens else "share"
            if len(jobs) == self.plan.max_batch_texts:
                return jobs, "full"
            layer_s = min(limit_s, self._longest_layer(job, now))
            if jobs and with_it > efficient and self.costs and self.costs(with_it) > layer_s:
                return jobs, "deadline"
            self.queue.take_out(job)
            if not job.abandoned:
                jobs.append(job)
                tokens, limit_s = with_it, layer_s
        return jobs, "idle"

    def _share(self) -> int:
        """Tokens that the next batch may have: the budget; with several workers one's part of all
        that waits or is under way, so that they have about the same to do."""
        plan = self.plan
        if plan.workers == 1:
            return plan.max_batch_tokens
        inside = self.queue.tokens + sum(group.tokens for group in self.groups)
        return min(plan.max_batch_tokens, max(LEAST_SHARE, -(-inside // plan.workers)))

    def _longest_layer(self, job: Job, now: float) -> float:
        """Seconds that a layer may take for a text to be in time, starting now."""
        if job.deadline is None or self._hopeless(job, now):
            return float("inf")
        return (job.deadline - now) / job.controls.depth.mean

    def _hopeless(self, job: Job, now: float) -> bool:
        """It would be late even alone. Its client will be gone soon, and what it would cost is
        better spent on those who can be in time."""
        if job.deadline is None or self.costs is None:
            return False
        return now + job.controls.depth.mean * self.costs(job.tokens) > job.deadline

    def _in_time_first(self, now: float) -> Iterator[Job]:
        """All that wait; texts may be taken out meanwhile."""
        hopeless = []
        for job in list(self.queue):
            if self._hopeless(job, now):
                hopeless.append(job)
            else:
                yield job
        yield from hopeless

    def _candidates(self, now: float, budget: int) -> Iterable[Job]:
        """The queue's beginning, the hopeless last. Grouping puts texts forward that are like the
        first one in depth and length, but not past those that would be late if they waited for
        another batch."""
        plan = self.plan
        waiting = self._in_time_first(now)
        if not plan.group_alike or self.costs is None or self.queue.tokens <= budget:
            return waiting
        seen: list[Job] = []
        tokens = 0
        for job in islice(waiting, LOOK_AHEAD * plan.max_batch_texts):
            seen.append(job)
            tokens += job.tokens
            if tokens > LOOK_AHEAD * budget:
                break
        mean_layers = self.queue.layers / len(self.queue)
        cannot_wait = now + 2 * mean_layers * self.costs(budget)  # this batch and the next
        first = seen[0]

        def unlike(place: int) -> tuple[float, int, int]:
            job = seen[place]
            if job is not first and self._hopeless(job, now):
                return float("inf"), 0, place
            if job is first or self.queue.latest_start(job) <= cannot_wait:
                return -1.0, 0, place
            deeper = abs(job.controls.depth.mean - first.controls.depth.mean)
            return deeper, abs(job.tokens - first.tokens), place

        return [seen[place] for place in sorted(range(len(seen)), key=unlike)]

    # -- backlog mode ------------------------------------------------------------------------

    def _in_backlog(self) -> bool:
        if not self.merges:
            return False
        plan, queue = self.plan, self.queue
        waiting = max(queue.tokens / plan.max_batch_tokens, len(queue) / plan.max_batch_texts)
        self._backlog = waiting > (BACKLOG_ENDS if self._backlog else BACKLOG_BEGINS)
        return self._backlog

    def _choose(self, now: float) -> Step | None:
        """Whoever cannot wait; else the deepest that fills the device; else whom a deeper group had
        better wait for; else the deepest. Never the shallowest because it is shallow."""
        costs = self.costs
        assert costs is not None  # without them there is no backlog mode
        options = self._options(costs, now)
        chosen = (
            self._cannot_wait(costs, options)
            or self._deepest_beyond_knee(costs, options)
            or self._awaited(costs, options)
            or options[-1]
        )
        for option in options:
            if option.group is not None:
                option.group.skipped = 0 if option is chosen else option.group.skipped + 1
        if chosen.group is not None:
            return self._join(chosen.group)
        if (step := self._open(now)) is not None:
            return step
        return self._decide(now, 0)  # all that waited had been given up, and is gone now

    def _options(self, costs: "StepTable", now: float) -> list["_Option"]:
        """The queue, then the groups from the shallowest on. Never empty in backlog mode: it ends
        when the queue is short."""
        options = []
        if len(self.groups) < MOST_GROUPS:
            tokens = min(self.queue.tokens, self.plan.max_batch_tokens)
            rows = min(len(self.queue), self.plan.max_batch_texts)
            options.append(_Option(None, 0, tokens, rows, self.queue[0][0] - now))
        for group in sorted(self.groups, key=lambda group: group.layer):
            slack_s = self._slack(costs, group, now)
            options.append(_Option(group, group.layer, group.tokens, len(group.inside), slack_s))
        return options

    def _slack(self, costs: "StepTable", group: Group, now: float) -> float:
        """How long a group can wait before its most pressing text is late, at the depth that its
        class goes on average. Each turn in which it was skipped takes the time of one away, so that
        no group waits for ever."""
        per_layer = costs(group.tokens)
        slacks = [
            _due(job) - now - job.controls.depth.ahead(group.layer) * per_layer
            for job in group.inside.values()
        ]
        return min(slacks) - group.skipped * self._step_s(costs, group.tokens)

    def _step_s(self, costs: "StepTable", tokens: float) -> float:
        return self.plan.layers_per_step * costs(tokens)

    def _cannot_wait(self, costs: "StepTable", options: Sequence["_Option"]) -> "_Option | None":
        pressing = min(options, key=lambda option: option.slack_s)
        others = [self._step_s(costs, one.tokens) for one in options if one is not pressing]
        return pressing if pressing.slack_s < max(others, default=0.0) else None

    def _deepest_beyond_knee(
        self, costs: "StepTable", options: Sequence["_Option"]
    ) -> "_Option | None":
        full = [option for option in options if option.tokens >= costs.knee]
        return full[-1] if full else None

    def _awaited(self, costs: "StepTable", options: Sequence["_Option"]) -> "_Option | None":
        for younger, older in pairwise(options):
            assert older.group is not None  # only the queue is none, and it is the youngest
            if costs.waiting_pays(
                tokens=older.tokens,
                rows=older.rows,
                younger_tokens=younger.tokens,
                others=younger.rows + len(self.queue),
                layers_behind=older.layer - younger.layer,
                layers_ahead=_layers_ahead(older.group),
                slack_s=older.slack_s,
            ):
                return younger
        return None

    def _join(self, group: Group) -> Step:
        """Run it, with another that has come as far if both are cheaper as one."""
        for other in self.groups:
            if (
                other is not group
                and (other.worker, other.layer) == (group.worker, group.layer)
                and group.tokens + other.tokens <= self.plan.max_batch_tokens
                and len(group.inside) + len(other.inside) <= self.plan.max_batch_texts
                and self._cheaper_together(group.tokens, other.tokens)
            ):
                group.take_in(other)
                self.groups.remove(other)
                return Step(group, joined=other)
        return Step(group)

    def _cheaper_together(self, tokens: int, other: int) -> bool:
        costs = self.costs
        assert costs is not None  # two groups come of backlog mode only
        return costs.saved_together(tokens, other) > JOINING * costs(tokens + other)


@dataclass(frozen=True, slots=True)
class _Option:
    """A group that could run next; `group` None is the batch that the queue would give."""

    group: Group | None
    layer: int
    tokens: int
    rows: int
    slack_s: float


def _due(job: Job) -> float:
    return job.queued_at + HORIZON_S if job.deadline is None else job.deadline


def _layers_ahead(group: Group) -> float:
    """Expected further layers, on average over its texts."""
    ahead = [job.controls.depth.ahead(group.layer) for job in group.inside.values()]
    return sum(ahead) / len(ahead)


def expected_seconds(jobs: Iterable[Job], costs: "StepTable", layer: int = 0) -> float:
    """How long texts that have run `layer` layers are expected to take on, together, while their
    classes shrink as they do."""
    classes: dict[Depth, tuple[int, int]] = {}  # texts, tokens
    for job in jobs:
        texts, tokens = classes.get(job.controls.depth, (0, 0))
        classes[job.controls.depth] = texts + 1, tokens + job.tokens
    seconds = 0.0
    for after in range(layer, max((len(depth.inside) for depth in classes), default=0)):
        texts_left = tokens_left = 0.0
        for depth, (texts, tokens) in classes.items():
            share = depth.share_going_on(layer, after)
            texts_left += texts * share
            tokens_left += tokens * share
        # With less than one text left on average, the layer runs as often as that.
        seconds += min(1.0, texts_left) * costs(tokens_left)
    return seconds
