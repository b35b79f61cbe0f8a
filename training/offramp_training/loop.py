"""The training loop: stage -> epoch -> batch -> loss -> backward, clip, step. `train` is the nest.

Everything that decides the next bit is in the model, the stage, the optimiser, `Position`, `Best`
and torch's generators, and all of it is in a resume point: a killed run goes on as if it had not
been. Several processes run the nest in step, each with the same state but for torch's generators.
Knows no objective by name, no file format and no exit policy.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from offramp_model.labels import reading
from offramp_training.batches import Batch, EncodedRows, bucketed_order
from offramp_training.config import LoopSection, Recipe
from offramp_training.errors import OutputError, RecipeError
from offramp_training.first_stage import FirstStage
from offramp_training.model import MultiExitModel
from offramp_training.objectives import Progress, Stage
from offramp_training.objectives.row_losses import Distillation
from offramp_training.optimiser import lr_factor, make_optimiser, set_lr
from offramp_training.processes import ALONE, Group, Processes, launched
from offramp_training.progress import Reporter
from offramp_training.resume import ResumePoints, rng_state, set_rng_state

EVALUATION_BATCH = 64


@dataclass
class Position:
    """Where the run stands; everything below is done."""

    stage: int = 0
    epoch: int = 0
    batch: int = 0  # batches of this epoch
    stage_batches: int = 0
    stage_steps: int = 0  # optimiser steps of this stage
    steps: int = 0  # optimiser steps of the run
    seconds: float = 0.0
    first_stage_of: str | None = None  # the run that trained it, where that was another

    def after_batch(self) -> None:
        self.batch += 1
        self.stage_batches += 1

    def after_step(self) -> None:
        self.stage_steps += 1
        self.steps += 1

    def next_epoch(self) -> None:
        self.epoch, self.batch = self.epoch + 1, 0

    def next_stage(self) -> None:
        self.stage, self.epoch, self.batch = self.stage + 1, 0, 0
        self.stage_batches = self.stage_steps = 0


@dataclass
class Best:
    """The best weights of the current stage by mean held-out accuracy over the exits."""

    accuracy: float | None = None
    weights: dict[str, torch.Tensor] | None = None
    bad_evaluations: int = 0
    evaluated_at: int = -1  # optimiser step of the newest evaluation

    def see(self, accuracy: float, model: MultiExitModel, step: int) -> None:
        self.evaluated_at = step
        if self.accuracy is not None and accuracy <= self.accuracy:
            self.bad_evaluations += 1
            return
        self.accuracy, self.bad_evaluations = accuracy, 0
        self.weights = {
            name: value.detach().to("cpu", copy=True) for name, value in model.state_dict().items()
        }


@dataclass
class Run:
    """One training run: its parts, and the state that a resume point holds."""

    recipe: Recipe
    model: MultiExitModel
    stages: list[Stage]
    train_rows: EncodedRows
    held_out: EncodedRows
    accelerator: Accelerator
    processes: Processes
    points: ResumePoints
    reporter: Reporter
    identity: dict[str, Any]  # what must be the same for a resumed run to be the same run
    position: Position = field(default_factory=Position)
    best: Best = field(default_factory=Best)
    first_stage: FirstStage | None = None  # shared with other runs
    # What stages learn from beside the labels; asked when one starts, as a teacher's answers cost a
    # pass over the rows.
    distillation: Callable[[], Distillation] = Distillation
    # Made by `_start_stage`.
    optimiser: Any = field(init=False, default=None)
    loss: float = field(init=False, default=0.0)  # of the newest step
    total_steps: int = field(init=False, default=0)
    _restored: dict[str, Any] | None = field(init=False, default=None)
    _clock: float = field(init=False, default_factory=time.monotonic)

    # ---- the nest's iterators: each yields what is left to do --------------------------------

    def stages_left(self) -> Iterator[Stage]:
        while self.position.stage < len(self.stages):
            if self.out_of_time and not self.position.stage_batches:
                # One that has begun is entered all the same: it ends with its best weights.
                left = ", ".join(stage.name for stage in self.stages[self.position.stage :])
                self.reporter.say(f"out of time: not trained: {left}")
                return
            stage = self.stages[self.position.stage]
            self._start_stage(stage)
            yield stage
            self._finish_stage(stage)

    def epochs_left(self, stage: Stage) -> Iterator[int]:
        while self.position.epoch < stage.epochs and not self.stopped:
            if self.position.batch == 0:
                stage.begin_epoch(self.position.epoch)
            yield self.position.epoch
            if not self.stopped:
                if stage.keeps_best:  # others are looked at when they end
                    self._evaluate_once()
                self.position.next_epoch()

    def batches_left(self, stage: Stage, epoch: int) -> Iterator[Batch]:
        order = self._order(stage, epoch)
        while self.position.batch < len(order) and not self.stopped:
            batch = self.train_rows.batch(order[self.position.batch]).to(self.model.device)
            yield batch
            self._after_batch(batch)

    # ---- one optimiser step -------------------------------------------------------------------

    def progress(self) -> Progress:
        """Sets this step's learning rate and says where the run stands."""
        position = self.position
        factor = lr_factor(position.stage_steps, self.total_steps, self.recipe.optimiser)
        lr = set_lr(self.optimiser, factor)
        return Progress(position.epoch, position.stage_steps, self.total_steps, lr)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        return [p for group in self.optimiser.param_groups for p in group["params"]]

    def backward(self, loss: torch.Tensor, rows: int) -> None:
        """Gradients of the loss over the `rows` of a batch, of which this process has a share."""
        mine = self.processes.weigh(loss, rows)
        self.accelerator.backward(mine)
        self.loss = float(self.processes.sum_gradients(self.parameters, mine))

    def clip(self) -> None:
        self.accelerator.unscale_gradients(self.optimiser)
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.optimiser.clip_norm)

    def step(self) -> None:
        self.optimiser.step()
        # Every parameter's gradient, not only this optimiser's: a stage may train a part.
        self.model.zero_grad(set_to_none=True)
        self.position.after_step()

    # ---- stopping -----------------------------------------------------------------------------

    @property
    def seconds(self) -> float:
        return self.position.seconds + time.monotonic() - self._clock

    @property
    def out_of_time(self) -> bool:
        """By the main process's clock: all processes stop at the same batch. All have to ask."""
        limit = self.recipe.loop.max_minutes
        return limit is not None and self.processes.mains(self.seconds >= limit * 60)

    @property
    def out_of_patience(self) -> bool:
        patience = self.recipe.loop.patience
        # A stage whose aim is not the exits' accuracy is not stopped by it either.
        counts = self.stages[self.position.stage].keeps_best
        return counts and patience is not None and self.best.bad_evaluations >= patience

    @property
    def stopped(self) -> bool:
        """Early stop, or out of time. Both are read off the state, so a resumed run agrees."""
        return self.out_of_time or self.out_of_patience

    # ---- between the steps --------------------------------------------------------------------

    def restore(self) -> bool:
        """Takes up the newest resume point, if there is one. The optimiser waits for its stage."""
        with self.processes.agreeing():
            state = self._point() if self.processes.is_main else None
        state = self.processes.mains(state)
        if state is None:
            return False
        self.model.load_state_dict(state["model"])
        self.position = Position(**state["position"])
        self.best = Best(**state["best"])
        self._restored = state
        if self.first_stage is not None and self.position.first_stage_of is not None:
            self.first_stage.trained_by = self.position.first_stage_of
        return True

    def _point(self) -> dict[str, Any] | None:
        state: dict[str, Any] | None = self.points.load()
        if state is not None and state["identity"] != self.identity:
            changed = [
                key for key, value in self.identity.items() if state["identity"].get(key) != value
            ]
            raise OutputError(
                f"{self.points.directory} holds an unfinished run with another "
                f"{' and another '.join(changed)}; allowed: the same again, or --overwrite"
            )
        if state is None or state["position"]["stage"] == 0:
            state = self._shared_first_stage() or state
        return state

    def _shared_first_stage(self) -> dict[str, Any] | None:
        """The end of the first stage as another run left it, with its seconds: time is up when it
        would have been for this run alone."""
        kept = self.first_stage.take() if self.first_stage is not None else None
        if kept is None:
            return None
        run, state = kept
        limit = self.recipe.loop.max_minutes
        if limit is not None and state["position"]["seconds"] >= limit * 60:
            return None  # alone, this run would not get that far
        self.reporter.say(f"first stage: that of {run}")
        return {**state, "position": {**state["position"], "first_stage_of": run}}

    def save_point(self) -> None:
        state = self._state()
        if self.processes.is_main:
            self.points.save(state)

    def _state(self) -> dict[str, Any]:
        """Of all processes, which all have to ask: generators differ, everything else is alike."""
        self.position.seconds, self._clock = self.seconds, time.monotonic()
        stage_left = self.position.stage < len(self.stages)
        scaler = self.accelerator.scaler
        return {
            "identity": self.identity,
            "position": asdict(self.position),
            "best": vars(self.best),
            "model": self.model.state_dict(),
            "stage": self.stages[self.position.stage].state_dict() if stage_left else {},
            "optimiser": self.optimiser.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else {},
            "rng": self.processes.everyones(rng_state()),
        }

    def _start_stage(self, stage: Stage) -> None:
        self.optimiser = self.accelerator.prepare_optimizer(
            make_optimiser(stage, self.recipe.optimiser)
        )
        stage.optimiser, stage.processes = self.optimiser, self.processes
        asked = time.monotonic()
        stage.distillation = self.distillation()
        self._clock += time.monotonic() - asked  # to prepare is not to train
        batches = sum(len(self._order(stage, epoch)) for epoch in range(stage.epochs))
        self.total_steps = batches * stage.steps_per_batch
        restored, self._restored = self._restored, None
        if restored is not None:
            # A point between two stages has of the next one what earlier ones left it, and the
            # generators.
            stage.load_state_dict(restored["stage"])
            if self.position.stage_batches:
                self.optimiser.load_state_dict(restored["optimiser"])
            if self.accelerator.scaler is not None:
                self.accelerator.scaler.load_state_dict(restored["scaler"])
            set_rng_state(restored["rng"][self.processes.rank])
        prepare = stage.rebuild if self.position.stage_batches else stage.prepare
        prepare(lambda: self.train_rows.in_order(EVALUATION_BATCH))
        for line in stage.report():
            self.reporter.say(line)
        self.model.train()
        self.reporter.start_stage(stage.name, batches, self.position.stage_batches)

    def _finish_stage(self, stage: Stage) -> None:
        if self.position.epoch < stage.epochs:
            no_better = f"no better for {self.best.bad_evaluations} evaluations"
            self.reporter.say(f"stopped: {no_better if self.out_of_patience else 'out of time'}")
        self._evaluate_once()
        self.reporter.end_stage()
        if stage.keeps_best and self.best.weights is not None:
            self.model.load_state_dict(self.best.weights)
        self.position.next_stage()
        self.best = Best()
        # One that time cut short is nobody else's: how far it got is this machine's, this hour's.
        if self.first_stage is not None and self.position.stage == 1 and not self.out_of_time:
            # The next stage makes an optimiser of its own.
            state = {**self._state(), "optimiser": {}}
            if self.processes.is_main:
                self.first_stage.keep(state)
        self.save_point()

    def _order(self, stage: Stage, epoch: int) -> list[list[int]]:
        loop = self.recipe.loop
        batch_size = stage.batch_size or loop.batch_size
        order = bucketed_order(
            self.train_rows.lengths,
            batch_size=batch_size,
            batch_tokens=None if stage.batch_size else loop.batch_tokens,
            seed=loop.seed,
            epoch=self.position.stage * 1000 + epoch,
        )
        if stage.drop_incomplete:
            order = [batch for batch in order if len(batch) == batch_size]
        return order

    def _after_batch(self, batch: Batch) -> None:
        position, loop = self.position, self.recipe.loop
        position.after_batch()
        self.reporter.batch(
            done=position.stage_batches,
            step=position.steps,
            rows=len(batch),
            loss=self.loss,
            lr=self.optimiser.param_groups[0]["lr"],
        )
        if loop.evaluate_every_steps and position.stage_batches % loop.evaluate_every_steps == 0:
            self._evaluate_once()
        if position.stage_batches % loop.checkpoint_every_steps == 0:
            self.save_point()

    def _evaluate_once(self) -> None:
        """Accuracy of every exit on held-out rows, unless it is known for these weights."""
        if self.best.evaluated_at == self.position.steps:
            return
        accuracies = exit_accuracies(self.model, self.held_out, self.processes)
        self.reporter.validation(self.position.steps, self.model.config.exit_layers, accuracies)
        self.best.see(sum(accuracies) / len(accuracies), self.model, self.position.steps)


def train(run: Run) -> MultiExitModel:
    """The nest. Goes on from the newest resume point; leaves the best weights in the model."""
    if run.restore():
        run.reporter.say(f"goes on after step {run.position.steps}")
    for stage in run.stages_left():
        for epoch in run.epochs_left(stage):
            for batch in run.batches_left(stage, epoch):
                for loss in stage.losses(batch, run.progress()):
                    run.progress()
                    run.backward(loss, rows=len(batch))
                    run.clip()
                    run.step()
    return run.model


@torch.no_grad()
def exit_accuracies(
    model: MultiExitModel, rows: EncodedRows, processes: Processes = ALONE
) -> list[float]:
    """Accuracy of each exit over the rows; leaves the model in the mode it was in.

    Processes take turns with the batches, and all find the same.
    """
    was_training = model.training
    model.eval()
    read = reading(model.config.problem_type)
    right = torch.zeros(model.config.num_exits, dtype=torch.long, device=model.device)
    by_length = sorted(range(len(rows)), key=rows.lengths.__getitem__)
    first, step = processes.rank * EVALUATION_BATCH, processes.count * EVALUATION_BATCH
    for start in range(first, len(by_length), step):
        batch = rows.batch(by_length[start : start + EVALUATION_BATCH]).to(model.device)
        predicted = read(model.logits(batch))
        right += (predicted == batch.labels).sum(dim=1)
    model.train(was_training)
    return [count / len(rows) for count in processes.reduce(right, "sum").tolist()]


def make_accelerator(section: LoopSection) -> Accelerator:
    """Accelerate with the precision that the recipe asks for, in one process or as launched."""
    if section.precision == "fp16" and not torch.cuda.is_available():
        raise RecipeError("loop.precision = 'fp16' needs a CUDA device; allowed here: no, bf16")
    # Accelerate keeps its settings per process; a second run may want another precision.
    AcceleratorState._reset_state(reset_partial_state=True)
    # Without being told so, Accelerate takes processes that have no GPU for one process each.
    on_cpu = launched() > 1 and not torch.cuda.is_available()
    return Accelerator(mixed_precision=section.precision, cpu=on_cpu)


def prepare_model(accelerator: Accelerator, model: MultiExitModel) -> MultiExitModel:
    """On its device, in the accelerator's precision. As for evaluation, that is without a wrapper
    that averages gradients: stages call more of a model than its `forward`."""
    prepared: MultiExitModel = accelerator.prepare_model(model, evaluation_mode=True)
    return prepared


def make_processes(accelerator: Accelerator) -> Processes:
    """Those that were launched. All are to call this."""
    return Group() if accelerator.num_processes > 1 else ALONE
