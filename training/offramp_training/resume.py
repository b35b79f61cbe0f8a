"""Resume points: everything a killed run needs to go on to the same bits, in safetensors and JSON.

State comes as a tree of dicts, lists, numbers, strings and tensors; tensors go to one safetensors
file and the rest, with their names in place, to one JSON file. A point is a directory written under
a temporary name and renamed, so that whatever is found is whole. Knows nothing about what the state
means.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from offramp_training.errors import OutputError

TENSORS, TREE = "state.safetensors", "state.json"
_TENSOR, _PAIRS, _TUPLE = "__tensor__", "__pairs__", "__tuple__"


def save_tree(directory: Path, tree: Any) -> None:
    """Writes a state tree into an existing directory."""
    tensors: dict[str, torch.Tensor] = {}
    content = _pack(tree, tensors, "")
    save_file(tensors, directory / TENSORS)
    (directory / TREE).write_text(json.dumps(content), encoding="utf-8")


def load_tree(directory: Path) -> Any:
    """The state tree of a directory; tensors on the CPU."""
    content = json.loads((directory / TREE).read_text(encoding="utf-8"))
    return _unpack(content, load_file(directory / TENSORS))


def _pack(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    """`value` as JSON, its tensors moved to `tensors`. Keys that JSON cannot hold become pairs."""
    if isinstance(value, torch.Tensor):
        # A copy: safetensors refuses tensors that share memory.
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, dict):
        items = [(key, _pack(one, tensors, f"{name}/{key}")) for key, one in value.items()]
        if all(isinstance(key, str) and not key.startswith("__") for key in value):
            return dict(items)
        return {_PAIRS: [list(item) for item in items]}
    if isinstance(value, (list, tuple)):
        packed = [_pack(one, tensors, f"{name}/{place}") for place, one in enumerate(value)]
        return {_TUPLE: packed} if isinstance(value, tuple) else packed
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(
        f"{name or 'state'} is a {type(value).__name__}; allowed in a state: dict, list, tuple, "
        "tensor, number, string, None"
    )


def _unpack(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(one, tensors) for one in value]
    if not isinstance(value, dict):
        return value
    if _TENSOR in value:
        return tensors[value[_TENSOR]]
    if _TUPLE in value:
        return tuple(_unpack(one, tensors) for one in value[_TUPLE])
    if _PAIRS in value:
        return {key: _unpack(one, tensors) for key, one in value[_PAIRS]}
    return {key: _unpack(one, tensors) for key, one in value.items()}


def rng_state() -> dict[str, Any]:
    """torch's random generators, of the CPU and of the device that this process runs on, as byte
    tensors."""
    cuda = [torch.cuda.get_rng_state()] if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any]) -> None:
    """Undo of `rng_state`."""
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state(state["cuda"][0])


class ResumePoints:
    """The resume points of one run, numbered; only the newest is kept."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __bool__(self) -> bool:
        """Is there one to go on from?"""
        return bool(self._points())

    def save(self, tree: Any) -> None:
        """Publishes a point at once: a kill at any moment leaves the old one or the new one."""
        old = self._points()
        number = int(old[-1].name.rpartition("-")[2]) + 1 if old else 1
        part = self.directory / f".part-{number:09d}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        save_tree(part, tree)
        for path in (*part.iterdir(), part):
            _sync(path)
        part.rename(self.directory / f"point-{number:09d}")
        _sync(self.directory)
        for point in old:
            shutil.rmtree(point)

    def load(self) -> Any | None:
        """The newest readable point's tree, or None where there is no point."""
        for part in self.directory.glob(".part-*"):
            shutil.rmtree(part)
        points = self._points()
        for point in reversed(points):
            try:
                return load_tree(point)
            except (OSError, ValueError, KeyError, SafetensorError):
                continue  # half deleted, or damaged: an older one may still be there
        if points:
            raise OutputError(f"{points[-1]} is damaged; allowed: --overwrite, to start anew")
        return None

    def _points(self) -> list[Path]:
        return sorted(self.directory.glob("point-*"))


def _sync(path: Path) -> None:
    """Makes a file, or the names in a directory, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
