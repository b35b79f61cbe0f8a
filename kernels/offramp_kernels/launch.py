"""Where and on what a Triton kernel may be launched. Knows nothing about what it computes."""

from typing import Any

import torch
from torch import Tensor
from triton.runtime import JITFunction

POINTER_ALIGNMENT = 16
"""Bytes; what lets the compiler move 16 bytes per thread and instruction."""


def check_launch_device(kernel: Any, device: torch.device) -> None:
    """ValueError unless ``kernel`` can run on tensors of ``device``: metadata only."""
    if not isinstance(kernel, JITFunction):
        return  # interpreted: any device will do
    if device.type != "cuda":
        raise ValueError(f"Triton runs on CUDA tensors, got {device}; use the reference backend")
    if device.index != torch.cuda.current_device():
        raise ValueError(f"tensors are on {device}, which is not the current CUDA device")


def check_aligned(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % POINTER_ALIGNMENT:
        raise ValueError(f"{name} must start at a multiple of {POINTER_ALIGNMENT} bytes")


def check_no_gradient(name: str, *tensors: Tensor) -> None:
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        raise ValueError(f"{name} has no backward on Triton; call it in inference mode")
