"""What routes, batcher, scheduler and engine hand each other: one text to classify, and its answer.

Plain data without tensors, so that the batcher stays free of torch and the engine free of HTTP.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, Protocol

ExitReason = Literal["criterion", "final", "forced"]
DispatchReason = Literal["full", "tokens", "deadline", "idle"]
"""What ended the forming of a batch: texts, tokens, a member's deadline, or an empty queue."""


@dataclass(frozen=True)
class Depth:
    """How deep texts of one threshold class go, by calibration.

    `inside[k]` is the share that runs layer k + 1: 1 at first, and never rising.
    """

    inside: tuple[float, ...]

    @classmethod
    def of(cls, exit_counts: Sequence[int], min_layer: int, max_layer: int) -> "Depth":
        """From calibration rows counted per exit layer, within a request's bounds."""
        rows = sum(exit_counts)
        left = [sum(exit_counts[:layer]) for layer in range(len(exit_counts))]
        return cls(
            tuple(
                1.0 if layer < min_layer else (rows - left[layer]) / rows
                for layer in range(max_layer)
            )
        )

    @cached_property
    def mean(self) -> float:
        """Layers that such a text runs on average."""
        return sum(self.inside)

    @cached_property
    def late(self) -> int:
        """Layers that 95 % of such texts do not exceed."""
        return sum(share > 0.05 for share in self.inside)

    def ahead(self, layer: int) -> float:
        """Expected further layers of a text that is still inside after `layer`."""
        rest = self.inside[layer:]
        # Deeper than any calibration row went: to the end, to be on the safe side.
        return sum(rest) / rest[0] if rest and rest[0] else float(len(rest))


@dataclass(frozen=True, slots=True)
class Controls:
    """How early a text may leave, already resolved to the policy's own units."""

    threshold: float
    min_layer: int
    max_layer: int
    depth: Depth  # how deep such texts go
    speedup: float | None = None  # what was asked for; None when a raw threshold was
    deadline_s: float | None = None  # from the arrival of the request; later is too late

    @property
    def expected_layers(self) -> float:
        """Layers such a text runs on average, by calibration."""
        return self.depth.mean


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one text. `signal` is the scalar its exit policy compared."""

    label: int
    logits: list[float]
    probs: list[float]
    exit_layer: int
    signal: float
    reason: ExitReason


@dataclass(frozen=True, slots=True)
class TimedAnswer:
    """An answer with the seconds its text waited and was computed."""

    answer: Answer
    queue_s: float
    inference_s: float


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
    deadline: float | None = None  # on the clock of the batcher
    expired: bool = False  # its deadline has passed: the engine drops it at the next exit
    # Filled by the batcher on admission:
    waiter: Waiter = field(init=False)
    index: int = field(init=False)  # place in its client batch
    queued_at: float = field(init=False)
    # Filled when its batch is formed:
    started_at: float = field(init=False)

    @property
    def tokens(self) -> int:
        return len(self.ids)

    @property
    def abandoned(self) -> bool:
        """Nobody waits for this answer any more. Safe to read from any thread."""
        return self.expired or self.waiter.abandoned

    def too_late(self, now: float) -> bool:
        return self.deadline is not None and now > self.deadline


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
    """A batch that is being computed: each `next` runs it to an exit, until nobody is left."""

    def __next__(self) -> Left: ...

    def take_in(self, other: Any) -> None:
        """Go on together with another course of the same engine, which has come to the same
        exit; its texts' places count on from ours."""
        ...


# Takes a batch in. Runs in the engine thread only, like what it returns.
Engine = Callable[[Sequence[Job]], Course]
