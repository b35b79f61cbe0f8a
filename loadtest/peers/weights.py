"""The same weights for every server: a plain transformers directory and whole-model int8 graphs.

    python loadtest/peers/weights.py CHECKPOINT --data DIR --output DIR

`final-head/` is what `offramp-train export --format final-head` would write, had transformers'
BERT a class for mean pooling; it brings that class along (`mean_pooled_bert.py`). A checkpoint that
pools the first token goes through the command itself. `int8/` holds the graph that an expert would
build without exits (`model/bench/whole_model.py`), in both kinds of norm.

Both are asked about rows of the data before they are left there: float32 must agree with the
checkpoint's own full pass in every label.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import onnx
import torch
from safetensors.torch import load_file

from offramp_model import Checkpoint, load_checkpoint
from offramp_model.checkpoint import BACKBONE
from offramp_model.onnx_stack import exact_int8
from offramp_model.recorded import record_exits
from offramp_training.data import load_split
from offramp_training.export import copy_others
from offramp_training.final_head import export_final_head

HERE = Path(__file__).parent
sys.path += [str(HERE), str(HERE.parents[1] / "model" / "bench")]

from mean_pooled_bert import MeanPooledBertForSequenceClassification  # noqa: E402
from whole_model import graph, quantised  # noqa: E402

CHECKED_ROWS = 128
TOLERANCE = 1e-3  # of logits, float32


def write_final_head(checkpoint: Checkpoint, output: Path) -> None:
    """A directory for `AutoModelForSequenceClassification`, mean pooling included."""
    if checkpoint.model.pooling != "mean":
        export_final_head(checkpoint, output)
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(checkpoint.directory)
    if config.model_type != "bert" or checkpoint.model.pooler != "none":
        raise SystemExit("mean pooling is written for BERT without a pooler")
    labels = dict(enumerate(checkpoint.model.labels))
    config.id2label, config.label2id = labels, {name: index for index, name in labels.items()}
    config.problem_type = checkpoint.model.problem_type
    MeanPooledBertForSequenceClassification.register_for_auto_class(
        "AutoModelForSequenceClassification"
    )
    model = MeanPooledBertForSequenceClassification(config)
    backbone = load_file(checkpoint.directory / BACKBONE)  # may bring a pooler that nobody asks
    wanted = {name: one for name, one in backbone.items() if not name.startswith("pooler.")}
    model.bert.load_state_dict(wanted, strict=True)
    heads, last = checkpoint.heads().state_dict(), checkpoint.model.num_exits - 1
    model.classifier.load_state_dict(
        {name: heads[f"classifiers.{last}.{name}"] for name in ("weight", "bias")}
    )
    output.mkdir(parents=True)
    copy_others(checkpoint.directory, output)
    for ours in ("README.md", "curve.png"):  # they speak of exits
        (output / ours).unlink(missing_ok=True)
    model.save_pretrained(output)


def check(checkpoint: Checkpoint, directory: Path, texts: list[str]) -> dict[str, float]:
    """How far what servers load is from the checkpoint's full pass.

    Raises:
        SystemExit: too far.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory, trust_remote_code=True)
    model.eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    with torch.inference_mode():
        theirs = model(**batch).logits
    recorded = record_exits(checkpoint.stack(), checkpoint.tokenizer().encode(texts))
    ours = recorded.logits[-1]
    largest = float((theirs - ours).abs().max())
    if largest > TOLERANCE or not torch.equal(theirs.argmax(-1), ours.argmax(-1)):
        raise SystemExit(f"{directory} differs from the checkpoint by up to {largest:g} in logits")
    return {"rows": len(texts), "largest_difference_of_logits": largest}


def write_graphs(checkpoint: Checkpoint, output: Path) -> None:
    """`fused.onnx` and `plain.onnx`, by kind of norm, and the session option they want here."""
    output.mkdir(parents=True)
    for name, fused in (("fused", True), ("plain", False)):
        part = output / name
        part.mkdir()
        small = quantised(graph(checkpoint, fused_norms=fused), part)
        onnx.checker.check_model(onnx.load(small).SerializeToString(), full_check=False)
        small.rename(output / f"{name}.onnx")
        shutil.rmtree(part)
    options = {"session.x64quantprecision": exact_int8()}
    (output / "session.json").write_text(json.dumps(options) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, help="with torch weights")
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    checkpoint = load_checkpoint(arguments.checkpoint)
    texts: list[Any] = [row.text for row in load_split(arguments.data, arguments.split).rows]
    shutil.rmtree(arguments.output, ignore_errors=True)
    write_final_head(checkpoint, arguments.output / "final-head")
    found = check(checkpoint, arguments.output / "final-head", texts[:CHECKED_ROWS])
    write_graphs(checkpoint, arguments.output / "int8")
    # Written last: where it is, everything is.
    (arguments.output / "checked.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
