"""`offramp-train export --format final-head`: transformers gives our last exit's logits."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers

from loading import load
from offramp_model.checkpoint import (
    DataRecord,
    Manifest,
    ObjectiveRecord,
    load_checkpoint,
    write_checkpoint,
)
from offramp_model.config import MultiExitConfig
from offramp_model.recorded import record_exits
from offramp_training.__main__ import main
from offramp_training.errors import OutputError
from offramp_training.final_head import export_final_head

parity = load("tests/unit/model/test_encoder_parity.py")


def checkpoint_of(family: str, directory: Path, **head: Any) -> Path:
    torch.manual_seed(0)
    backbone = transformers.AutoModel.from_config(parity.CONFIGS[family]())
    config = MultiExitConfig(
        num_layers=3,
        hidden_size=48,
        exit_layers=(1, 3),
        labels=("a", "b", "c"),
        max_length=60,
        **{"pooling": "cls", **head},
    )
    heads = load("tests/unit/model/conftest.py").spread_heads(config)

    def fill(part: Path) -> None:
        backbone.save_pretrained(part)
        words = {str(number): number for number in range(97)}
        tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="0"))
        tokenizer.save(str(part / "tokenizer.json"))

    manifest = Manifest(
        model=config,
        exit_policy="entropy",
        objective=ObjectiveRecord(name="joint"),
        seed=0,
        data=DataRecord(name="none", train_rows=0, train_fingerprint="none"),
    )
    write_checkpoint(directory, fill=fill, exits=heads.state_dict(), manifest=manifest)
    return directory


CASES = [
    ("bert", "none"),
    ("bert", "shared"),
    ("roberta", "per_exit"),
    ("xlm-roberta", "none"),
    ("electra", "none"),
    ("distilbert", "none"),
]


@pytest.mark.parametrize(("family", "pooler"), CASES)
def test_transformers_gives_the_last_exits_logits(family: str, pooler: Any, tmp_path: Path) -> None:
    checkpoint = load_checkpoint(checkpoint_of(family, tmp_path / "in", pooler=pooler))
    export_final_head(checkpoint, tmp_path / "out")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert type(model).__name__.endswith("ForSequenceClassification")
    assert model.config.id2label == {0: "a", 1: "b", 2: "c"}
    encodings = parity.random_encodings(97, [5, 17, 1, 33], with_types=False)
    ours = record_exits(checkpoint.stack(), encodings).logits[-1]
    with torch.inference_mode():
        inputs = parity.padded_inputs(model, encodings, with_types=False)
        theirs = model.eval()(**inputs).logits
    assert float((ours - theirs).norm() / ours.norm()) < 1e-5
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= names
    assert not names & {"exits.safetensors", "offramp.json", "README.md", "curve.png"}


@pytest.mark.parametrize(
    ("family", "head", "message"),
    [
        ("bert", {"pooling": "mean"}, "pooling mean has no form"),
        ("electra", {"pooler": "shared"}, "allowed: pooler none"),
    ],
)
def test_a_head_without_such_a_form_is_refused(
    family: str, head: dict[str, Any], message: str, tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(checkpoint_of(family, tmp_path / "in", **head))
    with pytest.raises(OutputError, match=message):
        export_final_head(checkpoint, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_writes_it_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, output = checkpoint_of("bert", tmp_path / "in"), tmp_path / "out"
    command = ["export", str(source), "--format", "final-head", "--output", str(output)]
    assert main([*command, "--quantize", "int8"]) == 2
    assert "takes neither --quantize nor --data" in capsys.readouterr().err
    assert main(command) == 0
    assert main(command) == 2
    assert "already exists and is not empty" in capsys.readouterr().err
