"""The queue's order: which text is computed next, and how much work stands before another.

Texts stand in the order of their *latest start*, the last moment at which they can begin and still
meet their deadline, and of arrival where that is the same. A text without a deadline is queued as
if it had to start within a second, so that first come, first served stays the rule among such
texts, and nobody with a deadline can keep them waiting for ever.

Priority and size move a request by a bounded time (`place_of`). Its place is fixed when it comes,
while those who come later get later ones: waiting alone brings everybody to the front.

Plain data under somebody else's lock and clock: it knows no promises, threads or time.
"""

from bisect import bisect_left, bisect_right, insort
from collections.abc import Callable, Iterator, Sequence

from offramp_service.jobs import Job

LayerSeconds = Callable[[float], float]
"""Live tokens → seconds of one layer, measured; rising."""

HORIZON_S = 1.0
"""Within which a text without a deadline is to start."""
PRIORITY_S = 0.01
"""A step of priority is worth so much waiting; all of them, a second in either direction."""
FURTHER_TEXT_S, MOST_YIELDING_S = 0.001, 0.25
"""A request stands behind smaller ones that come so much later for each text more; at most."""

Entry = tuple[float, int, Job]
"""Latest start, arrival, text."""


class JobQueue:
    """Texts that wait, by latest start."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []  # sorted
        self._places: dict[Job, tuple[float, int]] = {}
        self._arrivals = 0
        self.tokens = 0
        self.layers = 0.0  # that the texts will run, by calibration

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, job: Job) -> bool:
        return job in self._places

    def __iter__(self) -> Iterator[Job]:
        """In the order in which they will be taken."""
        return (job for _, _, job in self._entries)

    def __getitem__(self, place: int) -> Entry:
        """Whoever stands there, from 0 on."""
        return self._entries[place]

    def latest_start(self, job: Job) -> float:
        """Of a text that waits."""
        return self._places[job][0]

    def add(self, jobs: Sequence[Job], latest_start: float) -> None:
        """Texts of one request: they stand together."""
        for job in jobs:
            place = (latest_start, self._arrivals)
            self._arrivals += 1
            self._places[job] = place
            insort(self._entries, (*place, job))
            self.tokens += job.tokens
            self.layers += job.controls.depth.mean

    def take_out(self, job: Job) -> None:
        """Whoever it is, wherever it stands.

        Raises:
            KeyError: it does not wait.
        """
        del self._entries[bisect_left(self._entries, self._places.pop(job))]
        self.tokens -= job.tokens
        # Sums of floats drift; an empty queue holds no work.
        self.layers = self.layers - job.controls.depth.mean if self._entries else 0.0

    def work_before(
        self, latest_start: float, jobs: Sequence[Job], seconds: LayerSeconds, budget: int
    ) -> tuple[float, int]:
        """How long it takes one worker to compute `jobs` and all that stands before them, at best:
        in batches as large as the token budget and what is there allow; and how many tokens that
        are."""
        end = bisect_right(self._entries, (latest_start, self._arrivals))
        counted = [*(job for _, _, job in self._entries[:end]), *jobs]
        tokens = sum(job.tokens for job in counted)
        work = sum(job.tokens * job.controls.depth.mean for job in counted)
        return _in_full_batches(work, tokens, seconds, budget), tokens

    def seconds_for_all(self, seconds: LayerSeconds, budget: int) -> float:
        """How long all that waits takes, at about the same cost for each text whatever its size:
        a sum over the queue would cost a refused request more than it is worth."""
        mean_layers = self.layers / len(self._entries) if self._entries else 0.0
        return _in_full_batches(self.tokens * mean_layers, self.tokens, seconds, budget)


def _in_full_batches(work: float, tokens: int, seconds: LayerSeconds, budget: int) -> float:
    """Seconds of so many token-layers, in batches as large as there are tokens."""
    batch = min(tokens, budget)
    return work * seconds(batch) / batch if batch else 0.0


def place_of(jobs: Sequence[Job], now: float, seconds: LayerSeconds | None) -> float:
    """Where the texts of one request stand, all of them: where the most urgent does.

    Many texts without a deadline let smaller requests pass that come a little later. Their client
    has its answer when the last is known, and single texts would have to wait for all of them. All
    of its texts stand back, not only the later ones: that lets more small requests pass, and large
    ones do not slow each other down by taking turns.
    """
    yielding_s = min((len(jobs) - 1) * FURTHER_TEXT_S, MOST_YIELDING_S)
    return min(
        latest_start(job, now, seconds)
        + (yielding_s if job.deadline is None else 0.0)
        + job.controls.priority * PRIORITY_S
        for job in jobs
    )


def latest_start(job: Job, now: float, seconds: LayerSeconds | None) -> float:
    """See above, at the depth that few of its class exceed; without measured costs a text is taken
    to need no time."""
    if job.deadline is None:
        return now + HORIZON_S
    if seconds is None:
        return job.deadline
    return job.deadline - job.controls.depth.late * seconds(job.tokens)
