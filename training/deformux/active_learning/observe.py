"""Scores of an unlabelled volume, and its pooled features from a network's encoder."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from deformux.active_learning.feature_file import Features
from deformux.active_learning.uncertainty_scores import VolumeScores, score_samples
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import ScanFiles
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.inference.sliding_window import sliding_window
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["Observation", "encode", "mirrorings", "observe"]


@dataclass(frozen=True)
class Observation:
    """Scores of a volume, and the means ``(d,)`` of each channel of the four encoder stages."""

    scores: VolumeScores
    features: Features


class _Watched:
    """A network that remembers the means of its encoder's features for each window."""

    def __init__(self, network: DeformUXNet) -> None:
        self.network = network
        self.means: list[Tensor] = []

    def __call__(self, x: Tensor) -> Tensor:
        features = self.network.encode(x)
        self._remember(features)
        return self.network.decode(features)[:, :, : x.shape[2], : x.shape[3], : x.shape[4]]

    def encode_only(self, x: Tensor) -> Tensor:
        self._remember(self.network.encode(x))
        return x

    def features(self) -> Features:
        return torch.stack(self.means).mean(0).cpu().numpy()

    def _remember(self, features: Sequence[Tensor]) -> None:
        # The first is the scan itself.
        self.means.append(torch.cat([stage.float().mean((0, 2, 3, 4)) for stage in features[1:]]))


def mirrorings(axes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return every combination of the axes along which to mirror a volume, none first."""
    return [chosen for count in range(len(axes) + 1) for chosen in combinations(sorted(axes), count)]


@torch.inference_mode()
def encode(
    network: DeformUXNet, image: ScanFiles, prep: Preprocessing, *, device: str | torch.device = "cpu"
) -> Features:
    """Return encoder features ``(d,)`` of a volume: each channel's mean over voxels and windows.

    The network may be untrained.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    volume = _load(image, prep, device)
    watched = _Watched(network.to(device).eval())
    sliding_window(prep)(volume, watched.encode_only)
    return watched.features()


@torch.inference_mode()
def observe(
    networks: Sequence[DeformUXNet],
    image: ScanFiles,
    prep: Preprocessing,
    *,
    flip_axes: Sequence[int] = (),
    device: str | torch.device = "cpu",
) -> Observation:
    """Return scores of a volume from every network and every mirroring, and features from the first network.

    Args:
        networks: the model in use first, then earlier ones of the same labels.
        image: a scan; a file for each sequence if the networks take several.
        prep: how it becomes network input.
        flip_axes: axes of the frame along which anatomy may be mirrored: those that training mirrors.
        device: where to compute.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    volume = _load(image, prep, device)
    watched = _Watched(networks[0].to(device).eval())

    def samples() -> Iterator[Tensor]:
        yield sliding_window(prep)(volume, watched)[0].softmax(0)
        for index, network in enumerate(networks):
            network.to(device).eval()
            for axes in mirrorings(flip_axes)[index == 0 :]:
                spatial = [axis + 2 for axis in axes]
                yield sliding_window(prep)(volume.flip(spatial), network).flip(spatial)[0].softmax(0)

    scores = score_samples(samples())
    return Observation(scores, watched.features())


def _load(image: ScanFiles, prep: Preprocessing, device: str | torch.device) -> Tensor:
    volume = run_transforms(inference_transforms(prep), {"image": image})["image"]
    return volume.as_tensor()[None].to(device)
