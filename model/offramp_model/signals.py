"""Exit signals: pure functions from logits to the scalar that an exit policy compares.

Each is in its paper's own units. Nothing here knows a threshold or a direction; that is the
policy's business (`policies.py`). Those of multi-label models look at each label's own probability,
sigmoid(z/T), and are about the label set that the logits say.

Logits are [..., C]; results are [...] in float32, or float64 when the logits are float64: half
precision saturates long before the thresholds that matter. All stay finite for logits up to
±1e4 and give NaN for NaN logits, so that a broken row can be recognised and kept in.
"""

import math

import torch
from torch import Tensor


def _widen(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def max_probability(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Largest probability of softmax(z/T), in [1/C, 1] (confidence; COSEE, L2W-DEN)."""
    return torch.softmax(_widen(logits) / temperature, dim=-1).amax(dim=-1)


def margin(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Difference of the two largest probabilities of softmax(z/T), in [0, 1]."""
    top = torch.softmax(_widen(logits) / temperature, dim=-1).topk(2, dim=-1).values
    return top[..., 0] - top[..., 1]


def normalised_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of softmax(z/T) over ln C, in [0, 1] (COSEE, section 2).

    Computed from log-probabilities: p·log p of an underflowed probability is 0, not NaN.
    """
    log_p = torch.log_softmax(_widen(logits) / temperature, dim=-1)
    return -(log_p.exp() * log_p).sum(dim=-1) / math.log(logits.shape[-1])


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Normalised energy sigmoid(-T·logsumexp(z/T)), in (0, 1) (COSEE, section 2).

    Not shift-invariant: a common offset of the logits changes it although probabilities stay.
    """
    free = temperature * torch.logsumexp(_widen(logits) / temperature, dim=-1)
    return torch.sigmoid(-free)


def least_certain(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Of the least certain label of a multi-label model, max(p, 1 - p), in [0.5, 1].

    A set is right when all its labels are, so it is as sure as the least sure of them.
    """
    return torch.sigmoid(_widen(logits).abs().amin(dim=-1) / temperature)


def least_margin(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Smallest |2p - 1| over the labels of a multi-label model, in [0, 1]."""
    return torch.tanh(_widen(logits).abs().amin(dim=-1) / (2 * temperature))


def mean_binary_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Mean over the labels of a multi-label model of the entropy of p and 1 - p, over ln 2, in
    [0, 1].

    The largest entropy would order texts as `least_certain` does, so the mean is what adds a second
    view; at speed-up 2 it was the better one (0.495 of 800 sets right against 0.468 on joined SNIPS
    texts, `training/bench/bench_set_signals.py`).

    -ln p is softplus(-z): the entropy of a saturated label is 0, not NaN.
    """
    z = _widen(logits) / temperature
    softplus = torch.nn.functional.softplus
    entropy = torch.sigmoid(z) * softplus(-z) + torch.sigmoid(-z) * softplus(z)
    return entropy.mean(dim=-1) / math.log(2)
