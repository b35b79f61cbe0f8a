"""What the peers' servers run: texts → label and score, by torch or by ONNX Runtime.

Written as somebody would who wants these servers to look good: `tokenizers` without detours, no
gradients, batches padded to their longest text, on request sorted by length and cut into groups, so
that short texts are not padded to long ones. Runs in the peers' own environments; knows nothing of
HTTP or of offramp.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_LENGTH = 128
Answer = dict[str, Any]
Logits = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Padded ids and lengths → logits."""


def options() -> argparse.Namespace:
    """Flags of all the servers; what is unknown is the peer's own."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", type=Path, required=True, help="transformers directory")
    parser.add_argument("--graph", type=Path, help="ONNX graph; default: torch")
    parser.add_argument("--threads", type=int, default=1, help="of one worker")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--rows", type=int, default=32, help="most texts in a batch")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="wait for a batch to fill")
    parser.add_argument("--group", type=int, default=0, help="sort by length, groups of so many")
    parser.add_argument("--listen", type=int, required=True, help="port on loopback")
    return parser.parse_known_args()[0]


def groups(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Which rows run together: all as they come, or groups of `size` of like length."""
    if not size:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return [order[start : start + size] for start in range(0, len(order), size)]


def padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Ids padded to the longest row, and how many of each are real."""
    lengths = np.array([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), int(lengths.max())), np.int64)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = row
    return ids, lengths


def probabilities(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.asarray(powers / powers.sum(axis=-1, keepdims=True))


class Classifier:
    """Batches of texts → an answer for each, in their order."""

    def __init__(self, model: Path, logits: Logits, *, group: int = 0) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
        self._tokenizer.no_padding()
        self._tokenizer.enable_truncation(MAX_LENGTH)
        names = json.loads((model / "config.json").read_text())["id2label"]
        self._labels = [names[str(index)] for index in range(len(names))]
        self._logits, self._group = logits, group

    def __call__(self, texts: Sequence[str]) -> list[Answer]:
        rows = [one.ids for one in self._tokenizer.encode_batch_fast(list(texts))]
        answers: list[Answer] = [{}] * len(rows)
        for group in groups([len(row) for row in rows], self._group):
            scores = probabilities(self._logits(*padded([rows[index] for index in group])))
            best = scores.argmax(axis=-1)
            for place, index in enumerate(group):
                label = int(best[place])
                answers[index] = {
                    "label": self._labels[label],
                    "score": float(scores[place, label]),
                }
        return answers


def torch_logits(model: Path, threads: int) -> Logits:
    import torch
    from transformers import AutoModelForSequenceClassification

    torch.set_num_threads(threads)
    network = AutoModelForSequenceClassification.from_pretrained(model, trust_remote_code=True)
    network.eval()

    @torch.inference_mode()
    def logits(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        mask = (np.arange(ids.shape[1]) < lengths[:, None]).astype(np.int64)
        found = network(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).logits
        return np.asarray(found.numpy())

    return logits


def onnx_logits(graph: Path, threads: int) -> Logits:
    import onnxruntime

    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session_options.log_severity_level = 3
    for name, value in json.loads((graph.parent / "session.json").read_text()).items():
        session_options.add_session_config_entry(name, value)
    session = onnxruntime.InferenceSession(
        graph, session_options, providers=["CPUExecutionProvider"]
    )

    def logits(ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        (found,) = session.run(None, {"ids": ids, "lengths": lengths})
        return np.asarray(found)

    return logits


def make_classifier(given: argparse.Namespace) -> Classifier:
    if given.graph is not None:
        logits = onnx_logits(given.graph, given.threads)
    else:
        logits = torch_logits(given.model, given.threads)
    return Classifier(given.model, logits, group=given.group)
