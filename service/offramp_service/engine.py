"""The engine: computes a batch of texts on the device and says who leaves where.

It owns the device. It runs in one thread or, each with a batch of its own, in several, which are
not started here, and turns what `layer_loop` yields into plain answers; a text that leaves early is
yielded while the rest of its batch is still running.
It knows nothing about queues, futures, clients or time; torch is its stack's matter, and not loaded
here for one that needs none.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import numpy as np

from offramp_model.arrays import Array, like, namespace, sigmoid, softmax
from offramp_model.config import ProblemType
from offramp_model.cost import StepTable
from offramp_model.full_pass import layer_timer, run_through, uniform_batch
from offramp_model.labels import most_probable
from offramp_model.layer_loop import LayerStack, Leavers, layer_loop, start_rows
from offramp_model.noted import NotedPolicy
from offramp_model.policies import ExitPolicy
from offramp_model.rows import MAX_ROWS, ActiveRows, Encoding, RowSettings, TokenBatch
from offramp_service.jobs import Answer, ExitReason, Job, Left

if TYPE_CHECKING:
    from offramp_model.device_lane import DeviceLane

MEASURING_S = 1.0


Scoring = Callable[[Leavers], tuple[Array, Array]]
"""Leavers → the one label that an answer names, int64 [k], and its probabilities, [k, C]."""


def scoring(problem_type: ProblemType) -> Scoring:
    """How answers of this kind of problem are scored."""
    return _by_sigmoid if problem_type == "multi_label_classification" else _by_softmax


def _by_softmax(leavers: Leavers) -> tuple[Array, Array]:
    return leavers.label, softmax(leavers.logits)


def _by_sigmoid(leavers: Leavers) -> tuple[Array, Array]:
    """Leavers have a set of labels; an answer names the most probable one, as other servers do."""
    return most_probable(leavers.logits), sigmoid(leavers.logits)


class Engine:
    """One stack of layers, called with a batch at a time by each thread; `torch_threads` of each
    where torch runs it."""

    def __init__(
        self, stack: LayerStack, policy: ExitPolicy, *, torch_threads: int | None = None
    ) -> None:
        self._stack, self._policy, self._torch_threads = stack, policy, torch_threads
        self._lane: DeviceLane | None = None

    def warm_up(self, max_length: int) -> None:
        """First calls are slow: make them before anybody waits. Call it in the engine's thread."""
        if self._torch_threads is not None:
            import torch

            torch.set_num_threads(self._torch_threads)
        for length in (max_length, min(16, max_length)):
            run_through(self._loop, self._stack.num_layers, uniform_batch(1, length))

    def measure(
        self,
        most_tokens: int,
        max_length: int,
        *,
        repeats: int = 3,
        budget_s: float = MEASURING_S,
        turn: AbstractContextManager[None] | None = None,
    ) -> StepTable:
        """What a layer costs by the tokens of a batch: whole passes without early exits, with their
        embedding and heads, over their depth. Takes about `budget_s` seconds; each pass takes a
        `turn` where others compute as well. What other threads of this engine cost it when they
        compute beside is not in it. Call it when warm, in the engine's thread."""
        time_layer = layer_timer(
            *(self._loop, self._stack.num_layers), longest=max_length, most_rows=MAX_ROWS
        )
        alone = turn or nullcontext()

        def time_alone(tokens: int) -> float:
            with alone:
                return time_layer(tokens)

        return StepTable.measured(
            time_alone, most_tokens=most_tokens, repeats=repeats, budget_s=budget_s
        )

    def _loop(self, batch: TokenBatch, asked: RowSettings) -> Iterator[Leavers]:
        rows = start_rows(self._stack, batch, self._policy, asked)
        return layer_loop(self._stack, rows, self._policy)

    @property
    def has_lane(self) -> bool:
        """Batches run in the device lane, and cannot be joined there."""
        return self._lane is not None

    def open_lane(self, *, max_tokens: int, max_rows: int, survival: Sequence[float]) -> StepTable:
        """From now on run whole batches on the device, where they fit its lane; returns what a
        layer of it costs. See `offramp_model.lane_buckets.open_lane`; call it in the engine's
        thread.

        Raises:
            ValueError: the lane does not cover this encoder or policy.
        """
        from offramp_model.encoder import PackedEncoder
        from offramp_model.lane_buckets import open_lane

        if not isinstance(self._stack, PackedEncoder):
            raise ValueError("the device lane runs encoders in torch")
        self._lane, costs = open_lane(
            *(self._stack, self._policy),
            max_tokens=max_tokens,
            max_rows=max_rows,
            survival=survival,
        )
        return costs

    def __call__(self, jobs: Sequence[Job]) -> "Course":
        """Take a batch in; iterating it answers every job that is not abandoned, exit by exit.

        A batch with a job that asks for the signals of all its exits does not go through the device
        lane, which keeps those at which texts leave.
        """
        encodings, asked = [Encoding(job.ids, job.type_ids) for job in jobs], _settings(jobs)
        inside = list(jobs)  # grows where another batch joins

        def abandoned(index: Array) -> Array:
            return like(index, [inside[row].abandoned for row in index.tolist()], "bool")

        depth, score = self._stack.num_layers, scoring(self._stack.problem_type)
        asking = [row for row, job in enumerate(jobs) if job.controls.all_signals]
        policy = NotedPolicy(self._policy, asking)
        batch = TokenBatch.pack(encodings)
        if self._lane is not None and not asking and self._lane.covers(batch):
            turns = self._lane(batch, asked, abandoned=abandoned)
            return Course(turns, None, inside, depth, score, policy)
        rows = start_rows(self._stack, batch, policy, asked)
        turns = layer_loop(self._stack, rows, policy, abandoned=abandoned)
        return Course(turns, rows, inside, depth, score, policy)


class Course:
    """A batch on its way through the layers: each `next` runs it to an exit, and says how many ran
    to it and who leaves there.

    The layer loop in the hands of whoever calls `next`, so that several batches can be under way,
    and two that have come to the same exit can go on as one. A batch in the device lane has no
    `rows` here and runs to its end alone.
    """

    def __init__(
        self,
        turns: Iterator[Leavers],
        rows: ActiveRows | None,
        jobs: list[Job],
        num_layers: int,
        score: Scoring,
        noted: NotedPolicy,
    ) -> None:
        self._turns, self._rows, self._jobs = turns, rows, jobs
        self._num_layers, self._score, self._noted = num_layers, score, noted
        self._pending = set(range(len(jobs)))

    def __iter__(self) -> Iterator[Left]:
        return self

    def __next__(self) -> Left:
        """Run to the next exit.

        Raises:
            StopIteration: nobody is left.
            RuntimeError: nobody is left, and not as many answers came out as texts went in.
        """
        leavers = next(self._turns, None)
        if leavers is None:
            self._check_all_out()
            raise StopIteration
        answers = self._answers(leavers)
        for index, _ in answers:
            self._pending.remove(index)  # KeyError: a row that left twice
        return Left(leavers.exit_layer, leavers.rows_run, answers)

    def take_in(self, other: "Course") -> None:
        """Go on together with a batch that has come to the same exit; its jobs count on from ours.

        Nothing may be asked of `other` any more.

        Raises:
            RuntimeError: one of them is in the device lane.
        """
        if self._rows is None or other._rows is None:
            raise RuntimeError("batches in the device lane cannot be joined")
        offset = len(self._jobs)
        self._rows.append(other._rows, offset)
        self._noted.take_in(other._noted, offset)
        self._jobs += other._jobs
        self._pending |= {offset + index for index in other._pending}

    def _check_all_out(self) -> None:
        if lost := [index for index in self._pending if not self._jobs[index].abandoned]:
            raise RuntimeError(f"{len(self._jobs)} texts went in, {len(lost)} did not come out")

    def _answers(self, leavers: Leavers) -> list[tuple[int, Answer | Exception]]:
        if not leavers.row.shape[0]:
            return []
        layer = leavers.exit_layer
        label, probs = self._score(leavers)
        xp = namespace(leavers.logits)
        sound = xp.all(xp.isfinite(leavers.logits), axis=-1)
        columns = (
            leavers.row.tolist(),
            label.tolist(),
            leavers.logits.tolist(),
            probs.tolist(),
            leavers.signal.tolist(),
            leavers.by_policy.tolist(),
            sound.tolist(),
        )
        answers: list[tuple[int, Answer | Exception]] = []
        for row, label, logits, row_probs, signal, by_policy, is_sound in zip(
            *columns, strict=True
        ):
            if not is_sound:
                error = ArithmeticError("the model's scores are not finite numbers")
                answers.append((row, error))
                continue
            reason = self._reason(layer, by_policy=by_policy)
            noted = self._noted.signals.get(row)
            answers.append((row, Answer(label, logits, row_probs, layer, signal, reason, noted)))
        return answers

    def _reason(self, layer: int, *, by_policy: bool) -> ExitReason:
        if layer == self._num_layers:
            return "final"
        return "criterion" if by_policy else "forced"


def _settings(jobs: Sequence[Job]) -> RowSettings:
    controls = [job.controls for job in jobs]
    return RowSettings(
        threshold=np.array([one.threshold for one in controls], np.float64),
        min_layer=np.array([one.min_layer for one in controls], np.int64),
        max_layer=np.array([one.max_layer for one in controls], np.int64),
    )
