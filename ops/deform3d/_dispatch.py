"""The choice of the backend for a call: predicates, the choice, and the DEFORM3D_BACKEND override."""

from __future__ import annotations

import functools
import importlib
import logging
import os
import warnings

import torch
from torch import Tensor

from .cuda import can_fuse_offset, can_run_cuda

BACKENDS = ("cpu", "cuda", "reference")
ENVIRONMENT = "DEFORM3D_BACKEND"
CPU_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Offsets of this size fit beside any network: a query for free memory would only cost time.
_FUSE_NEVER_BYTES = 2**28

log = logging.getLogger("deform3d")


def can_run_cpu(device: torch.device, dtype: torch.dtype) -> tuple[bool, str]:
    """Return whether the Numba backend can run tensors of this device and dtype, and why or why not."""
    if device.type != "cpu":
        return False, f"the Numba backend needs CPU tensors, got {device}"
    if dtype not in CPU_DTYPES:
        return False, f"the Numba backend has no kernel for {dtype}"
    problem = _numba_problem()
    return not problem, problem or "CPU tensors, and Numba works"


def check_backend(name: str | None, source: str) -> None:
    """Raise ValueError unless `name` is a backend's name or None (choose one)."""
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, expected one of {', '.join(map(repr, BACKENDS))}.")


def choose_backend(device: torch.device, dtype: torch.dtype, backend: str | None = None) -> str:
    """Return the name of the backend for tensors of this device and dtype.

    An explicit `backend` comes first, then the environment variable DEFORM3D_BACKEND, then the fastest backend that
    can run. Raise ValueError for an unknown name and RuntimeError if the requested backend cannot run.
    """
    source = "backend"
    if backend is None:
        backend = os.environ.get(ENVIRONMENT)
        source = source if backend is None else ENVIRONMENT
    check_backend(backend, source)
    return _choose(device.type, dtype, backend, source)


def can_fuse(input: Tensor, weight: Tensor, backend: str | None) -> bool:
    """Return whether a kernel computes the offsets of this call itself; log the first time.

    Two convolutions are faster, so they run whenever memory allows. The kernel is for calls whose offsets, 81 channels,
    would take more than half of the GPU's free memory, PyTorch's own reserve included.
    """
    if input.device.type != "cuda" or input.dim() != 5 or weight.dim() != 5 or torch.compiler.is_compiling():
        return False
    dtype = input.dtype
    if torch.is_autocast_enabled("cuda") and dtype != torch.float64:
        dtype = torch.float32  # the operator computes in float32 under autocast
    offset_bytes = input.shape[0] * 3 * weight.shape[2:].numel() * input.shape[2:].numel() * dtype.itemsize
    if offset_bytes <= _FUSE_NEVER_BYTES or offset_bytes <= free_memory(input.device) // 2:
        return False
    if choose_backend(input.device, dtype, backend) != "cuda" or not can_fuse_offset(dtype, input.shape, weight.shape):
        return False
    _log_fusion(str(dtype))
    return True


def free_memory(device: torch.device) -> int:
    """Return the bytes available for tensors on this GPU: free, or held by PyTorch and not in use."""
    held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + held


@functools.cache
def _log_fusion(dtype: str) -> None:
    log.info("deform_conv3d on cuda, %s: offsets are computed inside the kernel and never stored", dtype)


@functools.cache
def _choose(device_type: str, dtype: torch.dtype, wanted: str | None, source: str) -> str:
    """Choose once per kind of call, so that the reason is logged once."""
    device = torch.device(device_type)
    if wanted == "reference":
        chosen, reason = wanted, f"asked for by {source}"
    else:
        chosen = wanted or ("cpu" if device_type == "cpu" else "cuda")
        able, reason = can_run_cpu(device, dtype) if chosen == "cpu" else can_run_cuda(device, dtype)
        if not able and wanted:
            raise RuntimeError(f"{source}: got {wanted!r}, which cannot run here: {reason}; or use 'reference'.")
        if not able:
            chosen = "reference"
            _warn_of_fallback(device_type, reason)
    log.info("deform_conv3d on %s, %s: backend %r: %s", device_type, dtype, chosen, reason)
    return chosen


@functools.cache
def _warn_of_fallback(device_type: str, reason: str) -> None:
    """Warn once per cause, even if the warning filters repeat warnings."""
    warnings.warn(f"deform_conv3d uses its slow PyTorch reference on {device_type}: {reason}.", stacklevel=2)


@functools.cache
def _numba_problem() -> str:
    """Return why the Numba backend cannot be loaded, or an empty text; an installed Numba may still be broken."""
    try:
        importlib.import_module("deform3d.cpu")
    except Exception as error:  # a broken Numba fails in many ways: wrong NumPy, no LLVM library, no cache folder
        return f"Numba cannot be loaded ({type(error).__name__}: {error}); install it with `pip install numba`"
    return ""
