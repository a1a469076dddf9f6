"""Whole volumes through the network, window by window."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeAlias

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from torch import Tensor, nn

from deformux.data.grid import ScanGrid, triple
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import ScanFiles
from deformux.data.transforms import inference_transforms, labels_of_scan, restore_transforms, run_transforms
from deformux.inference.captured_network import BatchedNetwork, CapturedNetwork, prepared
from deformux.inference.largest_component import keep_as_planned
from deformux.inference.locate import Locator
from deformux.inference.slab_labels import SlabLabels
from deformux.inference.slabs import LogitSlab, Windows, WindowsDone, hand_on, logit_slabs
from deformux.networks.precision import mixed_precision

__all__ = [
    "Network",
    "WindowInferer",
    "load_scan",
    "scan_slabs",
    "segment",
    "segment_labels",
    "sliding_window",
    "volume_logits",
]

# A network, or the result of ``prepared``, for several volumes.
Network: TypeAlias = nn.Module | CapturedNetwork


class WindowInferer(Inferer):
    """MONAI's sliding window with Gaussian blending.

    It takes ``(N, C, D, H, W)`` and returns float32 logits ``(N, classes, D, H, W)`` on the input's device.

    Args:
        window: voxels.
        overlap: share of a window that its neighbour covers too, 0 to below 1.
        progress: show a bar over the windows.
    """

    def __init__(self, window: Sequence[int], *, overlap: float = 0.25, progress: bool = False) -> None:
        super().__init__()
        self.window = tuple(window)
        self.overlap = overlap
        self.progress = progress

    def __call__(self, inputs: Tensor, network: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        plain = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        at_once = 1
        if isinstance(network, BatchedNetwork):
            at_once = min(network.batch_size(self.window), self._count(plain.shape[2:]) * len(plain))
        # A volume smaller than the window is padded as in training, around its centre with its border. The network
        # has learnt what a margin looks like, and loses 0.02 Dice on the hippocampus data without one.
        slide = SlidingWindowInferer(
            self.window,
            sw_batch_size=at_once,
            overlap=self.overlap,
            mode="gaussian",
            padding_mode="replicate",
            progress=self.progress,
        )

        def run(patch: Tensor) -> Tensor:
            count = len(patch)
            if count < at_once:
                # The last windows: a captured network expects the full number.
                patch = torch.cat([patch, patch[-1:].expand(at_once - count, *patch.shape[1:])])
            with mixed_precision(patch.device):
                return network(patch, *args, **kwargs)[:count].float()

        return slide(plain, run)

    def _count(self, size: Sequence[int]) -> int:
        """Return the number of windows that cover a volume."""
        count = 1
        for length, window in zip(size, self.window, strict=True):
            step = max(1, int(window * (1 - self.overlap)))
            count *= 1 + max(0, -(-(length - window) // step))
        return count


def sliding_window(prep: Preprocessing, *, overlap: float = 0.25, progress: bool = False) -> WindowInferer:
    """Return the inferer for results of ``inference_transforms(prep)``."""
    return WindowInferer(prep.patch_size, overlap=overlap, progress=progress)


def load_scan(image_path: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu") -> MetaTensor:
    """Return a scan, preprocessed: ``(channels, x, y, z)`` on the network's grid.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    return run_transforms(inference_transforms(prep, device=device), {"image": image_path})["image"]


def scan_slabs(
    network: Network,
    image: MetaTensor,
    prep: Preprocessing,
    *,
    device: str | torch.device = "cpu",
    locator: Locator | None = None,
    on_windows: WindowsDone | None = None,
) -> Iterator[LogitSlab]:
    """Yield the logits of a preprocessed scan slab by slab; ``image`` is the result of ``load_scan``.

    Args:
        network: a network, or the result of ``prepared``.
        image: ``(channels, x, y, z)``.
        prep: the model's preprocessing.
        device: where to compute.
        locator: of the model; only windows where it finds that labels can be are computed.
        on_windows: told the number of windows done, and of all, after each.
    """
    ready = prepared(network, device)
    windows = Windows(triple(image.shape[1:]), triple(prep.patch_size))
    wanted = locator.wanted(image, windows) if locator is not None else None
    return logit_slabs(image.to(device), ready, windows, wanted=wanted, on_windows=on_windows)


@torch.inference_mode()
def segment_labels(
    network: Network,
    image_path: ScanFiles,
    prep: Preprocessing,
    *,
    device: str | torch.device = "cpu",
    locator: Locator | None = None,
    on_windows: WindowsDone | None = None,
) -> MetaTensor:
    """Segment a scan of any size: labels ``(1, X, Y, Z)``, uint8, on its own grid; arguments as ``scan_slabs``.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    image = load_scan(image_path, prep, device=device)
    labels = SlabLabels(ScanGrid.of(image))
    slabs = scan_slabs(network, image, prep, device=device, locator=locator, on_windows=on_windows)
    hand_on(slabs, [labels])
    keep_as_planned(labels.labels.numpy(), labels.grid, prep)
    return labels_of_scan(labels.labels, image)


@torch.inference_mode()
def volume_logits(
    network: Network, image_path: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu"
) -> tuple[MetaTensor, Tensor]:
    """Return a preprocessed scan ``(channels, x, y, z)`` and its logits ``(C, x, y, z)``, both on the network's grid.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    image = load_scan(image_path, prep, device=device)
    return image, sliding_window(prep)(image[None].to(device), prepared(network, device))[0]


@torch.inference_mode()
def segment(
    network: Network, image_path: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu"
) -> tuple[MetaTensor, Tensor]:
    """Segment a scan: labels ``(1, X, Y, Z)``, uint8, on its own grid, probabilities ``(C, x, y, z)`` on the network's.

    Probabilities of all classes take much memory; ``segment_labels`` needs little, and gives the same labels.

    Args:
        network: a network, or the result of ``prepared`` for several volumes.
        image_path: the scan: NIfTI, NRRD or MetaImage; a file for each sequence if the model takes several.
        prep: the model's preprocessing.
        device: where to compute.

    Raises:
        InvalidVolume: the file is not a usable scan.

    Examples:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import nibabel as nib
        >>> import numpy as np
        >>> from deformux import DeformUXNet, Preprocessing, segment
        >>> hu = np.random.default_rng(0).normal(40, 20, size=(20, 24, 12)).astype(np.float32)
        >>> network = DeformUXNet(in_channels=1, out_channels=3, preset="tiny")
        >>> prep = Preprocessing(modality="ct", patch_size=(16, 16, 16))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     scan = Path(folder) / "scan.nii.gz"
        ...     nib.save(nib.Nifti1Image(hu, np.diag([1.5, 1.5, 3.0, 1.0])), scan)
        ...     labels, probabilities = segment(network, scan, prep)
        >>> labels.shape, probabilities.shape
        (torch.Size([1, 20, 24, 12]), torch.Size([3, 20, 24, 12]))
    """
    image, logits = volume_logits(network, image_path, prep, device=device)
    restored = run_transforms(restore_transforms(), {"image": image, "pred": logits})["pred"]
    keep_as_planned(restored[0].numpy(), ScanGrid.of(image), prep)
    return restored, logits.softmax(0)
