"""Calibration: the tables threshold -> speed-up, accuracy that give `speedup` its meaning.

Measured on held-out rows on the serving stack, one table per exit policy, and stored in the
checkpoint's manifest in place of older ones of the same policy, backend and dtype. Beside them the
manifest names the policy that is best at speed-up 2, which changes nothing that is served.

Refuses a split called train and, under any name, the whole set of rows that the checkpoint was
trained on; it cannot see a few of them among others. Knows nothing about how the rows were held
out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from offramp_model.calibrating import curve
from offramp_model.calibration import CalibrationTable
from offramp_model.checkpoint import Checkpoint, Manifest, update_manifest
from offramp_model.policies import make_supported_policy, supported_policies
from offramp_training.data import Dataset
from offramp_training.errors import DataError
from offramp_training.evaluate import best_policy, check_policies, record_dataset


def calibrate_checkpoint(
    checkpoint: Checkpoint,
    dataset: Dataset,
    *,
    dtype: str | None = None,
    policies: Sequence[str] | None = None,
) -> Checkpoint:
    """Measures each policy, by default all that the checkpoint supports, on `dataset` and stores
    the tables of the checkpoint's backend and `dtype` (default: its own); returns the checkpoint
    with them."""
    manifest, dtype = checkpoint.manifest, dtype or checkpoint.dtype
    policies = policies or supported_policies(checkpoint.model)
    check_policies(checkpoint, policies)
    if dataset.split == "train" or dataset.fingerprint == manifest.data.train_fingerprint:
        raise DataError(
            f"split {dataset.split!r} holds the training rows: thresholds tuned on them would be "
            "too bold; allowed: held-out rows (held_out, validation, test)"
        )
    recorded = record_dataset(checkpoint, dataset, dtype)
    labels = torch.tensor(dataset.labels)
    tables = tuple(
        CalibrationTable(
            policy=name,
            backend=checkpoint.backend,
            dtype=dtype,
            split=dataset.split,
            rows=len(dataset),
            data_fingerprint=dataset.fingerprint,
            points=curve(recorded, labels, make_supported_policy(name, checkpoint.model)),
        )
        for name in policies
    )
    replaced = {(table.policy, table.backend, table.dtype) for table in tables}
    kept = [
        table
        for table in manifest.calibration
        if (table.policy, table.backend, table.dtype) not in replaced
    ]
    manifest = manifest.model_copy(update={"calibration": (*kept, *tables)})
    if dtype == checkpoint.dtype:
        best = _best_policy(checkpoint, manifest, dataset.fingerprint)
        manifest = manifest.model_copy(update={"best_policy": best})
    update_manifest(checkpoint.directory, manifest)
    return Checkpoint(checkpoint.directory, manifest, checkpoint.backbone)


def _best_policy(checkpoint: Checkpoint, manifest: Manifest, fingerprint: str) -> str | None:
    """Of the tables measured on the same rows and in the checkpoint's own dtype: others cannot be
    compared with them."""
    comparable = {
        table.policy: table.points
        for table in manifest.calibration
        if (table.backend, table.dtype) == (checkpoint.backend, checkpoint.dtype)
        and table.data_fingerprint == fingerprint
    }
    return best_policy(comparable, manifest.exit_policy)
