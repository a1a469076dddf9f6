"""Tasks of Slicer's scribble tool: segments from scribbles, with and without a model."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from monailabel.interfaces.tasks.infer_v2 import InferTask, InferType
from monailabel.utils.others.generic import device_list
from nibabel.affines import apply_affine, voxel_sizes
from scipy import ndimage
from torch.nn import functional as F

from deformux.data.grid import Box, ScanGrid, slices, triple
from deformux.data.transforms import inference_transforms, run_transforms
from deformux_label.lib.configs.project import Project
from deformux_label.lib.infers.cancellation import raise_if_client_gone
from deformux_label.lib.infers.click_cache import ClickCache, ScanKey
from deformux_label.lib.infers.drawn_scribbles import Drawn, Scribbles, drawn_of
from deformux_label.lib.infers.graph_cut import (
    CutOptions,
    Evidence,
    Surroundings,
    by_histogram,
    by_mixture,
    cut,
    from_network,
    from_scribbles,
)
from deformux_label.lib.infers.model_loader import ServedModels
from deformux_label.lib.infers.reply_file import write_reply
from deformux_label.lib.infers.segmented_scan import open_requested_scan
from deformux_label.lib.infers.served_network import UNTRAINED, as_http_errors, joined_warnings
from deformux_label.lib.requests.inference import InferenceRequest
from deformux_label.lib.requests.scribbles import SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND, ScribblesRequest

__all__ = ["GraphCut", "NetworkGraphCut", "all_scribble_tasks"]

logger = logging.getLogger(__name__)

# A cut of more voxels takes too much time and memory; larger volumes are cut on coarser voxels.
_MAX_VOXELS = 3_000_000


class GraphCut(InferTask):
    """Task that segments one label by the intensities under scribbles and the nearness to them, without a model."""

    needs_label = False

    def __init__(self, project: Project, evidence: str, description: str) -> None:
        self.project = project
        self.evidence = evidence
        super().__init__(
            type=InferType.SCRIBBLES,
            labels=project.label_values,
            dimension=3,
            description=description,
            config=self._defaults(),
        )

    def is_valid(self) -> bool:
        return True

    def _defaults(self) -> dict[str, Any]:
        own = {"num_mixtures": 8} if self.evidence == "mixture" else {"num_bins": 32}
        return {"lamda": CutOptions.lamda, "sigma": CutOptions.sigma, **own}

    def parsed(self, sent: Mapping[str, Any], asked: InferenceRequest, uploads: Path | None) -> ScribblesRequest:
        """Return the typed request; raise HTTPException for a bad one."""
        return ScribblesRequest.of(
            sent,
            asked,
            labels=self.project.labels,
            uploads=uploads,
            defaults=self._defaults(),
            needs_label=self.needs_label,
        )

    def __call__(self, request: ScribblesRequest) -> tuple[str, dict[str, Any]]:
        start = time.perf_counter()
        with as_http_errors():
            mask, affine, params = self._segment(request)
        name = request.selected or "foreground"
        path = write_reply(mask, affine, request, {name: 1})
        params["latencies"] = {"total": round(time.perf_counter() - start, 4)}
        logger.info("Scribbles on %s: %s", Path(request.scan.path).name, params)
        return path, {"label_names": {name: 1}, **params}

    def _segment(self, request: ScribblesRequest) -> tuple[npt.NDArray[np.uint8], np.ndarray, dict[str, Any]]:
        drawn = drawn_of(request, of_foreground=True)
        prep = dataclasses.replace(self.project.preprocessing, sequences=())
        image = run_transforms(inference_transforms(prep), {"image": request.scan.path})["image"]
        grid = ScanGrid.of(image)
        region = _Region.of(image, grid, drawn)
        log_odds = from_scribbles(region.image, region.scribbles, region.around, self._by(request))
        found = region.cut(log_odds, _cut_options(request), connected=True)
        mask = np.zeros(grid.size, dtype=np.uint8)
        _paste(mask, found, region, drawn)
        warning = joined_warnings(
            image, None if (drawn.scribbles == SCRIBBLED_BACKGROUND).any() else _no_background(request)
        )
        return mask, grid.affine, {"warning": warning} if warning else {}

    def _by(self, request: ScribblesRequest) -> Evidence:
        numbers = request.numbers
        if self.evidence == "mixture":
            return by_mixture(int(numbers["num_mixtures"]))
        return by_histogram(int(numbers["num_bins"]))


class NetworkGraphCut(GraphCut):
    """Task that corrects one label of the published model by scribbles; without a model it uses only intensities."""

    needs_label = True

    def __init__(self, project: Project, models: ServedModels, cache: ClickCache) -> None:
        super().__init__(project, "histogram", "DeformUX-Net's probabilities, corrected by scribbles")
        self.models = models
        self.cache = cache

    def _defaults(self) -> dict[str, Any]:
        return {**super()._defaults(), "lamda": 2.0, "device": device_list()}

    def _segment(self, request: ScribblesRequest) -> tuple[npt.NDArray[np.uint8], np.ndarray, dict[str, Any]]:
        version = self.models.current()
        if version is None:
            mask, affine, params = super()._segment(request)
            warnings = [
                self.models.warning(None),
                f"{UNTRAINED} This segment comes from the scribbles alone.",
                params.get("warning"),
            ]
            return mask, affine, {**params, "warning": " ".join(filter(None, warnings))}
        drawn = drawn_of(request, of_foreground=False)  # refuses bad scribbles before a whole volume is segmented
        key = ScanKey.of(request.scan.files, version, request.options.device)
        opened = open_requested_scan(self.models, self.cache, request.scan, key)
        scan = opened.scan
        value = self.project.labels.index(request.selected or "") + 1
        region = _Region.of(scan.image, scan.grid, drawn)
        probability = region.cropped(scan.logits.float().softmax(0)[value : value + 1])
        log_odds = from_network(region.image, region.scribbles, region.around, self._by(request), probability)
        found = region.cut(log_odds, _cut_options(request), connected=False)
        # Far from the scribbles the mask stays unchanged; outside a region drawn by the client it is empty.
        mask = (scan.labels == value).astype(np.uint8)
        if request.roi is not None:
            mask[:] = 0
        _paste(mask, found, region, drawn)
        warning = joined_warnings(scan.image, self.models.warning(version), opened.warning)
        return mask, scan.grid.affine, {"model_version": version, **({"warning": warning} if warning else {})}


def all_scribble_tasks(project: Project, models: ServedModels, cache: ClickCache) -> dict[str, InferTask]:
    """Return the scribble tasks by name; the Slicer extension starts with the first."""
    return {
        "network+graphcut": NetworkGraphCut(project, models, cache),
        "histogram+graphcut": GraphCut(project, "histogram", "Histograms of intensity and nearness to scribbles"),
        "gmm+graphcut": GraphCut(project, "mixture", "Mixtures of Gaussians of intensity and nearness to scribbles"),
    }


@dataclass(frozen=True)
class _Region:
    """The region that is cut: a box of the network's grid, perhaps on larger voxels.

    Args:
        image: ``(x, y, z)``, scaled to 0..1.
        scribbles: ``(x, y, z)``.
        around: distances from the scribbles.
        grid: mapping between the scan's grid and these voxels.
        box: the region in voxels of the network's grid.
        factors: number of the network's voxels in one of these, along each axis.
    """

    image: npt.NDArray[np.float32]
    scribbles: Scribbles
    around: Surroundings
    grid: ScanGrid
    box: Box
    factors: tuple[int, int, int]

    @classmethod
    def of(cls, image: MetaTensor, grid: ScanGrid, drawn: Drawn) -> _Region:
        """Return the drawn region of a preprocessed image ``(C, x, y, z)``, in its first sequence."""
        box = grid.needed(drawn.inside)
        spacing = voxel_sizes(np.asarray(image.affine, dtype=float))
        factors = _factors([b - a for a, b in zip(*box, strict=True)], spacing)
        scaled = _scaled(_first_sequence(image))
        cropped = _pooled(scaled[(slice(None), *slices(box))], factors)[0].numpy()
        # A voxel here is the mean of `factors` voxels of the network's grid.
        to_here = np.diag([*(1 / np.array(factors)), 1.0])
        to_here[:3, 3] = -(np.array(box[0]) + (np.array(factors) - 1) / 2) / factors
        here = replace(grid, network_size=triple(cropped.shape), to_network=to_here @ grid.to_network)
        scribbles = _scribbles_on(here, drawn)
        sizes = spacing * factors
        around = Surroundings.of(scribbles, sizes, _distance_from_edge(here, drawn.region, sizes))
        return cls(cropped, scribbles, around, here, box, factors)

    def cropped(self, values: torch.Tensor) -> npt.NDArray[np.float32]:
        """Crop values ``(1, x, y, z)`` of the network's grid to this region."""
        return _pooled(values[(slice(None), *slices(self.box))], self.factors)[0].numpy()

    def cut(self, log_odds: npt.NDArray[np.float32], options: CutOptions, *, connected: bool) -> npt.NDArray[np.bool_]:
        """Return the segment ``(x, y, z)`` of this region."""
        raise_if_client_gone()
        return cut(self.image, self.scribbles, log_odds, options, connected=connected)


def _scribbles_on(grid: ScanGrid, drawn: Drawn) -> Scribbles:
    """Resample scribbles to the voxels of a region; even coarse voxels keep every scribble."""
    found = ndimage.affine_transform(
        drawn.scribbles, np.linalg.inv(grid.to_network), output_shape=grid.network_size, order=0, mode="constant"
    )
    for value in (SCRIBBLED_BACKGROUND, SCRIBBLED_FOREGROUND):
        voxels = np.argwhere(drawn.scribbles == value)
        reached = np.rint(apply_affine(grid.to_network, voxels)).astype(int)
        within = ((reached >= 0) & (reached < grid.network_size)).all(axis=1)
        found[tuple(reached[within].T)] = value
    return found


def _distance_from_edge(grid: ScanGrid, region: Box, sizes: npt.NDArray[np.float64]) -> npt.NDArray[np.float32]:
    """Return the distance in mm of each voxel from the nearest face of a region of the scan; 0 outside it."""
    # The axes of the grids are parallel.
    corners = apply_affine(grid.to_network, np.array(region) - 0.5)
    low, high = corners.min(0), corners.max(0)
    distance = np.full(grid.network_size, np.inf, dtype=np.float32)
    for axis, n in enumerate(grid.network_size):
        index = np.arange(n)
        along = np.clip(np.minimum(index - low[axis], high[axis] - index), 0, None) * sizes[axis]
        distance = np.minimum(distance, along.astype(np.float32).reshape([-1 if a == axis else 1 for a in range(3)]))
    return distance


def _paste(mask: npt.NDArray[np.uint8], found: npt.NDArray[np.bool_], region: _Region, drawn: Drawn) -> None:
    """Write the segment of a region into the mask on the scan's grid; scribbled voxels follow the scribbles."""
    values = torch.from_numpy(found[None].astype(np.float32))
    inside = region.grid.interpolate(values, lambda part: part[0] > 0.5, box=drawn.inside)
    mask[slices(drawn.inside)] = inside.numpy()
    mask[drawn.scribbles == SCRIBBLED_BACKGROUND] = 0
    mask[drawn.scribbles == SCRIBBLED_FOREGROUND] = 1


def _first_sequence(image: MetaTensor) -> torch.Tensor:
    number = next(n for n in range(len(image)) if n not in image.meta.get("missing", {}))
    return image.as_tensor()[number : number + 1]


def _scaled(image: torch.Tensor) -> torch.Tensor:
    low, high = image.min(), image.max()
    return (image - low) / (high - low) if high > low else torch.zeros_like(image)


def _factors(size: Sequence[int], spacing: npt.NDArray[np.float64]) -> tuple[int, int, int]:
    """Return the number of voxels to merge along each axis; the shortest voxel sides grow first."""
    factors = [1, 1, 1]
    while math.prod(-(-n // f) for n, f in zip(size, factors, strict=True)) > _MAX_VOXELS:
        factors[min(range(3), key=lambda axis: spacing[axis] * factors[axis])] += 1
    return triple(factors)


def _pooled(values: torch.Tensor, factors: Sequence[int]) -> torch.Tensor:
    if max(factors) == 1:
        return values.contiguous()
    return F.avg_pool3d(values[None], tuple(factors), ceil_mode=True)[0]


def _cut_options(request: ScribblesRequest) -> CutOptions:
    return CutOptions(lamda=request.numbers["lamda"], sigma=request.numbers["sigma"])


def _no_background(request: ScribblesRequest) -> str:
    where = "outside the region of interest" if request.roi is not None else "far from the foreground's scribbles"
    return f"No background was scribbled, so the area {where} was taken as background."
