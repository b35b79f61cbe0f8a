"""How many replicas Ray is to run: by layer-work that waits, and by how busy engines are.

Ray asks every second, and applies its own delays and bounds. Arithmetic only; it goes to Ray's
controller as it is, so it imports nothing but the standard library.
"""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext


class QueuedWork:
    """Replicas so that each has at most `layer_work` waiting, and none works more than `busy` of
    the time. The queue says when there are too few; an empty queue does not say that there are too
    many, so what goes down goes by how busy engines are.

    `offramp-serve plan` prints the queued layer-work at a latency target.
    """

    def __init__(self, layer_work: float, busy: float = 0.8) -> None:
        if layer_work <= 0 or not 0 < busy <= 1:
            raise ValueError(
                f"layer_work must be above 0 and busy in (0, 1], got {layer_work} and {busy}"
            )
        self._layer_work, self._busy = layer_work, busy

    def __call__(self, context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
        figures = context.aggregated_metrics or {}
        waiting = sum(figures.get("layer_work", {}).values())
        working = sum(figures.get("busy", {}).values())
        wanted = max(waiting / self._layer_work, working / self._busy)
        return max(1, math.ceil(wanted)), {}
