"""Exit policies: from an exit's logits and a row's own threshold to "leave" or "stay".

Every policy reduces what it has seen of a row to one scalar, the signal, and compares it with the
row's threshold in the units and direction of its paper. Two rules are common to all and stand in
one place, `_leaves`: the *exit* condition is what is computed, and a NaN signal never leaves.

Arrays are of numpy or torch, whichever the layer loop's stack computes with. A policy knows nothing
about layers to come, compaction, batching or calibration. `min_layer`, `max_layer` and the last
layer are the layer loop's business.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from offramp_model import signals
from offramp_model.arrays import Array, like, namespace, on_device_of
from offramp_model.config import MultiExitConfig, PolicyOptions, ProblemType
from offramp_model.labels import Reading, label_set, most_probable
from offramp_model.rows import ActiveRows

Direction = Literal["below", "above", "at_least"]


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """What an exit says about each row: `logits` [n, C], and where the model has gates, the
    gate's probability to leave here, `gate` [n]."""

    logits: Array
    gate: Array | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """Per row: `leaving` bool [n], `label` int64 [n], and the compared `signal` [n]. A label is
    what `labels.py` reads in the logits: a class, or a set of labels as bits."""

    leaving: Array
    label: Array
    signal: Array


class ExitPolicy(Protocol):
    """Decides at each exit which rows are sure enough to leave."""

    @property
    def name(self) -> str: ...

    @property
    def direction(self) -> Direction:
        """How a signal is compared: it leaves when `<` (below), `>` (above), `>=` (at_least)."""
        ...

    def initial_state(self, count: int, num_labels: int, beside: Array) -> dict[str, Array]:
        """The policy's memory for `count` new rows, in the library and on the device of `beside`;
        every array's first dimension is `count`."""
        ...

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        """Compare at one exit, and bring `rows.state` up to date."""
        ...


def never(policy: ExitPolicy) -> float:
    """The threshold with which no row leaves early: -inf for `below`, else +inf."""
    return -math.inf if policy.direction == "below" else math.inf


def _leaves(signal: Array, threshold: Array, direction: Direction) -> Array:
    """The exit condition, in the signal's own dtype (0.9 in float32 is below 0.9 in float64).

    Comparisons with NaN are false, so a NaN signal stays; "stay" is never what is computed.
    """
    limit = namespace(signal).astype(threshold, signal.dtype, copy=False)
    if direction == "below":
        return signal < limit
    if direction == "above":
        return signal > limit
    return signal >= limit


def _broken(logits: Array) -> Array:
    """Rows that hold a NaN, bool [n]."""
    xp = namespace(logits)
    return xp.any(xp.isnan(logits), axis=-1)


class _Memoryless:
    """A policy that looks at one exit at a time."""

    __slots__ = ()

    def initial_state(self, count: int, num_labels: int, beside: Array) -> dict[str, Array]:
        return {}


@dataclass(frozen=True, slots=True)
class FullDepthPolicy(_Memoryless):
    """Never early. The signal is that of `confidence`, for information only."""

    name: str = "full_depth"
    direction: Direction = "above"
    signal: Callable[[Array], Array] = signals.max_probability
    label: Reading = most_probable

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        signal = self.signal(head.logits)
        xp = namespace(signal)
        stays = xp.zeros_like(signal, dtype=xp.bool)
        return Decision(stays, self.label(head.logits), signal)


@dataclass(frozen=True, slots=True)
class FixedLayerPolicy(_Memoryless):
    """Leave at the first exit at or after layer `threshold`: the truncated model."""

    name: str = "fixed_layer"
    direction: Direction = "at_least"
    label: Reading = most_probable

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        signal = namespace(rows.threshold).full_like(rows.threshold, float(exit_layer))
        leaving = _leaves(signal, rows.threshold, self.direction)
        return Decision(leaving, self.label(head.logits), signal)


@dataclass(frozen=True, slots=True)
class SignalPolicy(_Memoryless):
    """Leave when a function of this exit's logits crosses the threshold; no memory.

    Strict on both sides: a tie stays (COSEE and ConsistentEE; papers' pages).
    """

    name: str
    direction: Direction
    signal: Callable[[Array], Array]
    label: Reading = most_probable

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        signal = self.signal(head.logits)
        leaving = _leaves(signal, rows.threshold, self.direction)
        return Decision(leaving, self.label(head.logits), signal)


@dataclass(frozen=True, slots=True)
class PatiencePolicy:
    """Leave after `threshold` exits in a row that agree with the one before them (PABEE).

    The count starts at 0 and falls back to 0 when the label changes, so a row cannot leave
    before exit `threshold + 1`. An exit with NaN logits agrees with nothing and cannot be left
    at: its signal is NaN. Label sets agree when they are the same.
    """

    name: str = "patience"
    direction: Direction = "at_least"
    label: Reading = most_probable

    def initial_state(self, count: int, num_labels: int, beside: Array) -> dict[str, Array]:
        xp, there = namespace(beside), on_device_of(beside)
        return {
            "last_label": xp.full((count,), -1, dtype=xp.int64, **there),
            "agreeing": xp.zeros((count,), dtype=xp.float32, **there),
        }

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        xp, label, broken = namespace(head.logits), self.label(head.logits), _broken(head.logits)
        agrees = (label == rows.state["last_label"]) & ~broken
        agreeing = xp.where(agrees, rows.state["agreeing"] + 1, 0.0)
        rows.state = {"last_label": xp.where(broken, -1, label), "agreeing": agreeing}
        signal = xp.where(broken, xp.nan, agreeing)
        return Decision(_leaves(signal, rows.threshold, self.direction), label, signal)


@dataclass(frozen=True, slots=True)
class VotePolicy:
    """Leave when the most voted class has `votes / l^p >= threshold` after l exits (ensemble).

    Every exit votes for its arg-max. A tie between classes goes to the class just voted for, if
    it is one of them, else to the smallest label id. The label is the winner's; a row that runs
    to the end takes the last exit's own label, or with `fallback="majority"` the most voted one,
    ties to the label that was voted for latest (ensemble page, section 5).

    Votes are divided by l^p in float64, the same expression in calibration and in serving, so
    that equality with a calibrated threshold is exact.
    """

    exponent: float = 0.75
    fallback: Literal["last", "majority"] = "last"
    name: str = "vote"
    direction: Direction = "at_least"

    def __post_init__(self) -> None:
        if not 0.0 <= self.exponent < 1.0:
            raise ValueError(f"the vote exponent must lie in [0, 1), got {self.exponent}")

    def initial_state(self, count: int, num_labels: int, beside: Array) -> dict[str, Array]:
        xp, there = namespace(beside), on_device_of(beside)
        return {
            "votes": xp.zeros((count, num_labels), dtype=xp.int64, **there),
            # At which exit each class was voted for last, for ties of the majority fallback.
            "voted_at": xp.zeros((count, num_labels), dtype=xp.int64, **there),
            "exits_seen": xp.zeros((count,), dtype=xp.int64, **there),
        }

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        xp, own, broken = namespace(head.logits), most_probable(head.logits), _broken(head.logits)
        seen = rows.state["exits_seen"] + 1
        classes = xp.arange(head.logits.shape[-1], dtype=xp.int64, **on_device_of(own))
        is_own = classes == own[:, None]
        ballot = is_own & ~broken[:, None]
        votes = rows.state["votes"] + xp.astype(ballot, xp.int64)
        voted_at = xp.where(ballot, seen[:, None], rows.state["voted_at"])
        rows.state = {"votes": votes, "voted_at": voted_at, "exits_seen": seen}

        most = xp.max(votes, axis=-1)
        tied = votes == most[:, None]
        own_wins = xp.any(tied & is_own, axis=-1)
        winner = xp.where(own_wins, own, xp.argmax(votes, axis=-1))
        signal = xp.astype(most, xp.float64) / self._divisor(seen, exit_layer)
        signal = xp.where(broken, xp.nan, signal)
        leaving = _leaves(signal, rows.threshold, self.direction)
        latest = xp.argmax(xp.where(tied, voted_at, -1), axis=-1)
        at_end = latest if self.fallback == "majority" else own
        return Decision(leaving, xp.where(leaving, winner, at_end), signal)

    def _divisor(self, seen: Array, exit_layer: int) -> Array:
        """l^p of each row, by Python's own power: libraries' powers differ in the last bit. There
        are no more exits than layers."""
        powers = [0.0, *(float(exits) ** self.exponent for exits in range(1, exit_layer + 1))]
        return like(seen, powers, "float64")[seen]


@dataclass(frozen=True, slots=True)
class GatePolicy(_Memoryless):
    """Leave when the learned gate says so with more than `threshold` (ConsistentEE).

    Strict: a tie stays. The gates are trained for a threshold of 0.5; any other is an extension.
    A row whose logits hold NaN does not leave, whatever its gate says.
    """

    name: str = "gate"
    direction: Direction = "above"

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        if head.gate is None:
            raise ValueError("exit policy 'gate' needs gates, and this model has none")
        xp = namespace(head.logits)
        signal = xp.where(_broken(head.logits), xp.nan, head.gate)
        leaving = _leaves(signal, rows.threshold, self.direction)
        return Decision(leaving, most_probable(head.logits), signal)


def _signal_policy(
    name: str,
    direction: Direction,
    signal: Callable[..., Array],
    label: Reading = most_probable,
) -> Callable[[PolicyOptions], ExitPolicy]:
    def make(options: PolicyOptions) -> ExitPolicy:
        at_temperature = partial(signal, temperature=options.temperature)
        return SignalPolicy(name, direction, at_temperature, label)

    return make


POLICIES: dict[str, Callable[[PolicyOptions], ExitPolicy]] = {
    "full_depth": lambda _: FullDepthPolicy(),
    "fixed_layer": lambda _: FixedLayerPolicy(),
    "confidence": _signal_policy("confidence", "above", signals.max_probability),
    "margin": _signal_policy("margin", "above", signals.margin),
    "entropy": _signal_policy("entropy", "below", signals.normalised_entropy),
    "energy": _signal_policy("energy", "below", signals.energy),
    "patience": lambda _: PatiencePolicy(),
    "vote": lambda options: VotePolicy(options.vote_exponent, options.vote_fallback),
    "gate": lambda _: GatePolicy(),
}
"""For one label a text; they know of all policies there are."""

LABEL_SET_POLICIES: dict[str, Callable[[PolicyOptions], ExitPolicy]] = {
    "full_depth": lambda _: FullDepthPolicy(signal=signals.least_certain, label=label_set),
    "fixed_layer": lambda _: FixedLayerPolicy(label=label_set),
    "confidence": _signal_policy("confidence", "above", signals.least_certain, label_set),
    "margin": _signal_policy("margin", "above", signals.least_margin, label_set),
    "entropy": _signal_policy("entropy", "below", signals.mean_binary_entropy, label_set),
    "patience": lambda _: PatiencePolicy(label=label_set),
}
"""For sets of labels, under the same names and with the same directions."""


def make_policy(
    name: str,
    options: PolicyOptions | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> ExitPolicy:
    """The exit policy of that name; a model's own is that of `make_supported_policy`.

    Raises:
        ValueError: there is none; the message lists those there are.
    """
    is_multi_label = problem_type == "multi_label_classification"
    table = LABEL_SET_POLICIES if is_multi_label else POLICIES
    try:
        return table[name](options or PolicyOptions())
    except KeyError:
        raise ValueError(f"unknown exit policy {name!r}; known: {', '.join(table)}") from None


def supported_policies(config: MultiExitConfig) -> tuple[str, ...]:
    """The policies whose inputs a model has: `gate` needs gates, the others only logits; and of
    multi-label models those that mean something for a set of labels."""
    if config.is_multi_label:
        return tuple(LABEL_SET_POLICIES)
    return tuple(name for name in POLICIES if name != "gate" or config.has_gates)


def why_unsupported(name: str, config: MultiExitConfig) -> str | None:
    """What keeps a model from a known policy, and those that it supports; None: nothing does."""
    supported = supported_policies(config)
    if name in supported:
        return None
    reason = (
        "is for one label a text, and this checkpoint is multi-label"
        if config.is_multi_label
        else "needs gates, and this checkpoint has none"
    )
    return f"exit policy {name!r} {reason}; it supports: {', '.join(supported)}"


def make_supported_policy(name: str, config: MultiExitConfig) -> ExitPolicy:
    """The exit policy of that name with the model's options.

    Raises:
        ValueError: there is none, or the model lacks what it looks at; the message lists those
            that the model supports.
    """
    if name in POLICIES and (reason := why_unsupported(name, config)):
        raise ValueError(reason)
    return make_policy(name, config.policies, config.problem_type)


def threshold_range(policy: ExitPolicy, config: MultiExitConfig) -> tuple[float, float]:
    """Smallest and largest threshold that mean anything for this policy and model, inclusive."""
    if policy.name == "fixed_layer":
        return 1.0, float(config.num_layers)
    if policy.name == "patience":
        return 0.0, float(config.num_exits)
    if policy.name == "vote":
        return 0.0, float(config.num_exits)
    return 0.0, 1.0
