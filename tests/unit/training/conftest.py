"""A three-layer random BERT, a word tokenizer, rows made up on the spot: nothing is copied in."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

SUBJECTS = ("cats", "dogs", "birds", "boats", "trains")
VERBS = {0: ("like", "love", "enjoy"), 1: ("fear", "hate", "avoid"), 2: ("count", "paint", "draw")}
OBJECTS = ("rain", "snow", "the sun", "old songs", "long walks in the hills")
WORDS = " ".join([*SUBJECTS, *OBJECTS, *(verb for verbs in VERBS.values() for verb in verbs)])
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def make_rows(count: int, seed: int, labels: int = 3) -> list[dict[str, Any]]:
    """Sentences whose verb gives the label away."""
    rng = random.Random(seed)
    rows = []
    for number in range(count):
        label = rng.randrange(labels)
        words = (rng.choice(SUBJECTS), rng.choice(VERBS[label]), rng.choice(OBJECTS), str(number))
        rows.append({"text": " ".join(words), "label": label})
    return rows


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    directory = tmp_path_factory.mktemp("backbone")
    vocabulary = {
        word: number for number, word in enumerate([*SPECIALS, *sorted(set(WORDS.split()))])
    }
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    ).save_pretrained(directory)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("verbs")
    write_rows(directory / "train.jsonl", make_rows(160, seed=1))
    write_rows(directory / "validation.jsonl", make_rows(48, seed=2))
    write_rows(directory / "test.jsonl", make_rows(40, seed=3))
    names = {"label_names": ["pleasure", "dread", "craft"]}
    (directory / "dataset_info.json").write_text(json.dumps(names), encoding="utf-8")
    return directory


@pytest.fixture
def recipe_table(backbone: Path) -> dict[str, Any]:
    """A recipe for the tiny backbone, two epochs of ten batches, dropout on."""
    return {
        "model": {"backbone": str(backbone), "max_length": 16},
        "optimiser": {"lr": 2e-3, "head_lr": 2e-3},
        "loop": {"epochs": 2, "batch_size": 16, "seed": 7, "checkpoint_every_steps": 3},
    }


@pytest.fixture(scope="session")
def checkpoint(backbone: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole checkpoint, trained and calibrated as `fit` does it."""
    from offramp_training.config import make_recipe
    from offramp_training.fit import fit

    recipe = make_recipe(
        {
            "model": {"backbone": str(backbone), "max_length": 16},
            "optimiser": {"lr": 2e-3, "head_lr": 2e-3},
            "loop": {"epochs": 2, "batch_size": 16},
        }
    )
    return fit(recipe, tmp_path_factory.mktemp("out") / "verbs", data=str(data))
