"""The seam for the CUDA kernels: the one module that will import cupy, and says today why it cannot run."""

from __future__ import annotations

import torch


def can_run_cuda(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the CUDA kernels can run tensors of this device and dtype, and why (not)."""
    if device.type != "cuda":
        return False, f"the CUDA backend needs CUDA tensors, got {device}"
    return False, "this deform3d has no CUDA kernels; install a version with them, and `pip install cupy-cuda13x`"
