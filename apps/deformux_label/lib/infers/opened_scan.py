"""Scans with their automatic segmentation, from which clicks and scribbles start."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from deformux.data.preprocessing import apply, inference_transforms
from deformux.interactive.editor import Study, study_from_logits
from deformux_label.lib.infers.click_cache import ClickCache, ScanKey
from deformux_label.lib.infers.gpu_memory import Placement, within_memory
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.served_network import ServedNetwork, served_logits
from deformux_label.lib.requests.inference import RequestedScan

__all__ = ["OpenedScan", "open_requested_scan"]


@dataclass(frozen=True)
class OpenedScan:
    """A segmented scan.

    Args:
        study: the scan and its segmentation.
        warning: a sentence where memory was short.
        network_s: seconds that the network took for this request; 0 where the scan was in the cache.
    """

    study: Study
    warning: str | None = None
    network_s: float = 0.0


def open_requested_scan(models: ServedModels, cache: ClickCache, scan: RequestedScan, key: ScanKey) -> OpenedScan:
    """Return a scan from the cache, else segment it, and cache it if its request allows that.

    Args:
        models: which have the version that ``key`` names.
        cache: of all requests.
        scan: the file.
        key: of the file as it is now, with the version and the device.
    """
    made: list[OpenedScan] = []

    def compute() -> Study:
        made.append(_segmented(models, scan.path, key.version, key.device))
        return made[-1].study

    study = cache.scan(key, compute) if scan.keep else compute()
    return made[-1] if made else OpenedScan(study)


def _segmented(models: ServedModels, path: str, version: str, device: str) -> OpenedScan:
    _, card = models.load(version, device)
    image = apply(inference_transforms(card.preprocessing, device=device), {"image": path})["image"]
    networks: list[ServedNetwork] = []

    def logits(placement: Placement) -> Tensor:
        networks.append(ServedNetwork(models, version, placement))
        return served_logits(networks[-1], image)

    found, warning = within_memory(logits, card.preprocessing.patch_size, device)
    return OpenedScan(study_from_logits(image, found), warning, sum(network.seconds for network in networks))
