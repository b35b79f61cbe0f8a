"""What a multi-exit model is: depth, exits, heads and labels.

Plain validated data. It knows nothing about weights, files, training or requests.
"""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Pooling = Literal["cls", "mean", "mean_cls", "max_mean", "attention"]
Pooler = Literal["shared", "per_exit", "none"]
ProblemType = Literal["single_label_classification", "multi_label_classification"]
"""One class of several, by softmax; or any number of labels, each by its own sigmoid. The names are
those of `problem_type` in Hugging Face's configs."""

MOST_LABELS_OF_SETS = 63
"""Of a multi-label model: a set of labels is the bits of an int64 (`labels.py`)."""


class PolicyOptions(BaseModel):
    """What exit policies are made of beside their thresholds; one set for a model.

    `temperature` softens the probabilities that confidence, margin, entropy and energy look at:
    softmax(z / T). Votes are divided by `l^vote_exponent`; a row that no vote let go takes the
    label of the last exit or, by `vote_fallback`, of the majority.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    vote_exponent: Annotated[float, Field(ge=0, lt=1)] = 0.75
    vote_fallback: Literal["last", "majority"] = "last"


class MultiExitConfig(BaseModel):
    """The shape of a multi-exit classifier.

    Exit layers are 1-based and ascending, and the last one is the last layer: every text has
    left by then. `labels` is ordered by label id; a model of one label answers yes or no, and is
    a multi-label one, as a softmax over one class says nothing. `attention_heads` is for
    `attention` pooling only and divides the hidden size. `gate_hidden` is the inner width of the
    learned gates beside the exit heads: 0 is a single linear map, None is a model without gates.
    `policies` is what exit policies are made of, in calibration and in serving alike.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    num_layers: Annotated[int, Field(ge=1)]
    hidden_size: Annotated[int, Field(ge=1)]
    exit_layers: tuple[int, ...]
    labels: tuple[str, ...]
    problem_type: ProblemType = "single_label_classification"
    pooling: Pooling = "mean"
    attention_heads: Annotated[int, Field(ge=1)] = 4
    pooler: Pooler = "none"
    max_length: Annotated[int, Field(ge=2)] = 128
    head_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.1
    gate_hidden: Annotated[int, Field(ge=0)] | None = None
    policies: PolicyOptions = PolicyOptions()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.exit_layers:
            raise ValueError("exit_layers is empty: a model needs at least its last exit")
        if list(self.exit_layers) != sorted(set(self.exit_layers)) or self.exit_layers[0] < 1:
            raise ValueError(
                f"exit_layers {self.exit_layers} must be ascending, without repeats, from 1 on"
            )
        if self.exit_layers[-1] != self.num_layers:
            raise ValueError(
                f"the last exit is at layer {self.exit_layers[-1]}, "
                f"but it must be at the last layer, {self.num_layers}"
            )
        self._check_labels()
        if self.pooling == "attention" and self.hidden_size % self.attention_heads:
            raise ValueError(
                f"attention_heads = {self.attention_heads} does not divide hidden_size = "
                f"{self.hidden_size}"
            )
        if self.has_gates and self.num_exits < 2:
            raise ValueError("gates choose between exits, but there is only the last one")
        return self

    def _check_labels(self) -> None:
        distinct = len(set(self.labels)) == len(self.labels)
        if not self.is_multi_label:
            if len(self.labels) < 2 or not distinct:
                raise ValueError(
                    f"labels must be at least two different names, got {self.labels}; a single "
                    "label goes with problem_type multi_label_classification"
                )
            return
        if not 1 <= len(self.labels) <= MOST_LABELS_OF_SETS or not distinct:
            raise ValueError(
                f"labels of a multi-label model must be 1 to {MOST_LABELS_OF_SETS} different "
                f"names, got {len(self.labels)}: {self.labels}"
            )
        if self.has_gates:
            raise ValueError("gates are learned for one label a text, not for multi-label models")

    @property
    def is_multi_label(self) -> bool:
        """Is the answer a set of labels, rather than one?"""
        return self.problem_type == "multi_label_classification"

    @property
    def num_labels(self) -> int:
        """Number of classes, C."""
        return len(self.labels)

    @property
    def num_exits(self) -> int:
        """Number of exit heads, E."""
        return len(self.exit_layers)

    @property
    def pooled_size(self) -> int:
        """Width of what pooling gives, P: H, or 2H where it joins two forms."""
        return self.hidden_size * (2 if self.pooling in ("mean_cls", "max_mean") else 1)

    @property
    def state_size(self) -> int:
        """Width of what classifiers and gates see, W: a pooler maps P to H, without one it is P."""
        return self.pooled_size if self.pooler == "none" else self.hidden_size

    @property
    def pooling_form(self) -> str:
        """The pooling with what belongs to it, for messages and reports."""
        heads = f" ({self.attention_heads} heads)" if self.pooling == "attention" else ""
        return self.pooling + heads

    @property
    def has_gates(self) -> bool:
        """Is there a learned gate at every exit but the last?"""
        return self.gate_hidden is not None

    def segment(self, exit_layer: int) -> range:
        """0-based layers after the previous exit, up to and with the one before this exit.

        Raises:
            ValueError: there is no exit after that layer.
        """
        index = self.exit_index(exit_layer)
        return range(self.exit_layers[index - 1] if index else 0, exit_layer)

    def exit_index(self, exit_layer: int) -> int:
        """0-based position of an exit layer among the exits.

        Raises:
            ValueError: there is no exit after that layer.
        """
        try:
            return self.exit_layers.index(exit_layer)
        except ValueError:
            raise ValueError(
                f"no exit after layer {exit_layer}; exits are after {self.exit_layers}"
            ) from None
