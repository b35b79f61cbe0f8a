"""The end of a first stage, kept for the runs of a sweep that have the same one.

What is kept is the state of a resume point, random generators included, so that a run which goes on
from another's first stage ends with the bits that it would have had alone. Knows neither what makes
two first stages the same (`fit.first_stage_identity`) nor what is in the state.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from offramp_training.errors import OutputError
from offramp_training.resume import ResumePoints


class FirstStage:
    """A directory that is named for one first stage, as seen by one of the runs that share it."""

    def __init__(self, directory: Path, run: str) -> None:
        self.run = run
        self.trained_by = run  # another, once this run goes on from there
        self._points = ResumePoints(directory)

    def keep(self, state: dict[str, Any]) -> None:
        """The state at the end of the stage, published at once, unless one is there."""
        if not self._points:
            self._points.save({"run": self.run, "state": state})

    def take(self) -> tuple[str, dict[str, Any]] | None:
        """Whose it is, and the state; None where nothing is kept.

        A damaged one is removed: training the stage anew is all that it costs.
        """
        try:
            kept = self._points.load()
        except OutputError:
            shutil.rmtree(self._points.directory)
            return None
        return None if kept is None else (kept["run"], kept["state"])
