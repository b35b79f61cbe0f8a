"""What routes, scheduler, batcher and engine hand each other: one text to classify, its answer.

Plain data without tensors, so that the batcher stays free of torch and the engine free of HTTP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from operator import sub
from typing import Any, Literal, Protocol

ExitReason = Literal["criterion", "final", "forced"]
DispatchReason = Literal["full", "tokens", "share", "deadline", "idle"]
"""What ended the forming of a batch: its texts, its tokens, its share where other workers are to
have some as well, a member's deadline, or an empty queue."""

LEAST_PRIORITY, MOST_PRIORITY = -100, 100
"""The lower, the sooner; 0 where nobody says."""

LATE_SHARE = 0.05
"""Of a class's texts that may run deeper than what is planned for."""


@dataclass(frozen=True)
class Depth:
    """How deep texts of one class of controls go, by calibration.

    `inside[k]` is the share that runs layer k + 1: 1 at first, never rising.
    """

    inside: tuple[float, ...]

    @classmethod
    def of(cls, exit_counts: Sequence[int], min_layer: int, max_layer: int) -> "Depth":
        """From calibration rows counted by exit layer, within a request's bounds."""
        rows = sum(exit_counts)
        stays = [rows - sum(exit_counts[:layer]) for layer in range(max_layer)]
        return cls(tuple(1.0 if k < min_layer else left / rows for k, left in enumerate(stays)))

    @classmethod
    def full(cls, layers: int) -> "Depth":
        """Every text runs so many layers."""
        return cls((1.0,) * layers)

    @cached_property
    def mean(self) -> float:
        """Layers that such a text runs on average."""
        return sum(self.inside)

    @cached_property
    def late(self) -> int:
        """Layers that 95 % of such texts do not exceed."""
        return sum(share > LATE_SHARE for share in self.inside)

    @cached_property
    def exit_shares(self) -> tuple[float, ...]:
        """Share that leaves after each layer."""
        return tuple(map(sub, self.inside, (*self.inside[1:], 0.0)))

    def share_going_on(self, layer: int, after: int) -> float:
        """Of texts still inside after `layer`, the share that runs another one after `after`."""
        if after >= len(self.inside):
            return 0.0
        # Deeper than any calibration row went: to the end, to be on the safe side.
        return self.inside[after] / self.inside[layer] if self.inside[layer] else 1.0

    def ahead(self, layer: int) -> float:
        """Expected further layers of a text that is still inside after `layer`."""
        return sum(self.share_going_on(layer, after) for after in range(layer, len(self.inside)))


@dataclass(frozen=True, slots=True)
class Controls:
    """How early a text may leave, already resolved to the policy's own units."""

    threshold: float
    min_layer: int
    max_layer: int
    depth: Depth  # how deep such texts go
    speedup: float | None = None  # what was asked for; None when a raw threshold was
    deadline_s: float | None = None  # from the request's arrival; later answers are worth nothing
    effective_speedup: float | None = None  # what it was raised to, or `speedup` itself
    priority: int = 0  # LEAST_PRIORITY to MOST_PRIORITY
    # How deep calibration has such texts go at the effective speed-up; None where there is none, or
    # nothing to expect: raw thresholds, and a speed-up of 1.
    expected: Depth | None = None
    all_signals: bool = False  # keep those of all exits, not only where the text leaves


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one text. `label` is the most probable one and `probs` are by softmax, or by
    sigmoid of a multi-label model; `signal` is the scalar its exit policy compared, and `signals`
    holds it for each exit that the text has passed, with the layer, if its controls ask so."""

    label: int
    logits: list[float]
    probs: list[float]
    exit_layer: int
    signal: float
    reason: ExitReason
    signals: Sequence[tuple[int, float]] | None = None


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer with the seconds its text waited and was computed, and when the one gave way to the
    other, by the batcher's clock."""

    answer: Answer
    queue_s: float
    inference_s: float
    started_at: float


class Waiter(Protocol):
    """Whoever is owed the answer."""

    @property
    def abandoned(self) -> bool: ...


@dataclass(slots=True, eq=False)
class Job:
    """One text inside the service."""

    ids: list[int]
    type_ids: list[int]
    controls: Controls
    # Filled by the batcher on admission:
    waiter: Waiter = field(init=False)
    index: int = field(init=False)  # place in its client batch
    queued_at: float = field(init=False)
    deadline: float | None = field(init=False)  # after which the answer is worth nothing
    # Filled by the scheduler when its batch is formed:
    started_at: float = field(init=False)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for this answer any more. Safe to read from any thread."""
        return self.waiter.abandoned


@dataclass(frozen=True, slots=True)
class Left:
    """What happened at one exit: how many texts ran to it, and the answers of those who left.

    Each answer comes with its text's place in the batch; a text whose computation broke leaves
    with its error. Maybe nobody left.
    """

    exit_layer: int
    texts_run: int
    answers: Sequence[tuple[int, Answer | Exception]]


class Course(Protocol):
    """A batch under way: each `next` runs it to its next exit, until nobody is left inside."""

    def __next__(self) -> Left: ...

    def take_in(self, other: Any) -> None:
        """Go on together with another course of the same engine that has come to the same exit;
        its texts' places count on from ours. Nothing may be asked of `other` any more."""
        ...


# Takes a batch in. Called in the engine's threads only, by several at once where there are several
# workers; what it returns is asked by one at a time.
Engine = Callable[[Sequence[Job]], Course]
