"""From a scenario to requests: the texts, the mix of doors, controls, lists and clients, and the
bytes that are sent.

Requests are drawn beforehand, as many as a deck holds, and sent in turn again and again; those of a
trace are made one after the other as it is read. So a run of hours needs no more memory than one of
minutes. It knows nothing of time or connections.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from random import Random
from typing import Annotated, Any, Protocol, TypeVar

from pydantic import Field, NonNegativeFloat, PositiveInt, ValidationError, model_validator

from offramp_loadtest.doors import Body, malformed, needs_model, write
from offramp_loadtest.generator import Planned
from offramp_loadtest.http_client import Address, Leave, post
from offramp_loadtest.question import Kind, Question
from offramp_loadtest.scenario import (
    Controls,
    Door,
    Replay,
    Scenario,
    ScenarioError,
    Strict,
    Texts,
)
from offramp_loadtest.texts import Lengths, Text, make_text, read_rows

DECK = 8192


@dataclass(frozen=True)
class Server:
    """What the servers say of themselves, as far as anybody knows."""

    model: str = ""
    labels: Sequence[str] = ()
    num_layers: int | None = None
    info: Mapping[str, Any] = field(default_factory=dict)


class Maker:
    """Makes one request after the other, as a scenario mixes them."""

    def __init__(
        self, scenario: Scenario, server: Server, random: Random, headers: Sequence[str] = ()
    ) -> None:
        """Raises:
        ScenarioError: a text file cannot be read, or the model's name is needed and not known.
        """
        self._scenario, self._server, self._random = scenario, server, random
        self._addresses: list[Address] = scenario.target.addresses()
        self._headers = tuple(headers)
        self._texts = [_source(one, random) for one in scenario.texts]
        doors: set[str] = {one.door for one in scenario.doors}
        naming = sorted(one for one in doors if needs_model(one))
        if naming and not server.model:
            raise ScenarioError(
                f"target.model: not given, and no server says it; needed by {', '.join(naming)}"
            )
        self._malformed = {one: malformed(one, server.model) for one in doors}

    def draw(self) -> Question:
        """One request of the mix."""
        random, scenario = self._random, self._scenario
        door = _drawn(random, scenario.doors).door
        clients = scenario.clients
        if random.random() < clients.malformed_share:
            return self._malformed_one(door)
        controls, size = _drawn(random, scenario.controls), _drawn(random, scenario.batches).texts
        texts = [next(_drawn(random, self._texts).texts) for _ in range(max(1, size))]
        leave = self._leave() if random.random() < clients.leave_share else None
        return self.make(door, texts, controls, size, leave)

    def text(self, words: int) -> Text:
        return Text(make_text(words, self._random))

    def make(
        self,
        door: str,
        texts: Sequence[Text],
        controls: Controls,
        size: int,
        leave: Leave | None = None,
    ) -> Question:
        """A request with these texts; a `size` of 0 is a single text."""
        given = [one.text for one in texts]
        body = write(door, given, self._server.model, controls.asked(), single=size == 0)
        names = [self._name(one.label) for one in texts]
        labels = tuple(one for one in names if one is not None)
        return Question(
            self._wires(body),
            Kind(door, controls.label(), size),
            labels if len(labels) == len(texts) else (),
            leave,
        )

    def _malformed_one(self, door: str) -> Question:
        one = self._random.choice(self._malformed[door])
        return Question(
            self._wires(one.body),
            Kind(door, "", 0),
            malformed=one.name,
            right_statuses=one.statuses,
        )

    def _leave(self) -> Leave:
        random, clients = self._random, self._scenario.clients
        after_s = random.expovariate(1000 / clients.leave_after_ms)
        sending = random.random() < clients.leave_while_sending_share
        return Leave(after_s, random.random() if sending else 1.0)

    def _name(self, label: str | int | None) -> str | None:
        """A label's name, where numbers have one."""
        if isinstance(label, int):
            names = self._scenario.target.labels or self._server.labels
            return names[label] if 0 <= label < len(names) else None
        return label

    def _wires(self, body: Body) -> tuple[bytes, ...]:
        headers = (*body.headers, *self._headers)
        return tuple(
            post(one, body.path, body.content, *headers, content_type=body.content_type)
            for one in self._addresses
        )


def deck(maker: Maker, size: int = DECK) -> Iterator[Question]:
    """Requests drawn beforehand, in turn, again and again."""
    return cycle([maker.draw() for _ in range(size)])


# -- mixes ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Source:
    share: float
    texts: Iterator[Text]


def _source(given: Texts, random: Random) -> _Source:
    if given.words is not None:
        return _Source(given.share, _made_up(given.words.lengths(), random))
    assert given.file is not None
    try:
        rows = read_rows(Path(given.file))
    except (OSError, ValueError) as error:
        raise ScenarioError(f"texts.file: {error}") from None
    random.shuffle(rows)  # each text as often as any other
    return _Source(given.share, cycle(rows))


def _made_up(lengths: Lengths, random: Random) -> Iterator[Text]:
    while True:
        yield Text(make_text(lengths(random), random))


class _Shared(Protocol):
    @property
    def share(self) -> float: ...


_One = TypeVar("_One", bound=_Shared)


def _drawn(random: Random, mix: Sequence[_One]) -> _One:
    """One of the mix, by their shares."""
    return mix[0] if len(mix) == 1 else random.choices(mix, [one.share for one in mix])[0]


# -- traces --------------------------------------------------------------------------------------


class TraceLine(Strict):
    """A request of a trace: when it came, and a text, texts or the length of a made-up one; what is
    silent is drawn from the scenario."""

    at_s: NonNegativeFloat
    text: str | None = None
    texts: Annotated[list[str], Field(min_length=1)] | None = None
    words: PositiveInt | None = None
    label: str | int | None = None
    door: Door | None = None
    speedup: Annotated[float, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> "TraceLine":
        given = [name for name in ("text", "texts", "words") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("one of text, texts and words is wanted")
        return self


def read_trace(path: Path) -> Iterator[TraceLine]:
    """Line by line.

    Raises:
        ScenarioError: it cannot be read, a line is not what it may be, or comes before the one
            above.
    """
    last = 0.0
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                one = _trace_line(line, f"{path.name}, line {number}")
                if one.at_s < last:
                    raise ScenarioError(
                        f"{path.name}, line {number}: at_s is {one.at_s:g}, {last:g} above it"
                    )
                last = one.at_s
                yield one
    except (OSError, UnicodeDecodeError) as error:
        raise ScenarioError(f"arrivals.file: {error}") from None


def _trace_line(line: str, where: str) -> TraceLine:
    try:
        return TraceLine.model_validate(json.loads(line))
    except json.JSONDecodeError as error:
        raise ScenarioError(f"{where} is not JSON: {error.msg}") from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field_name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ScenarioError(f"{where}: {field_name} {message}".replace(":  ", ": ")) from None


def check_trace(replay: Replay) -> tuple[int, float]:
    """Read a trace once to its end: how many requests there are, and for how many seconds of the
    replay.

    Raises:
        ScenarioError: see `read_trace`; or nothing is in it.
    """
    count, last = 0, 0.0
    for one in read_trace(Path(replay.file)):
        if replay.seconds is not None and one.at_s / replay.speed >= replay.seconds:
            break
        count, last = count + 1, one.at_s / replay.speed
    if not count:
        raise ScenarioError(f"{Path(replay.file).name} holds no request")
    return count, last


def replayed(
    replay: Replay,
    maker: Maker,
    scenario: Scenario,
    random: Random,
    *,
    place: int = 0,
    processes: int = 1,
) -> Iterator[Planned]:
    """A trace's requests, each made when it is drawn; of several processes, the share of one."""
    named: dict[float, Controls] = {}
    for one in islice(read_trace(Path(replay.file)), place, None, processes):
        at = one.at_s / replay.speed
        if replay.seconds is not None and at >= replay.seconds:
            return
        door = one.door or _drawn(random, scenario.doors).door
        if one.speedup is None:
            controls = _drawn(random, scenario.controls)
        else:
            controls = named.setdefault(one.speedup, Controls(speedup=one.speedup))
        if one.texts is not None:
            yield at, maker.make(door, [Text(text) for text in one.texts], controls, len(one.texts))
            continue
        text = maker.text(one.words) if one.words else Text(one.text or "", one.label)
        yield at, maker.make(door, [text], controls, 0)
