"""What routes, batcher and engine hand each other: one text to classify, and its answer.

Plain data without tensors, so that the batcher stays free of torch and the engine free of HTTP.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

ExitReason = Literal["criterion", "final", "forced"]


@dataclass(frozen=True, slots=True)
class Controls:
    """How early a text may leave, already resolved to the policy's own units."""

    threshold: float
    min_layer: int
    max_layer: int
    expected_layers: float  # layers such a text runs on average, by calibration
    speedup: float | None = None  # what was asked for; None when a raw threshold was
    deadline_s: float | None = None  # from the request's arrival; later answers are worth nothing


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
    # Filled by the batcher on admission:
    waiter: Waiter = field(init=False)
    index: int = field(init=False)  # place in its client batch
    queued_at: float = field(init=False)

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


# Computes a batch, exit by exit. Runs in the engine thread only.
Engine = Callable[[Sequence[Job]], Iterable[Left]]
