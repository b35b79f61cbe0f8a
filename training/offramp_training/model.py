"""The encoder under training: a transformers backbone with an exit head after chosen layers.

Padded batches and every exit's logits: what gradients need. Serving runs the same weights without
padding in `offramp_model`. Knows nothing about losses, data or exit policies.
"""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import nn

from offramp_model.backbone import check_backbone
from offramp_model.config import MultiExitConfig, PolicyOptions, ProblemType
from offramp_model.families import FAMILIES
from offramp_model.heads import ExitHeads
from offramp_training.config import ModelSection
from offramp_training.errors import BackboneError, RecipeError

if TYPE_CHECKING:
    from offramp_training.batches import Batch

TOKENIZER_FILES = ("special_tokens_map.json", "vocab.txt", "vocab.json", "merges.txt")


class MultiExitModel(nn.Module):
    """Backbone and exit heads; `forward` gives the logits of every exit, [E, B, C]."""

    def __init__(self, backbone: Any, config: MultiExitConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = backbone
        self.exits = ExitHeads(config)
        self._takes_types = "token_type_ids" in inspect.signature(backbone.forward).parameters
        # transformers' own pooler looks at the last layer only. It stays in the file, as it came.
        pooler = getattr(backbone, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)
            # One that sees two pooled forms at once has no pre-trained counterpart.
            fits = config.pooled_size == config.hidden_size
            if config.pooler != "none" and fits and hasattr(pooler, "dense"):
                self.exits.init_pooler(pooler.dense)

    def add_gates(self, hidden: int) -> None:
        """Fresh gates beside the exit heads, for an objective that learns when to leave."""
        if self.config.num_exits < 2:
            raise ValueError(
                f"model.exit_layers = {list(self.config.exit_layers)}; gates choose between exits, "
                f"allowed: two layers or more, the last of them {self.config.num_layers}"
            )
        self.config = self.config.model_copy(update={"gate_hidden": hidden})
        self.exits.add_gates(hidden)
        self.exits.gates.to(self.device)

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        *,
        with_gates: Literal[False] = False,
    ) -> torch.Tensor: ...

    @overload
    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        *,
        with_gates: Literal[True],
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
        *,
        with_gates: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits of every exit; `with_gates` also those of the gates, [E - 1, B]."""
        states = self.states(input_ids, attention_mask, token_type_ids)
        logits = torch.stack([self.exits.classify(i, state) for i, state in enumerate(states)])
        if not with_gates:
            return logits
        gates = [self.exits.gate_logits(i, state) for i, state in enumerate(states[:-1])]
        return logits, torch.stack(gates)

    def states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> list[torch.Tensor]:
        """What each exit's classifier and gate see, [B, W] each."""
        pooled = self.pooled(input_ids, attention_mask, token_type_ids)
        return [self.exits.state(index, rows) for index, rows in enumerate(pooled)]

    def pooled(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        token_type_ids: torch.Tensor,
    ) -> list[torch.Tensor]:
        """What each exit's pooling gives: one vector per row and exit, [B, P] each."""
        types = {"token_type_ids": token_type_ids} if self._takes_types else {}
        output = self.backbone(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **types
        )
        return [
            self.exits.pool_padded(index, output.hidden_states[layer], attention_mask)
            for index, layer in enumerate(self.config.exit_layers)
        ]

    def logits(self, batch: Batch) -> torch.Tensor:
        """`forward` of a batch."""
        logits: torch.Tensor = self(batch.input_ids, batch.attention_mask, batch.token_type_ids)
        return logits

    def logits_and_gates(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of every exit, [E, B, C], and of every gate, [E - 1, B], from one pass."""
        both: tuple[torch.Tensor, torch.Tensor] = self(
            batch.input_ids, batch.attention_mask, batch.token_type_ids, with_gates=True
        )
        return both

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    @property
    def pad_id(self) -> int:
        return int(self.backbone.config.pad_token_id or 0)

    def save_backbone(self, directory: Path) -> None:
        """`config.json` and `model.safetensors`, under Hugging Face's own names."""
        self.backbone.save_pretrained(directory)

    def exit_tensors(self) -> dict[str, torch.Tensor]:
        """What goes into `exits.safetensors`."""
        return {name: value.detach().cpu() for name, value in self.exits.state_dict().items()}


def build_model(
    directory: Path,
    section: ModelSection,
    labels: tuple[str, ...],
    seed: int,
    policies: PolicyOptions | None = None,
    problem_type: ProblemType = "single_label_classification",
) -> MultiExitModel:
    """A backbone from a local directory with fresh exit heads, the same heads for the same seed."""
    backbone = load_backbone(directory)
    config = _multi_exit_config(backbone.config, section, labels, problem_type)
    config = config.model_copy(update={"policies": policies or PolicyOptions()})
    try:
        check_backbone(backbone.config.to_dict(), config)
    except ValueError as error:
        raise BackboneError(f"{directory}: cannot be served: {error}") from None
    backbone.config.id2label = dict(enumerate(labels))
    backbone.config.label2id = {label: number for number, label in enumerate(labels)}
    backbone.config.problem_type = problem_type
    if section.freeze_embeddings:
        backbone.embeddings.requires_grad_(False)
    torch.manual_seed(seed)
    return MultiExitModel(backbone, config)


def load_backbone(directory: Path) -> Any:
    """transformers' model of a directory: safetensors only, no remote code, float32.

    Every weight comes from the file. transformers would make up a missing pooler; it is dropped.
    """
    from transformers import AutoConfig, AutoModel  # slow to import: not for `inspect` or `--help`
    from transformers.utils import logging

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        family = AutoConfig.from_pretrained(directory, local_files_only=True).model_type
        if family in FAMILIES:
            backbone, report = AutoModel.from_pretrained(
                directory,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # reported, and refused below by name
                output_loading_info=True,
            )
    except Exception as error:  # transformers has no common base for what can go wrong
        raise BackboneError(f"{directory}: not a readable backbone: {_reason(error)}") from None
    if family not in FAMILIES:
        raise BackboneError(f"{directory}: model_type {family!r}; allowed: {', '.join(FAMILIES)}")
    missing = sorted(report["missing_keys"])
    if any(key.startswith("pooler.") for key in missing):
        backbone.pooler = None
    _refuse(directory, "no", [key for key in missing if not key.startswith("pooler.")])
    _refuse(directory, "another shape of", sorted(key for key, *_ in report["mismatched_keys"]))
    return backbone


def _refuse(directory: Path, what: str, keys: list[str]) -> None:
    if keys:
        more = f", ... ({len(keys)} tensors)" if len(keys) > 3 else ""
        raise BackboneError(
            f"{directory}: its weights have {what} {', '.join(keys[:3])}{more}; "
            "every layer that config.json names is needed"
        )


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or 'no reason given').splitlines()[0]}"


def _multi_exit_config(
    backbone: Any, section: ModelSection, labels: Any, problem_type: ProblemType
) -> MultiExitConfig:
    layers = backbone.num_hidden_layers
    exits = section.exit_layers or tuple(range(1, layers + 1))
    if exits[-1] != layers:
        raise RecipeError(
            f"model.exit_layers = {list(exits)}; the backbone has {layers} layers, allowed: "
            f"ascending layer numbers of which the last is {layers}"
        )
    if section.pooling == "attention" and backbone.hidden_size % section.attention_heads:
        raise RecipeError(
            f"model.attention_heads = {section.attention_heads}; allowed: what divides the "
            f"backbone's width, {backbone.hidden_size}"
        )
    longest = backbone.max_position_embeddings
    if "roberta" in backbone.model_type:
        longest -= backbone.pad_token_id + 1  # its positions start after the padding id
    if section.max_length > longest:
        raise RecipeError(
            f"model.max_length = {section.max_length}; the backbone has {longest} positions"
        )
    return MultiExitConfig(
        num_layers=layers,
        hidden_size=backbone.hidden_size,
        exit_layers=exits,
        labels=labels,
        problem_type=problem_type,
        pooling=section.pooling,
        attention_heads=section.attention_heads,
        pooler=section.pooler,
        max_length=section.max_length,
        head_dropout=section.head_dropout,
    )


def load_tokenizer(directory: Path, model: MultiExitModel) -> Any:
    """transformers' tokenizer of a directory; it must give no id that the model has no row for."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, use_fast=True, trust_remote_code=False
        )
    except Exception as error:  # neither transformers nor tokenizers has a common base
        raise BackboneError(f"{directory}: not a readable tokenizer: {_reason(error)}") from None
    largest, rows = max(tokenizer.get_vocab().values()), model.backbone.config.vocab_size
    if largest >= rows:
        raise BackboneError(
            f"{directory}: the tokenizer gives ids up to {largest}, the backbone has embeddings "
            f"for {rows} ids only"
        )
    return tokenizer


def save_tokenizer(tokenizer: Any, source: Path, target: Path) -> None:
    """Hugging Face's fast form, and the older files of `source`, whichever of them it has."""
    shutil.rmtree(target, ignore_errors=True)  # of a run refused for starting from another backbone
    tokenizer.save_pretrained(target)
    for name in TOKENIZER_FILES:  # transformers 5 no longer writes these; other readers want them
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
