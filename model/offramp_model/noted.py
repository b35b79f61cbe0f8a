"""An exit policy that remembers what it compared: the signals of all exits that a row has passed.

The layer loop yields a row once, with the signal at which it left. Whoever wants to see how a row
became sure asks for it here, row by row; for the others nothing is kept and nothing is read. It
decides nothing itself.
"""

from collections.abc import Iterable

from offramp_model.arrays import Array
from offramp_model.policies import Decision, Direction, ExitPolicy, HeadOutput
from offramp_model.rows import ActiveRows

Signals = list[tuple[int, float]]
"""Exit layer and signal, in the order in which a row came by."""


class NotedPolicy:
    """`policy`, and the signals of the rows that `asking` names, by their place in the batch."""

    def __init__(self, policy: ExitPolicy, asking: Iterable[int]) -> None:
        self._policy = policy
        self.signals: dict[int, Signals] = {row: [] for row in asking}

    @property
    def name(self) -> str:
        return self._policy.name

    @property
    def direction(self) -> Direction:
        return self._policy.direction

    def initial_state(self, count: int, num_labels: int, beside: Array) -> dict[str, Array]:
        return self._policy.initial_state(count, num_labels, beside)

    def decide(self, exit_layer: int, head: HeadOutput, rows: ActiveRows) -> Decision:
        decision = self._policy.decide(exit_layer, head, rows)
        if self.signals:
            self._note(exit_layer, rows, decision.signal)
        return decision

    def take_in(self, other: "NotedPolicy", offset: int) -> None:
        """Go on with the rows of another batch as well, which count on from `offset`."""
        self.signals |= {row + offset: noted for row, noted in other.signals.items()}

    def _note(self, exit_layer: int, rows: ActiveRows, signal: Array) -> None:
        columns = (rows.row.tolist(), rows.alive.tolist(), signal.tolist())
        for row, alive, value in zip(*columns, strict=True):
            # Who has left and is still carried is not compared with anything any more.
            if alive and row in self.signals:
                self.signals[row].append((exit_layer, value))
