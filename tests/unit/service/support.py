"""A tiny random checkpoint with a calibration, for the service's tests. Knows no test framework.

Loaded by path (`importlib`), because test folders are not packages.
"""

import random
from pathlib import Path

import tokenizers
import torch
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from offramp_model.calibrating import curve
from offramp_model.calibration import CalibrationTable
from offramp_model.checkpoint import (
    DataRecord,
    Manifest,
    ObjectiveRecord,
    load_checkpoint,
    update_manifest,
    write_checkpoint,
)
from offramp_model.config import MultiExitConfig, ProblemType
from offramp_model.heads import ExitHeads
from offramp_model.policies import make_supported_policy
from offramp_model.recorded import record_exits

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
WORDS = tuple(f"w{number}" for number in range(60))
LABELS = ("negative", "positive", "neutral")
LAYERS, MAX_LENGTH = 4, 32


def random_texts(count: int, seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(rng.choices(WORDS, k=rng.randint(1, 20))) for _ in range(count)]


def make_tokenizer() -> tokenizers.Tokenizer:
    vocabulary = {word: index for index, word in enumerate((*SPECIALS, *WORDS))}
    tokenizer = tokenizers.Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    return tokenizer


def write_tiny_checkpoint(
    directory: Path,
    *,
    exit_layers: tuple[int, ...] = (1, 2, 3, 4),
    width: int = 16,
    labels: tuple[str, ...] = LABELS,
    problem_type: ProblemType = "single_label_classification",
) -> Path:
    """A four-layer BERT with random weights, calibrated for confidence and entropy."""
    import transformers

    config = MultiExitConfig(
        num_layers=LAYERS,
        hidden_size=width,
        exit_layers=exit_layers,
        labels=labels,
        problem_type=problem_type,
        max_length=MAX_LENGTH,
    )

    def fill(part: Path) -> None:
        torch.manual_seed(0)
        backbone = transformers.BertModel(
            transformers.BertConfig(
                vocab_size=len(SPECIALS) + len(WORDS),
                hidden_size=width,
                num_hidden_layers=LAYERS,
                num_attention_heads=2,
                intermediate_size=2 * width,
                max_position_embeddings=MAX_LENGTH,
                initializer_range=0.4,
            ),
            add_pooling_layer=False,
        )
        backbone.save_pretrained(part)
        make_tokenizer().save(str(part / "tokenizer.json"))

    torch.manual_seed(1)
    heads = ExitHeads(config)
    for parameter in heads.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    manifest = Manifest(
        model=config,
        exit_policy="confidence",
        objective=ObjectiveRecord(name="joint"),
        seed=0,
        data=DataRecord(name="random", train_rows=0, train_fingerprint="none"),
    )
    write_checkpoint(directory, fill=fill, exits=heads.state_dict(), manifest=manifest)
    _calibrate(directory)
    return directory


def _calibrate(directory: Path) -> None:
    checkpoint = load_checkpoint(directory)
    encodings = checkpoint.tokenizer().encode(random_texts(200, seed=3))
    recorded = record_exits(checkpoint.stack(), encodings)
    model = checkpoint.model
    # Classes, or sets of them as bits.
    answers = 2**model.num_labels if model.is_multi_label else model.num_labels
    labels = torch.randint(answers, (200,), generator=torch.Generator().manual_seed(4))
    tables = tuple(
        CalibrationTable(
            policy=name,
            split="validation",
            rows=200,
            data_fingerprint="random",
            points=curve(recorded, labels, make_supported_policy(name, model), num_points=40),
        )
        for name in ("confidence", "entropy")
    )
    update_manifest(directory, checkpoint.manifest.model_copy(update={"calibration": tables}))
