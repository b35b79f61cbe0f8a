"""The model card: a checkpoint's README.md, written from its manifest alone."""

from __future__ import annotations

from typing import Any

from offramp_model.checkpoint import Manifest
from offramp_model.config import MultiExitConfig
from offramp_training.config import DistillationSection


def model_card(manifest: Manifest) -> str:
    """Markdown for people who find the directory."""
    parts = [_head(manifest), _figures(manifest), _use(), _origin(manifest)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(manifest: Manifest) -> str:
    model = manifest.model
    return (
        "---\nlibrary_name: offramp\npipeline_tag: text-classification\n"
        "tags:\n- early-exit\n- text-classification\n---\n\n"
        f"# Multi-exit text classifier: {manifest.data.name}\n\n"
        f"An encoder of {model.num_layers} layers with a small classifier after layers "
        f"{', '.join(map(str, model.exit_layers))}. A text leaves at the first layer that is sure "
        f"of it, so easy texts cost less. {_labels(model)} ({model.num_labels}): "
        f"{', '.join(f'`{label}`' for label in model.labels)}."
    )


def _labels(model: MultiExitConfig) -> str:
    if not model.is_multi_label:
        return "Labels"
    return "A text may have any number of labels, each where its own sigmoid is above 0.5. Labels"


def _figures(manifest: Manifest) -> str:
    evaluation: dict[str, Any] = dict(manifest.evaluation)
    if not evaluation:
        return "Not evaluated yet: `offramp-train evaluate` measures it."
    one = evaluation["policies"].get(manifest.exit_policy, {})
    lines = [
        "## Accuracy and speed",
        "",
        "![accuracy against speed-up](curve.png)",
        "",
        f"On {evaluation['rows']} rows of `{evaluation['split']}`; speed-up is in layers, "
        f"`L·N / Σ exit_layer`. {_accuracy(manifest.model)}{_thresholds(manifest)}:",
        "",
        "| requested speed-up | speed-up | accuracy | macro F1 | mean exit layer |",
        "|---|---|---|---|---|",
        *(
            f"| {point['requested']:g} | {point['speedup']:.2f} | {point['accuracy']:.4f} "
            f"| {point['macro_f1']:.4f} | {point['mean_exit_layer']:.2f} |"
            for point in one.get("calibrated", ())
        ),
        *_natural(one),
        *_best(manifest),
        "",
        "| every row leaves at layer | accuracy |",
        "|---|---|",
        *(f"| {one['exit_layer']} | {one['accuracy']:.4f} |" for one in evaluation["layers"]),
    ]
    return "\n".join(lines)


def _accuracy(model: MultiExitConfig) -> str:
    if not model.is_multi_label:
        return ""
    return "Accuracy is the share of rows whose whole set of labels is right. "


def _natural(policy: dict[str, Any]) -> list[str]:
    """The operating point that the exits were trained for, where there is one."""
    point = policy.get("natural")
    if not point:
        return []
    return [
        "",
        f"At the threshold that the exits were trained for, {point['threshold']:g}: speed-up "
        f"{point['speedup']:.2f}, accuracy {point['accuracy']:.4f}.",
    ]


def _thresholds(manifest: Manifest) -> str:
    """Whose thresholds the table shows: those that a request gets."""
    policy = f"Exit policy `{manifest.exit_policy}`"
    for table in manifest.calibration:
        if (table.policy, table.backend, table.dtype) == (manifest.exit_policy, "torch", "float32"):
            return (
                f"{policy} with the thresholds that a request gets, calibrated on {table.rows} "
                f"rows of `{table.split}`"
            )
    return f"{policy}, not calibrated"


def _best(manifest: Manifest) -> list[str]:
    if manifest.best_policy is None:
        return []
    best = f"Most accurate policy at speed-up 2 on the calibration rows: `{manifest.best_policy}`."
    return ["", best]


def _use() -> str:
    return (
        "## Use\n\n"
        "`offramp-serve` serves the directory; requests choose their own `speedup`. The directory "
        "also opens with transformers' `AutoModel` and `AutoTokenizer` (the encoder alone: the "
        "exit heads are in `exits.safetensors`). Thresholds for each policy are in `offramp.json`."
    )


def _origin(manifest: Manifest) -> str:
    data, parameters = manifest.data, manifest.objective.parameters
    model: Any = parameters.get("model", {})
    heads = f"pooling `{manifest.model.pooling_form}`, pooler `{manifest.model.pooler}`"
    untrained = ", ".join(manifest.objective.untrained_stages)
    distilled = DistillationSection.model_validate(parameters.get("distillation", {})).in_words
    return (
        "## Origin\n\n"
        f"Backbone `{_short(str(model.get('backbone', 'unknown')))}`; exit heads with {heads}; "
        f"objective `{manifest.objective.name}`; seed {manifest.seed}; {data.train_rows} training "
        f"rows, {data.held_out_rows} rows held out for calibration. "
        f"{f'Distilled from {distilled}. ' if distilled else ''}"
        f"{f'Not trained for want of time: {untrained}. ' if untrained else ''}"
        "Every setting is in `offramp.json`."
    )


def _short(backbone: str) -> str:
    """A hub name as it is; of a local path only its last part, which is nobody's home."""
    return backbone.rsplit("/", 1)[-1] if backbone.startswith(("/", ".", "~")) else backbone
