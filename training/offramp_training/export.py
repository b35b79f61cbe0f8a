"""`offramp-train export --format onnx`: a checkpoint as graphs for ONNX Runtime.

The new directory is a checkpoint like the old one, with a graph for the embeddings and one for each
stretch from exit to exit in place of the backbone's weights; heads, tokenizer, tables and report go
along. Tables of other backends stay what they are: `calibrate` makes those of the graphs.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from offramp_model.checkpoint import (
    EMBEDDINGS,
    SEGMENT,
    ActivationRecord,
    Checkpoint,
    FlipRecord,
    GraphRecord,
    load_checkpoint,
    update_manifest,
    write_checkpoint,
)
from offramp_model.families import family_of
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import RecordedExits, record_exits, replay
from offramp_training.data import Dataset
from offramp_training.errors import OutputError
from offramp_training.evaluate import HEADLINE_SPEEDUP

Row = TypeVar("Row")

COMPARED_ROWS = 2000
WEIGHTS = ("*.safetensors", "*.onnx", "offramp.json")
"""What an export does not copy: it writes its own."""


def export_onnx(checkpoint: Checkpoint, output: Path, *, measured_on: Dataset | None) -> Checkpoint:
    """Write the graphs; int8 with activations measured on those rows, or float32 without any.

    Raises:
        OutputError: onnx or onnxruntime is not installed.
        CheckpointError: the checkpoint is an export already, or there is something at `output`.
    """
    stack = checkpoint.stack()
    try:
        import onnx

        from offramp_model.onnx_graph import embedding_graph, segment_graph
        from offramp_training.activations import MOST_ROWS, measure_activations
    except ImportError as error:
        raise OutputError(
            f"--format onnx needs {error.name}: pip install 'offramp[train,onnx]'"
        ) from error
    activation = checkpoint.backbone[family_of(checkpoint.backbone).activation_key]
    scales, record = None, None
    if measured_on is not None:
        texts = spread(measured_on.inputs, MOST_ROWS)
        encodings = checkpoint.tokenizer().encode(texts)
        scales = measure_activations(stack, activation, encodings)
        record = ActivationRecord(
            split=measured_on.split, rows=len(texts), data_fingerprint=measured_on.fingerprint
        )

    def fill(part: Path) -> None:
        copy_others(checkpoint.directory, part)
        onnx.save(embedding_graph(stack.embeddings), part / EMBEDDINGS)
        for exit_layer in checkpoint.model.exit_layers:
            layers = {i + 1: stack.layers[i] for i in checkpoint.model.segment(exit_layer)}
            graph = segment_graph(layers, activation, scales=scales)
            onnx.save(graph, part / SEGMENT.format(exit_layer))

    graphs = GraphRecord(
        dtype="float32" if scales is None else "int8",
        source=checkpoint.version,
        vocab_size=stack.vocab_size,
        max_positions=stack.max_positions,
        activations=record,
    )
    manifest = checkpoint.manifest.model_copy(update={"graphs": graphs})
    exits = checkpoint.heads().state_dict()
    write_checkpoint(output, fill=fill, exits=exits, manifest=manifest)
    exported = load_checkpoint(output)
    if measured_on is None:
        return exported
    graphs = graphs.model_copy(update={"flips": count_flips(checkpoint, exported, measured_on)})
    update_manifest(output, manifest := exported.manifest.model_copy(update={"graphs": graphs}))
    return Checkpoint(output, manifest, exported.backbone)


def count_flips(source: Checkpoint, exported: Checkpoint, dataset: Dataset) -> FlipRecord:
    """How often an export and its source disagree, on at most `COMPARED_ROWS` rows."""
    chosen = spread(list(zip(dataset.inputs, dataset.labels, strict=True)), COMPARED_ROWS)
    encodings = source.tokenizer().encode([text for text, _ in chosen])
    labels = torch.tensor([label for _, label in chosen])
    before, after = (
        record_exits(stack, encodings) for stack in (source.stack(), exported.any_stack())
    )
    said, says = before.said[-1], after.said[-1]
    return FlipRecord(
        rows=len(chosen),
        accuracy=float((says == labels).double().mean()),
        source_accuracy=float((said == labels).double().mean()),
        label_flips=float((says != said).double().mean()),
        exit_flips=_exit_flips(source, before, after),
    )


def _exit_flips(source: Checkpoint, before: RecordedExits, after: RecordedExits) -> float | None:
    name = source.manifest.exit_policy
    try:
        threshold = source.table(name).threshold_for(HEADLINE_SPEEDUP)
    except ValueError:  # not calibrated, or not that far
        return None
    policy = make_supported_policy(name, source.model)
    left = [replay(one, policy, threshold).exit_layer for one in (before, after)]
    return float((left[0] != left[1]).double().mean())


def copy_others(source: Path, target: Path) -> None:
    """Every plain file of a checkpoint but its weights and manifest."""
    for file in source.iterdir():
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and not any(map(file.match, WEIGHTS)):
            shutil.copyfile(file, target / file.name)


def spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many, evenly from the first to the last: rows may be sorted by label."""
    if len(rows) <= most:
        return list(rows)
    return [rows[index * len(rows) // most] for index in range(most)]
