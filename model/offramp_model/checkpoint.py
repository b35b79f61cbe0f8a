"""Checkpoints on disk: what training writes, what the service reads, and every check between.

A checkpoint is a directory that `AutoModel` and `AutoTokenizer` open, plus `exits.safetensors`
(the exit heads) and `offramp.json` (the manifest). Exported for ONNX Runtime it has graphs in place
of the backbone's weights, and everything else as it was. Only safetensors, JSON and ONNX's own
format are ever read; there is no pickle and no code in a checkpoint. Writing goes to a temporary
name and is renamed at the end, so a checkpoint is whole or absent.

Whoever opens graphs needs no torch, and loads none. This module knows nothing about training,
requests, or how tables are made.
"""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    model_validator,
)
from safetensors import SafetensorError, safe_open

from offramp_model.arrays import Array
from offramp_model.backbone import check_backbone
from offramp_model.calibration import CalibrationTable
from offramp_model.config import MultiExitConfig
from offramp_model.exit_head import exit_heads, head_shapes
from offramp_model.policies import POLICIES, why_unsupported
from offramp_model.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import torch

    from offramp_model.encoder import PackedEncoder
    from offramp_model.heads import ExitHeads
    from offramp_model.onnx_stack import OnnxStack

FORMAT_VERSION = 1
OLD_PROBLEM_TYPE = "single_label_classification"  # of manifests that say it beside `model`
MANIFEST, BACKBONE, EXITS = "offramp.json", "model.safetensors", "exits.safetensors"
CONFIG, TOKENIZER = "config.json", "tokenizer.json"
EMBEDDINGS, SEGMENT = "embeddings.onnx", "segment-{}.onnx"  # by exit layer

Backend = Literal["torch", "onnx"]

TORCH_DTYPES = ("float32", "bfloat16", "float16")
"""What the backbone's weights can be run in."""


class CheckpointError(ValueError):
    """A checkpoint is missing something, damaged, or not what its manifest says."""


class ObjectiveRecord(BaseModel):
    """Which objective made the checkpoint, with every hyper-parameter of the recipe."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    parameters: dict[str, JsonValue] = {}
    untrained_stages: tuple[str, ...] = ()  # for want of time


class DataRecord(BaseModel):
    """What the checkpoint was trained on, and on which rows it may not be calibrated."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    train_rows: Annotated[int, Field(ge=0)]
    train_fingerprint: str
    held_out_rows: Annotated[int, Field(ge=0)] = 0
    held_out_fingerprint: str = ""


class ActivationRecord(BaseModel):
    """The rows on which the scales of int8 activations were measured."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    split: str
    rows: Annotated[int, Field(ge=1)]
    data_fingerprint: str


class FlipRecord(BaseModel):
    """What the graphs say against the checkpoint that they came from, on held-out rows.

    `label_flips` and `exit_flips` are shares of rows: another label at full depth; another exit at
    the raw threshold that the source's calibration has for speed-up 2.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    rows: Annotated[int, Field(ge=1)]
    accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    source_accuracy: Annotated[float, Field(ge=0.0, le=1.0)]
    label_flips: Annotated[float, Field(ge=0.0, le=1.0)]
    exit_flips: Annotated[float, Field(ge=0.0, le=1.0)] | None = None


class GraphRecord(BaseModel):
    """What the ONNX graphs are: their dtype, the checkpoint that they came from (`source`, its
    `version`), and the sizes of the embedding tables."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dtype: Literal["float32", "int8"]
    source: str
    vocab_size: Annotated[int, Field(ge=1)]
    max_positions: Annotated[int, Field(ge=1)]
    activations: ActivationRecord | None = None
    flips: FlipRecord | None = None


class Manifest(BaseModel):
    """`offramp.json`: everything about a checkpoint that is not a tensor."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")

    format_version: Literal[1] = 1
    model: MultiExitConfig
    exit_policy: str  # what requests get unless they ask for another
    best_policy: str | None = None  # the most accurate at speed-up 2 when it was calibrated
    # The raw threshold that the exits were trained for, where the objective has one.
    exit_threshold: float | None = None
    objective: ObjectiveRecord
    seed: int
    data: DataRecord
    versions: dict[str, str] = {}
    sha256: dict[str, str] = {}
    graphs: GraphRecord | None = None  # exported for ONNX Runtime
    evaluation: dict[str, JsonValue] = {}
    calibration: tuple[CalibrationTable, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _problem_type_moved(cls, content: Any) -> Any:
        """It once stood here, with its only value, and is the model's now."""
        if isinstance(content, dict) and content.get("problem_type") == OLD_PROBLEM_TYPE:
            return {key: value for key, value in content.items() if key != "problem_type"}
        return content

    @property
    def tensor_files(self) -> tuple[str, ...]:
        """The files with weights in them, whose hashes are kept."""
        if self.graphs is None:
            return BACKBONE, EXITS
        segments = (SEGMENT.format(layer) for layer in self.model.exit_layers)
        return EMBEDDINGS, *segments, EXITS


class Checkpoint:
    """A verified checkpoint directory; weights are read when a stack is asked for."""

    def __init__(self, directory: Path, manifest: Manifest, backbone: dict[str, Any]) -> None:
        self.directory, self.manifest, self.backbone = directory, manifest, backbone

    @property
    def model(self) -> MultiExitConfig:
        return self.manifest.model

    @property
    def version(self) -> str:
        """Short content hash: changes with the weights, not with tables or reports."""
        hashes = "".join(self.manifest.sha256[name] for name in self.manifest.tensor_files)
        return hashlib.sha256(hashes.encode()).hexdigest()[:12]

    @property
    def backend(self) -> Backend:
        """What runs it."""
        return "torch" if self.manifest.graphs is None else "onnx"

    @property
    def dtype(self) -> str:
        """What it runs in unless told otherwise; graphs run in no other."""
        return "float32" if self.manifest.graphs is None else self.manifest.graphs.dtype

    def tokenizer(self, max_length: int | None = None) -> TextTokenizer:
        """The tokenizer, for texts of at most `max_length` tokens (default: the model's limit).

        Raises:
            CheckpointError: `tokenizer.json` is not a tokenizer.
        """
        try:
            return TextTokenizer(self.directory / TOKENIZER, max_length or self.model.max_length)
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def stack(
        self, *, device: "torch.device | str" = "cpu", dtype: "torch.dtype | None" = None
    ) -> "PackedEncoder":
        """Read the weights as a `LayerStack` in torch, by default in float32.

        Raises:
            CheckpointError: it is exported, a tensor is missing or has the wrong shape, the
                tokenizer and the model do not fit one another, or torch is not installed.
        """
        if self.backend != "torch":
            raise CheckpointError(
                f"{self.directory} holds ONNX graphs and no {BACKBONE}; backend: {self.backend}"
            )
        encoder = self._encoder_module()
        with safe_open(self.directory / BACKBONE, framework="pt") as tensors:
            try:
                stack: PackedEncoder = encoder.PackedEncoder(
                    self.backbone,
                    tensors.get_tensor,
                    self.heads(),
                    self.model,
                    device=device,
                    dtype=dtype or encoder.DTYPES["float32"],
                )
            except (ValueError, SafetensorError) as error:
                raise CheckpointError(f"{self.directory / BACKBONE}: {error}") from error
        self._check_sizes(stack.vocab_size, stack.max_positions)
        return stack

    def onnx_stack(
        self, *, threads: int | None = None, device: Literal["cpu", "cuda"] = "cpu"
    ) -> "OnnxStack":
        """Open the graphs as a `LayerStack` in ONNX Runtime.

        Raises:
            CheckpointError: it has no graphs, or some that cannot be run, or not on this device; or
                onnxruntime is not installed.
        """
        graphs = self.manifest.graphs
        if graphs is None:
            raise CheckpointError(
                f"{self.directory} holds no ONNX graphs; make them with "
                "`offramp-train export --format onnx`"
            )
        self._check_sizes(graphs.vocab_size, graphs.max_positions)
        from offramp_model.onnx_stack import OnnxStack

        try:
            return OnnxStack(
                self.directory / EMBEDDINGS,
                {layer: self.directory / SEGMENT.format(layer) for layer in self.model.exit_layers},
                exit_heads(self.model, _read_tensors(self.directory / EXITS)),
                self.model,
                vocab_size=graphs.vocab_size,
                max_positions=graphs.max_positions,
                threads=threads,
                device=device,
            )
        except ImportError as error:
            raise CheckpointError(
                f"{self.directory} runs in onnxruntime, which is not installed: "
                "pip install 'offramp[onnx]'"
            ) from error
        except ValueError as error:
            raise CheckpointError(str(error)) from error

    def any_stack(
        self,
        dtype: str | None = None,
        *,
        device: Literal["cpu", "cuda"] = "cpu",
        threads: int | None = None,
    ) -> "PackedEncoder | OnnxStack":
        """The stack of the checkpoint's own backend.

        Raises:
            CheckpointError: see `stack` and `onnx_stack`; or it cannot be run in `dtype`.
        """
        dtype = dtype or self.dtype
        allowed = TORCH_DTYPES if self.backend == "torch" else (self.dtype,)
        if dtype not in allowed:
            raise CheckpointError(
                f"{self.directory} cannot be run in {dtype}; backend {self.backend} has: "
                f"{', '.join(allowed)}"
            )
        if self.backend == "onnx":
            return self.onnx_stack(threads=threads, device=device)
        return self.stack(device=device, dtype=self._encoder_module().DTYPES[dtype])

    def heads(self) -> "ExitHeads":
        """The exit heads as modules of torch, with their weights."""
        import torch

        from offramp_model.heads import ExitHeads

        # Modules draw first weights when they are made; opening a checkpoint is nothing that a
        # caller's own draws should tell. Not on torch's meta device: drawing there imports sympy, a
        # second of a service's start.
        with torch.random.fork_rng(devices=[]):
            heads = ExitHeads(self.model)
        tensors = _read_tensors(self.directory / EXITS)
        heads.load_state_dict({name: torch.from_numpy(one) for name, one in tensors.items()})
        return heads

    def _encoder_module(self) -> Any:
        try:
            from offramp_model import encoder
        except ImportError as error:
            raise CheckpointError(
                f"{self.directory} runs in torch, which is not installed: pip install "
                "'offramp[torch]'; or make ONNX graphs of it where torch is, with "
                "`offramp-train export --format onnx`, and serve those"
            ) from error
        return encoder

    def _check_sizes(self, vocab_size: int, max_positions: int) -> None:
        largest_id = self.tokenizer().largest_id
        if largest_id >= vocab_size:
            raise CheckpointError(
                f"{self.directory / TOKENIZER} gives ids up to {largest_id}, but the backbone has "
                f"embeddings for {vocab_size} ids only"
            )
        if max_positions < self.model.max_length:
            raise CheckpointError(
                f"max_length is {self.model.max_length}, but the backbone has positions for "
                f"{max_positions} tokens only"
            )

    def table(
        self, policy: str, *, backend: str = "torch", dtype: str = "float32"
    ) -> CalibrationTable:
        """The calibration of a policy on a backend and dtype.

        Raises:
            CheckpointError: it was not calibrated; the message says what was.
        """
        for table in self.manifest.calibration:
            if (table.policy, table.backend, table.dtype) == (policy, backend, dtype):
                return table
        there = [f"{t.policy}/{t.backend}/{t.dtype}" for t in self.manifest.calibration]
        raise CheckpointError(
            f"{self.directory} has no calibration of {policy}/{backend}/{dtype}; "
            f"it has: {', '.join(there) or 'none'}. Run `offramp-train calibrate`."
        )


def load_checkpoint(directory: Path | str) -> Checkpoint:
    """Open a checkpoint and check all that can be checked without running it.

    Version, manifest, hashes, presence and shape of every exit head, label count and backbone
    dimensions.

    Raises:
        CheckpointError: with the file at fault and what is wrong with it.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory / MANIFEST)
    for name in (CONFIG, TOKENIZER, *manifest.tensor_files):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} has no {name}: it is not a whole checkpoint")
    for name in manifest.tensor_files:
        _check_hash(directory / name, manifest.sha256.get(name))
    _check_heads(directory / EXITS, manifest.model)
    backbone = _read_json(directory / CONFIG)
    try:
        check_backbone(backbone, manifest.model)
    except ValueError as error:
        raise CheckpointError(f"{directory / CONFIG}: {error}") from error
    return Checkpoint(directory, manifest, backbone)


def write_checkpoint(
    directory: Path | str,
    *,
    fill: Callable[[Path], None],
    exits: Mapping[str, Array],
    manifest: Manifest,
) -> None:
    """Write a new checkpoint, whole or not at all.

    Args:
        directory: must not exist yet, or be an empty directory.
        fill: writes `config.json`, the tokenizer's files and `model.safetensors`, or the graphs
            (and whatever else belongs in it) into the directory that it is given.
        exits: the exit heads, as a state dict of torch.
        manifest: hashes are filled in here.

    Raises:
        CheckpointError: there is something at `directory` already, or the result would not load.
    """
    from safetensors.torch import save_file

    directory = Path(directory)
    if directory.exists() and any(directory.iterdir()):
        raise CheckpointError(f"{directory} already exists and is not empty")
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as name:
        part = Path(name) / "checkpoint"
        part.mkdir()
        fill(part)
        save_file({key: value.contiguous() for key, value in exits.items()}, part / EXITS)
        hashes = {file: file_sha256(part / file) for file in manifest.tensor_files}
        _write_manifest(part / MANIFEST, manifest.model_copy(update={"sha256": hashes}))
        for file in part.iterdir():
            if file.is_file():
                file.chmod(0o644)  # safetensors writes 0600; the service may be another user
        load_checkpoint(part).any_stack()
        if directory.exists():
            directory.rmdir()
        part.rename(directory)


def update_manifest(directory: Path | str, manifest: Manifest) -> None:
    """Replace `offramp.json` at once; a reader sees the old one or the new one."""
    _write_manifest(Path(directory) / MANIFEST, manifest)


def file_sha256(path: Path) -> str:
    """Hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(path: Path, manifest: Manifest) -> None:
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".offramp.", suffix=".json")
    part = Path(name)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=1))
            file.write("\n")
        shutil.copymode(path, part) if path.exists() else part.chmod(0o644)
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} must hold a JSON object")
    return content


def _read_manifest(path: Path) -> Manifest:
    if not path.is_file():
        raise CheckpointError(f"{path.parent} is not an offramp checkpoint: it has no {MANIFEST}")
    content = _read_json(path)
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: format_version {version!r}, this build reads 1")
    try:
        manifest = Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(f"{path}: {where}: {first['msg']}") from error
    for key, name in (("exit_policy", manifest.exit_policy), ("best_policy", manifest.best_policy)):
        if name not in POLICIES and not (key == "best_policy" and name is None):
            raise CheckpointError(f"{path}: unknown {key} {name!r}; known: {', '.join(POLICIES)}")
    named = (manifest.exit_policy, manifest.best_policy, *(t.policy for t in manifest.calibration))
    for policy in named:
        if policy is not None and (reason := why_unsupported(policy, manifest.model)):
            raise CheckpointError(f"{path}: {reason}")
    for table in manifest.calibration:
        if any(len(point.exit_counts) != manifest.model.num_layers for point in table.points):
            raise CheckpointError(
                f"{path}: the calibration of {table.policy} is not of a model with "
                f"{manifest.model.num_layers} layers"
            )
    return manifest


def _check_hash(path: Path, expected: str | None) -> None:
    if expected is None:
        raise CheckpointError(f"{path.parent / MANIFEST} has no sha256 of {path.name}")
    actual = file_sha256(path)
    if actual != expected:
        raise CheckpointError(
            f"{path} is damaged or was replaced: sha256 {actual}, the manifest says {expected}"
        )


def _check_heads(path: Path, model: MultiExitConfig) -> None:
    expected = head_shapes(model)
    actual = {name: tuple(t.shape) for name, t in _read_tensors(path).items()}
    for name in sorted(expected.keys() | actual.keys()):
        if name not in actual:
            raise CheckpointError(f"{path} has no tensor {name}; the manifest asks for it")
        if name not in expected:
            raise CheckpointError(f"{path} has a tensor {name} that the manifest does not know")
        if actual[name] != expected[name]:
            raise CheckpointError(
                f"{path}: {name} has shape {actual[name]}, but {_sizes(model)} ask for "
                f"{expected[name]}"
            )


def _sizes(model: MultiExitConfig) -> str:
    gates = f", gates of width {model.gate_hidden}" if model.has_gates else ""
    pooler = f"pooling {model.pooling_form}, pooler {model.pooler}"
    return f"{model.num_labels} labels and width {model.hidden_size}, {pooler}{gates}"


def _read_tensors(path: Path) -> dict[str, Array]:
    try:
        with safe_open(path, framework="np") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
