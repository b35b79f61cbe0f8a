"""Multi-exit encoders: what training writes and the service reads.

It imports numpy and tokenizers; torch and the kernels only in the modules that compute with them
(`encoder`, `heads`, `device_lane`, `recorded`, `calibrating`), so that whoever serves ONNX graphs
needs neither. Never transformers, a web library or a metrics library.
"""

from offramp_model.calibration import CalibrationTable, CurvePoint
from offramp_model.checkpoint import (
    Checkpoint,
    CheckpointError,
    Manifest,
    load_checkpoint,
    update_manifest,
    write_checkpoint,
)
from offramp_model.config import MultiExitConfig
from offramp_model.layer_loop import LayerStack, Leavers, layer_loop, start_rows
from offramp_model.policies import (
    POLICIES,
    Decision,
    ExitPolicy,
    HeadOutput,
    make_policy,
    make_supported_policy,
    never,
    supported_policies,
)
from offramp_model.rows import ActiveRows, Encoding, PackedTokens, RowSettings, TokenBatch
from offramp_model.tokenizer import InputTooLong, TextTokenizer

__all__ = [
    "POLICIES",
    "ActiveRows",
    "CalibrationTable",
    "Checkpoint",
    "CheckpointError",
    "CurvePoint",
    "Decision",
    "Encoding",
    "ExitPolicy",
    "HeadOutput",
    "InputTooLong",
    "LayerStack",
    "Leavers",
    "Manifest",
    "MultiExitConfig",
    "PackedTokens",
    "RowSettings",
    "TextTokenizer",
    "TokenBatch",
    "layer_loop",
    "load_checkpoint",
    "make_policy",
    "make_supported_policy",
    "never",
    "start_rows",
    "supported_policies",
    "update_manifest",
    "write_checkpoint",
]
