"""Several processes that train one model as one process would: `accelerate launch`, `torchrun`.

A batch is everywhere that of all processes. Each takes its share of the rows, weighs its loss by
that share, and the gradients are summed: that is the gradient of the batch, if the loss is a mean
over rows. A loss with other statistics over rows sums those too (`reduce`). A stage that takes no
share does the same work in every process: slower, and as right.

`Alone` is one process and costs nothing, `Group` is several. Knows nothing about stages or files.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

import torch
from torch import distributed, nn

from offramp_training.errors import TrainingError

if TYPE_CHECKING:
    from offramp_training.batches import Batch

T = TypeVar("T")
How = Literal["sum", "max"]

DEAL = 2  # rows that stay together
BUCKET = 1 << 25  # gradient entries that travel together: 128 MiB of float32
PATIENCE = timedelta(days=1)  # with a process that calibrates, or reads data that others have


class Processes(Protocol):
    """This process among those that train together. Except for `rank`, `count`, `is_main`, `share`,
    `own` and `weigh`, all of them must make the same calls in the same order."""

    @property
    def rank(self) -> int: ...

    @property
    def count(self) -> int: ...

    @property
    def is_main(self) -> bool:
        """The one that writes files and talks."""
        ...

    def share(self, batch: Batch) -> Batch:
        """This process's rows of a batch, one at least."""
        ...

    def own(self, values: torch.Tensor) -> torch.Tensor:
        """The same of values that have the batch's rows in their last dimension."""
        ...

    def weigh(self, loss: torch.Tensor, rows: int) -> torch.Tensor:
        """A mean over this process's share of `rows` as its part of the mean over all of them."""
        ...

    def reduce(self, values: torch.Tensor, how: How) -> torch.Tensor:
        """Elementwise over the processes. A sum is differentiable: its gradient is the sum of the
        processes' gradients, so that weighed losses together give that of one process."""
        ...

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """Sums every parameter's gradient, and returns the sum of the losses, a constant."""
        ...

    def everyones(self, value: T) -> list[T]:
        """What each process has, by rank; small or on the CPU."""
        ...

    def mains(self, value: T) -> T:
        """What the main process has."""
        ...

    def agreeing(self) -> AbstractContextManager[None]:
        """Around work of each process on its own: a `TrainingError` in one is raised in all."""
        ...


class Alone:
    """One process."""

    rank, count, is_main = 0, 1, True

    def share(self, batch: Batch) -> Batch:
        return batch

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values

    def weigh(self, loss: torch.Tensor, rows: int) -> torch.Tensor:
        return loss

    def reduce(self, values: torch.Tensor, how: How) -> torch.Tensor:
        return values

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        return loss.detach()

    def everyones(self, value: T) -> list[T]:
        return [value]

    def mains(self, value: T) -> T:
        return value

    def agreeing(self) -> AbstractContextManager[None]:
        return nullcontext()


ALONE = Alone()


class Group:
    """The processes of torch's default process group, which somebody else has set up."""

    def __init__(self) -> None:
        self.rank, self.count = distributed.get_rank(), distributed.get_world_size()
        self.is_main = self.rank == 0
        # NCCL has no place for Python values, nor the patience.
        self._talk = distributed.new_group(backend="gloo", timeout=PATIENCE)

    def share(self, batch: Batch) -> Batch:
        return batch.take(own_places(len(batch), self.rank, self.count))

    def own(self, values: torch.Tensor) -> torch.Tensor:
        return values[..., own_places(values.shape[-1], self.rank, self.count)]

    def weigh(self, loss: torch.Tensor, rows: int) -> torch.Tensor:
        return loss * weight(rows, self.rank, self.count)

    def reduce(self, values: torch.Tensor, how: How) -> torch.Tensor:
        if how == "sum":
            total: torch.Tensor = _Sum.apply(values)  # type: ignore[no-untyped-call]
            return total
        highest = values.detach().clone()
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return highest

    def sum_gradients(self, parameters: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        total = loss.detach().float().reshape(1)
        for bucket in _buckets(parameters):
            total = self._sum_bucket(bucket, loss.detach().float().reshape(1))
        return total.reshape(())

    def _sum_bucket(self, bucket: Sequence[nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
        """In one message: gradients, which of them there are, and the loss."""
        missing = [parameter.grad is None for parameter in bucket]
        here = torch.tensor([float(not gone) for gone in missing], device=loss.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        message = torch.cat([*(g.reshape(-1) for g in gradients), here, loss])
        distributed.all_reduce(message)
        parts = torch.split(message, [*(p.numel() for p in bucket), len(bucket), 1])
        *sums, here, loss = parts
        # What nobody has a gradient of gets none: weight decay must not move it. Only who lacks
        # some has to look, and wait for the device.
        anywhere = here.tolist() if any(missing) else [1.0] * len(bucket)
        for parameter, gradient, processes in zip(bucket, sums, anywhere, strict=True):
            parameter.grad = gradient.view_as(parameter) if processes else None
        return loss

    def everyones(self, value: T) -> list[T]:
        values: list[Any] = [None] * self.count
        distributed.all_gather_object(values, value, self._talk)
        return values

    def mains(self, value: T) -> T:
        values: list[Any] = [value if self.is_main else None]
        distributed.broadcast_object_list(values, src=0, group=self._talk)
        mains: T = values[0]
        return mains

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        mine: TrainingError | None = None
        try:
            yield
        except TrainingError as error:
            mine = error
        for theirs in self.everyones(mine):
            if theirs is not None:
                raise theirs from None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(_context: Any, values: torch.Tensor) -> torch.Tensor:
        total = values.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_context: Any, gradient: torch.Tensor) -> torch.Tensor:
        total = gradient.contiguous().clone()
        distributed.all_reduce(total)
        return total


def own_places(rows: int, rank: int, count: int) -> torch.Tensor:
    """Which rows of a batch are this process's, ascending: int64 [n].

    Batches are sorted by length; dealt out in turn, all shares are alike. In pairs, so that a stage
    that cuts its share into every other row and the rest has its share of the batch cut so. Too few
    rows to deal out are everyone's: no process is without rows, and none counts more than others.
    """
    places = torch.arange(rows)
    if rows < DEAL * count:
        return places
    return places[places // DEAL % count == rank]


def weight(rows: int, rank: int, count: int) -> float:
    """The part that this process's share has in the mean over the batch; they sum to 1."""
    return 1 / count if rows < DEAL * count else len(own_places(rows, rank, count)) / rows


def launched() -> int:
    """How many processes a launcher has started, this one included."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leave() -> None:
    """Ends the process group, if there is one."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def first_on_machine() -> bool:
    """Whether to print what every process would: the processes of a machine have one terminal."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def _buckets(parameters: Iterable[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    entries = 0
    for parameter in parameters:
        if bucket and entries + parameter.numel() > BUCKET:
            yield bucket
            bucket, entries = [], 0
        bucket.append(parameter)
        entries += parameter.numel()
    if bucket:
        yield bucket
