"""Shadow runs: some texts that left early are run again to the end, and the answers compared.

Whoever left early got the answer of its exit; what the last exit would have said is known only by
asking it. Which texts are asked again is decided here, and what their second run has to say. When
it runs is the scheduler's to say, and never before a client's text for the same model; other
models take turns with it.

It knows neither metrics nor threads, and runs nothing.
"""

import random
from dataclasses import dataclass
from typing import Protocol

from offramp_service.jobs import Answer, Controls, Job


class _Closing(Protocol):
    closed: bool


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """What a text said when it left early; waits for what its second run says."""

    label: int
    exit_layer: int
    watch: _Closing

    @property
    def abandoned(self) -> bool:
        """Nobody listens any more."""
        return self.watch.closed

    def agrees(self, answer: Answer) -> bool:
        """Would its client have been told the same label at full depth? Of sets of labels, the most
        probable one, which is what doors name."""
        return answer.label == self.label


class ShadowWatch:
    """Chooses texts at random, a share of `rate` of those that left because they were sure.

    At random and not by content: a text that comes often is to count as often. `full_depth` are
    controls that never let a text leave early. Any of the engine's threads may ask it.
    """

    def __init__(self, rate: float, full_depth: Controls, *, seed: int = 0) -> None:
        self._rate, self._full_depth = rate, full_depth
        self._random = random.Random(seed)
        self.closed = False  # no comparison is of use any more

    def choose(self, job: Job, answer: Answer, now: float) -> Job | None:
        """The second run of a text that has been answered, if it was drawn."""
        # Bounds that a client set are not the checkpoint's judgement, so only the criterion counts.
        if answer.reason != "criterion" or self._random.random() >= self._rate:
            return None
        again = Job(job.ids, job.type_ids, self._full_depth)
        again.waiter, again.index = Sample(answer.label, answer.exit_layer, self), 0
        again.queued_at, again.deadline = now, None
        return again


def sample_of(job: Job) -> Sample:
    """What a second run is compared with."""
    sample = job.waiter
    assert isinstance(sample, Sample)
    return sample
