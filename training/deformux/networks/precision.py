"""Arithmetic of a device: bfloat16 if native, else float32."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

__all__ = ["computes_bfloat16", "mixed_precision"]


def computes_bfloat16(device: str | torch.device) -> bool:
    """Return whether a device computes bfloat16 natively."""
    # Without the instructions a CPU emulates bfloat16, which is slower than float32.
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.is_bf16_supported() if on_gpu else torch.cpu._is_avx512_bf16_supported()


def mixed_precision(device: str | torch.device, *, keep_casts: bool = True) -> AbstractContextManager[Any]:
    """Return autocast to bfloat16 if the device computes it natively, else a context without effect.

    Args:
        device: where the computation runs.
        keep_casts: cast each weight once until the end of the context.
    """
    kind = torch.device(device).type
    return torch.autocast(kind, dtype=torch.bfloat16, enabled=computes_bfloat16(device), cache_enabled=keep_casts)
