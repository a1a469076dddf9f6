"""Scans with their automatic segmentation, from which clicks and scribbles start."""

from __future__ import annotations

from dataclasses import dataclass

from deformux.data.sequences import ScanFiles
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.interactive.open_scan import OpenScan, scan_from_slabs
from deformux_label.lib.infers.click_cache import ClickCache, ScanKey
from deformux_label.lib.infers.gpu_memory import Placement, within_memory
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.served_network import ServedNetwork, served_slabs
from deformux_label.lib.requests.inference import RequestedScan

__all__ = ["SegmentedScan", "open_requested_scan"]


@dataclass(frozen=True)
class SegmentedScan:
    """A scan that is open for clicks and scribbles.

    Args:
        scan: the scan and its automatic segmentation.
        warning: a sentence if memory was short, else None.
        network_s: seconds that the network took; 0 if the scan was cached.
    """

    scan: OpenScan
    warning: str | None = None
    network_s: float = 0.0


def open_requested_scan(
    models: ServedModels, cache: ClickCache, requested: RequestedScan, key: ScanKey
) -> SegmentedScan:
    """Return a scan from the cache, else segment it, and cache it if the request allows.

    Args:
        models: the served models.
        cache: the server's cache.
        requested: the scan to open.
        key: its current state, with the model version and the device.
    """
    made: list[SegmentedScan] = []

    def compute() -> OpenScan:
        made.append(_segmented(models, requested.files, key.version, key.device))
        return made[-1].scan

    scan = cache.scan(key, compute) if requested.keep else compute()
    return made[-1] if made else SegmentedScan(scan)


def _segmented(models: ServedModels, files: ScanFiles, version: str, device: str) -> SegmentedScan:
    _, card = models.load(version, device)
    image = run_transforms(inference_transforms(card.preprocessing, device=device), {"image": files})["image"]
    networks: list[ServedNetwork] = []

    def opened(placement: Placement) -> OpenScan:
        networks.append(ServedNetwork(models, version, placement))
        return scan_from_slabs(image, served_slabs(networks[-1], image), prep=card.preprocessing)

    found, warning = within_memory(opened, card.preprocessing.patch_size, device)
    return SegmentedScan(found, warning, sum(network.seconds for network in networks))
