"""The loop's promises to stages: order of calls, what moves, what is kept."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offramp_model.tokenizer import TextTokenizer
from offramp_training.batches import Batch, EncodedRows
from offramp_training.config import OptimiserSection, Recipe, make_recipe
from offramp_training.data import load_splits
from offramp_training.errors import RecipeError
from offramp_training.loop import Run, exit_accuracies, make_accelerator, train
from offramp_training.model import MultiExitModel, build_model
from offramp_training.objectives import Progress, Stage
from offramp_training.objectives.joint import joint_loss
from offramp_training.optimiser import lr_factor
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
            yield joint_loss(self.model.logits(batch), batch.labels, torch.ones(3), "sum")

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen = state["seen"]


@pytest.fixture
def make_run(
    tmp_path: Path, backbone: Path, data: Path, recipe_table: dict[str, Any]
) -> Iterator[Callable[..., Run]]:
    reporters = []

    def make(stages: Callable[[MultiExitModel, Recipe], list[Stage]], **loop: Any) -> Run:
        recipe_table["loop"].update(loop)
        recipe = make_recipe(recipe_table)
        splits = load_splits(str(data))
        model = build_model(backbone, recipe.model, splits["train"].label_names, recipe.loop.seed)
        tokenizer = TextTokenizer(backbone / "tokenizer.json", 16)
        reporters.append(Reporter(tmp_path / "tensorboard"))
        return Run(
            recipe=recipe,
            model=make_accelerator(recipe.loop).prepare_model(model),
            stages=stages(model, recipe),
            train_rows=EncodedRows.of(splits["train"], tokenizer, model.pad_id),
            held_out=EncodedRows.of(splits["validation"], tokenizer, model.pad_id),
            accelerator=make_accelerator(recipe.loop),
            points=ResumePoints(tmp_path / "resume"),
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


def test_patience_stops_early_and_the_best_weights_stay(make_run: Callable[..., Run]) -> None:
    class Spoiling(Heads):
        """Flips the last head's answers after each batch: every evaluation is worse."""

        def losses(self, batch: Batch, progress: Progress) -> Iterator[torch.Tensor]:
            for _ in range(2):
                yield -joint_loss(self.model.logits(batch), batch.labels, torch.ones(3), "sum")

    run = make_run(lambda model, recipe: [Spoiling(model, 50)], patience=2, evaluate_every_steps=1)
    train(run)
    assert run.position.steps < 40  # of 50 * 10 * 2
    assert run.position.stage == 1


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
