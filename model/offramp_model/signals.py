"""Exit signals: pure functions from logits to the scalar that an exit policy compares.

Each is in its paper's own units. Nothing here knows a threshold or a direction; that is the
policy's business (`policies.py`).

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
