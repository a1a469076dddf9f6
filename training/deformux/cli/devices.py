"""Options of the commands that PyTorch must check: device and threads."""

from __future__ import annotations

import torch

from deformux.cli.common import valid_device

__all__ = ["device_name", "torch_device", "use_threads"]


def use_threads(threads: int) -> None:
    """Let PyTorch compute on a number of CPU threads; 0 leaves the choice to PyTorch."""
    if threads:
        torch.set_num_threads(threads)


def torch_device(name: str) -> str:
    """Return the device of an option, ``auto`` resolved; raise ValueError if this machine has no such device."""
    if valid_device(name) == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(name).type == "cuda" and not torch.cuda.is_available():
        raise ValueError("this machine has no usable CUDA device; use --device cpu")
    return name


def device_name(device: str) -> str:
    """Return the name of a device, as cards state it."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
