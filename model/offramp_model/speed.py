"""Speed-up arithmetic, defined once: always in layers, always a ratio of sums.

`speed-up = L·N / Σ exit_layer` over N rows. Head, pooler and wall-clock cost are not in it; a
measured time ratio is called latency or throughput speed-up and is computed where it is measured.
"""

from collections.abc import Sequence


def mean_exit_layer(exit_counts: Sequence[int]) -> float:
    """Mean 1-based exit layer of rows counted per layer.

    Args:
        exit_counts: one count for each layer 1..L; layers without an exit hold 0.

    Raises:
        ValueError: a count is negative or there is no row at all.
    """
    rows = sum(exit_counts)
    if min(exit_counts, default=0) < 0 or rows == 0:
        raise ValueError(f"exit counts must be non-negative with at least one row: {exit_counts}")
    layers_run = sum(layer * count for layer, count in enumerate(exit_counts, start=1))
    return layers_run / rows


def speedup_ratio(exit_counts: Sequence[int]) -> float:
    """Speed-up in layers, `L·N / Σ exit_layer` ≥ 1, of rows counted per layer 1..L."""
    return len(exit_counts) / mean_exit_layer(exit_counts)


def count_exits(exit_layers: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Rows per layer 1..L from each row's 1-based exit layer.

    Raises:
        ValueError: an exit layer lies outside 1..L.
    """
    counts = [0] * num_layers
    for layer in exit_layers:
        if not 1 <= layer <= num_layers:
            raise ValueError(f"exit layer {layer} is outside 1..{num_layers}")
        counts[layer - 1] += 1
    return tuple(counts)
