"""Scenarios: what load is, as a TOML file, checked in every field before anything is sent.

Numbers and names only; it opens no connection and reads no text.
"""

import math
import os
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from offramp_loadtest import arrivals
from offramp_loadtest.doors import DOORS
from offramp_loadtest.http_client import Address
from offramp_loadtest.texts import Lengths, always, lognormal, uniform

SHIPPED = Path(__file__).parent / "scenarios"

Share = Annotated[float, Field(ge=0, le=1)]
Weight = PositiveFloat
Door = Literal["vllm", "tei", "v2", "v2-binary", "v1"]
Pattern = Literal["constant", "poisson", "bursty"]

_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+: *[\x20-\x7e]*")


class ScenarioError(ValueError):
    """A scenario that cannot be run; says which fields, what was given and what is allowed."""


class Strict(BaseModel):
    """A table of a scenario: no field that is not known, no string for a number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known(cls, given: object) -> object:
        unknown = sorted(set(given) - set(cls.model_fields)) if isinstance(given, dict) else []
        if unknown:
            raise ValueError(
                f"unknown: {', '.join(map(str, unknown))}; allowed: {', '.join(cls.model_fields)}"
            )
        return given


# -- when ----------------------------------------------------------------------------------------


class Flat(Strict):
    """One rate all the time."""

    pattern: Pattern
    rate: PositiveFloat
    seconds: PositiveFloat

    def due(self, random: Random) -> Iterator[float]:
        return arrivals.PATTERNS[self.pattern](self.rate, self.seconds, random)


class Step(Strict):
    rate: NonNegativeFloat
    seconds: PositiveFloat


class Steps(Strict):
    """One rate after the other."""

    pattern: Literal["step"]
    steps: Annotated[list[Step], Field(min_length=1)]
    spread: Literal["poisson", "constant"] = "poisson"

    @property
    def seconds(self) -> float:
        return sum(one.seconds for one in self.steps)

    def due(self, random: Random) -> Iterator[float]:
        phases = [arrivals.Phase(one.seconds, one.rate, one.rate) for one in self.steps]
        return arrivals.along(phases, _SPREADS[self.spread], random)


class Ramp(Strict):
    """From one rate to another, and then on at that."""

    pattern: Literal["ramp"]
    from_rate: NonNegativeFloat
    to_rate: NonNegativeFloat
    ramp_s: PositiveFloat
    hold_s: NonNegativeFloat = 0.0
    spread: Literal["poisson", "constant"] = "poisson"

    @property
    def seconds(self) -> float:
        return self.ramp_s + self.hold_s

    def due(self, random: Random) -> Iterator[float]:
        phases = [arrivals.Phase(self.ramp_s, self.from_rate, self.to_rate)]
        if self.hold_s:
            phases.append(arrivals.Phase(self.hold_s, self.to_rate, self.to_rate))
        return arrivals.along(phases, _SPREADS[self.spread], random)


class Replay(Strict):
    """As in a trace, so many times as fast; `seconds` of the replay at most."""

    pattern: Literal["replay"]
    file: str
    speed: PositiveFloat = 1.0
    seconds: PositiveFloat | None = None


class Closed(Strict):
    """So many requests in flight at all times: how much a server can do, and nothing about how long
    its clients wait."""

    pattern: Literal["closed"]
    in_flight: PositiveInt
    seconds: PositiveFloat


_SPREADS = {"poisson": arrivals.by_chance, "constant": arrivals.regular}

Arrivals = Annotated[Flat | Steps | Ramp | Replay | Closed, Field(discriminator="pattern")]


# -- what ----------------------------------------------------------------------------------------


class Words(Strict):
    """How long made-up texts are, in words."""

    distribution: Literal["always", "uniform", "lognormal"]
    words: PositiveInt | None = None
    least: PositiveInt | None = None
    most: PositiveInt | None = None
    median: PositiveFloat | None = None
    p95: PositiveFloat | None = None

    @model_validator(mode="after")
    def _complete(self) -> Self:
        wanted = {
            "always": {"words"},
            "uniform": {"least", "most"},
            "lognormal": {"median", "p95", "most"},
        }[self.distribution]
        given = self.model_fields_set - {"distribution"}
        if given != wanted:
            raise ValueError(f"{self.distribution} has the fields {', '.join(sorted(wanted))}")
        if self.least is not None and self.most is not None and self.least > self.most:
            raise ValueError(f"least is {self.least}, more than most, {self.most}")
        if self.median is not None and self.p95 is not None and self.p95 < self.median:
            raise ValueError(f"p95 is {self.p95:g}, less than the median, {self.median:g}")
        return self

    def lengths(self) -> Lengths:
        if self.words is not None:
            return always(self.words)
        assert self.most is not None
        if self.least is not None:
            return uniform(self.least, self.most)
        assert self.median is not None
        assert self.p95 is not None
        return lognormal(self.median, self.p95, self.most)


class Texts(Strict):
    """Where a share of the texts comes from: a file, or made up."""

    share: Weight = 1.0
    file: str | None = None
    words: Words | None = None

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if (self.file is None) == (self.words is None):
            raise ValueError("texts have a file or a table words, one of them")
        return self


class Batch(Strict):
    """How many texts are in a share of the requests; 0: a single text, not in a list."""

    share: Weight = 1.0
    texts: NonNegativeInt


class DoorShare(Strict):
    share: Weight = 1.0
    door: Door


class Controls(Strict):
    """What a share of the requests asks for, on every door by the same names."""

    share: Weight = 1.0
    name: Annotated[str, Field(min_length=1, max_length=60)] | None = None
    speedup: Annotated[float, Field(ge=1)] | None = None
    threshold: float | None = None
    max_accuracy_drop: Share | None = None
    min_layer: PositiveInt | None = None
    max_layer: PositiveInt | None = None
    deadline_ms: PositiveInt | None = None
    priority: int | None = None
    top_k: PositiveInt | None = None
    return_details: bool | None = None
    truncate: bool | None = None

    def asked(self) -> dict[str, Any]:
        """What is sent."""
        return self.model_dump(exclude={"share", "name"}, exclude_none=True)

    def label(self) -> str:
        """As reports call them: what is asked for but for truncation, which changes nothing."""
        asked = {name: value for name, value in self.asked().items() if name != "truncate"}
        words = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in asked.items()
        ]
        return self.name or ", ".join(words) or "default"


class Clients(Strict):
    """What else clients do."""

    leave_share: Share = 0.0
    leave_after_ms: PositiveFloat = 20.0
    """Mean of an exponential distribution, from when the request was sent."""
    leave_while_sending_share: Share = 0.3
    """Of those that leave: those that have sent only a part of their request."""
    malformed_share: Share = 0.0


# -- to whom, and how well -----------------------------------------------------------------------


class Target(Strict):
    """The servers and the connections to them."""

    urls: Annotated[list[str], Field(min_length=1)] = ["http://127.0.0.1:3000"]
    balance: Literal["round-robin", "least-outstanding"] = "round-robin"
    model: str | None = None
    """Default: what the first server says at /info."""
    labels: list[str] | None = None
    """Names of labels that texts have as numbers. Default: as at /info."""
    api_key_env: str | None = None
    """Name of the environment variable that holds the API key."""
    headers: list[str] = []
    max_connections: PositiveInt = 512
    patience_s: PositiveFloat = 60.0
    ca_file: str | None = None

    @model_validator(mode="after")
    def _sendable(self) -> Self:
        self.addresses()
        for one in self.headers:
            if not _HEADER.fullmatch(one):
                raise ValueError(f"header {one!r} is not NAME: VALUE in printable ASCII")
        if len(self.urls) > self.max_connections:
            raise ValueError(
                f"{len(self.urls)} urls need more than {self.max_connections} connections"
            )
        return self

    def addresses(self) -> list[Address]:
        return [parse_url(one) for one in self.urls]

    def api_key(self, environment: Mapping[str, str]) -> str | None:
        """Raises:
        ScenarioError: the variable is not set.
        """
        if self.api_key_env is None:
            return None
        if not (key := environment.get(self.api_key_env)):
            raise ScenarioError(f"target.api_key_env: {self.api_key_env} is not set")
        return key


def parse_url(url: str) -> Address:
    """Of `http://host:port/prefix`, or `host:port`.

    Raises:
        ValueError: it is neither.
    """
    parts = urlsplit(url if "//" in url else f"http://{url}")
    try:
        port = parts.port
    except ValueError:
        port = -1
    fine = parts.scheme in ("http", "https") and parts.hostname and port != -1
    if not fine or parts.query or parts.fragment or parts.username:
        raise ValueError(
            f"{url!r} is no target; allowed is http[s]://host[:port][/prefix] or host:port"
        )
    assert parts.hostname
    tls = parts.scheme == "https"
    return Address(parts.hostname, port or (443 if tls else 80), tls, parts.path.rstrip("/"))


class Slo(Strict):
    """What must hold, or the exit code says so. Latencies are of requests answered with 200, from
    when they were due."""

    p50_ms: PositiveFloat | None = None
    p90_ms: PositiveFloat | None = None
    p95_ms: PositiveFloat | None = None
    p99_ms: PositiveFloat | None = None
    p999_ms: PositiveFloat | None = None
    error_share: Share | None = None
    """At most: of the well-formed requests, those that got no 200."""
    rate: PositiveFloat | None = None
    """At least: requests answered with 200 a second."""
    rate_share: Share | None = None
    """At least: that rate, as a share of the rate at which they were due."""
    accuracy: Share | None = None
    """At least: of the texts whose labels are known."""
    speedup: Annotated[float, Field(ge=1)] | None = None
    """At least: achieved over all texts, in layers."""


class Scenario(Strict):
    """A whole run."""

    name: Annotated[str, Field(pattern=r"^[\w.-]{1,60}$")]
    description: str = ""
    seed: NonNegativeInt = 0
    warm_up_s: NonNegativeFloat = 0.0
    """At the start, and in no figure."""
    processes: PositiveInt = 1
    arrivals: Arrivals
    texts: Annotated[list[Texts], Field(min_length=1)]
    batches: Annotated[list[Batch], Field(min_length=1)] = [Batch(texts=0)]
    doors: Annotated[list[DoorShare], Field(min_length=1)] = [DoorShare(door="vllm")]
    controls: Annotated[list[Controls], Field(min_length=1)] = [Controls()]
    clients: Clients = Clients()
    target: Target = Target()
    slo: Slo = Slo()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        seconds = self.arrivals.seconds
        if seconds is not None and self.warm_up_s >= seconds:
            raise ValueError(f"warm_up_s is {self.warm_up_s:g}, all of the {seconds:g} seconds")
        if isinstance(self.arrivals, Steps | Ramp):
            next(self.arrivals.due(Random(0)), None)  # refuses rates that are 0 all the time
        if (
            isinstance(self.arrivals, Closed)
            and self.arrivals.in_flight > self.target.max_connections
        ):
            raise ValueError(
                f"in_flight is {self.arrivals.in_flight}, more than max_connections, "
                f"{self.target.max_connections}"
            )
        labels = [one.label() for one in self.controls]
        if repeated := {one for one in labels if labels.count(one) > 1}:
            raise ValueError(f"controls of the same name: {', '.join(sorted(repeated))}")
        return self


# -- files, and what flags change in them --------------------------------------------------------


def shipped() -> dict[str, Path]:
    """The scenarios that come with the repository, by name."""
    return {path.stem: path for path in sorted(SHIPPED.glob("*.toml"))}


def find(name: str) -> Path:
    """A file, or a shipped scenario by its name.

    Raises:
        ScenarioError: there is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    known = shipped()
    if name in known:
        return known[name]
    raise ScenarioError(f"{name} is neither a file nor one of {', '.join(known)}")


def read_table(path: Path) -> dict[str, Any]:
    """A scenario file as it stands; files that it names are seen from its own directory.

    Raises:
        ScenarioError: it is not TOML.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ScenarioError(f"{path.name}: {error}") from None
    table.setdefault("name", path.stem)
    for part in [table.get("arrivals"), table.get("target"), *_tables(table.get("texts"))]:
        for key in ("file", "ca_file"):
            if isinstance(part, dict) and isinstance(part.get(key), str):
                part[key] = os.path.normpath(path.parent / part[key])
    return table


def _tables(given: object) -> list[Any]:
    return given if isinstance(given, list) else []


def make_scenario(table: Mapping[str, Any]) -> Scenario:
    """Raises:
    ScenarioError: names every field that is not what it may be.
    """
    try:
        return Scenario.model_validate(dict(table))
    except ValidationError as error:
        raise ScenarioError("\n".join(_complaints(error))) from None


def _complaints(error: ValidationError) -> Iterator[str]:
    for one in error.errors(include_url=False):
        where = ".".join(str(part) for part in one["loc"]) or "scenario"
        what = one["msg"].removeprefix("Value error, ")
        given = one["input"]
        shown = "" if isinstance(given, dict | list) else f"{given!r} given: "
        yield f"{where}: {shown}{what[:1].lower()}{what[1:]}"


def change(table: dict[str, Any], key: str, value: object) -> None:
    """Set `arrivals.rate` or `texts.0.file` and the like.

    Raises:
        ScenarioError: the way there leads through something that is no table.
    """
    *steps, last = key.split(".")
    place: Any = table
    for step in steps:
        is_list = isinstance(place, list)
        place = _item(place, step, key) if is_list else place.setdefault(step, {})
        if not isinstance(place, dict | list):
            raise ScenarioError(f"{key}: {step} is no table")
    if isinstance(place, list):
        _item(place, last, key)
        place[int(last)] = value
    else:
        place[last] = value


def _item(items: Sequence[Any], step: str, key: str) -> Any:
    if not step.isdecimal() or int(step) >= len(items):
        raise ScenarioError(f"{key}: {step} is none of 0 to {len(items) - 1}")
    return items[int(step)]


def scale(table: dict[str, Any], factor: float) -> None:
    """All rates times a factor."""
    if not 0 < factor < math.inf:
        raise ScenarioError(f"scale is {factor:g}, allowed is more than 0")
    when = table.get("arrivals", {})
    for part in [when, *_tables(when.get("steps"))]:
        for key in ("rate", "from_rate", "to_rate", "speed"):
            if key in part:
                part[key] = part[key] * factor
    if when.get("pattern") == "replay":
        when.setdefault("speed", factor)


assert set(DOORS) == set(Door.__args__)  # type: ignore[attr-defined]
