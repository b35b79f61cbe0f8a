"""A checkpoint opened for serving, and what the settings mean for it.

Everything that depends on both the settings and the checkpoint is decided here, once, before the
first request: the policy, its calibration table, the longest text, the range of speed-ups. What
cannot work is refused here, by name. It knows nothing about requests.
"""

import logging
import math
from dataclasses import dataclass
from typing import Any

from offramp_model.calibration import CalibrationTable
from offramp_model.checkpoint import Checkpoint, CheckpointError, load_checkpoint
from offramp_model.config import MultiExitConfig
from offramp_model.layer_loop import LayerStack
from offramp_model.onnx_stack import Device
from offramp_model.policies import ExitPolicy, make_supported_policy
from offramp_model.rows import MAX_ROWS
from offramp_model.tokenizer import TextTokenizer
from offramp_service.settings import Settings

log = logging.getLogger(__name__)

FEW_THREADS = 4
"""With more, a text that is computed alone would wait long for its one thread."""


class SettingsError(ValueError):
    """A setting that this checkpoint cannot honour."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DescribedModel:
    """What has to be known of a checkpoint to take requests for it, with the limits in effect.

    `table` is None if the policy was not calibrated on this backend and dtype; then only a
    speed-up of 1 and raw thresholds can be asked for.
    """

    name: str
    version: str
    sha: str
    config: MultiExitConfig
    policy: ExitPolicy
    table: CalibrationTable | None
    tokenizer: TextTokenizer
    backend: str
    dtype: str
    vocab_size: int  # token ids that the model has embeddings for
    max_input_length: int
    max_batch_texts: int
    min_speedup: float
    max_speedup: float
    default_speedup: float
    floors: tuple[float, ...]  # speed-ups that load may raise everybody to, from 1 on

    @property
    def num_layers(self) -> int:
        return self.config.num_layers

    def expected_accuracy(self, speedup: float) -> float:
        """At a speed-up that can be asked for, by calibration; NaN where there is none."""
        return self.table.point_for(speedup).accuracy if self.table is not None else math.nan

    def survival(self, speedup: float) -> list[float]:
        """Share of the texts that goes on after each exit at a speed-up, by calibration; where it
        is not calibrated, all but after the last."""
        exits = self.config.exit_layers
        if self.table is None:
            return [1.0] * (len(exits) - 1) + [0.0]
        point = self.table.point_for(min(speedup, self.table.max_speedup))
        rows = sum(point.exit_counts)
        return [1 - sum(point.exit_counts[:layer]) / rows for layer in exits]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel(DescribedModel):
    """What is served: the opened checkpoint, ready to run."""

    stack: LayerStack
    device: Device
    engine_workers: int  # batches that are computed at a time
    torch_threads: int | None  # of each; None: torch does not run it

    @property
    def tensor_device(self) -> Device:
        """Where hidden states are between segments; those of graphs come back to the host."""
        return self.device if self.backend == "torch" else "cpu"


def load_model(settings: Settings) -> ServedModel:
    """Open the checkpoint.

    Raises:
        CheckpointError: the directory is not a sound checkpoint.
        SettingsError: it is, but a setting does not fit it.
    """
    checkpoint = load_checkpoint(settings.directory)
    device, dtype = _device(settings, checkpoint), _dtype(settings, checkpoint)
    threads, workers = settings.engine_threads, _engine_workers(settings, device)
    # A pool of graphs' threads is all workers': beside it each computes as well.
    pool = threads - workers + 1 if checkpoint.backend == "onnx" else threads
    stack = checkpoint.any_stack(dtype, device=device, threads=pool)
    return ServedModel(
        **_description(settings, checkpoint, dtype, stack.vocab_size),
        stack=stack,
        device=device,
        engine_workers=workers,
        torch_threads=threads // workers if checkpoint.backend == "torch" else None,
    )


def describe_model(settings: Settings, vocab_size: int) -> DescribedModel:
    """Open the checkpoint for a process that takes requests and computes nothing; what only the
    weights show is given.

    Raises:
        CheckpointError, SettingsError: as `load_model`.
    """
    checkpoint = load_checkpoint(settings.directory)
    dtype = _dtype(settings, checkpoint)
    return DescribedModel(**_description(settings, checkpoint, dtype, vocab_size))


def _description(
    settings: Settings, checkpoint: Checkpoint, dtype: str, vocab_size: int
) -> dict[str, Any]:
    """The fields of a `DescribedModel`."""
    policy = _policy(settings.exit_policy or checkpoint.manifest.exit_policy, checkpoint.model)
    try:
        table = checkpoint.table(policy.name, backend=checkpoint.backend, dtype=dtype)
    except CheckpointError as error:
        log.warning("only speed-up 1 and raw thresholds can be served: %s", error)
        table = None
    max_input_length = _max_input_length(settings, checkpoint.model.max_length)
    least, most = _speedup_range(settings, table)
    return {
        "name": settings.model_name,
        "version": settings.model_version,
        "sha": checkpoint.version,
        "config": checkpoint.model,
        "policy": policy,
        "table": table,
        "tokenizer": checkpoint.tokenizer(max_input_length),
        "backend": checkpoint.backend,
        "dtype": dtype,
        "vocab_size": vocab_size,
        "max_input_length": max_input_length,
        "max_batch_texts": _max_batch_texts(settings),
        "min_speedup": least,
        "max_speedup": most,
        "default_speedup": _default_speedup(settings, least, most),
        "floors": _floors(settings, table, most),
    }


def _device(settings: Settings, checkpoint: Checkpoint) -> Device:
    """The configured device, or the best there is; graphs go to a GPU only when they are told."""
    if settings.device == "cpu":
        return "cpu"
    if checkpoint.backend == "onnx":
        if settings.device == "cuda" and checkpoint.dtype == "int8":
            raise SettingsError(
                f"--device cuda: the int8 graphs of {settings.model_id} run on the CPU; the "
                "checkpoint that they were exported from runs on both"
            )
        return "cuda" if settings.device == "cuda" else "cpu"
    if _has_cuda():
        return "cuda"
    if settings.device == "cuda":
        raise SettingsError("--device cuda: torch sees no CUDA device; allowed here: auto, cpu")
    return "cpu"


def _engine_workers(settings: Settings, device: Device) -> int:
    """The configured number; by default one thread for each batch where there are a few cores: two
    batches of one thread are done sooner than two, one after the other, of two threads."""
    wanted = settings.engine_workers
    if wanted is not None and wanted > 1 and device == "cuda":
        raise SettingsError(
            f"--engine-workers {wanted}: a CUDA device computes one batch at a time; allowed: 1"
        )
    few = device == "cpu" and settings.engine_threads <= FEW_THREADS
    return wanted or (settings.engine_threads if few else 1)


def _has_cuda() -> bool:
    try:
        import torch
    except ImportError:
        return False  # the checkpoint says what is missing, when it is asked for its stack
    return torch.cuda.is_available()


def _dtype(settings: Settings, checkpoint: Checkpoint) -> str:
    """The configured dtype, or the checkpoint's own; the backend must be the checkpoint's."""
    if settings.backend not in ("auto", checkpoint.backend):
        there = "ONNX graphs" if checkpoint.backend == "onnx" else "no ONNX graphs"
        raise SettingsError(
            f"--backend {settings.backend}: {settings.model_id} holds {there}; "
            + (
                "allowed: auto, onnx"
                if checkpoint.backend == "onnx"
                else "`offramp-train export --format onnx` makes a directory that does"
            )
        )
    if checkpoint.backend == "onnx" and settings.dtype not in ("auto", checkpoint.dtype):
        raise SettingsError(
            f"--dtype {settings.dtype}: the graphs of {settings.model_id} are {checkpoint.dtype}"
        )
    if checkpoint.backend == "torch" and settings.dtype == "int8":
        raise SettingsError(
            "--dtype int8: backend torch has no int8; allowed: float32, bfloat16, float16"
        )
    return checkpoint.dtype if settings.dtype == "auto" else settings.dtype


def _policy(name: str, config: MultiExitConfig) -> ExitPolicy:
    try:
        return make_supported_policy(name, config)
    except ValueError as error:
        raise SettingsError(f"--exit-policy: {error}") from None


def _max_input_length(settings: Settings, longest: int) -> int:
    """The checkpoint's limit, or the operator's smaller one; must fit a batch of its own."""
    wanted = settings.max_input_length
    if wanted is not None and wanted > longest:
        raise SettingsError(f"--max-input-length {wanted}: this checkpoint takes {longest} tokens")
    effective = wanted or longest
    for flag, budget in (
        ("--max-batch-tokens", settings.max_batch_tokens),
        ("--max-queued-tokens", settings.max_queued_tokens),
    ):
        if effective > budget:
            raise SettingsError(f"{flag} {budget} does not hold one text of {effective} tokens")
    return effective


def _max_batch_texts(settings: Settings) -> int:
    """The operator's limit, within what the kernels take."""
    wanted = settings.max_batch_requests
    if wanted is not None and wanted > MAX_ROWS:
        log.warning("--max-batch-requests %d: the engine takes at most %d", wanted, MAX_ROWS)
    return min(wanted or MAX_ROWS, MAX_ROWS)


def _speedup_range(settings: Settings, table: CalibrationTable | None) -> tuple[float, float]:
    """What may be asked for: the calibrated range within the operator's bounds."""
    reachable = table.max_speedup if table is not None else 1.0
    if settings.min_speedup > reachable:
        raise SettingsError(
            f"--min-speedup {settings.min_speedup}: this checkpoint is calibrated up to "
            f"{reachable:.4g}"
        )
    if settings.max_speedup is None:
        return settings.min_speedup, reachable
    if settings.max_speedup > reachable:
        log.warning("--max-speedup %s: calibrated up to %.4g", settings.max_speedup, reachable)
    return settings.min_speedup, min(settings.max_speedup, reachable)


def _default_speedup(settings: Settings, least: float, most: float) -> float:
    """The configured default; an unset one moves up to the operator's lower bound."""
    default = settings.default_speedup
    if "default_speedup" not in settings.model_fields_set:
        return max(default, least)
    if not least <= default <= most:
        raise SettingsError(f"--default-speedup {default} is outside {least:.4g} to {most:.4g}")
    return default


def _floors(settings: Settings, table: CalibrationTable | None, most: float) -> tuple[float, ...]:
    """The calibrated speed-ups that are accurate enough, within the operator's bound."""
    if table is None:
        for flag, value in (
            ("--slo-p95-ms", settings.slo_p95_ms),
            ("--min-accuracy", settings.min_accuracy),
        ):
            if value is not None:
                raise SettingsError(
                    f"{flag} {value:g}: goes by a calibration, and this checkpoint has none for "
                    "the policy, backend and dtype that are served"
                )
        return (1.0,)
    least = settings.min_accuracy or 0.0
    full = table.points[0].accuracy
    if full < least:
        raise SettingsError(
            f"--min-accuracy {least:g}: at speed-up 1 this checkpoint's calibrated accuracy is "
            f"{full:.4g}"
        )
    return accurate_speedups(table, most, least)


def accurate_speedups(table: CalibrationTable, most: float, least: float) -> tuple[float, ...]:
    """The calibrated speed-ups up to `most` with an accuracy of at least `least`, ascending; as
    tables are not monotone in accuracy, there may be gaps."""
    return tuple(
        point.speedup for point in table.points if point.speedup <= most and point.accuracy >= least
    )
