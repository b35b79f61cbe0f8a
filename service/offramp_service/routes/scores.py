"""From an answer's logits to the scores that a client asked for. Pure; it knows no door."""

import math
from collections.abc import Sequence

from offramp_service.errors import InvalidInput
from offramp_service.jobs import Answer
from offramp_service.schemas.shared import Activation, Scored


def scores(answer: Answer, activation: Activation | None = None) -> list[float]:
    """One score for each label, in label-id order; None is the model's own activation."""
    match activation:
        case "none":
            return answer.logits
        case "sigmoid":
            return [1 / (1 + math.exp(-min(max(one, -700.0), 700.0))) for one in answer.logits]
        case "softmax":
            return _softmax(answer.logits)
        case None:
            return answer.probs


def _softmax(logits: Sequence[float]) -> list[float]:
    largest = max(logits)
    powers = [math.exp(one - largest) for one in logits]
    total = sum(powers)
    return [power / total for power in powers]


def best(labels: Sequence[str], values: Sequence[float], top_k: int | None = None) -> list[Scored]:
    """Labels and scores, best first; all, or `top_k` of them."""
    return [Scored(values[index], labels[index]) for index in ranked(values)[:top_k]]


def ranked(values: Sequence[float]) -> list[int]:
    """Label ids, best first; ties keep their order."""
    return sorted(range(len(values)), key=lambda index: -values[index])


def check_top_k(top_k: int | None, param: str = "top_k") -> None:
    """More than there are labels is all of them.

    Raises:
        InvalidInput: fewer than one.
    """
    if top_k is not None and top_k < 1:
        raise InvalidInput(f"{param} is {top_k!s:.40}, allowed is 1 or more", param=param)
