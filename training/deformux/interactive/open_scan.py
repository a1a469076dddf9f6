"""A scan that is opened for edits: its image and its automatic segmentation."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from torch import Tensor, nn

from deformux.data.grid import ScanGrid, highest
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import ScanFiles
from deformux.inference.sliding_window import volume_logits

__all__ = ["OpenScan", "open_scan", "scan_from_logits"]


@dataclass(frozen=True)
class OpenScan:
    """A scan and its automatic segmentation, from which edits start.

    Args:
        image: network input ``(channels, x, y, z)``.
        logits: of the automatic segmentation, ``(C, x, y, z)``, float16 on the CPU.
        classes: those of the highest logits, ``(x, y, z)``, uint8.
        labels: the automatic mask on the scan's grid, ``(X, Y, Z)``, uint8.
    """

    image: MetaTensor
    logits: Tensor
    classes: npt.NDArray[np.uint8]
    labels: npt.NDArray[np.uint8]

    @cached_property
    def grid(self) -> ScanGrid:
        """Return the scan's grid, relative to the network's."""
        return ScanGrid.of(self.image)

    @property
    def nbytes(self) -> int:
        """Return the bytes of memory that the scan takes."""
        return self.image.nbytes + self.logits.nbytes + self.classes.nbytes + self.labels.nbytes


@torch.inference_mode()
def scan_from_logits(image: MetaTensor, logits: Tensor, *, labels: npt.NDArray[np.uint8] | None = None) -> OpenScan:
    """Return a preprocessed scan ``(channels, x, y, z)`` whose logits ``(C, x, y, z)`` are known, opened for edits.

    Args:
        image: result of ``inference_transforms``.
        logits: of the automatic segmentation.
        labels: the segmentation on the scan's grid ``(X, Y, Z)``, if it is restored already.
    """
    restored = ScanGrid.of(image).labels(logits.float()).numpy() if labels is None else labels
    classes = highest(logits).to("cpu", torch.uint8).numpy()
    return OpenScan(
        image=image.cpu(),
        logits=_halved(logits, classes),
        classes=classes,
        labels=np.ascontiguousarray(restored, dtype=np.uint8),
    )


def open_scan(
    network: nn.Module, path: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu"
) -> OpenScan:
    """Segment a scan automatically, as ``segment`` does, and keep what edits need.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    return scan_from_logits(*volume_logits(network, path, prep, device=device))


def _halved(logits: Tensor, classes: npt.NDArray[np.uint8]) -> Tensor:
    """Return the logits in float16 with the same highest class: rounding turns small differences into ties."""
    halved = logits.to(torch.float16)
    x, y, z = np.nonzero((highest(halved) != highest(logits)).cpu().numpy())
    halved = halved.cpu()
    values = halved.numpy()
    values[classes[x, y, z], x, y, z] = np.nextafter(values[:, x, y, z].max(0, initial=-np.inf), np.float16("inf"))
    return halved
