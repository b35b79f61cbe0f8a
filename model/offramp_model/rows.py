"""The texts that are still inside: packed tokens and everything that travels with each row.

`ActiveRows` has one way to drop rows, `keep`; whatever is per row lives in it, so nothing can be
forgotten when the batch is compacted. It knows nothing about layers, policies or requests.

Tokens are packed: all rows' tokens stand one after another, [T, H], without padding, and
`cu_seqlens` says where each row starts. Rows are sorted by length when a batch is packed and
compaction keeps the order, so rows of equal length always form one contiguous run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from offramp_kernels import compact_plan, gather_rows


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

    input_ids: Tensor
    type_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    order: Tensor

    @property
    def num_rows(self) -> int:
        return self.order.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.shape[0]

    @classmethod
    def pack(
        cls, encodings: Sequence[Encoding], device: torch.device | str = "cpu"
    ) -> "TokenBatch":
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

        starts = np.repeat(offsets[:-1], np.diff(offsets))

        def tensor(values: ArrayLike, dtype: type[np.integer[Any]] = np.int64) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype)).to(device)

        return cls(
            input_ids=tensor(ids),
            type_ids=tensor(type_ids),
            positions=tensor(np.arange(len(ids)) - starts),
            cu_seqlens=tensor(offsets, np.int32),
            order=tensor(order),
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

    values: Tensor
    cu_seqlens: Tensor
    _runs: tuple[Run, ...] | None = field(default=None, repr=False)

    @property
    def num_rows(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def lengths(self) -> Tensor:
        """Tokens of each row, int32 [n]."""
        return self.cu_seqlens.diff()

    @property
    def runs(self) -> tuple[Run, ...]:
        """Runs of equal length; computed once per compaction (reads the lengths on the host)."""
        if self._runs is None:
            found, start = [], 0
            for length, members in groupby(self.lengths.tolist()):
                run = Run(start, sum(1 for _ in members), length)
                found.append(run)
                start = run.stop
            self._runs = tuple(found)
        return self._runs

    def replace(self, values: Tensor) -> "PackedTokens":
        """The same rows with new hidden states."""
        return PackedTokens(values, self.cu_seqlens, self._runs)

    def keep(self, stays: Tensor) -> "PackedTokens":
        """Only the rows where `stays` (bool [n]) is true, in the same order."""
        plan = compact_plan(stays, self.cu_seqlens)
        values = gather_rows(self.values, self.cu_seqlens, plan)
        # The one place where the survivor count is read on the host.
        survivors, _ = plan.read_counts()
        return PackedTokens(values, plan.cu_seqlens[: survivors + 1])

    def append(self, other: "PackedTokens") -> "PackedTokens":
        """These rows, then the others."""
        starts = other.cu_seqlens[1:] + self.cu_seqlens[-1]
        return PackedTokens(
            torch.cat([self.values, other.values]), torch.cat([self.cu_seqlens, starts])
        )


@dataclass(frozen=True, slots=True)
class RowSettings:
    """What each row of a batch asks for, in submitted order.

    `threshold` float64 [n] in the policy's own units, `min_layer` and `max_layer` int64 [n],
    1-based and inclusive.
    """

    threshold: Tensor
    min_layer: Tensor
    max_layer: Tensor

    @classmethod
    def uniform(
        cls, count: int, threshold: float, *, min_layer: int = 1, max_layer: int
    ) -> "RowSettings":
        """The same settings for every row."""
        return cls(
            threshold=torch.full((count,), threshold, dtype=torch.float64),
            min_layer=torch.full((count,), min_layer, dtype=torch.int64),
            max_layer=torch.full((count,), max_layer, dtype=torch.int64),
        )

    def at(self, order: Tensor) -> "RowSettings":
        """The settings in another order, on the device of `order`."""
        return RowSettings(
            threshold=self.threshold.to(order.device)[order],
            min_layer=self.min_layer.to(order.device)[order],
            max_layer=self.max_layer.to(order.device)[order],
        )


@dataclass(slots=True)
class ActiveRows:
    """The rows of a batch that are still carried, with all that belongs to each.

    `alive[j]` is false for a row that has left but was not compacted away yet: its answer is
    latched, whatever is computed for it from then on is ignored.
    """

    hidden: PackedTokens
    row: Tensor  # int64 [n], index in the batch as submitted
    threshold: Tensor  # float64 [n]
    min_layer: Tensor  # int64 [n]
    max_layer: Tensor  # int64 [n]
    alive: Tensor  # bool [n]
    state: dict[str, Tensor]  # the policy's memory, first dimension n

    @property
    def num_rows(self) -> int:
        """Rows carried, alive or not."""
        return self.row.shape[0]

    def keep(self, stays: Tensor) -> None:
        """Drop every row where `stays` (bool [n]) is false, from everything at once."""
        self.hidden = self.hidden.keep(stays)
        index = stays.nonzero().squeeze(-1)
        self.row = self.row.index_select(0, index)
        self.threshold = self.threshold.index_select(0, index)
        self.min_layer = self.min_layer.index_select(0, index)
        self.max_layer = self.max_layer.index_select(0, index)
        self.alive = self.alive.index_select(0, index)
        self.state = {name: values.index_select(0, index) for name, values in self.state.items()}

    def append(self, other: "ActiveRows", offset: int) -> None:
        """Carry another batch's rows as well, which have run as many layers; their `row` counts on
        from `offset`. The order of length is lost: equal lengths may make two runs."""
        self.hidden = self.hidden.append(other.hidden)
        self.row = torch.cat([self.row, other.row + offset])
        self.threshold = torch.cat([self.threshold, other.threshold])
        self.min_layer = torch.cat([self.min_layer, other.min_layer])
        self.max_layer = torch.cat([self.max_layer, other.max_layer])
        self.alive = torch.cat([self.alive, other.alive])
        self.state = {name: torch.cat([own, other.state[name]]) for name, own in self.state.items()}
