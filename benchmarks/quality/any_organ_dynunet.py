"""MONAI's DynUNet with nnU-Net's plan, augmentation and training, for some minutes."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from benchmarks.common.networks import adopt_fast_convolutions
from benchmarks.quality.any_organ_deformux import Tell, Trained
from benchmarks.quality.any_organ_fixed import fixed_settings
from benchmarks.quality.any_organ_nnunet_plan import UNetPlan, unet_plan
from benchmarks.quality.any_organ_unet_patches import UNetPatches
from monai.data import MetaTensor
from monai.losses import DiceCELoss
from monai.networks.nets import DynUNet
from monai.transforms import Spacingd
from torch import Tensor, nn
from torch.utils.data import DataLoader

from deformux.data.cases import Case
from deformux.data.grid import ScanGrid
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.transforms import run_transforms
from deformux.data.volume_reader import open_volume
from deformux.inference.sliding_window import WindowInferer
from deformux.networks.precision import mixed_precision

__all__ = ["OPTIMIZERS", "DynUNetContender"]

OPTIMIZERS = ("sgd", "adamw")

_SGD_RATE, _ADAMW_RATE = 1e-2, 1e-3
_CLIP = 12.0
_TELL_SECONDS = 1.0
_WORKERS = 8  # on a GPU, for which one process draws too few patches


class DynUNetContender:
    """A DynUNet: its plan, its training, and its segmentations.

    Args:
        scans: for the plan: sizes and spacings.
        sequences: names of several sequences of each case; none for one.
        n_labels: labels 1..N.
        voxels: most voxels in the patches of a step, instead of nnU-Net's rule of GPU memory.
        optimizer: ``sgd``, nnU-Net's, or ``adamw`` in one cycle.
        seed, device: of the training.
    """

    def __init__(
        self,
        scans: Sequence[Path],
        *,
        sequences: Sequence[str] = (),
        n_labels: int,
        voxels: int,
        optimizer: str,
        seed: int,
        device: str,
    ) -> None:
        self.sequences = tuple(sequences)
        self.n_labels, self.optimizer_name, self.seed, self.device = n_labels, optimizer, seed, device
        self.is_ct = fixed_settings(scans).prep.modality == "ct"
        shapes, spacings = zip(*(_grid(scan) for scan in scans), strict=True)
        self.plan: UNetPlan = unet_plan(shapes, spacings, voxels=voxels)
        # Of the labelled voxels of all training cases: (low, high, mean, deviation), for CT.
        self.intensities: tuple[float, float, float, float] | None = None
        torch.manual_seed(seed)
        self.network = _dynunet(self.plan, max(1, len(self.sequences)), n_labels)

    def facts(self) -> dict[str, Any]:
        """Return plain values that say what was chosen."""
        return {**asdict(self.plan), "optimizer": self.optimizer_name}

    def train(self, cases: Sequence[Case], *, seconds: float, tell: Tell) -> Trained:
        """Train for a time that begins when all volumes are read; rates follow the time, not a number of steps."""
        loaded = [self._load(case) for case in cases]
        if self.is_ct:
            self.intensities = _of_labels(loaded)
        volumes = [(self._normalised(d["image"]), torch.as_tensor(d["label"])) for d in loaded]
        on_gpu = self.device.startswith("cuda")
        patches = UNetPatches(volumes, self.plan, seed=self.seed)
        batches = iter(DataLoader(patches, batch_size=None, num_workers=_WORKERS if on_gpu else 0, pin_memory=on_gpu))
        self.network.to(self.device).train()
        optimizer, rate = _optimizer(self.network, self.optimizer_name)
        began = last = time.monotonic()
        steps = 0
        while (part := (time.monotonic() - began) / seconds) < 1:
            for group in optimizer.param_groups:
                group["lr"] = rate(part)
            self._step(next(batches), optimizer)
            steps += 1
            if time.monotonic() - last > _TELL_SECONDS:
                last = time.monotonic()
                tell(f"training, step {steps}", part)
        if on_gpu:
            torch.cuda.synchronize()
        return Trained(self.network.eval(), steps, time.monotonic() - began)

    @torch.inference_mode()
    def segment_case(self, case: Case) -> np.ndarray:
        """Return labels ``(X, Y, Z)`` on the scan's own grid; windows overlap by half, without mirroring."""
        load = [LoadVolumed("image", sequences=self.sequences)]
        image = self._resampled(run_transforms(load, {"image": case.images}), ("image",))["image"]
        grid = ScanGrid.of(image)
        scan = self._normalised(image)[None].to(self.device)
        logits = WindowInferer(self.plan.patch_size, overlap=0.5)(scan, self.network)[0]
        return np.asarray(grid.labels(logits))

    def _step(self, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer) -> None:
        image, label = (batch[key].to(self.device, non_blocking=True) for key in ("image", "label"))
        optimizer.zero_grad()
        with mixed_precision(self.device):
            outputs = self.network(image)
        heads = outputs.float().unbind(1)
        # Each coarser output counts half.
        weights = [0.5**level for level in range(len(heads))]
        loss_of = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, smooth_dr=1e-5, smooth_nr=1e-5)
        losses = [weight * loss_of(head, label) for weight, head in zip(weights, heads, strict=True)]
        (torch.stack(losses).sum() / sum(weights)).backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), _CLIP)
        optimizer.step()

    def _load(self, case: Case) -> dict[Any, Any]:
        load = (LoadVolumed("image", sequences=self.sequences), LoadLabeld("label", n_labels=self.n_labels))
        return self._resampled(run_transforms(load, {"image": case.images, "label": case.label}), ("image", "label"))

    def _resampled(self, data: dict[Any, Any], keys: tuple[str, ...]) -> dict[Any, Any]:
        """Resample along the file's own axes: nnU-Net turns no scan."""
        mode = tuple("bilinear" if key == "image" else "nearest" for key in keys)
        resample = Spacingd(keys, pixdim=self.plan.spacing_mm, mode=mode, padding_mode="border", dtype=np.float32)
        return run_transforms([resample], data)

    def _normalised(self, image: MetaTensor) -> Tensor:
        values = torch.as_tensor(image.as_tensor()).float()
        if self.intensities is None:
            # Each sequence by itself.
            deviation, mean = torch.std_mean(values, dim=(1, 2, 3), keepdim=True)
            return (values - mean) / deviation.clamp_min(1e-8)
        low, high, centre, width = self.intensities
        return (values.clamp(low, high) - centre) / max(width, 1e-8)


def _dynunet(plan: UNetPlan, channels: int, n_labels: int) -> DynUNet:
    network = DynUNet(
        3, channels, n_labels + 1, plan.kernels, plan.strides, plan.strides[1:],
        # All decoder stages but the lowest.
        deep_supervision=True, deep_supr_num=max(1, len(plan.strides) - 3),
    )  # fmt: skip
    adopt_fast_convolutions(network)
    return network


def _optimizer(network: nn.Module, name: str) -> tuple[torch.optim.Optimizer, Callable[[float], float]]:
    """Return an optimizer, and the learning rate by the part of the training that is done."""
    if name == "sgd":
        sgd = torch.optim.SGD(network.parameters(), _SGD_RATE, momentum=0.99, nesterov=True, weight_decay=3e-5)
        return sgd, lambda part: _SGD_RATE * (1 - part) ** 0.9
    return torch.optim.AdamW(network.parameters(), _ADAMW_RATE, weight_decay=0.01), _one_cycle


def _one_cycle(part: float) -> float:
    """Return a rate that rises from a 25th in 30 % of the training and falls to nothing, both along a cosine."""
    rising = 0.3
    if part < rising:
        return _ADAMW_RATE * (1 + 24 * (1 - np.cos(np.pi * part / rising)) / 2) / 25
    return float(_ADAMW_RATE * (1 + np.cos(np.pi * (part - rising) / (1 - rising))) / 2)


def _of_labels(loaded: Sequence[dict[Any, Any]]) -> tuple[float, float, float, float]:
    values = np.concatenate([np.asarray(d["image"])[np.asarray(d["label"]) > 0] for d in loaded])
    low, high = np.percentile(values, (0.5, 99.5))
    return float(low), float(high), float(values.mean()), float(values.std())


def _grid(scan: Path) -> tuple[tuple[int, ...], tuple[float, ...]]:
    with open_volume(scan) as opened:
        return opened.header.shape, tuple(float(size) for size in nib.affines.voxel_sizes(opened.header.affine))
