"""Counts what came of requests, in a memory that does not grow with them; several counts add up.

Of each kind of request (door, controls, list size) and target: statuses, latencies from when it
was due and from when it was sent, exit layers, right labels; and all of them over time, in slots
that grow twice as long when they would be too many. What is counted goes through JSON and back, so
that processes, or machines, put theirs together. It knows nothing of how requests were made.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from offramp_loadtest.doors import Answers, read
from offramp_loadtest.histogram import Histogram
from offramp_loadtest.http_client import Reply
from offramp_loadtest.question import LEFT, NO_ANSWER, Kind, Outcome

SLOT_S = 0.1
MOST_SLOTS = 300

_EXIT_LAYER = re.compile(rb"\r\nx-exit-layer: *(\d+)", re.IGNORECASE)
_EXIT_LAYER_MEAN = re.compile(rb"\r\nx-exit-layer-mean: *([\d.]+)", re.IGNORECASE)
_RAISED = re.compile(rb"\r\nx-speedup-effective:", re.IGNORECASE)


def exit_layer(reply: Reply) -> int | None:
    """Where a single text left, if the answer says so."""
    found = _EXIT_LAYER.search(reply.head)
    return int(found[1]) if found else None


_NAMES = {NO_ANSWER: "no answer", LEFT: "left"}


def status_name(status: int) -> str:
    return _NAMES.get(status, str(status))


@dataclass
class Tally:
    """Of requests of one kind to one target; well-formed ones, whose clients stayed."""

    statuses: Counter[str] = field(default_factory=Counter)
    latency: Histogram = field(default_factory=Histogram)  # answered with 200, from when it was due
    service: Histogram = field(default_factory=Histogram)  # the same, from when it was sent
    texts: int = 0  # in the requests answered with 200 that say where they left
    layers_run: float = 0.0  # by those texts together
    exit_layers: Counter[int] = field(default_factory=Counter)  # where it is known text by text
    raised: int = 0  # requests whose speed-up the server raised
    graded: int = 0  # texts whose label is known
    right: int = 0
    unreadable: int = 0  # answers with 200 that are none

    def add(self, other: "Tally") -> None:
        self.statuses += other.statuses
        self.latency.add(other.latency)
        self.service.add(other.service)
        self.exit_layers += other.exit_layers
        for name in _NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def to_json(self) -> dict[str, Any]:
        return {
            "statuses": dict(self.statuses),
            "latency": self.latency.sparse(),
            "service": self.service.sparse(),
            "exit_layers": {str(layer): count for layer, count in self.exit_layers.items()},
            **{name: getattr(self, name) for name in _NUMBERS},
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Tally":
        return cls(
            Counter(found["statuses"]),
            Histogram.from_sparse(found["latency"], 3),
            Histogram.from_sparse(found["service"], 3),
            exit_layers=Counter({int(layer): n for layer, n in found["exit_layers"].items()}),
            **{name: found[name] for name in _NUMBERS},
        )


_NUMBERS = ("texts", "layers_run", "raised", "graded", "right", "unreadable")


@dataclass
class Slot:
    """A length of time: what was due in it and how long that took, and what was answered in it."""

    due: int = 0
    answered: int = 0  # with 200
    refused: int = 0  # everything else, of clients that stayed
    texts: int = 0
    layers_run: float = 0.0
    latency: Histogram = field(default_factory=lambda: Histogram(2))

    def add(self, other: "Slot") -> None:
        for name in _SLOT_NUMBERS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.latency.add(other.latency)

    def to_json(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in _SLOT_NUMBERS}
        return numbers | {"latency": self.latency.sparse()}

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Slot":
        numbers = {name: found[name] for name in _SLOT_NUMBERS}
        return cls(**numbers, latency=Histogram.from_sparse(found["latency"], 2))


_SLOT_NUMBERS = ("due", "answered", "refused", "texts", "layers_run")


class Timeline:
    """Slots of equal length from the start on, never more than so many."""

    def __init__(self, slot_s: float = SLOT_S, slots: Iterable[Slot] = ()) -> None:
        self.slot_s, self.slots = slot_s, list(slots)

    def at(self, seconds: float) -> Slot:
        while (place := int(seconds / self.slot_s)) >= MOST_SLOTS:
            self._double()
        while place >= len(self.slots):
            self.slots.append(Slot())
        return self.slots[place]

    def add(self, other: "Timeline") -> None:
        other = Timeline(other.slot_s, other.slots)
        while other.slot_s < self.slot_s * 0.99:
            other._double()
        while self.slot_s < other.slot_s * 0.99:
            self._double()
        for place, slot in enumerate(other.slots):
            self.at((place + 0.5) * self.slot_s).add(slot)

    def at_most(self, count: int) -> "Timeline":
        """The same in fewer, longer slots."""
        shorter = Timeline(self.slot_s)
        shorter.add(self)
        while len(shorter.slots) > count:
            shorter._double()
        return shorter

    def _double(self) -> None:
        pairs = []
        for place in range(0, len(self.slots), 2):
            both = Slot()
            for one in self.slots[place : place + 2]:
                both.add(one)
            pairs.append(both)
        self.slots, self.slot_s = pairs, 2 * self.slot_s


class Recorder:
    """All that a process has seen."""

    def __init__(self, *, start: float = 0.0, warm_up_s: float = 0.0) -> None:
        """`start` is the time from which all is counted; what is due less than `warm_up_s` after it
        is left out."""
        self._start, self._warm_up_s = start, warm_up_s
        self.tallies: dict[tuple[Kind, int], Tally] = {}
        self.timeline = Timeline()
        self.lateness = Histogram()  # of all requests: when they were sent, after they were due
        self.warm_up = 0
        self.last_due_s = self.last_answer_s = 0.0
        self.leavers: Counter[str] = Counter()
        self.malformed: dict[str, Counter[str]] = {}
        self.wrongly_answered = 0  # malformed ones with another status than the right ones

    # -- request by request --------------------------------------------------------------------

    def note(self, outcome: Outcome) -> None:
        question = outcome.question
        due_s = outcome.due - self._start
        if due_s < self._warm_up_s - 1e-6:  # clocks are not that exact
            self.warm_up += 1
            return
        self.lateness.record(outcome.lateness_s)
        self.last_due_s = max(self.last_due_s, due_s)
        slot = self.timeline.at(due_s)
        slot.due += 1
        status = status_name(outcome.status)
        if question.malformed:
            self.malformed.setdefault(question.malformed, Counter())[status] += 1
            self.wrongly_answered += outcome.status not in question.right_statuses
            return
        if question.leave is not None:
            # Only quick answers find such a client still there, so its latency says nothing.
            self.leavers[status] += 1
            return
        self._count(outcome, slot, status)

    def _count(self, outcome: Outcome, slot: Slot, status: str) -> None:
        key = outcome.question.kind, outcome.target
        tally = self.tallies.get(key)
        if tally is None:
            tally = self.tallies[key] = Tally()
        tally.statuses[status] += 1
        then = self.timeline.at(outcome.done - self._start)
        if outcome.status != 200 or outcome.reply is None:
            then.refused += 1
            return
        latency_s = outcome.latency_s
        tally.latency.record(latency_s)
        tally.service.record(outcome.done - outcome.sent)
        slot.latency.record(latency_s)
        then.answered += 1
        self.last_answer_s = max(self.last_answer_s, outcome.done - self._start)
        self._look_into(outcome, outcome.reply, tally, then)

    def _look_into(self, outcome: Outcome, reply: Reply, tally: Tally, then: Slot) -> None:
        """Where texts left, and what they are said to be."""
        question, head = outcome.question, reply.head
        answers = None
        if question.labels or (question.texts > 1 and question.kind.door.startswith("v2")):
            answers = self._read(question.kind.door, reply, tally)
        texts, layers_run = question.texts, 0.0
        if (layer := exit_layer(reply)) is not None:
            layers_run = layer
            tally.exit_layers[layer] += 1
        elif found := _EXIT_LAYER_MEAN.search(head):
            layers_run = float(found[1]) * texts
            if texts == 1:
                tally.exit_layers[round(float(found[1]))] += 1
            elif answers is not None and len(answers.exit_layers) == texts:
                layers_run = sum(answers.exit_layers)
                tally.exit_layers.update(answers.exit_layers)
        if layers_run:
            tally.texts += texts
            tally.layers_run += layers_run
            then.texts += texts
            then.layers_run += layers_run
        tally.raised += _RAISED.search(head) is not None
        if question.labels and answers is not None:
            tally.graded += len(question.labels)
            pairs = zip(question.labels, answers.labels, strict=False)
            tally.right += sum(one == other for one, other in pairs)

    def _read(self, door: str, reply: Reply, tally: Tally) -> Answers | None:
        try:
            header = reply.header("inference-header-content-length")
            return read(door, reply.body, header)
        except ValueError:
            tally.unreadable += 1
            return None

    # -- put together --------------------------------------------------------------------------

    def add(self, other: "Recorder") -> None:
        """What another process has counted."""
        for key, tally in other.tallies.items():
            self.tallies.setdefault(key, Tally()).add(tally)
        self.timeline.add(other.timeline)
        self.lateness.add(other.lateness)
        self.warm_up += other.warm_up
        self.last_due_s = max(self.last_due_s, other.last_due_s)
        self.last_answer_s = max(self.last_answer_s, other.last_answer_s)
        self.leavers += other.leavers
        for name, statuses in other.malformed.items():
            self.malformed.setdefault(name, Counter()).update(statuses)
        self.wrongly_answered += other.wrongly_answered

    def total(self, chosen: Callable[[Kind, int], bool] | None = None) -> Tally:
        """Of all kinds and targets, or those chosen."""
        total = Tally()
        for (kind, target), tally in self.tallies.items():
            if chosen is None or chosen(kind, target):
                total.add(tally)
        return total

    def to_json(self) -> dict[str, Any]:
        return {
            "tallies": [
                {"kind": list(kind), "target": target, **tally.to_json()}
                for (kind, target), tally in self.tallies.items()
            ],
            "timeline": {
                "slot_s": self.timeline.slot_s,
                "slots": [one.to_json() for one in self.timeline.slots],
            },
            "lateness": self.lateness.sparse(),
            "warm_up": self.warm_up,
            "last_due_s": self.last_due_s,
            "last_answer_s": self.last_answer_s,
            "leavers": dict(self.leavers),
            "malformed": {name: dict(one) for name, one in self.malformed.items()},
            "wrongly_answered": self.wrongly_answered,
        }

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> "Recorder":
        """Raises:
        KeyError, TypeError, ValueError: it is not what `to_json` made.
        """
        recorder = cls()
        for one in found["tallies"]:
            door, controls, texts = one["kind"]
            kind = Kind(str(door), str(controls), int(texts))
            recorder.tallies[kind, int(one["target"])] = Tally.from_json(one)
        timeline = found["timeline"]
        slots = [Slot.from_json(one) for one in timeline["slots"]]
        recorder.timeline = Timeline(timeline["slot_s"], slots)
        recorder.lateness = Histogram.from_sparse(found["lateness"], 3)
        recorder.warm_up = found["warm_up"]
        recorder.last_due_s = found["last_due_s"]
        recorder.last_answer_s = found["last_answer_s"]
        recorder.leavers = Counter(found["leavers"])
        recorder.malformed = {name: Counter(one) for name, one in found["malformed"].items()}
        recorder.wrongly_answered = found["wrongly_answered"]
        return recorder
