"""The teacher of a distilled run: a finished checkpoint, checked before any training and run once
over the training rows.

It answers with its last exit, on the stack that serves and with its own tokenizer, so it may be of
any family, depth and width; only its labels must be the run's. Its answers follow from its files
and the rows: they are made anew when a run goes on, and no resume point holds them. Knows nothing
about losses.
"""

from __future__ import annotations

import torch

from offramp_model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from offramp_model.recorded import record_exits
from offramp_training.config import DistillationSection, Recipe
from offramp_training.data import Dataset
from offramp_training.errors import RecipeError
from offramp_training.objectives.row_losses import Distillation, RowLogits
from offramp_training.processes import ALONE, Processes
from offramp_training.progress import rows_bar


def pin_teacher(recipe: Recipe, labels: tuple[str, ...]) -> Recipe:
    """The recipe with its teacher's hashes filled in: what the teacher is, wherever it lies.

    Raises:
        RecipeError: there is no such teacher, or it is one of other labels or other weights.
    """
    if recipe.distillation.teacher is None:
        return recipe
    hashes = _open(recipe.distillation, recipe.distillation.teacher, labels).manifest.sha256
    section = recipe.distillation.model_copy(update={"teacher_sha256": hashes})
    return recipe.model_copy(update={"distillation": section})


def make_distillation(
    section: DistillationSection, rows: Dataset, device: torch.device, processes: Processes = ALONE
) -> Distillation:
    """What a run's stages share; the main process runs the teacher, if there is one, over all of
    `rows`."""
    teacher, logits = None, None
    if section.teacher is not None:
        with processes.agreeing():
            if processes.is_main:
                checkpoint = _open(section, section.teacher, rows.label_names)
                logits = last_exit(checkpoint, rows, device)
        logits = processes.mains(logits)
    if logits is not None:
        teacher = RowLogits([row.id for row in rows.rows], logits)
    return Distillation(section.self_weight, section.teacher_weight, section.temperature, teacher)


def last_exit(checkpoint: Checkpoint, rows: Dataset, device: torch.device) -> torch.Tensor:
    """Logits of a checkpoint's last exit for every row, without dropout: float32 [N, C], CPU."""
    encodings = checkpoint.tokenizer().encode(rows.inputs)
    with rows_bar("rows through the teacher", len(rows)) as progress:
        stack = checkpoint.stack(device=device)
        recorded = record_exits(stack, encodings, device=device, last_only=True, progress=progress)
    return recorded.logits[-1]


def _open(section: DistillationSection, path: str, labels: tuple[str, ...]) -> Checkpoint:
    where = f"distillation.teacher = {path!r}"
    try:
        checkpoint = load_checkpoint(path)
    except CheckpointError as error:
        raise RecipeError(f"{where}: {error}; allowed: the directory of a checkpoint") from None
    if checkpoint.model.labels != labels:
        raise RecipeError(
            f"{where}: its labels are {', '.join(checkpoint.model.labels)}; allowed: those of the "
            f"data in their order, {', '.join(labels)}"
        )
    hashes = checkpoint.manifest.sha256
    if section.teacher_sha256 is not None and section.teacher_sha256 != hashes:
        raise RecipeError(
            f"distillation.teacher_sha256 = {section.teacher_sha256}; allowed: none, or those of "
            f"{path}, {hashes}"
        )
    return checkpoint
