"""What is sent, ready for the wire, and what came of it. Plain data; knows no HTTP."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from offramp_loadtest.http_client import Leave, Reply

NO_ANSWER = 0
"""A status: the connection ended, or patience did."""
LEFT = -1
"""A status: the client went away itself."""


class Kind(NamedTuple):
    """What requests are told apart by in a report."""

    door: str
    controls: str
    texts: int  # in a list; 0: a single text


NO_KIND = Kind("", "", 0)


@dataclass(frozen=True, slots=True)
class Question:
    """One request, as bytes for each of the targets."""

    wires: Sequence[bytes]
    kind: Kind = NO_KIND
    labels: tuple[str, ...] = ()  # right answers, text by text; empty: nobody knows
    leave: Leave | None = None
    malformed: str = ""  # what is wrong with it on purpose
    right_statuses: frozenset[int] = field(default=frozenset((200,)))

    @property
    def texts(self) -> int:
        return max(1, self.kind.texts)


class Outcome(NamedTuple):
    """What came of one request; times in seconds on the machine's monotonic clock."""

    question: Question
    target: int
    due: float
    sent: float
    done: float
    reply: Reply | None

    @property
    def status(self) -> int:
        return NO_ANSWER if self.reply is None else self.reply.status

    @property
    def latency_s(self) -> float:
        return self.done - self.due

    @property
    def lateness_s(self) -> float:
        """The generator's share of the latency."""
        return self.sent - self.due
