"""The recipe: everything that decides what `fit` does, read from TOML and checked before any work.

Holds values only. Does not know whether the data exist or how many layers the backbone has; what
depends on those is checked as soon as they are known, still before the first step.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    model_validator,
)

from offramp_model.config import PolicyOptions, Pooler, Pooling, ProblemType
from offramp_training.errors import RecipeError
from offramp_training.explain import explain
from offramp_training.objectives import OBJECTIVES, Objective, make_objective
from offramp_training.objectives.joint import Joint

DEFAULT_BACKBONE = "sentence-transformers/all-MiniLM-L6-v2"

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The encoder and its exits."""

    backbone: str = DEFAULT_BACKBONE  # hub name or local directory
    exit_layers: tuple[Count, ...] | None = None  # None: every layer
    pooling: Pooling = "mean"
    attention_heads: Count = 4  # of pooling = "attention"; each has its share of the width
    pooler: Pooler = "none"
    max_length: Annotated[int, Field(ge=4, le=8192)] = 128
    head_dropout: Share = 0.1
    # Keep the embeddings as they came. Half of a small encoder's parameters are there, and a third
    # of its training time on CPU goes into their gradients.
    freeze_embeddings: bool = False


class DataSection(Section):
    """Where the rows are and which of them are kept back."""

    path: str | None = None  # directory, .jsonl[.gz]/.csv/.parquet file, or hub name
    text: str = "text"
    text_pair: str = "text_pair"
    label: str = "label"
    # One label a row, or a set of them. None: sets where a row has a list of labels, or a CSV or
    # Parquet cell has names with a | between them.
    problem_type: ProblemType | None = None
    # Train rows kept back for early stopping and calibration. None: the validation split serves,
    # or, where there is none, a tenth of the training rows (2,000 at most).
    held_out: Count | None = None


class DistillationSection(Section):
    """Softer targets beside the labels, whatever the objective.

    `self_weight` of an exit's loss is its divergence from the same model's last exit (for those
    before that one), `teacher_weight` that from a teacher's last exit (for all); the rest is
    cross-entropy.
    """

    self_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    teacher: str | None = None  # directory of a finished checkpoint with the same labels
    teacher_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    temperature: Positive = 2.0  # of both targets and of the exits beside them
    # What the teacher is: all that its answers follow from (`teacher.hashes_of`). None: whatever
    # lies there; a checkpoint's record has it filled in.
    teacher_sha256: dict[str, str] | None = None

    @model_validator(mode="after")
    def _weights_and_teacher_agree(self) -> DistillationSection:
        if self.self_weight + self.teacher_weight > 1:
            raise ValueError(
                f"distillation.self_weight = {self.self_weight} and distillation.teacher_weight = "
                f"{self.teacher_weight}; allowed: at most 1 together"
            )
        if (self.teacher is None) != (self.teacher_weight == 0):
            raise ValueError(
                f"distillation.teacher = {self.teacher!r} and distillation.teacher_weight = "
                f"{self.teacher_weight}; allowed: a checkpoint with a weight above 0, or neither"
            )
        if self.teacher is None and self.teacher_sha256 is not None:
            raise ValueError(
                "distillation.teacher_sha256 without distillation.teacher; allowed: both, or the "
                "teacher alone"
            )
        return self

    @property
    def in_words(self) -> str:
        """What the exits learn from beside the labels; empty where that is nothing."""
        sources = []
        if self.self_weight:
            sources.append(f"the last exit (weight {self.self_weight:g})")
        if self.teacher is not None:
            sources.append(f"teacher {Path(self.teacher).name} (weight {self.teacher_weight:g})")
        return f"{' and '.join(sources)}, temperature {self.temperature:g}" if sources else ""


class OptimiserSection(Section):
    """AdamW and its schedule."""

    lr: Positive = 5e-5
    head_lr: Positive = 5e-4
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.01
    betas: tuple[Share, Share] = (0.9, 0.999)
    warmup_ratio: Annotated[float, Field(ge=0, le=1)] = 0.06
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    clip_norm: Positive = 1.0


class LoopSection(Section):
    """How long, how large, how often."""

    epochs: Count = 2
    batch_size: Count = 32
    batch_tokens: Count | None = None  # padded tokens a batch may hold; instead of batch_size
    precision: Literal["no", "bf16", "fp16"] = "no"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    evaluate_every_steps: Count | None = None  # None: after each epoch only
    patience: Count | None = None  # evaluations without a better mean accuracy before stopping
    max_train_rows: Count | None = None  # a seeded sample of the training rows
    checkpoint_every_steps: Count = 200  # how often a resume point is written
    max_minutes: Positive | None = None  # stop training after this long, keep the best so far
    threads: Count | None = None  # torch threads; None: torch's own choice


class Recipe(Section):
    """One training run."""

    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    objective: SerializeAsAny[Any] = Field(default_factory=Joint)  # an Objective
    distillation: DistillationSection = DistillationSection()
    policies: PolicyOptions = PolicyOptions()
    optimiser: OptimiserSection = OptimiserSection()
    loop: LoopSection = LoopSection()

    @model_validator(mode="after")
    def _exits_ascend(self) -> Recipe:
        layers = self.model.exit_layers
        if layers is not None and (not layers or list(layers) != sorted(set(layers))):
            raise ValueError(
                f"model.exit_layers = {list(layers)}; allowed: layer numbers in ascending order"
            )
        return self

    def as_dict(self) -> dict[str, Any]:
        """Every value, defaults included, ready for JSON."""
        return self.model_dump(mode="json")


def read_recipe(
    path: Path, overrides: Iterable[str] = (), *, objective: str | None = None
) -> Recipe:
    """The recipe in a TOML file, checked; see `read_table`."""
    return make_recipe(read_table(path, overrides, objective=objective))


def read_table(
    path: Path, overrides: Iterable[str] = (), *, objective: str | None = None
) -> dict[str, Any]:
    """The values of a recipe file with `section.key=value` overrides on top, not checked yet.

    Another `objective` than the file's has its own defaults: the file's options are none of its.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe") from None
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: not TOML: {error}") from None
    own = table.get("objective", {})
    if objective is not None and isinstance(own, dict) and own.get("name", "joint") != objective:
        table["objective"] = {"name": objective}
    for override in overrides:
        apply_override(table, override)
    return table


def make_recipe(table: dict[str, Any]) -> Recipe:
    """A checked recipe; a `RecipeError` names each wrong key, its value and what is allowed."""
    recipe = parse_recipe(table)
    refuse_without_effect([recipe])
    return recipe


def refuse_without_effect(recipes: Sequence[Recipe]) -> None:
    """No key may be given that does nothing in any of the recipes, which are the points of a sweep
    or one alone."""
    first, *others = (_without_effect(recipe) for recipe in recipes)
    for key, finding in first.items():
        if all(key in other for other in others):
            raise RecipeError(finding)


def _without_effect(recipe: Recipe) -> dict[str, str]:
    """Keys that were given and do nothing, with what is allowed. A default is passed over beside
    the key that it depends on: that is how records of runs have it."""
    model, soft = recipe.model, recipe.distillation
    found = {}
    for section, key, used, depends_on, allowed in (
        (
            model,
            "model.attention_heads",
            model.pooling == "attention",
            {"pooling"},
            f"with model.pooling = 'attention', which is {model.pooling!r}",
        ),
        (
            soft,
            "distillation.temperature",
            soft.self_weight + soft.teacher_weight > 0,
            {"self_weight", "teacher_weight"},
            "with distillation.self_weight or distillation.teacher_weight above 0",
        ),
    ):
        name = key.rpartition(".")[2]
        value, given = getattr(section, name), section.model_fields_set
        is_default = value == type(section).model_fields[name].default
        if name in given and not used and not (is_default and given & depends_on):
            found[key] = f"{key} = {value!r} has no effect; allowed: {allowed}"
    return found


def parse_recipe(table: dict[str, Any]) -> Recipe:
    """A recipe of allowed values, some of which may do nothing, as in the record of a run."""
    try:
        return Recipe.model_validate({**table, "objective": _make_objective(table)})
    except ValidationError as error:
        raise RecipeError(explain(error, Recipe, table)) from None


def _make_objective(table: dict[str, Any]) -> Objective:
    options = table.get("objective", {})
    if not isinstance(options, dict):
        raise RecipeError(f"objective = {options!r}; allowed: a table with a name and its options")
    try:
        return make_objective(options)
    except ValidationError as error:
        objective = OBJECTIVES[options.get("name", "joint")]
        raise RecipeError(explain(error, objective, options, "objective.")) from None
    except ValueError as error:
        raise RecipeError(str(error)) from None


def apply_override(table: dict[str, Any], override: str) -> None:
    """Set `a.b=value` in a nested table; the value is TOML, or a bare string where it is not."""
    key, equals, text = override.partition("=")
    if not equals or not all(part.strip() for part in key.split(".")):
        raise RecipeError(f"--set {override}: allowed: section.key=value, e.g. loop.epochs=3")
    try:
        set_value(table, key, toml_value(text.strip()))
    except RecipeError as error:
        raise RecipeError(f"--set {override}: {error}") from None


def set_value(table: dict[str, Any], key: str, value: Any) -> None:
    """Set the nested `a.b` of a table; sections that are not there yet are made."""
    *sections, last = (part.strip() for part in key.split("."))
    for part in sections:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise RecipeError(f"{part} is a value, not a section")
    table[last] = value


def toml_value(text: str) -> Any:
    """A value as TOML reads it. A bare word is a string, so that a shell's quotes are enough."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


__all__ = [
    "DEFAULT_BACKBONE",
    "DataSection",
    "DistillationSection",
    "LoopSection",
    "ModelSection",
    "OptimiserSection",
    "Recipe",
    "apply_override",
    "make_recipe",
    "parse_recipe",
    "read_recipe",
    "read_table",
    "refuse_without_effect",
    "set_value",
    "toml_value",
]
