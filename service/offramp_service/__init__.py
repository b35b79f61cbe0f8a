"""The HTTP service that answers from a multi-exit checkpoint."""
