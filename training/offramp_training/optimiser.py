"""AdamW over a stage's parameters, and the learning rate as a plain function of the step.

The rate is computed, not kept: a resumed run has no scheduler state to restore. Knows nothing about
losses or data.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from offramp_training.config import OptimiserSection
from offramp_training.objectives import Stage


def make_optimiser(stage: Stage, section: OptimiserSection) -> torch.optim.AdamW:
    """Backbone and the rest at their own rates; biases and norms (one dimension) do not decay."""
    groups: dict[tuple[bool, bool], list[torch.nn.Parameter]] = {}
    for name, parameter in stage.parameters().items():
        key = (name.startswith("backbone."), parameter.ndim > 1)
        groups.setdefault(key, []).append(parameter)
    tables: list[dict[str, Any]] = []
    for (in_backbone, decays), parameters in groups.items():
        rate = stage.lr or (section.lr if in_backbone else section.head_lr)
        decay = section.weight_decay if decays else 0.0
        tables.append({"params": parameters, "lr": rate, "base_lr": rate, "weight_decay": decay})
    return torch.optim.AdamW(tables, betas=section.betas, fused=True)


def lr_factor(step: int, total_steps: int, section: OptimiserSection) -> float:
    """Share of the base rate at optimiser step `step` (0-based): warm-up, then decay."""
    warmup = math.ceil(total_steps * section.warmup_ratio)
    if step < warmup:
        return (step + 1) / warmup
    if section.schedule == "constant":
        return 1.0
    done = (step - warmup) / max(1, total_steps - warmup)
    if section.schedule == "linear":
        return max(0.0, 1.0 - done)
    return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))


def set_lr(optimiser: Any, factor: float) -> float:
    """Scales every group's base rate; returns the first group's rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["base_lr"] * factor
    rate: float = optimiser.param_groups[0]["lr"]
    return rate
