"""Scores of an unlabelled volume, and its pooled features from a network's encoder."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor
from torch.nn import functional as F

from deformux.active_learning.feature_file import Features
from deformux.active_learning.uncertainty_scores import VolumeScores, score_samples
from deformux.data.grid import Index, triple
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import ScanFiles
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.inference.slabs import LogitSlab, Windows, hand_on, logit_slabs
from deformux.inference.sliding_window import sliding_window
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["Observation", "encode", "mirrorings", "observe"]


# Probabilities of a scan, over voxels and classes, that are kept at a time.
_MOST_VALUES = 512 * 2**20 // 4


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


class _PooledProbabilities:
    """Takes the slabs of a mirrored scan; returns probabilities of the scan itself, on coarser voxels if it is large.

    Args:
        size: voxels of the scan on the network's grid.
        axes: along which it was mirrored.
    """

    def __init__(self, size: Index, axes: Sequence[int]) -> None:
        self.size, self.axes = size, axes
        self._sums: Tensor | None = None
        self._factor, self._axis = 1, 0

    def add(self, slab: LogitSlab) -> None:
        """Take the next slab."""
        axis = slab.axis
        if self._sums is None:
            while len(slab.logits) * math.prod(-(-n // self._factor) for n in self.size) > _MOST_VALUES:
                self._factor += 1
            size = [-(-n // self._factor) for n in self.size]
            self._sums = torch.zeros(len(slab.logits), *size, device=slab.logits.device)
            self._axis = axis
        probabilities = slab.logits.softmax(0).flip([a + 1 for a in self.axes])
        start = self.size[axis] - slab.stop if axis in self.axes else slab.start
        if self._factor > 1:
            kernel = [1 if a == axis else self._factor for a in range(3)]
            probabilities = F.avg_pool3d(probabilities[None], kernel, ceil_mode=True, count_include_pad=False)[0]
        planes = torch.arange(start, start + slab.stop - slab.start, device=slab.logits.device)
        self._sums.index_add_(axis + 1, planes // self._factor, probabilities)

    def probabilities(self) -> Tensor:
        """Return the probabilities ``(C, x, y, z)`` once every slab was added."""
        assert self._sums is not None
        if self._factor == 1:
            return self._sums
        planes = torch.arange(self.size[self._axis], device=self._sums.device) // self._factor
        shape = [-1 if a == self._axis else 1 for a in range(3)]
        return self._sums / planes.bincount().reshape(shape)


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
        networks: the model in use first, then earlier ones of the same labels. The probabilities of a large scan are
            compared on coarser voxels, so that memory stays bounded.
        image: a scan; a file for each sequence if the networks take several.
        prep: how it becomes network input.
        flip_axes: axes of the frame along which anatomy may be mirrored: those that training mirrors.
        device: where to compute.

    Raises:
        InvalidVolume: the file is not a usable scan.
    """
    volume = _load(image, prep, device)
    watched = _Watched(networks[0].to(device).eval())

    windows = Windows(triple(volume.shape[2:]), triple(prep.patch_size))

    def sample(network: DeformUXNet | _Watched, axes: Sequence[int]) -> Tensor:
        pooled = _PooledProbabilities(windows.size, axes)
        hand_on(logit_slabs(volume[0].flip([axis + 1 for axis in axes]), network, windows), [pooled])
        return pooled.probabilities()

    def samples() -> Iterator[Tensor]:
        yield sample(watched, ())
        for index, network in enumerate(networks):
            network.to(device).eval()
            for axes in mirrorings(flip_axes)[index == 0 :]:
                yield sample(network, axes)

    scores = score_samples(samples())
    return Observation(scores, watched.features())


def _load(image: ScanFiles, prep: Preprocessing, device: str | torch.device) -> Tensor:
    volume = run_transforms(inference_transforms(prep), {"image": image})["image"]
    return volume.as_tensor()[None].to(device)
