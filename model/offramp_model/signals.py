"""Exit signals: pure functions from logits to the scalar that an exit policy compares.

Each is in its paper's own units. Nothing here knows a threshold or a direction; that is the
policy's business (`policies.py`). Those of multi-label models look at each label's own probability,
sigmoid(z/T), and are about the label set that the logits say.

Logits are [..., C], of numpy or torch, with gradients in the latter; results are [...] in float32,
or float64 when the logits are float64: half precision saturates long before the thresholds that
matter. All stay finite for logits up to ±1e4 and give NaN for NaN logits, so that a broken row can
be recognised and kept in.
"""

import math

from offramp_model.arrays import (
    Array,
    log_softmax,
    logsumexp,
    namespace,
    sigmoid,
    softmax,
    softplus,
)


def _widen(logits: Array) -> Array:
    xp = namespace(logits)
    return logits if logits.dtype in (xp.float32, xp.float64) else xp.astype(logits, xp.float32)


def max_probability(logits: Array, temperature: float = 1.0) -> Array:
    """Largest probability of softmax(z/T), in [1/C, 1] (confidence; COSEE, L2W-DEN)."""
    return namespace(logits).max(softmax(_widen(logits) / temperature), axis=-1)


def margin(logits: Array, temperature: float = 1.0) -> Array:
    """Difference of the two largest probabilities of softmax(z/T), in [0, 1]."""
    ascending = namespace(logits).sort(softmax(_widen(logits) / temperature), axis=-1)
    return ascending[..., -1] - ascending[..., -2]


def normalised_entropy(logits: Array, temperature: float = 1.0) -> Array:
    """Entropy of softmax(z/T) over ln C, in [0, 1] (COSEE, section 2).

    Computed from log-probabilities: p·log p of an underflowed probability is 0, not NaN.
    """
    xp, log_p = namespace(logits), log_softmax(_widen(logits) / temperature)
    return -xp.sum(xp.exp(log_p) * log_p, axis=-1) / math.log(logits.shape[-1])


def energy(logits: Array, temperature: float = 1.0) -> Array:
    """Normalised energy sigmoid(-T·logsumexp(z/T)), in (0, 1) (COSEE, section 2).

    Not shift-invariant: a common offset of the logits changes it although probabilities stay.
    """
    return sigmoid(-temperature * logsumexp(_widen(logits) / temperature))


def least_certain(logits: Array, temperature: float = 1.0) -> Array:
    """Of the least certain label of a multi-label model, max(p, 1 - p), in [0.5, 1].

    A set is right when all its labels are, so it is as sure as the least sure of them.
    """
    return sigmoid(_smallest(logits) / temperature)


def least_margin(logits: Array, temperature: float = 1.0) -> Array:
    """Smallest |2p - 1| over the labels of a multi-label model, in [0, 1]."""
    return namespace(logits).tanh(_smallest(logits) / (2 * temperature))


def mean_binary_entropy(logits: Array, temperature: float = 1.0) -> Array:
    """Mean over the labels of a multi-label model of the entropy of p and 1 - p, over ln 2, in
    [0, 1].

    The largest entropy would order texts as `least_certain` does, so the mean is what adds a second
    view; at speed-up 2 it was the better one (0.495 of 800 sets right against 0.468 on joined SNIPS
    texts, `training/bench/bench_set_signals.py`).

    -ln p is softplus(-z): the entropy of a saturated label is 0, not NaN.
    """
    z = _widen(logits) / temperature
    entropy = sigmoid(z) * softplus(-z) + sigmoid(-z) * softplus(z)
    return namespace(logits).mean(entropy, axis=-1) / math.log(2)


def _smallest(logits: Array) -> Array:
    """|z| of the label that is closest to being undecided."""
    xp = namespace(logits)
    return xp.min(xp.abs(_widen(logits)), axis=-1)
