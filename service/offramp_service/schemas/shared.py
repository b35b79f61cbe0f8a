"""What bodies of all doors have in common: the controls of early exit, and how a text left."""

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

Activation = Literal["softmax", "sigmoid", "none"]
"""What makes scores of logits."""


class Asked(Struct, kw_only=True):
    """Controls as a body carried them; None where it was silent."""

    speedup: Annotated[
        float | None, Meta(description="target compute ratio in layers; 1 = never leave early")
    ] = None
    threshold: Annotated[
        float | None, Meta(description="raw threshold of the exit policy; overrides speedup")
    ] = None
    max_accuracy_drop: Annotated[
        float | None,
        Meta(
            description="instead of speedup: the fastest whose accuracy on held-out rows is at "
            "most so much below full depth"
        ),
    ] = None
    min_layer: Annotated[int | None, Meta(description="earliest exit, 1-based")] = None
    max_layer: Annotated[int | None, Meta(description="latest exit, 1-based")] = None
    deadline_ms: Annotated[
        int | None, Meta(description="504 where no answer can be or was given within so long")
    ] = None
    priority: Annotated[int, Meta(description="lower is sooner")] = 0
    top_k: Annotated[int | None, Meta(description="the best so many labels only")] = None
    return_details: Annotated[bool, Meta(description="say of each text how it left")] = False


class Timings(Struct):
    """Milliseconds."""

    tokenization: float
    queue: float
    inference: float
    total: float


class ExitSignal(Struct):
    """What the exit policy compared after a layer; null where that was no number."""

    exit_layer: int
    exit_signal: float | None


class Details(Struct):
    """How a text left. `threshold` is null where it could not leave early; `signals` is there if
    `return_signals` was, and ends where the text left."""

    exit_layer: int
    num_layers: int
    exit_signal: float | None
    threshold: float | None
    timings_ms: Timings
    signals: list[ExitSignal] | UnsetType = UNSET


class Scored(Struct):
    """A label and its score, in TEI's order of fields."""

    score: float
    label: str
