"""The table of training objectives. A new one is a file beside this one and a line here."""

from __future__ import annotations

from typing import Any

from offramp_training.objectives.base import Objective, Progress, Stage
from offramp_training.objectives.consistentee import ConsistentEE
from offramp_training.objectives.cosee import Cosee
from offramp_training.objectives.ensemble import Ensemble
from offramp_training.objectives.joint import Joint
from offramp_training.objectives.l2w import L2W

OBJECTIVES: dict[str, Any] = {
    "joint": Joint,
    "ensemble": Ensemble,
    "consistentee": ConsistentEE,
    "cosee": Cosee,
    "l2w": L2W,
}


MULTI_LABEL_OBJECTIVES = ("joint",)
"""Those that are defined for sets of labels: the others' papers weigh, vote on or reward the one
right class of a row."""


def make_objective(options: dict[str, Any]) -> Objective:
    """What an `[objective]` table asks for; the objective checks its own options."""
    name = options.get("name", "joint")
    if not isinstance(name, str) or name not in OBJECTIVES:
        known = ", ".join(sorted(OBJECTIVES))
        raise ValueError(f"objective.name = {name!r}; allowed: {known}")
    made: Objective = OBJECTIVES[name](**options)
    return made


__all__ = [
    "MULTI_LABEL_OBJECTIVES",
    "OBJECTIVES",
    "Objective",
    "Progress",
    "Stage",
    "make_objective",
]
