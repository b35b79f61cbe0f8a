"""What the interpreted suites share: poison, guards, and programs in shuffled order.

Loading it outside the interpreter fails: run test_interpreter.py.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

if not triton.knobs.runtime.interpret:
    raise RuntimeError("set TRITON_INTERPRET=1, or run test_interpreter.py")

INTEGERS = {torch.float16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
GUARD = 16
"""Rows before and after a buffer: a multiple of 16 bytes at any width."""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3}


def bits(tensor: Tensor) -> Tensor:
    return tensor.view(INTEGERS[tensor.dtype])


def distance(ours: Tensor, expected: Tensor) -> float:
    """Relative error in the Euclidean norm, against an fp64 answer."""
    error = (ours.double() - expected.double()).norm()
    return float(error / expected.double().norm().clamp(min=1e-30))


def guarded(rows: int, width: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A buffer of NaN, and the [rows, width] inside its two guards."""
    buffer = torch.full((rows + 2 * GUARD, width), torch.nan, dtype=dtype)
    return buffer, buffer[GUARD : GUARD + rows]


def untouched(buffer: Tensor, written: int) -> bool:
    """Whether all but the first ``written`` rows between the guards still are NaN."""
    before, after = buffer[:GUARD], buffer[GUARD + written :]
    return bool(before.isnan().all() and after.isnan().all())


@contextmanager
def shuffled_programs(seed: int) -> Iterator[list[tuple[int, int, int]]]:
    """Programs run in a random order; yields the list of grid positions in the order they ran.

    The interpreter runs programs one by one, x outermost. A GPU promises no order, so a kernel
    whose answer depends on it has a race.
    """
    builder: Any = interpreter.interpreter_builder
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx
    order: list[tuple[int, int, int]] = []
    ran: list[tuple[int, int, int]] = []

    def shuffle(x: int, y: int, z: int) -> None:
        set_dim(x, y, z)
        order[:] = [(i, j, k) for i in range(x) for j in range(y) for k in range(z)]
        random.Random(seed).shuffle(order)

    def take_next(x: int, y: int, z: int) -> None:
        ran.append(order.pop())
        set_index(*ran[-1])

    builder.set_grid_dim, builder.set_grid_idx = shuffle, take_next
    try:
        yield ran
    finally:
        del builder.set_grid_dim, builder.set_grid_idx
