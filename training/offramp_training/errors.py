"""What can be wrong with what a user gave; the command line prints these as one line.

TrainingError (ValueError)
├── RecipeError      a key or value of the recipe
├── DataError        a file, a line, a column, a label
├── BackboneError    the encoder to start from
├── OutputError      the directory to write to
└── SweepError       points of a sweep that failed
"""

from __future__ import annotations


class TrainingError(ValueError):
    """Base of every error that the user can mend."""


class RecipeError(TrainingError):
    """A recipe that cannot be trained."""


class DataError(TrainingError):
    """Rows that cannot be learnt from."""


class BackboneError(TrainingError):
    """No encoder to start from."""


class OutputError(TrainingError):
    """An output directory that must not, or cannot, be written."""


class SweepError(TrainingError):
    """A sweep that ended with failed points."""
