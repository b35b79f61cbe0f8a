"""`offramp-train export --format final-head`: a plain directory that other servers load.

Backbone and last exit head as transformers' own `...ForSequenceClassification`, no exits. Those
classes pool the first token and put a dense layer and an activation before the classifier: tanh in
the BERT and RoBERTa lines, GELU in ELECTRA, ReLU in DistilBERT. A head with a pooler is that, where
the activation is tanh. A head without one gets a dense layer that changes nothing: in front of tanh
it is so small that tanh is the identity, in front of the others it lifts values to where they are,
and the classifier undoes it, all within float32's rounding. Other poolings have no such form.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from offramp_model.checkpoint import BACKBONE, Checkpoint, CheckpointError
from offramp_model.config import MultiExitConfig
from offramp_training.errors import OutputError
from offramp_training.export import copy_others


@dataclass(frozen=True)
class _Form:
    """Where a class of transformers keeps its head: names of the two layers, and whether the
    activation between them is tanh."""

    dense: str
    classifier: str
    is_tanh: bool


_ROBERTA = _Form("classifier.dense", "classifier.out_proj", is_tanh=True)
FORMS: Mapping[str, _Form] = {
    "bert": _Form("bert.pooler.dense", "classifier", is_tanh=True),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "electra": _Form("classifier.dense", "classifier.out_proj", is_tanh=False),
    "distilbert": _Form("pre_classifier", "classifier", is_tanh=False),
}

_SMALL = 2.0**-10  # tanh(x · 2^-10) = x · 2^-10, to 3e-7 of it at x = 1
_LIFT = 64.0  # above what any feature of a normed state is below zero


def export_final_head(checkpoint: Checkpoint, output: Path) -> None:
    """Write the directory, whole or not at all.

    Raises:
        OutputError: the head has no such form, or there is something at `output`.
        CheckpointError: the checkpoint holds ONNX graphs.
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    model = checkpoint.model
    if checkpoint.backend != "torch":
        raise CheckpointError(f"{checkpoint.directory} holds ONNX graphs and no {BACKBONE}")
    form = FORMS[checkpoint.backbone["model_type"]]
    _check(model, form, checkpoint.backbone["model_type"])
    if output.exists() and any(output.iterdir()):
        raise OutputError(f"{output} already exists and is not empty")
    config = AutoConfig.from_pretrained(checkpoint.directory)
    config.id2label = dict(enumerate(model.labels))
    config.label2id = {label: index for index, label in enumerate(model.labels)}
    config.problem_type = model.problem_type
    classifier = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    _load_backbone(classifier, checkpoint.directory / BACKBONE)
    _load_head(classifier, checkpoint, form)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as name:
        part = Path(name) / "model"
        part.mkdir()
        copy_others(checkpoint.directory, part)
        for ours in ("README.md", "curve.png"):  # they speak of exits
            (part / ours).unlink(missing_ok=True)
        classifier.save_pretrained(part)
        for file in part.iterdir():
            file.chmod(0o644)
        if output.exists():
            output.rmdir()
        part.rename(output)


def _check(model: MultiExitConfig, form: _Form, family: str) -> None:
    if model.pooling != "cls":
        raise OutputError(
            f"--format final-head: pooling {model.pooling} has no form in transformers' "
            "classes, which pool the first token; allowed: cls"
        )
    if model.pooler != "none" and not form.is_tanh:
        raise OutputError(
            f"--format final-head: a {model.pooler} pooler ends in tanh, and transformers' class "
            f"for {family} has another activation there; allowed: pooler none"
        )


def _load_backbone(classifier: Any, weights: Path) -> None:
    outcome = classifier.base_model.load_state_dict(load_file(weights), strict=False)
    missing = [name for name in outcome.missing_keys if not name.startswith("pooler.")]
    if missing:
        raise CheckpointError(f"{weights} has no {missing[0]}")


@torch.no_grad()
def _load_head(classifier: nn.Module, checkpoint: Checkpoint, form: _Form) -> None:
    tensors, model = checkpoint.heads().state_dict(), checkpoint.model
    width, last = model.hidden_size, model.num_exits - 1
    weight, bias = tensors[f"classifiers.{last}.weight"], tensors[f"classifiers.{last}.bias"]
    if model.pooler != "none":
        pooler = f"poolers.{0 if model.pooler == 'shared' else last}"
        dense, shift = tensors[f"{pooler}.weight"], tensors[f"{pooler}.bias"]
    elif form.is_tanh:
        dense, shift = torch.eye(width) * _SMALL, torch.zeros(width)
        weight = weight / _SMALL
    else:
        dense, shift = torch.eye(width), torch.full((width,), _LIFT)
        bias = (bias.double() - weight.double().sum(dim=1) * _LIFT).float()
    _set(classifier.get_submodule(form.dense), dense, shift)
    _set(classifier.get_submodule(form.classifier), weight, bias)


def _set(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    linear.load_state_dict({"weight": weight, "bias": bias})
