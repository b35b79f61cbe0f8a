"""Pooling: how the hidden states of a text's tokens become the one vector that an exit head sees.

Each form is one short function over rows of one length, [rows, S, H], with a mask where rows are
padded. Training calls it on a padded batch; serving calls the same function once per run of rows of
equal length, which needs no mask. It knows nothing about exits, layers, classifiers or parameters.
"""

import math
from collections.abc import Callable

from offramp_model.arrays import Array, namespace, segment_means, softmax
from offramp_model.config import Pooling
from offramp_model.rows import PackedTokens, Run


def pool(
    form: Pooling, hidden: Array, mask: Array | None = None, query: Array | None = None
) -> Array:
    """[rows, S, H], where padded with a 0/1 mask [rows, S] → [rows, P]; `query` is that of
    `attend`."""
    match form:
        case "cls":
            return hidden[:, 0]
        case "mean":
            return _mean(hidden, mask)
        case "mean_cls":
            return _joined(_mean(hidden, mask), hidden[:, 0])
        case "max_mean":
            return _joined(_largest(hidden, mask), _mean(hidden, mask))
        case "attention":
            return attend(hidden, mask, query)


def pool_packed(form: Pooling, hidden: PackedTokens, query: Array | None = None) -> Array:
    """Packed [T, H] → [n, P], what `pool` gives for the same rows padded.

    Forms that have a quick way over packed tokens take it. For the others runs of equal length
    are plain [rows, length, H] views: no mask, no scatter. Either way, what a row gets does not
    depend on its neighbours.
    """
    values, cu_seqlens = hidden.values, hidden.cu_seqlens
    match form:
        case "cls":
            return _first(hidden)
        case "mean":
            return segment_means(values, cu_seqlens)
        case "mean_cls":
            return _joined(segment_means(values, cu_seqlens), _first(hidden))
        case "max_mean":
            return _joined(_by_run(_largest, hidden), segment_means(values, cu_seqlens))
        case "attention":
            return _by_run(lambda rows: attend(rows, None, query), hidden)


def attend(hidden: Array, mask: Array | None, query: Array | None) -> Array:
    """A learned weighted mean: one query per attention head asks each token how much it matters.

    Head k of `query` [heads, H / heads] looks at its own slice of the features as key and as value:
    softmax over the real tokens of (slice · query_k) / √(H / heads). A query of zeros, the start,
    weighs all tokens alike, so that training sets out from the mean; weight decay pulls back to it.
    """
    assert query is not None  # the form is `attention`
    xp, (rows, length, width) = namespace(hidden), hidden.shape
    heads, size = query.shape
    tokens = xp.permute_dims(xp.reshape(hidden, (rows, length, heads, size)), (0, 2, 1, 3))
    asked = xp.astype(query, hidden.dtype, copy=False)[:, :, None] / math.sqrt(size)
    scores = (tokens @ asked)[..., 0]  # (rows, heads, S)
    if mask is not None:
        scores = xp.where(mask[:, None, :] == 0, -xp.inf, scores)
    return xp.reshape(softmax(scores)[:, :, None, :] @ tokens, (rows, width))


def _mean(hidden: Array, mask: Array | None) -> Array:
    """Of the real tokens, specials among them."""
    xp = namespace(hidden)
    if mask is None:
        return xp.mean(hidden, axis=1)
    weights = xp.astype(mask, hidden.dtype)[..., None]
    return xp.sum(hidden * weights, axis=1) / xp.sum(weights, axis=1)


def _largest(hidden: Array, mask: Array | None = None) -> Array:
    """Value of each feature over the real tokens."""
    xp = namespace(hidden)
    if mask is not None:
        hidden = xp.where(mask[..., None] == 0, -xp.inf, hidden)
    return xp.max(hidden, axis=1)


def _first(hidden: PackedTokens) -> Array:
    """The hidden state of the first token, [CLS] or <s>."""
    return hidden.values[hidden.cu_seqlens[:-1]]


def _joined(first: Array, second: Array) -> Array:
    return namespace(first).concat([first, second], axis=-1)


def _by_run(form: Callable[[Array], Array], hidden: PackedTokens) -> Array:
    nobody = Run(start=0, rows=0, length=1)  # so that an empty batch has the right width, too
    xp, width = namespace(hidden.values), hidden.values.shape[1]
    return xp.concat(
        [
            form(xp.reshape(hidden.values[run.start : run.stop], (run.rows, run.length, width)))
            for run in hidden.runs or (nobody,)
        ]
    )
