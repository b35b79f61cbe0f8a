"""Training, evaluation and calibration of multi-exit checkpoints."""
