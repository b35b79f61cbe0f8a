"""The texts that are still inside: packed tokens and everything that travels with each row.

`ActiveRows` has one way to drop rows, `keep`; whatever is per row lives in it, so nothing can be
forgotten when the batch is compacted. It knows nothing about layers, policies or requests.

A batch as submitted, tokens and settings, is numpy's; once a stack has embedded it, everything of
its rows is in the stack's own library (`arrays.py`) and on its device.

Tokens are packed: all rows' tokens stand one after another, [T, H], without padding, and
`cu_seqlens` says where each row starts. Rows are sorted by length when a batch is packed and
compaction keeps the order, so rows of equal length always form one contiguous run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Self

import numpy as np
from numpy.typing import NDArray

from offramp_model.arrays import Array, indices, is_on_gpu, namespace, on_device_of

MAX_ROWS = 4096
"""Rows of a batch, which is what the kernels take."""


@dataclass(frozen=True, slots=True)
class Encoding:
    """One tokenised text: token ids with specials, and the segment (0 or 1) of each token."""

    ids: list[int]
    type_ids: list[int]

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class TokenBatch:
    """Token ids of several texts, packed in order of length.

    `input_ids`, `type_ids` and `positions` (0-based place of a token in its text) are int64 [T];
    `cu_seqlens` is int32 [n+1]; `order[j]` (int64 [n]) is the submitted index of packed row j.
    """

    input_ids: NDArray[np.int64]
    type_ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]
    order: NDArray[np.int64]

    @property
    def num_rows(self) -> int:
        return len(self.order)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)

    @classmethod
    def pack(cls, encodings: Sequence[Encoding]) -> Self:
        """Pack texts, shortest first; equal lengths keep the order in which they were submitted.

        Raises:
            ValueError: a text has no tokens.
        """
        order = sorted(range(len(encodings)), key=lambda index: len(encodings[index]))
        ids: list[int] = []
        type_ids: list[int] = []
        offsets = [0]
        for index in order:
            encoding = encodings[index]
            if not encoding.ids:
                raise ValueError(f"text {index} has no tokens")
            ids += encoding.ids
            type_ids += encoding.type_ids
            offsets.append(len(ids))
        cu_seqlens = np.array(offsets, np.int32)
        return cls(
            input_ids=np.array(ids, np.int64),
            type_ids=np.array(type_ids, np.int64),
            positions=np.arange(len(ids)) - np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens)),
            cu_seqlens=cu_seqlens,
            order=np.array(order, np.int64),
        )


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of one length: tokens start..stop are [rows, length, H] seen flat."""

    start: int
    rows: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.rows * self.length


@dataclass(slots=True)
class PackedTokens:
    """Hidden states of the rows still inside: `values` [T, H] and `cu_seqlens` int32 [n+1]."""

    values: Array
    cu_seqlens: Array
    _runs: tuple[Run, ...] | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        rows: int = self.cu_seqlens.shape[0] - 1
        return rows

    @property
    def lengths(self) -> Array:
        """Tokens of each row, int32 [n]."""
        return self.cu_seqlens[1:] - self.cu_seqlens[:-1]

    @property
    def runs(self) -> tuple[Run, ...]:
        """Runs of equal length; computed once per compaction (reads the lengths on the host)."""
        if self._runs is None:
            found, start = [], 0
            for length, members in groupby(self.lengths.tolist()):
                run = Run(start, len(list(members)), length)
                found.append(run)
                start = run.stop
            self._runs = tuple(found)
        return self._runs

    def replace(self, values: Array) -> "PackedTokens":
        """The same rows with new hidden states."""
        return PackedTokens(values, self.cu_seqlens, self._runs)

    def keep(self, stays: Array) -> "PackedTokens":
        """Only the rows where `stays` (bool [n]) is true, in the same order; maybe a view."""
        if is_on_gpu(stays):
            return self._keep_on_gpu(stays)
        xp, survivors = namespace(stays), indices(stays)
        starts, lengths = self.cu_seqlens[:-1][survivors], self.lengths[survivors]
        cu_seqlens = xp.zeros(
            (survivors.shape[0] + 1,), dtype=self.cu_seqlens.dtype, **on_device_of(stays)
        )
        cu_seqlens[1:] = xp.cumulative_sum(lengths)
        return PackedTokens(self._tokens(starts, lengths, cu_seqlens), cu_seqlens)

    def _tokens(self, starts: Array, lengths: Array, cu_seqlens: Array) -> Array:
        """The hidden states of texts that begin at `starts`, packed to `cu_seqlens`."""
        if starts.shape[0] == 0:
            return self.values[:0]
        first, last, tokens = int(starts[0]), int(starts[-1] + lengths[-1]), int(cu_seqlens[-1])
        if last - first == tokens:  # nobody left between them: nothing need be copied
            return self.values[first:last]
        # Each token's place of now, and how far its text moves.
        xp = namespace(starts)
        shift = xp.repeat(starts - cu_seqlens[:-1], lengths)
        index = shift + xp.arange(tokens, dtype=starts.dtype, **on_device_of(starts))
        return xp.take(self.values, index, axis=0)

    def _keep_on_gpu(self, stays: Array) -> "PackedTokens":
        """`keep` by the kernels, which wait for the host once."""
        from offramp_kernels import compact_plan, gather_rows

        plan = compact_plan(stays, self.cu_seqlens)
        values = gather_rows(self.values, self.cu_seqlens, plan)
        survivors, _ = plan.read_counts()
        return PackedTokens(values, plan.cu_seqlens[: survivors + 1])

    def append(self, other: "PackedTokens") -> "PackedTokens":
        """These rows, then the others."""
        xp = namespace(self.values)
        starts = other.cu_seqlens[1:] + self.cu_seqlens[-1]
        return PackedTokens(
            xp.concat([self.values, other.values]), xp.concat([self.cu_seqlens, starts])
        )


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What each row of a batch asks for, in submitted order.

    `threshold` float64 [n] in the policy's own units, `min_layer` and `max_layer` int64 [n],
    1-based and inclusive.
    """

    threshold: NDArray[np.float64]
    min_layer: NDArray[np.int64]
    max_layer: NDArray[np.int64]

    @classmethod
    def uniform(
        cls, count: int, threshold: float, *, min_layer: int = 1, max_layer: int
    ) -> "RowSettings":
        """The same settings for every row."""
        return cls(
            threshold=np.full(count, threshold, np.float64),
            min_layer=np.full(count, min_layer, np.int64),
            max_layer=np.full(count, max_layer, np.int64),
        )

    def at(self, order: NDArray[np.int64]) -> "RowSettings":
        """The settings in another order."""
        return RowSettings(self.threshold[order], self.min_layer[order], self.max_layer[order])


@dataclass(slots=True)
class ActiveRows:
    """The rows of a batch that are still carried, with all that belongs to each.

    `alive[j]` is false for a row that has left but was not compacted away yet: its answer is
    latched, whatever is computed for it from then on is ignored.
    """

    hidden: PackedTokens
    row: Array  # int64 [n], index in the batch as submitted
    threshold: Array  # float64 [n]
    min_layer: Array  # int64 [n]
    max_layer: Array  # int64 [n]
    alive: Array  # bool [n]
    state: dict[str, Array]  # the policy's memory, first dimension n

    @property
    def num_rows(self) -> int:
        """Rows carried, alive or not."""
        rows: int = self.row.shape[0]
        return rows

    def keep(self, stays: Array) -> None:
        """Drop every row where `stays` (bool [n]) is false, from everything at once."""
        self.hidden = self.hidden.keep(stays)
        index = indices(stays)
        self.row = self.row[index]
        self.threshold = self.threshold[index]
        self.min_layer = self.min_layer[index]
        self.max_layer = self.max_layer[index]
        self.alive = self.alive[index]
        self.state = {name: values[index] for name, values in self.state.items()}

    def append(self, other: "ActiveRows", offset: int) -> None:
        """Carry another batch's rows as well, which have run as many layers; their `row` counts on
        from `offset`. The order of length is lost: equal lengths may make two runs."""
        concat = namespace(self.row).concat
        self.hidden = self.hidden.append(other.hidden)
        self.row = concat([self.row, other.row + offset])
        self.threshold = concat([self.threshold, other.threshold])
        self.min_layer = concat([self.min_layer, other.min_layer])
        self.max_layer = concat([self.max_layer, other.max_layer])
        self.alive = concat([self.alive, other.alive])
        self.state = {name: concat([own, other.state[name]]) for name, own in self.state.items()}
