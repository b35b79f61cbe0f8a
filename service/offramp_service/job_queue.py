"""The queue's order: which text is computed next, and how much work stands before another.

Texts stand in the order of their *latest start*, the last moment at which they can begin and still
meet their deadline, and of arrival where that is the same. A text without a deadline is queued as
if it had to start within a second, so that first come, first served stays the rule among such
texts, and nobody with a deadline can keep them waiting for ever.

Plain data under somebody else's lock and clock: it knows no promises, threads or time.
"""

import heapq
from collections.abc import Callable, Iterator, Sequence

from offramp_service.jobs import Job

LayerSeconds = Callable[[float], float]
"""Live tokens → seconds of one layer, measured; rising."""

HORIZON_S = 1.0
"""Within which a text without a deadline is to start."""
_SLACK = 64  # entries of texts that left, kept until they are as many as those inside


class JobQueue:
    """Texts that wait, by latest start."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._inside: dict[Job, tuple[float, int]] = {}
        self._arrivals = 0
        self.tokens = 0
        self.layers = 0.0  # that the texts will run, by calibration

    def __len__(self) -> int:
        return len(self._inside)

    def __contains__(self, job: Job) -> bool:
        return job in self._inside

    def __iter__(self) -> Iterator[Job]:
        """In the order in which they will be taken."""
        return iter(sorted(self._inside, key=self._inside.__getitem__))

    def add(self, jobs: Sequence[Job], latest_start: float) -> None:
        """Texts of one request: they stand together."""
        for job in jobs:
            place = (latest_start, self._arrivals)
            self._arrivals += 1
            self._inside[job] = place
            heapq.heappush(self._heap, (*place, job))
            self.tokens += job.tokens
            self.layers += job.controls.expected_layers

    def first(self) -> Job:
        """The next text.

        Raises:
            IndexError: nobody waits.
        """
        while True:
            latest_start, arrival, job = self._heap[0]
            if self._inside.get(job) == (latest_start, arrival):
                return job
            heapq.heappop(self._heap)

    def take_out(self, job: Job) -> None:
        """Whoever it is, wherever it stands.

        Raises:
            KeyError: it does not wait.
        """
        del self._inside[job]
        self.tokens -= job.tokens
        self.layers -= job.controls.expected_layers
        if not self._inside:
            self._heap.clear()
            self.layers = 0.0  # sums of floats drift; an empty queue holds no work
        elif len(self._heap) > 2 * len(self._inside) + _SLACK:
            self._heap = [(*place, job) for job, place in self._inside.items()]
            heapq.heapify(self._heap)

    def seconds_before(
        self, latest_start: float, jobs: Sequence[Job], seconds: LayerSeconds, budget: int
    ) -> float:
        """How long it takes to compute `jobs` and all that stands before them, at best: in batches
        as large as the token budget and what is there allow."""
        ahead = [job for job, place in self._inside.items() if place[0] <= latest_start]
        counted = (*ahead, *jobs)
        tokens = sum(job.tokens for job in counted)
        work = sum(job.tokens * job.controls.expected_layers for job in counted)
        batch = min(tokens, budget)
        return work * seconds(batch) / batch if batch else 0.0


def latest_start(
    job: Job, now: float, deadline: float | None, seconds: LayerSeconds | None
) -> float:
    """See above; without measured costs a text is taken to need no time."""
    if deadline is None:
        return now + HORIZON_S
    if seconds is None:
        return deadline
    return deadline - job.controls.expected_layers * seconds(job.tokens)
