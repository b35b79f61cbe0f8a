"""The heart: run a batch layer by layer and let each row leave at the first exit that is sure.

Everything that answers from a checkpoint drives this one loop: the service, evaluation and the
tests. It knows nothing of weights, devices, requests, futures or time, nor of which library
computes (`arrays.py`); it sees a stack of segments, rows, and a policy.

Deciding and compacting are separate. A decision latches a row's answer at the exit where it was
made; compaction only stops carrying rows that already left, and no schedule of it can change an
answer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from offramp_model.arrays import Array, indices, like, namespace
from offramp_model.config import ProblemType
from offramp_model.policies import Decision, ExitPolicy, HeadOutput
from offramp_model.rows import ActiveRows, PackedTokens, RowSettings, TokenBatch


class LayerStack(Protocol):
    """An encoder cut at its exits."""

    @property
    def num_layers(self) -> int: ...

    @property
    def num_labels(self) -> int: ...

    @property
    def problem_type(self) -> ProblemType: ...

    @property
    def exit_layers(self) -> tuple[int, ...]:
        """1-based layers after which there is an exit head; the last is `num_layers`."""
        ...

    def embed(self, batch: TokenBatch) -> PackedTokens: ...

    def segment(self, exit_layer: int, hidden: PackedTokens) -> PackedTokens:
        """Run the layers after the previous exit, up to and with `exit_layer`."""
        ...

    def exit_head(self, exit_layer: int, hidden: PackedTokens) -> HeadOutput: ...


@dataclass(frozen=True, slots=True)
class Leavers:
    """The rows that left at one exit, maybe none, and how many ran to get there.

    `row` int64 [k] indexes the batch as submitted; `label` int64 [k]; `logits` float32 [k, C];
    `signal` [k]. `by_policy` bool [k] is false where the row was forced out by `max_layer` or by
    the end of the model. `rows_run` counts the live rows that ran the segment up to this exit.
    """

    exit_layer: int
    row: Array
    label: Array
    logits: Array
    signal: Array
    by_policy: Array
    rows_run: int


Compaction = Callable[[int, int, int], bool]
"""(exit_layer, rows alive, rows carried) → compact now?"""

Abandoned = Callable[[Array], Array]
"""Submitted indices of live rows, int64 [n] → bool [n]: nobody waits for this answer any more."""


def every_exit(exit_layer: int, alive: int, carried: int) -> bool:
    """Compact whenever somebody left: right on CPU, where cost is linear in tokens."""
    return alive < carried


def start_rows(
    stack: LayerStack, batch: TokenBatch, policy: ExitPolicy, settings: RowSettings
) -> ActiveRows:
    """Embed a batch and give every row its settings (in submitted order) and a fresh state, where
    and as what the stack keeps its hidden states."""
    settings = settings.at(batch.order)
    hidden = stack.embed(batch)
    there = hidden.cu_seqlens
    return ActiveRows(
        hidden=hidden,
        row=like(there, batch.order, "int64"),
        threshold=like(there, settings.threshold, "float64"),
        min_layer=like(there, settings.min_layer, "int64"),
        max_layer=like(there, settings.max_layer, "int64"),
        alive=like(there, [True] * batch.num_rows, "bool"),
        state=policy.initial_state(batch.num_rows, stack.num_labels, there),
    )


def layer_loop(
    stack: LayerStack,
    rows: ActiveRows,
    policy: ExitPolicy,
    *,
    compact: Compaction = every_exit,
    abandoned: Abandoned | None = None,
) -> Iterator[Leavers]:
    """Run `rows` through `stack`; at each exit, yield the rows that leave there (maybe none).

    Every row is yielded exactly once, except those that `abandoned` gives up. The loop ends as
    soon as nobody is left. `rows` is consumed; between two turns rows of another batch that has
    come to the same exit may be appended to it.
    """
    for exit_layer in stack.exit_layers:
        if abandoned is not None:
            rows.alive = rows.alive & ~abandoned(rows.row)
        # Here, and only here, the host learns how many rows are left.
        alive = int(namespace(rows.alive).count_nonzero(rows.alive))
        if alive == 0:
            return
        if compact(exit_layer, alive, rows.num_rows) and alive < rows.num_rows:
            rows.keep(rows.alive)
        rows.hidden = stack.segment(exit_layer, rows.hidden)
        head = stack.exit_head(exit_layer, rows.hidden)
        decision = policy.decide(exit_layer, head, rows)
        sure = decision.leaving & (rows.min_layer <= exit_layer)
        if exit_layer == stack.num_layers:
            leaving = rows.alive
        else:
            leaving = rows.alive & (sure | (rows.max_layer <= exit_layer))
        rows.alive = rows.alive & ~leaving
        yield _leavers(exit_layer, leaving, sure, head, decision, rows, alive)


def _leavers(
    exit_layer: int,
    leaving: Array,
    sure: Array,
    head: HeadOutput,
    decision: Decision,
    rows: ActiveRows,
    rows_run: int,
) -> Leavers:
    xp, index = namespace(leaving), indices(leaving)
    return Leavers(
        exit_layer=exit_layer,
        row=rows.row[index],
        label=decision.label[index],
        logits=xp.astype(head.logits[index], xp.float32, copy=False),
        signal=decision.signal[index],
        by_policy=sure[index],
        rows_run=rows_run,
    )
