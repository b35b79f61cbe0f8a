"""Multi-exit encoders: what training writes and the service reads."""
