"""Where a Triton kernel may be launched. Knows nothing about what the kernel computes."""

from typing import Any

import torch
from triton.runtime import JITFunction


def check_launch_device(kernel: Any, device: torch.device) -> None:
    """ValueError unless ``kernel`` can run on tensors of ``device``: metadata only."""
    if not isinstance(kernel, JITFunction):
        return  # interpreted: any device will do
    if device.type != "cuda":
        raise ValueError(f"Triton runs on CUDA tensors, got {device}; use the reference backend")
    if device.index != torch.cuda.current_device():
        raise ValueError(f"tensors are on {device}, which is not the current CUDA device")
