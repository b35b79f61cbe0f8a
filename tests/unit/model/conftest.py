"""A tiny random encoder and a way to run the layer loop and collect its answers."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import save_file
from torch import Tensor

from offramp_model.checkpoint import DataRecord, Manifest, ObjectiveRecord, write_checkpoint
from offramp_model.config import MultiExitConfig
from offramp_model.encoder import PackedEncoder
from offramp_model.heads import ExitHeads
from offramp_model.layer_loop import LayerStack, every_exit, layer_loop, start_rows
from offramp_model.policies import ExitPolicy
from offramp_model.rows import Encoding, RowSettings, TokenBatch

WIDTH, LAYERS, CLASSES, VOCAB = 16, 4, 3, 50
BACKBONE = {
    "model_type": "bert",
    "num_hidden_layers": LAYERS,
    "hidden_size": WIDTH,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
}


def bert_tensors(seed: int = 0) -> dict[str, Tensor]:
    """Random weights of `BACKBONE` under transformers' names."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.4

    tensors = {
        "embeddings.word_embeddings.weight": normal(VOCAB, WIDTH),
        "embeddings.position_embeddings.weight": normal(40, WIDTH),
        "embeddings.token_type_embeddings.weight": normal(2, WIDTH),
        "embeddings.LayerNorm.weight": normal(WIDTH) + 1,
        "embeddings.LayerNorm.bias": normal(WIDTH),
    }
    for layer in range(LAYERS):
        prefix = f"encoder.layer.{layer}."
        for name, rows, columns in (
            ("attention.self.query", WIDTH, WIDTH),
            ("attention.self.key", WIDTH, WIDTH),
            ("attention.self.value", WIDTH, WIDTH),
            ("attention.output.dense", WIDTH, WIDTH),
            ("intermediate.dense", 32, WIDTH),
            ("output.dense", WIDTH, 32),
        ):
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
            tensors[f"{prefix}{name}.bias"] = normal(rows)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            tensors[f"{prefix}{name}.weight"] = normal(WIDTH) + 1
            tensors[f"{prefix}{name}.bias"] = normal(WIDTH)
    return tensors


def tiny_config(**changes: Any) -> MultiExitConfig:
    settings: dict[str, Any] = {
        "num_layers": LAYERS,
        "hidden_size": WIDTH,
        "exit_layers": (1, 2, 3, 4),
        "labels": ("a", "b", "c"),
        "max_length": 32,
    }
    return MultiExitConfig(**(settings | changes))


def spread_heads(config: MultiExitConfig) -> ExitHeads:
    """Heads with weights large enough that signals differ from text to text."""
    torch.manual_seed(1)
    heads = ExitHeads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return heads


@pytest.fixture(scope="session")
def stack() -> PackedEncoder:
    config = tiny_config(gate_hidden=5)
    return PackedEncoder(BACKBONE, bert_tensors().__getitem__, spread_heads(config), config)


@dataclass
class Answers:
    """What each submitted row was told; `times` counts how often."""

    exit_layer: Tensor
    label: Tensor
    logits: Tensor
    signal: Tensor
    times: Tensor


RunLoop = Callable[..., Answers]


@pytest.fixture(scope="session")
def run_loop() -> RunLoop:
    def run(
        stack: LayerStack,
        encodings: list[Encoding],
        policy: ExitPolicy,
        settings: RowSettings,
        compact: Callable[[int, int, int], bool] = every_exit,
    ) -> Answers:
        count = len(encodings)
        answers = Answers(
            exit_layer=torch.zeros(count, dtype=torch.int64),
            label=torch.zeros(count, dtype=torch.int64),
            logits=torch.zeros(count, stack.num_labels),
            signal=torch.zeros(count, dtype=torch.float64),
            times=torch.zeros(count, dtype=torch.int64),
        )
        rows = start_rows(stack, TokenBatch.pack(encodings), policy, settings)
        for leavers in layer_loop(stack, rows, policy, compact=compact):
            row = torch.as_tensor(leavers.row)
            answers.exit_layer[row] = leavers.exit_layer
            answers.label[row] = torch.as_tensor(leavers.label)
            answers.logits[row] = torch.as_tensor(leavers.logits)
            answers.signal[row] = torch.as_tensor(leavers.signal).double()
            answers.times[row] += 1
        return answers

    return run


@pytest.fixture(scope="session")
def oracle_cases() -> Callable[[str, str], list[dict[str, Any]]]:
    """Acceptance cases of an objective, by kind."""
    path = Path(__file__).parents[2] / "oracles.json"
    objectives = json.loads(path.read_text(encoding="utf-8"))["objectives"]

    def cases(objective: str, kind: str) -> list[dict[str, Any]]:
        found = [case for case in objectives[objective] if case["kind"] == kind]
        assert found, f"no oracle cases {objective}/{kind}"
        return found

    return cases


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{index}" for index in range(4, VOCAB))]


def write_tokenizer(path: Path) -> None:
    """A word-level tokenizer with BERT's specials and pair template."""
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(path))


def tiny_manifest(config: MultiExitConfig, **changes: Any) -> Manifest:
    settings: dict[str, Any] = {
        "model": config,
        "exit_policy": "entropy",
        "objective": ObjectiveRecord(name="joint"),
        "seed": 0,
        "data": DataRecord(name="made up", train_rows=3, train_fingerprint="0" * 8),
    }
    return Manifest(**(settings | changes))


WriteTiny = Callable[..., Path]


@pytest.fixture(scope="session")
def write_tiny() -> WriteTiny:
    """Write a whole tiny checkpoint; `config` and `manifest` may be changed."""

    def write(
        directory: Path, config: MultiExitConfig | None = None, **manifest_changes: Any
    ) -> Path:
        config = config or tiny_config()

        def fill(part: Path) -> None:
            (part / "config.json").write_text(json.dumps(BACKBONE))
            write_tokenizer(part / "tokenizer.json")
            save_file(bert_tensors(), part / "model.safetensors")

        write_checkpoint(
            directory,
            fill=fill,
            exits=spread_heads(config).state_dict(),
            manifest=tiny_manifest(config, **manifest_changes),
        )
        return directory

    return write
