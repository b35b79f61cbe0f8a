"""The compaction plan: where each survivor of a packed batch comes from and goes to.

Plain device tensors of fixed capacity. Knows nothing about hidden states, exit policies or which
backend wrote it.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class CompactPlan:
    """Order-preserving move of the survivors of B rows (B is the capacity, not the survivors).

    Shapes depend on B alone, so that a plan can be made, kept and replayed without the host ever
    learning how many rows survived.
    """

    source: Tensor
    """int32 [B]: old row of new row j; -1 for every j >= n_alive."""
    cu_seqlens: Tensor
    """int32 [B + 1]: new offsets; every entry j >= n_alive equals T_alive."""
    counts: Tensor
    """int32 [2]: n_alive, T_alive."""

    @property
    def capacity(self) -> int:
        return self.source.shape[0]

    def read_counts(self) -> tuple[int, int]:
        """(n_alive, T_alive) on the host: the one place that reads them. Synchronises on CUDA."""
        n_alive, t_alive = self.counts.tolist()
        return n_alive, t_alive
