"""`offramp-train fit`: from a recipe and data to a checkpoint that is ready to serve.

Wiring only. Every check that can fail does so before the first step. All that it writes lies in
`<output>.fit` beside the output (resume points, TensorBoard, at last the checkpoint); the output
directory appears whole, when all is done. Of several processes, each prepares and trains; the main
one alone writes, calibrates and evaluates. Knows nothing about losses or steps.
"""

from __future__ import annotations

import importlib.metadata
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from offramp_model.checkpoint import (
    MANIFEST,
    DataRecord,
    Manifest,
    ObjectiveRecord,
    load_checkpoint,
    write_checkpoint,
)
from offramp_model.tokenizer import TextTokenizer
from offramp_training import seeds
from offramp_training.backbone import resolve_backbone
from offramp_training.batches import EncodedRows
from offramp_training.calibrate import calibrate_checkpoint
from offramp_training.card import model_card
from offramp_training.config import Recipe
from offramp_training.data import (
    Columns,
    Dataset,
    check_classes,
    default_held_out,
    hold_out,
    load_splits,
    sample,
)
from offramp_training.errors import DataError, OutputError, RecipeError
from offramp_training.evaluate import evaluate_checkpoint, store_report
from offramp_training.first_stage import FirstStage
from offramp_training.loop import Run, make_accelerator, make_processes, prepare_model, train
from offramp_training.model import (
    MultiExitModel,
    build_model,
    load_tokenizer,
    save_tokenizer,
)
from offramp_training.objectives import MULTI_LABEL_OBJECTIVES, Stage
from offramp_training.progress import Reporter
from offramp_training.resume import ResumePoints
from offramp_training.teacher import make_distillation, open_teacher

# Settings that may change when a run goes on: how often it is saved, when it must stop, how many
# threads it gets. The last two show in the weights, but they are the machine's, not the run's.
NOT_IDENTITY = ("checkpoint_every_steps", "max_minutes", "threads")

UNTRAINED_POLICY = "entropy"
"""Of a checkpoint that lacks stages: looks at logits alone."""


@dataclass(frozen=True)
class FitData:
    """The rows of one run: to learn from, to stop and calibrate by, and to report on."""

    name: str
    train: Dataset
    held_out: Dataset
    report: Dataset  # the validation split where it was not needed as held-out rows


def fit(
    recipe: Recipe,
    output: Path,
    *,
    data: str | None = None,
    overwrite: bool = False,
    calibrate: bool = True,
    first_stage: FirstStage | None = None,
) -> Path:
    """Trains, writes the checkpoint and, unless told not to, calibrates and evaluates it.

    `first_stage` is where runs with the same `first_stage_identity` leave the end of that stage for
    each other; the result is the same without it.
    """
    accelerator = make_accelerator(recipe.loop)
    processes = make_processes(accelerator)
    with processes.agreeing():
        work = _check_output(output, overwrite)
        if recipe.loop.threads is not None:
            torch.set_num_threads(recipe.loop.threads)
        rows = choose_rows(recipe, data)
        _check_objective(recipe, rows)
        recipe, teacher = open_teacher(recipe, rows.train.label_names, rows.train.problem_type)
        backbone = resolve_backbone(recipe.model.backbone)
        model = _model(recipe, backbone, rows)
        tokenizer = load_tokenizer(backbone, model)
        stages = _stages(recipe, model, rows)
    points = ResumePoints(work / "resume")
    with processes.agreeing():
        if processes.is_main:
            _start_work(work, points, overwrite)
            save_tokenizer(tokenizer, backbone, work / "tokenizer")
    text_tokenizer = TextTokenizer(work / "tokenizer" / "tokenizer.json", recipe.model.max_length)
    model = prepare_model(accelerator, model)
    if not processes.is_main:  # all were seeded alike, and would all drop the same units
        torch.manual_seed(seeds.number(recipe.loop.seed, "dropout", processes.rank))
    with Reporter(work / "tensorboard", silent=not processes.is_main) as reporter:
        run = Run(
            recipe=recipe,
            model=model,
            stages=stages,
            train_rows=EncodedRows.of(rows.train, text_tokenizer, model.pad_id),
            held_out=EncodedRows.of(rows.held_out, text_tokenizer, model.pad_id),
            points=points,
            reporter=reporter,
            identity=run_identity(recipe, rows) | {"number of processes": processes.count},
            accelerator=accelerator,
            processes=processes,
            first_stage=first_stage,
            distillation=cache(
                lambda: make_distillation(
                    recipe.distillation, teacher, rows.train, model.device, processes
                )
            ),
        )
        train(run)
    with processes.agreeing():
        if processes.is_main:
            untrained = tuple(stage.name for stage in stages[run.position.stage :])
            made = _write(_manifest(recipe, rows, model, untrained), model, work)
            if calibrate:
                checkpoint = calibrate_checkpoint(load_checkpoint(made), rows.held_out)
                report = evaluate_checkpoint(checkpoint, rows.report)
                store_report(checkpoint, report, rows.report.split)
            _publish(made, output, work)
    return output


def check_recipe(recipe: Recipe, rows: FitData) -> Recipe:
    """What only the backbone and a teacher can tell about a recipe; writes nothing. Returns it with
    the teacher's hashes filled in.

    Raises:
        TrainingError: `fit` would refuse it before the first step.
    """
    _check_objective(recipe, rows)
    recipe, _ = open_teacher(recipe, rows.train.label_names, rows.train.problem_type)
    backbone = resolve_backbone(recipe.model.backbone)
    model = _model(recipe, backbone, rows)
    load_tokenizer(backbone, model)
    _stages(recipe, model, rows)
    make_accelerator(recipe.loop)
    return recipe


def choose_rows(recipe: Recipe, data: str | None) -> FitData:
    """Training and held-out rows as the recipe wants them; the same for the same recipe."""
    source = data or recipe.data.path
    if source is None:
        raise RecipeError("no data: give --data PATH or set data.path in the recipe")
    columns = Columns(recipe.data.text, recipe.data.text_pair, recipe.data.label)
    wanted = ("train", "validation")
    splits = load_splits(source, columns, splits=wanted, problem_type=recipe.data.problem_type)
    if not splits.get("train"):
        raise DataError(f"{source}: no training rows; it has: {', '.join(splits)}")
    seed, train_rows, validation = recipe.loop.seed, splits["train"], splits.get("validation")
    count = recipe.data.held_out
    if count is None and validation is None:
        count = default_held_out(train_rows)
    held_out = validation
    check_classes(train_rows, f"{source}: train", columns.label)
    if count is not None:
        train_rows, held_out = hold_out(train_rows, count, seed)
        check_classes(train_rows, f"data.held_out = {count}", columns.label)
    most = recipe.loop.max_train_rows
    train_rows = sample(train_rows, most, seed)
    check_classes(train_rows, f"loop.max_train_rows = {most}", columns.label)
    if held_out is None or not held_out.rows:
        raise DataError(f"{source}: the validation split is empty; set data.held_out")
    if train_rows.fingerprint == held_out.fingerprint:
        raise DataError(f"{source}: the validation rows are the training rows; set data.held_out")
    return FitData(Path(source).name, train_rows, held_out, validation or held_out)


def is_finished(output: Path) -> bool:
    """Is there a checkpoint, and no run that would go on and replace it?"""
    return (output / MANIFEST).exists() and not ResumePoints(_work(output) / "resume")


def _work(output: Path) -> Path:
    return output.with_name(output.name + ".fit")


def _check_output(output: Path, overwrite: bool) -> Path:
    """The directory to work in, beside the output. Nothing is written or deleted here."""
    if output.name in ("", ".."):
        raise OutputError(f"--output {output}: allowed: a path that ends in a name")
    work = _work(output)
    finished = (output / MANIFEST).exists()
    if is_finished(output) and not overwrite:
        raise OutputError(f"{output} holds a finished checkpoint; allowed with --overwrite")
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output} is a file; a directory is needed")
    if output.is_mount():
        raise OutputError(f"{output} is a mount point; give a directory below it")
    if output.is_dir() and any(output.iterdir()) and not finished:
        raise OutputError(f"{output} is not empty and not a checkpoint; give a new directory")
    return work


def _start_work(work: Path, points: ResumePoints, overwrite: bool) -> None:
    """Clears all that an earlier run left, but what it is to go on from."""
    if overwrite or not points:
        shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{work}: {error.strerror}") from None


def _check_objective(recipe: Recipe, rows: FitData) -> None:
    name = recipe.objective.name
    if rows.train.is_multi_label and name not in MULTI_LABEL_OBJECTIVES:
        raise RecipeError(
            f"objective.name = {name!r}; it is for one label a row and these rows have sets of "
            f"labels, allowed: {', '.join(MULTI_LABEL_OBJECTIVES)}"
        )


def _model(recipe: Recipe, backbone: Path, rows: FitData) -> MultiExitModel:
    labels, seed = rows.train.label_names, recipe.loop.seed
    return build_model(
        *(backbone, recipe.model, labels, seed, recipe.policies),
        problem_type=rows.train.problem_type,
    )


def _stages(recipe: Recipe, model: MultiExitModel, rows: FitData) -> list[Stage]:
    if recipe.distillation.self_weight > 0 and model.config.num_exits < 2:
        raise RecipeError(
            f"distillation.self_weight = {recipe.distillation.self_weight}; no exit comes before "
            f"the last of model.exit_layers = {list(model.config.exit_layers)}, allowed: 0"
        )
    try:
        stages: list[Stage] = recipe.objective.stages(model, recipe)
    except RecipeError:
        raise
    except ValueError as error:
        raise RecipeError(str(error)) from None
    for stage in stages:
        batch_size = stage.batch_size or recipe.loop.batch_size
        if stage.drop_incomplete and batch_size > len(rows.train):
            raise RecipeError(
                f"loop.batch_size = {batch_size}; {recipe.objective.name} leaves out incomplete "
                f"batches and there are {len(rows.train)} training rows, allowed: up to that"
            )
    return stages


def run_identity(recipe: Recipe, rows: FitData) -> dict[str, Any]:
    """What must be the same for a run to go on, ready for JSON. The recipe has its teacher's hashes
    filled in, here and below."""
    table = recipe.as_dict()
    for key in NOT_IDENTITY:
        del table["loop"][key]
    return _identity(table, rows)


def first_stage_identity(recipe: Recipe, rows: FitData) -> dict[str, Any]:
    """What two runs must have in common for the same first stage to the bit, ready for JSON."""
    table = recipe.as_dict()
    for key in NOT_IDENTITY:
        if key != "threads":
            del table["loop"][key]
    for key in recipe.objective.not_in_first_stage:
        del table["objective"][key]
    return _identity(table, rows)


def _identity(table: dict[str, Any], rows: FitData) -> dict[str, Any]:
    del table["data"]["path"]  # the rows count, not where they lie
    teacher = table["distillation"].pop("teacher")  # likewise
    hashes = table["distillation"].pop("teacher_sha256")
    if (teacher is None) != (hashes is None):
        raise ValueError(f"no identity without the hashes of distillation.teacher = {teacher!r}")
    return {
        "teacher": hashes,
        "recipe": table,
        "training data": rows.train.ordered_fingerprint,
        "held-out data": rows.held_out.ordered_fingerprint,
    }


def _write(manifest: Manifest, model: MultiExitModel, work: Path) -> Path:
    """The checkpoint, still among the files of the run."""
    made = work / "checkpoint"

    def fill(directory: Path) -> None:
        model.save_backbone(directory)
        shutil.copytree(work / "tokenizer", directory, dirs_exist_ok=True)
        (directory / "README.md").write_text(model_card(manifest), encoding="utf-8")

    shutil.rmtree(made, ignore_errors=True)  # of a run that was killed while it calibrated
    write_checkpoint(made, fill=fill, exits=model.exit_tensors(), manifest=manifest)
    return made


def _publish(made: Path, output: Path, work: Path) -> None:
    """Two renames put the new checkpoint in the place of an older one, if there is one."""
    shutil.copytree(work / "tensorboard", made / "tensorboard")
    if output.exists():
        shutil.rmtree(work / "replaced", ignore_errors=True)
        output.rename(work / "replaced")
    made.rename(output)
    # At once: resume points of which a part is deleted would be an unfinished run that is damaged.
    if (work / "resume").exists():  # not where there was no time for a single step
        (work / "resume").rename(work / "done")
    shutil.rmtree(work)


def _manifest(
    recipe: Recipe, rows: FitData, model: MultiExitModel, untrained: tuple[str, ...]
) -> Manifest:
    objective = recipe.objective
    table = recipe.as_dict()
    del table["data"]["path"]
    if recipe.distillation.teacher is not None:  # its hashes say which it was, wherever it lies
        table["distillation"]["teacher"] = Path(recipe.distillation.teacher).resolve().name
    packages = ("offramp", "torch", "transformers", "accelerate", "tokenizers", "safetensors")
    return Manifest(
        model=model.config,
        # What the objective's own policy looks at may be what time was too short for.
        exit_policy=UNTRAINED_POLICY if untrained else objective.exit_policy,
        exit_threshold=None if untrained else objective.exit_threshold,
        objective=ObjectiveRecord(
            name=objective.name, parameters=table, untrained_stages=untrained
        ),
        seed=recipe.loop.seed,
        data=DataRecord(
            name=rows.name,
            train_rows=len(rows.train),
            train_fingerprint=rows.train.fingerprint,
            held_out_rows=len(rows.held_out),
            held_out_fingerprint=rows.held_out.fingerprint,
        ),
        versions={package: importlib.metadata.version(package) for package in packages},
    )
