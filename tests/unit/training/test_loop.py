"""The loop's promises to stages: order of calls, what moves, what is kept."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp_model.tokenizer import TextTokenizer
from offramp_training import loop
from offramp_training.batches import Batch, EncodedRows
from offramp_training.config import OptimiserSection, Recipe, make_recipe
from offramp_training.data import load_splits
from offramp_training.errors import RecipeError
from offramp_training.loop import Run, exit_accuracies, make_accelerator, prepare_model, train
from offramp_training.model import MultiExitModel, build_model
from offramp_training.objectives import Progress, Stage
from offramp_training.objectives.joint import joint_loss
from offramp_training.optimiser import lr_factor
from offramp_training.processes import ALONE, Processes
from offramp_training.progress import Reporter
from offramp_training.resume import ResumePoints


class Heads(Stage):
    """Trains the heads alone, twice per batch, and counts what the loop asks of it."""

    def __init__(self, model: MultiExitModel, epochs: int) -> None:
        super().__init__("heads", model, epochs)
        self.steps_per_batch = 2
        self.lr = 1e-2
        self.calls: list[str] = []
        self.seen: dict[int, int] = {}
        self.steps: list[int] = []

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return {k: p for k, p in self.model.named_parameters() if k.startswith("exits.")}

    def prepare(self, batches: Callable[[], Iterable[Batch]]) -> None:
        self.calls.append("prepare")
        ids = [int(row) for batch in batches() for row in batch.ids]
        assert ids == sorted(ids)
        self.seen = dict.fromkeys(ids, 0)

    def begin_epoch(self, epoch: int) -> None:
        self.calls.append(f"epoch {epoch}")

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        self.steps.append(progress.step)
        for row in batch.ids.tolist():
            self.seen[row] += 1
        for _ in range(2):
            yield joint_loss(self.row_losses(self.model.logits(batch), batch), torch.ones(3), "sum")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


class Spoiling(Heads):
    """Climbs instead of descending: every evaluation is worse than the first."""

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        for loss in super().losses(batch, progress):
            yield -loss


class Weighing(Heads):
    """Weighs each loss by a running mean of its own, which a resumed run must find again."""

    def __init__(self, model: MultiExitModel, epochs: int) -> None:
        super().__init__(model, epochs)
        self.mean = torch.ones(())

    def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        for loss in super().losses(batch, progress):
            self.mean = 0.7 * self.mean + 0.3 * loss.detach()
            yield loss * self.mean

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean = state["mean"]


class Killed(Exception):
    pass


def killed_at(run: Run, batch_number: int) -> None:
    """Trains until the stage is asked for the losses of its n-th batch."""
    original, seen = run.stages[0].losses, 0

    def losses(batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
        nonlocal seen
        seen += 1
        if seen == batch_number:
            raise Killed
        return original(batch, progress)

    run.stages[0].losses = losses  # type: ignore[method-assign]
    with pytest.raises(Killed):
        train(run)


def state_of(run: Run) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in run.model.state_dict().items()}


def assert_same_bits(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    assert [name for name in one if not torch.equal(one[name], two[name])] == []


@pytest.fixture
def make_run(
    tmp_path: Path, backbone: Path, data: Path, recipe_table: dict[str, Any]
) -> Iterator[Callable[..., Run]]:
    reporters = []

    def make(
        stages: Callable[[MultiExitModel, Recipe], list[Stage]], points: str = "resume", **loop: Any
    ) -> Run:
        recipe_table["loop"].update(loop)
        recipe = make_recipe(recipe_table)
        splits = load_splits(str(data))
        model = build_model(backbone, recipe.model, splits["train"].label_names, recipe.loop.seed)
        tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
        reporters.append(Reporter(tmp_path / "tensorboard"))
        return Run(
            recipe=recipe,
            model=prepare_model(make_accelerator(recipe.loop), model),
            stages=stages(model, recipe),
            train_rows=EncodedRows.of(splits["train"], tokenizer, model.pad_id),
            held_out=EncodedRows.of(splits["validation"], tokenizer, model.pad_id),
            accelerator=make_accelerator(recipe.loop),
            processes=ALONE,
            points=ResumePoints(tmp_path / points),
            reporter=reporters[-1],
            identity={"recipe": "this"},
        )

    yield make
    for reporter in reporters:
        reporter.__exit__()


def joint_stages(model: MultiExitModel, recipe: Recipe) -> list[Stage]:
    stages: list[Stage] = recipe.objective.stages(model, recipe)
    return stages


def test_joint_training_learns(make_run: Callable[..., Run]) -> None:
    run = make_run(joint_stages, epochs=15)
    before = exit_accuracies(run.model, run.held_out)
    train(run)
    after = exit_accuracies(run.model, run.held_out)
    assert max(before) < 0.75
    assert min(after) > 0.9
    assert list((run.points.directory.parent / "tensorboard").iterdir())


def test_a_stage_trains_its_own_parameters_and_sees_every_row_each_epoch(
    make_run: Callable[..., Run],
) -> None:
    run = make_run(lambda model, recipe: [Heads(model, 2), Heads(model, 1)])
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    train(run)
    first, second = run.stages
    assert isinstance(first, Heads)
    assert isinstance(second, Heads)
    assert first.calls == ["prepare", "epoch 0", "epoch 1"]
    assert second.calls == ["prepare", "epoch 0"]
    assert set(first.seen.values()) == {2}
    assert first.steps == list(range(0, 40, 2))
    for name, value in run.model.state_dict().items():
        assert torch.equal(value, before[name]) == name.startswith("backbone.")


@pytest.fixture
def evaluated(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, dict[str, torch.Tensor]]]:
    """Mean accuracy and weights of every evaluation on held-out rows."""
    seen: list[tuple[float, dict[str, torch.Tensor]]] = []

    def spy(model: MultiExitModel, rows: EncodedRows, processes: Processes) -> list[float]:
        accuracies = exit_accuracies(model, rows, processes)
        weights = {name: value.clone() for name, value in model.state_dict().items()}
        seen.append((sum(accuracies) / len(accuracies), weights))
        return accuracies

    monkeypatch.setattr(loop, "exit_accuracies", spy)
    return seen


def spoiling(model: MultiExitModel, recipe: Recipe) -> list[Stage]:
    return [Spoiling(model, 50)]


def test_patience_stops_early_and_the_best_weights_stay(
    make_run: Callable[..., Run],
    evaluated: list[tuple[float, dict[str, torch.Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = make_run(spoiling, patience=2, evaluate_every_steps=1)
    train(run)
    assert run.position.steps < 40  # of 50 * 10 * 2
    assert run.position.stage == 1
    best = max(evaluated, key=lambda one: one[0])  # the first of equals
    assert evaluated.index(best) == len(evaluated) - 3
    assert not torch.equal(best[1]["exits.classifiers.0.weight"],
                           evaluated[-1][1]["exits.classifiers.0.weight"])  # fmt: skip
    assert_same_bits(state_of(run), best[1])
    assert "stopped: no better for 2 evaluations" in capsys.readouterr().err


def test_a_stage_without_it_keeps_the_newest_weights(
    make_run: Callable[..., Run], evaluated: list[tuple[float, dict[str, torch.Tensor]]]
) -> None:
    run = make_run(spoiling, patience=2, evaluate_every_steps=1)
    run.stages[0].keeps_best = False
    train(run)
    assert_same_bits(state_of(run), evaluated[-1][1])


@pytest.mark.parametrize("batches_before_the_end", [0, 1])
def test_a_resumed_run_has_the_patience_that_was_left(
    make_run: Callable[..., Run], batches_before_the_end: int
) -> None:
    settings: dict[str, Any] = {
        "patience": 3,
        "evaluate_every_steps": 1,
        "checkpoint_every_steps": 1,
    }
    whole = make_run(spoiling, "whole", **settings)
    train(whole)
    batches = whole.position.steps // 2
    killed_at(make_run(spoiling, **settings), batches - batches_before_the_end)
    resumed = make_run(spoiling, **settings)
    train(resumed)
    assert resumed.position.steps == whole.position.steps
    assert_same_bits(state_of(resumed), state_of(whole))


def test_a_stages_own_state_survives_a_kill(make_run: Callable[..., Run]) -> None:
    def weighing(model: MultiExitModel, recipe: Recipe) -> list[Stage]:
        return [Weighing(model, 2)]

    whole = make_run(weighing, "whole")
    train(whole)
    killed_at(make_run(weighing), 15)  # in epoch 1; the newest point is after batch 12
    resumed = make_run(weighing)
    train(resumed)
    one, two = whole.stages[0], resumed.stages[0]
    assert isinstance(one, Weighing)
    assert isinstance(two, Weighing)
    assert two.calls == []  # prepared and begun before the kill
    assert set(two.seen.values()) == {2}
    assert torch.equal(one.mean, two.mean)
    assert_same_bits(state_of(resumed), state_of(whole))


def test_a_run_resumed_after_its_time_ends_with_its_best_weights(
    make_run: Callable[..., Run],
    evaluated: list[tuple[float, dict[str, torch.Tensor]]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = {"evaluate_every_steps": 1, "checkpoint_every_steps": 1}
    killed_at(make_run(spoiling, **settings), 12)
    resumed = make_run(spoiling, max_minutes=1e-9, **settings)
    train(resumed)
    assert resumed.position.stage == 1
    best = max(evaluated, key=lambda one: one[0])
    assert best[0] > evaluated[-1][0]
    assert_same_bits(state_of(resumed), best[1])
    assert "stopped: out of time" in capsys.readouterr().err


def test_out_of_time_ends_the_run_with_what_there_is(make_run: Callable[..., Run]) -> None:
    run = make_run(joint_stages, epochs=500, max_minutes=1e-3)
    train(run)
    assert run.position.steps < 5000


def test_schedules() -> None:
    linear = OptimiserSection(warmup_ratio=0.2)
    factors = [lr_factor(step, 10, linear) for step in range(10)]
    assert factors == pytest.approx([0.5, 1, 1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125])
    cosine = OptimiserSection(warmup_ratio=0, schedule="cosine")
    assert [lr_factor(step, 4, cosine) for step in (0, 2, 4)] == pytest.approx([1, 0.5, 0])
    constant = OptimiserSection(warmup_ratio=0.5, schedule="constant")
    assert [lr_factor(step, 4, constant) for step in range(4)] == [0.5, 1, 1, 1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 is allowed with a device")
def test_half_precision_needs_a_device() -> None:
    with pytest.raises(RecipeError, match="fp16' needs a CUDA device; allowed here: no, bf16"):
        make_accelerator(make_recipe({"loop": {"precision": "fp16"}}).loop)
