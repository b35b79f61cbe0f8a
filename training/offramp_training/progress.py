"""What a person sees of a run: a progress bar, or plain lines when nobody watches, and TensorBoard.

Knows nothing about models; it is told numbers.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

LINE_EVERY_SECONDS = 30.0
RATE_OVER_BATCHES = 50


class Reporter:
    """Progress of one `fit`; a context manager, which closes the bar and the event file.

    `silent`: nothing is shown and nothing written, for a process that another one speaks for.
    """

    def __init__(
        self, tensorboard: Path, *, console: Console | None = None, silent: bool = False
    ) -> None:
        if silent:
            console = Console(quiet=True, force_terminal=False)
        self.console = console or Console(file=sys.stderr)
        self._events = None if silent else _summary_writer(tensorboard)
        self._bar: Progress | None = None
        self._task: Any = None
        self._recent: deque[tuple[float, int, float]] = deque(maxlen=RATE_OVER_BATCHES)
        self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop_bar()
        if self._events is not None:
            self._events.close()

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def start_stage(self, name: str, batches: int, done: int) -> None:
        self._stop_bar()
        self._recent.clear()
        self._total = batches
        if self.console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.completed}/{task.total} batches"),
                TextColumn("{task.fields[numbers]}"),
                console=self.console,
            )
            self._task = self._bar.add_task(name, total=batches, completed=done, numbers="")
            self._bar.start()

    def end_stage(self) -> None:
        self._stop_bar()

    def batch(self, *, done: int, step: int, rows: int, loss: float, lr: float) -> None:
        """After each batch: `done` batches of this stage, `step` optimiser steps of the run."""
        now = time.monotonic()
        self._recent.append((now, rows, loss))
        self._event("train/loss", loss, step)
        self._event("train/lr", lr, step)
        numbers = self._numbers(done)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, numbers=numbers)
        elif now - self._last_line >= LINE_EVERY_SECONDS or done == self._total:
            self._last_line = now
            self.say(f"batch {done}/{self._total}  {numbers}")

    def validation(
        self, step: int, exit_layers: Sequence[int], accuracies: Sequence[float]
    ) -> None:
        mean = sum(accuracies) / len(accuracies)
        for layer, accuracy in zip(exit_layers, accuracies, strict=True):
            self._event(f"held_out/accuracy_layer_{layer}", accuracy, step)
        self._event("held_out/accuracy_mean", mean, step)
        shown = "  ".join(f"{accuracy:.4f}" for accuracy in accuracies)
        self.say(f"step {step}: held-out accuracy by exit {shown}  mean {mean:.4f}")

    def _event(self, name: str, value: float, step: int) -> None:
        if self._events is not None:
            self._events.add_scalar(name, value, step)

    def _numbers(self, done: int) -> str:
        """Loss, rate and time left over the last batches."""
        loss = sum(loss for _, _, loss in self._recent) / len(self._recent)
        seconds = self._recent[-1][0] - self._recent[0][0]
        if len(self._recent) < 2 or seconds <= 0:
            return f"loss {loss:.4f}"
        rows = sum(rows for _, rows, _ in list(self._recent)[1:])
        left = (self._total - done) * seconds / (len(self._recent) - 1)
        minutes, rest = divmod(round(left), 60)
        return f"loss {loss:.4f}  {rows / seconds:.0f} rows/s  {minutes}:{rest:02d} left"

    def _stop_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def rows_bar(task: str, rows: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr that is told how many rows are done; nothing where nobody watches."""
    console = Console(file=sys.stderr)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
    )
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        number = bar.add_task(task, total=rows)
        yield lambda done: bar.update(number, completed=done)


def _summary_writer(directory: Path) -> Any:
    with warnings.catch_warnings():
        # tensorboard's own imports of deprecated helpers; nothing a user of fit can act on.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(directory))
