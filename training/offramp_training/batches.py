"""Length-bucketed batches of already tokenised rows, the same for the same seed and epoch.

Rows of like length share a batch, so little is padding. The order is a function of (seed, epoch)
alone: a resumed run asks for the same order and skips what it has done. Knows nothing about texts,
models or losses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from offramp_model.rows import Encoding
from offramp_model.tokenizer import TextTokenizer
from offramp_training import seeds
from offramp_training.data import Dataset

BUCKET_BATCHES = 50  # rows are sorted by length inside runs of this many batches


@dataclass(frozen=True)
class Batch:
    """Padded rows, and the ids that per-row state is kept under."""

    ids: torch.Tensor  # [B] ids of the rows in the training split
    input_ids: torch.Tensor  # [B, S]
    attention_mask: torch.Tensor  # [B, S]
    token_type_ids: torch.Tensor  # [B, S]
    labels: torch.Tensor  # [B], classes or label sets as bits

    def __len__(self) -> int:
        return int(self.labels.shape[0])

    def take(self, places: torch.Tensor | slice) -> Batch:
        """The rows at `places`, padded as they are."""
        return Batch(
            self.ids[places],
            self.input_ids[places],
            self.attention_mask[places],
            self.token_type_ids[places],
            self.labels[places],
        )

    def to(self, device: torch.device) -> Batch:
        return Batch(
            self.ids.to(device),
            self.input_ids.to(device),
            self.attention_mask.to(device),
            self.token_type_ids.to(device),
            self.labels.to(device),
        )


@dataclass(frozen=True)
class EncodedRows:
    """A tokenised split."""

    encodings: Sequence[Encoding]
    ids: Sequence[int]
    labels: Sequence[int]
    pad_id: int

    @classmethod
    def of(cls, dataset: Dataset, tokenizer: TextTokenizer, pad_id: int) -> EncodedRows:
        encodings = tokenizer.encode(dataset.inputs)
        return cls(encodings, [row.id for row in dataset.rows], dataset.labels, pad_id)

    def __len__(self) -> int:
        return len(self.encodings)

    @cached_property
    def lengths(self) -> list[int]:
        return [len(encoding.ids) for encoding in self.encodings]

    def batch(self, places: Sequence[int]) -> Batch:
        """The rows at `places`, padded to the longest of them."""
        width = max(len(self.encodings[place].ids) for place in places)
        ids = torch.full((len(places), width), self.pad_id)
        mask = torch.zeros((len(places), width), dtype=torch.long)
        types = torch.zeros((len(places), width), dtype=torch.long)
        for line, place in enumerate(places):
            encoding = self.encodings[place]
            length = len(encoding.ids)
            ids[line, :length] = torch.tensor(encoding.ids)
            types[line, :length] = torch.tensor(encoding.type_ids)
            mask[line, :length] = 1
        return Batch(
            ids=torch.tensor([self.ids[place] for place in places]),
            input_ids=ids,
            attention_mask=mask,
            token_type_ids=types,
            labels=torch.tensor([self.labels[place] for place in places]),
        )

    def in_order(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in file order."""
        for start in range(0, len(self), batch_size):
            yield self.batch(range(start, min(start + batch_size, len(self))))


def bucketed_order(
    lengths: Sequence[int],
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    batch_tokens: int | None = None,
) -> list[list[int]]:
    """Places of one epoch's rows, batch by batch: every row exactly once.

    Shuffle, sort by length inside runs of some batches, cut, shuffle the batches. With
    `batch_tokens`, a batch is cut where its padded size would pass that; a longer row goes alone.
    """
    generator = seeds.generator(seed, "row order", epoch)
    shuffled = torch.randperm(len(lengths), generator=generator).tolist()
    run = batch_size * BUCKET_BATCHES
    if batch_tokens is not None:
        run = max(1, batch_tokens * BUCKET_BATCHES * len(lengths) // max(1, sum(lengths)))
    batches: list[list[int]] = []
    for start in range(0, len(shuffled), run):
        bucket = sorted(shuffled[start : start + run], key=lambda place: lengths[place])
        if batch_tokens is None:
            batches += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
        else:
            batches += _cut_by_tokens(bucket, lengths, batch_tokens)
    order = torch.randperm(len(batches), generator=generator).tolist()
    return [batches[place] for place in order]


def _cut_by_tokens(bucket: list[int], lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Cuts a bucket, ascending in length, so that rows * longest stays within the budget."""
    batches: list[list[int]] = []
    current: list[int] = []
    for place in bucket:
        if current and (len(current) + 1) * lengths[place] > budget:
            batches.append(current)
            current = []
        current.append(place)
    return [*batches, current] if current else batches
