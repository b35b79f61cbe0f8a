"""The engine: computes a batch of texts on the device and says who leaves where.

It owns the device. It runs in one thread, which is not started here, and turns `layer_loop` into
plain answers; a text that leaves early is yielded while the rest of its batch is still running.
It knows nothing about queues, futures, clients or time.
"""

import time
from collections.abc import Iterator, Sequence

import torch

from offramp_model.cost import StepTable
from offramp_model.layer_loop import LayerStack, Leavers, layer_loop, start_rows
from offramp_model.policies import ExitPolicy
from offramp_model.rows import Encoding, RowSettings, TokenBatch
from offramp_service.jobs import Answer, ExitReason, Job, Left

MEASURED_LENGTH = 32  # of the texts whose layers are timed
MEASURING_S = 1.0


class Engine:
    """One stack of layers on one device, called with a batch at a time."""

    def __init__(
        self, stack: LayerStack, policy: ExitPolicy, *, device: str = "cpu", threads: int = 1
    ) -> None:
        self._stack, self._policy, self._device, self._threads = stack, policy, device, threads

    def warm_up(self, max_length: int) -> None:
        """First calls are slow: make them before anybody waits. Call it in the engine's thread."""
        torch.set_num_threads(self._threads)
        with torch.inference_mode():
            for length in (max_length, min(16, max_length)):
                batch = TokenBatch.pack([Encoding([0] * length, [0] * length)], self._device)
                depth = self._stack.num_layers
                # A bound at the last layer and a threshold of NaN: through every layer.
                settings = RowSettings.uniform(1, float("nan"), max_layer=depth)
                rows = start_rows(self._stack, batch, self._policy, settings)
                for _ in layer_loop(self._stack, rows, self._policy):
                    pass

    @torch.inference_mode()
    def measure(self, most_tokens: int, max_length: int) -> StepTable:
        """What a layer costs by the tokens of a batch: whole passes without early exits, with their
        embedding and heads, over their depth. Takes about a second. Call it when warm, in the
        engine's thread."""
        depth, length = self._stack.num_layers, min(MEASURED_LENGTH, max_length)

        def time_layer(tokens: int) -> float:
            count = max(1, tokens // length)
            size = min(tokens // count, max_length)
            batch = TokenBatch.pack([Encoding([0] * size, [0] * size)] * count, self._device)
            settings = RowSettings.uniform(count, float("nan"), max_layer=depth)
            started = time.perf_counter()
            rows = start_rows(self._stack, batch, self._policy, settings)
            for left in layer_loop(self._stack, rows, self._policy):
                left.row.tolist()  # waits for the device
            return (time.perf_counter() - started) / depth

        return StepTable.measured(
            time_layer, most_tokens=most_tokens, repeats=3, budget_s=MEASURING_S
        )

    @torch.inference_mode()
    def __call__(self, jobs: Sequence[Job]) -> Iterator[Left]:
        """Answer every job that is not abandoned, and say at every exit who ran to it.

        Raises:
            RuntimeError: not as many answers came out as texts went in.
        """
        batch = TokenBatch.pack([Encoding(job.ids, job.type_ids) for job in jobs], self._device)
        rows = start_rows(self._stack, batch, self._policy, _settings(jobs))

        def abandoned(index: torch.Tensor) -> torch.Tensor:
            given_up = [jobs[row].abandoned for row in index.tolist()]
            return torch.tensor(given_up, dtype=torch.bool, device=index.device)

        pending = set(range(len(jobs)))
        for leavers in layer_loop(self._stack, rows, self._policy, abandoned=abandoned):
            answers = self._answers(leavers)
            for index, _ in answers:
                pending.remove(index)  # KeyError: a row that left twice
            yield Left(leavers.exit_layer, leavers.rows_run, answers)
        if lost := [index for index in pending if not jobs[index].abandoned]:
            raise RuntimeError(f"{len(jobs)} texts went in, {len(lost)} did not come out")

    def _answers(self, leavers: Leavers) -> list[tuple[int, Answer | Exception]]:
        if not leavers.row.numel():
            return []
        layer = leavers.exit_layer
        probs = torch.softmax(leavers.logits, dim=-1)
        sound = leavers.logits.isfinite().all(dim=-1)
        columns = (
            leavers.row.tolist(),
            leavers.label.tolist(),
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
            answers.append((row, Answer(label, logits, row_probs, layer, signal, reason)))
        return answers

    def _reason(self, layer: int, *, by_policy: bool) -> ExitReason:
        if layer == self._stack.num_layers:
            return "final"
        return "criterion" if by_policy else "forced"


def _settings(jobs: Sequence[Job]) -> RowSettings:
    controls = [job.controls for job in jobs]
    return RowSettings(
        threshold=torch.tensor([one.threshold for one in controls], dtype=torch.float64),
        min_layer=torch.tensor([one.min_layer for one in controls], dtype=torch.int64),
        max_layer=torch.tensor([one.max_layer for one in controls], dtype=torch.int64),
    )
