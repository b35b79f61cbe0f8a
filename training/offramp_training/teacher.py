"""The teacher of a distilled run: a finished checkpoint, checked before any training and run once
over the training rows.

It answers with its last exit, on the stack that serves and with its own tokenizer, so it may be of
any family, depth and width; only its labels must be the run's. Its answers follow from its files
and the rows: they are made anew when a run goes on, and no resume point holds them. Knows nothing
about losses, nor when they are needed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from offramp_model.checkpoint import (
    BACKBONE,
    CONFIG,
    EXITS,
    MANIFEST,
    TOKENIZER,
    Checkpoint,
    CheckpointError,
    file_sha256,
    load_checkpoint,
)
from offramp_model.config import ProblemType
from offramp_model.recorded import record_exits
from offramp_training.config import DistillationSection, Recipe
from offramp_training.data import Dataset
from offramp_training.errors import RecipeError
from offramp_training.objectives.row_losses import Distillation, RowLogits
from offramp_training.processes import ALONE, Processes
from offramp_training.progress import rows_bar


def open_teacher(
    recipe: Recipe,
    labels: tuple[str, ...],
    problem_type: ProblemType = "single_label_classification",
) -> tuple[Recipe, Checkpoint | None]:
    """The teacher, if there is one, and the recipe with its hashes filled in: what it is, wherever
    it lies.

    Raises:
        RecipeError: there is no such teacher, it cannot run, or it is one of other labels or not
            the one that the recipe demands.
    """
    section = recipe.distillation
    if section.teacher is None:
        return recipe, None
    with _naming(section.teacher):
        teacher = load_checkpoint(section.teacher)
    if teacher.model.labels != labels:
        raise RecipeError(
            f"distillation.teacher = {section.teacher!r}: its labels are "
            f"{', '.join(teacher.model.labels)}; allowed: those of the data in their order, "
            f"{', '.join(labels)}"
        )
    if teacher.model.problem_type != problem_type:
        raise RecipeError(
            f"distillation.teacher = {section.teacher!r}: its problem_type is "
            f"{teacher.model.problem_type}; allowed: that of the data, {problem_type}"
        )
    with _naming(section.teacher):
        teacher.stack()  # not kept: that it can be made is all that matters so early
        hashes = hashes_of(teacher)
    if section.teacher_sha256 is not None and section.teacher_sha256 != hashes:
        raise RecipeError(
            f"distillation.teacher_sha256 = {section.teacher_sha256}; allowed: none, or those of "
            f"{section.teacher}, {hashes}"
        )
    section = section.model_copy(update={"teacher_sha256": hashes})
    return recipe.model_copy(update={"distillation": section}), teacher


def hashes_of(teacher: Checkpoint) -> dict[str, str]:
    """Sha256 of all that its answers follow from: weights, tokenizer, and the shape of encoder and
    exits. The rest of its manifest, tables and reports, plays no part."""
    model = json.dumps(teacher.model.model_dump(mode="json"), sort_keys=True)
    return {
        **{name: teacher.manifest.sha256[name] for name in (BACKBONE, EXITS)},
        **{name: file_sha256(teacher.directory / name) for name in (CONFIG, TOKENIZER)},
        f"{MANIFEST}:model": hashlib.sha256(model.encode()).hexdigest(),
    }


def make_distillation(
    section: DistillationSection,
    teacher: Checkpoint | None,
    rows: Dataset,
    device: torch.device,
    processes: Processes = ALONE,
) -> Distillation:
    """What a run's stages share; the main process runs the teacher, if there is one, over all of
    `rows`."""
    answers, logits = None, None
    if teacher is not None:
        with processes.agreeing():
            if processes.is_main:
                with _naming(str(section.teacher)):
                    logits = last_exit(teacher, rows, device)
        logits = processes.mains(logits)
    if logits is not None:
        answers = RowLogits([row.id for row in rows.rows], logits)
    return Distillation(
        section.self_weight,
        section.teacher_weight,
        section.temperature,
        answers,
        rows.problem_type,
    )


def last_exit(checkpoint: Checkpoint, rows: Dataset, device: torch.device) -> torch.Tensor:
    """Logits of a checkpoint's last exit for every row, without dropout: float32 [N, C], CPU."""
    encodings = checkpoint.tokenizer().encode(rows.inputs)
    with rows_bar("rows through the teacher", len(rows)) as progress:
        stack = checkpoint.stack(device=device)
        recorded = record_exits(stack, encodings, last_only=True, progress=progress)
    return recorded.logits[-1]


@contextmanager
def _naming(path: str) -> Iterator[None]:
    """What is wrong with the files, said of the recipe's key."""
    try:
        yield
    except (CheckpointError, OSError) as error:
        raise RecipeError(
            f"distillation.teacher = {path!r}: {error}; allowed: the directory of a checkpoint"
        ) from None
