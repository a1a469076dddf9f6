"""Learning from scans without a label: the moving average of the weights labels them, and patches of both are mixed.

Bidirectional copy-paste in a mean teacher (Bai et al., CVPR 2023, arXiv 2305.00673): each patch of a step is half from
a labelled volume and half from an unlabelled one, in turns one inside the other. The network thus sees unlabelled scans
beside certain labels, instead of by themselves, where it would confirm its own errors.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import SelectItemsd, Transform
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from deformux.data.cases import Scan
from deformux.data.label_values import UNLABELLED
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import inference_transforms, run_transforms
from deformux.data.volume_reader import InvalidVolume
from deformux.fitting.optimizer import MixedPrecision
from deformux.fitting.patches import DrawnPatches, Patches
from deformux.fitting.recipe import Recipe
from deformux.fitting.sample_parallel import SampleThreads, sample_workers

__all__ = ["MeanTeacher", "UnlabelledPatches", "labelled_region", "read_scans", "unlabelled_batches"]

logger = logging.getLogger(__name__)

# Share of each side of a patch that the box of the other volume has.
_BOX_SIDE = 2 / 3
# Separates these random numbers from others of the same step.
_STREAM = 0xC0B4
# Changes the seed for patches of unlabelled scans: they must not follow those of labelled ones.
_OTHERS = 0x07_4E25
# Labelled volumes that say where labels can be.
_REGION_VOLUMES = 8
# Memory for unlabelled volumes, relative to that for labelled ones; a voxel has maps of where patches can be centred.
_CACHE_SHARE = 0.5
_BYTES_PER_VALUE = 8

Region = tuple[tuple[float, ...], tuple[float, ...]]
"""Lower and upper corner of a box, as shares of a volume's sides."""


def labelled_region(patches: Patches) -> Region:
    """Return the box in which the labels of some volumes lie, of which unlabelled ones are expected to be alike."""
    number = len(patches.ids)
    low, high = np.ones(3), np.zeros(3)
    for index in sorted({int(at) for at in np.linspace(0, number - 1, min(number, _REGION_VOLUMES))}):
        foreground = torch.as_tensor(patches.volume(index)["foreground"])[0]
        if bool(foreground.any()):
            at = foreground.nonzero().cpu().numpy()
            low = np.minimum(low, at.min(0) / foreground.shape)
            high = np.maximum(high, (at.max(0) + 1) / foreground.shape)
    if (low >= high).any():
        return (0.0,) * 3, (1.0,) * 3
    return tuple(map(float, low)), tuple(map(float, high))


class UnlabelledPatches(DrawnPatches):
    """Training patches of scans without a label, ``(N, channels, D, H, W)`` under ``image``.

    ``label`` is 255 where a patch reaches beyond its scan.

    Args:
        volumes: by id, as ``read_scans`` returns them.
        options: the other arguments of ``DrawnPatches``.
    """

    def __init__(self, volumes: Mapping[str, Mapping[str, Any]], *, n_labels: int, **options: Any) -> None:
        annotated = np.ones(n_labels + 1, dtype=bool)
        files = [{**volume, "annotated": annotated} for volume in volumes.values()]
        super().__init__(list(volumes), files, (), new=(), n_labels=n_labels, **options)


def read_scans(
    scans: Sequence[Scan],
    region: Region,
    *,
    recipe: Recipe,
    prep: Preprocessing,
    seed: int,
    stop: Callable[[], bool] | None = None,
) -> dict[str, Mapping[str, Any]]:
    """Return preprocessed volumes by id, as many as fit into half of ``recipe.cache_gb``; log those that are unusable.

    Args:
        scans: of more than ``recipe.unlabelled_scans`` some are chosen by the seed.
        region: where patches are centred as often as labelled ones are on a label.
        recipe, prep, seed: of the training.
        stop: asked before each scan whether to read no more.
    """
    load = [*inference_transforms(prep), _ExpectedRegiond(region), SelectItemsd(("image", "label"))]
    most = recipe.unlabelled_scans
    chosen = list(scans) if len(scans) <= most else random.Random(seed).sample(list(scans), most)
    volumes: dict[str, Mapping[str, Any]] = {}
    left = _CACHE_SHARE * recipe.cache_gb * 1e9
    for scan in chosen:
        if stop is not None and stop():
            break
        try:
            volume = {str(key): value for key, value in run_transforms(load, {"image": scan.images}).items()}
        except InvalidVolume as error:
            logger.warning("The scan %s is not learnt from: %s", scan.id, error)
            continue
        left -= _BYTES_PER_VALUE * volume["image"].numel()
        if left < 0:
            break
        volumes[scan.id] = volume
    logger.info("learning from %d of %d scans without a label", len(volumes), len(scans))
    return volumes


class _ExpectedRegiond(Transform):
    """Adds a ``label`` that is 1 in a region of ``image`` (C, x, y, z), where patches are then centred, else 0."""

    def __init__(self, region: Region) -> None:
        self.region = region

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        shape = np.array(image.shape[1:])
        low = np.minimum(np.floor(self.region[0] * shape).astype(int), shape - 1)
        high = np.maximum(np.ceil(self.region[1] * shape).astype(int), low + 1)
        label = torch.zeros(1, *image.shape[1:], dtype=torch.uint8)
        x, y, z = (slice(int(a), int(b)) for a, b in zip(low, high, strict=True))
        label[0, x, y, z] = 1
        return {**data, "label": MetaTensor(label, affine=image.affine)}


class MeanTeacher:
    """Labels unlabelled patches by the moving average of a network in training, and mixes them with labelled ones.

    What it does in a step follows from the seed, the step and the weights alone, so that a resumed training goes on as
    an uninterrupted one would have.

    Args:
        average: of the network in training.
        recipe: from when on it teaches, and how sure it must be.
        seed: of the training.
        samples: number of patches in a batch, which get a thread each on a CPU.
    """

    def __init__(self, average: AveragedModel, recipe: Recipe, *, seed: int, samples: int = 1) -> None:
        self.recipe, self.seed = recipe, seed
        self._module = average.module
        self._network: nn.Module = MixedPrecision(average.module, recipe.mixed_precision)
        workers = sample_workers(average.module, next(average.parameters()).device, samples)
        self._threads = SampleThreads(self._network, workers) if workers > 1 else None

    def takes_part(self, step: int) -> bool:
        """Return whether a step, counted from 1, learns from unlabelled patches."""
        return step > self.recipe.unlabelled_start * self.recipe.steps

    @torch.no_grad()
    def mixed(
        self, step: int, image: Tensor, label: Tensor, annotated: Tensor, others: Tensor, beyond: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return mixed patches, their labels, and these without the teacher's, all on the device of ``image``.

        Args:
            step: number of the step, from 1.
            image: labelled patches ``(N, channels, D, H, W)``.
            label: ``(N, 1, D, H, W)``, 255 where unlabelled.
            annotated: ``(N, classes)``, which classes were annotated; the teacher's others count as background.
            others: unlabelled patches, as many as labelled ones.
            beyond: ``(N, 1, D, H, W)``, 255 where these reach beyond their scan.
        """
        answers = self._answers(others, annotated.to(others.device))
        answers = torch.where(beyond.to(others.device) == UNLABELLED, UNLABELLED, answers).to(label.dtype)
        box = self._box(step, image.shape[2:]).to(image.device)
        # In every second patch the labelled volume is inside.
        turns = torch.arange(len(image), device=image.device).remainder(2).bool()[:, None, None, None, None]
        foreign = box ^ turns
        return (
            torch.where(foreign, others, image),
            torch.where(foreign, answers, label),
            torch.where(foreign, UNLABELLED, label).to(label.dtype),
        )

    def _answers(self, image: Tensor, annotated: Tensor) -> Tensor:
        """Return labels ``(N, 1, D, H, W)``, 255 where the teacher is not sure enough.

        A voxel counts if its probability is at least that of the recipe, or of half of the voxels with the same
        label: otherwise a label that is rare, and therefore never certain, would not be learnt.
        """
        probability, chosen = self._logits(image).softmax(1).max(1, keepdim=True)
        here = annotated.bool().clone()
        here[:, 0] = True
        known = here.gather(1, chosen.flatten(1)).view_as(chosen)
        labels = torch.where(known, chosen, 0)
        sure = probability >= self.recipe.unlabelled_confidence
        for value in chosen.unique():
            of_it = chosen == value
            sure |= of_it & (probability >= probability[of_it].median())
        return torch.where(sure, labels, UNLABELLED)

    def _logits(self, image: Tensor) -> Tensor:
        self._module.eval()
        if self._threads is None:
            return self._network(image)

        # Gradients are enabled in each thread by itself.
        @torch.no_grad()
        def answer(part: Tensor) -> Tensor:
            return self._network(part)

        return torch.cat(self._threads.each(answer, image.chunk(self._threads.workers)))

    def _box(self, step: int, size: Sequence[int]) -> Tensor:
        """Return a random box in a patch as ``(1, 1, D, H, W)``."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, step, _STREAM]))
        box = torch.zeros(1, 1, *size, dtype=torch.bool)
        sides = [max(1, round(_BOX_SIDE * side)) for side in size]
        starts = [int(rng.integers(side - own + 1)) for side, own in zip(size, sides, strict=True)]
        x, y, z = (slice(start, start + own) for start, own in zip(starts, sides, strict=True))
        box[0, 0, x, y, z] = True
        return box


def unlabelled_batches(
    patches: UnlabelledPatches | None, teacher: MeanTeacher | None, *, first_step: int, steps: int, seed: int
) -> Iterator[Mapping[str, Tensor] | None]:
    """Yield the unlabelled patches of each step from ``first_step`` on; None for a step that learns from none."""
    batches: Iterator[Mapping[str, Tensor]] | None = None
    for step in range(first_step, steps):
        if patches is None or teacher is None or not teacher.takes_part(step + 1):
            yield None
            continue
        if batches is None:
            batches = iter(patches.loader(first_step=step, steps=steps, seed=seed ^ _OTHERS))
        yield next(batches)
