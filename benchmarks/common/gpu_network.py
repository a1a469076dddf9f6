"""The base network's training step: time, memory, and the operator's share of it."""

from __future__ import annotations

from typing import Any

import torch
from benchmarks.common.gpu_timing import Progress, Stopwatch, kernel_times, operator_us, profiled
from monai.losses import DiceCELoss

from deform3d import _launch
from deformux.networks.blocks import DeformableMixer
from deformux.networks.deformux_net import DeformUXNet

BATCH, PATCH, CLASSES = 2, 96, 14
# Offsets of a trained network are small, but not zero as at initialisation.
SIGMA = 0.3
WHAT = (
    f'`DeformUXNet(1, {CLASSES}, "base")`, {BATCH}×{PATCH}³, channels-last, bfloat16 autocast, DiceCE, fused AdamW, '
    f"offsets of deviation {SIGMA}."
)


def training_steps(progress: Progress, seconds: float = 2.0) -> dict[str, Any]:
    """Return one row without and one with activation checkpointing."""
    torch.backends.cudnn.benchmark = True
    watch, rows = Stopwatch(seconds), []
    for checkpointing in (False, True):
        rows.append(_row(watch, checkpointing))
        progress.step(
            f"base network, checkpointing {checkpointing}: {rows[-1]['ms']:.1f} ms, {rows[-1]['peak_gb']:.1f} GB"
        )
    return {"what": WHAT, "rows": rows}


def _row(watch: Stopwatch, checkpointing: bool) -> dict[str, Any]:
    torch.manual_seed(0)
    network = DeformUXNet(1, CLASSES, "base", activation_checkpointing=checkpointing)
    for module in network.modules():
        if isinstance(module, DeformableMixer):
            # The offset branch sees normalised features: this deviation of its weights gives offsets of SIGMA.
            torch.nn.init.normal_(module.offset.weight, std=SIGMA / module.offset.in_channels**0.5)
    network = network.cuda().to(memory_format=torch.channels_last_3d).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, weight_decay=0.08, fused=True)
    loss_of = DiceCELoss(to_onehot_y=True, softmax=True)
    shape = (BATCH, 1, PATCH, PATCH, PATCH)
    scan, labels = torch.randn(shape, device="cuda"), torch.randint(0, CLASSES, shape, device="cuda")

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logits = network(scan)
        loss_of(logits.float(), labels).backward()
        optimizer.step()

    milliseconds = watch.milliseconds(step)
    # The first steps tried cuDNN's algorithms, whose workspaces are no part of a step.
    torch.cuda.reset_peak_memory_stats()
    step()
    peak = (torch.cuda.max_memory_allocated() - watch.flush.nbytes) / 1e9
    events = profiled(step, 3).events()
    kernels = kernel_times(events, 3)
    total = sum(kernel["us"] for kernel in kernels)
    # A profiler that does not connect CuPy's launches with the operator still names their kernels.
    names = {kernel.name for kernel in _launch.all_kernels()}
    own = sum(kernel["us"] for kernel in kernels if kernel["kernel"] in names)
    operator = max(own, operator_us(events, 3))
    return {
        "checkpointing": checkpointing,
        "ms": milliseconds,
        "peak_gb": peak,
        "operator_ms": operator / 1000,
        "share": operator / total if total else None,  # a profiler may see no kernels
        "longest": kernels[:25],
    }
