"""Training patches: which volume is drawn when, and how it is augmented, follow from the seed and the step alone.

Nothing random is carried from step to step. A resumed training therefore draws what an uninterrupted one would have
drawn, and several processes that draw ahead give the same as one, up to rounding.
"""

from __future__ import annotations

import itertools
import logging
import os
import random
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import RandomizableTrait, Transform

from deformux.data.cases import Case
from deformux.data.preprocessed_store import PreprocessedStore
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import labelled_transforms
from deformux.fitting.augmentation import training_augmentation
from deformux.fitting.distributed import ALONE, Ranks
from deformux.fitting.recipe import Recipe
from deformux.fitting.stored_volumes import Volumes

__all__ = ["DrawnPatches", "Patches", "draw_order", "seed_everything"]

logger = logging.getLogger(__name__)

# Number of processes that draw patches for a GPU: more do not help, and fewer than two cannot keep up.
_MAX_WORKERS, _MIN_WORKERS = 12, 2
# Batches that each of them has ready.
_PREFETCH = 2


def draw_order(cases: Sequence[str], new: Collection[str], *, oversampling: int, draws: int, seed: int) -> list[int]:
    """Return the index into ``cases`` of every draw: shuffled rounds in which new cases come ``oversampling`` times.

    Args:
        cases: ids.
        new: ids of the new ones; if all are new, none is preferred.
    """
    times = [oversampling if case in new else 1 for case in cases]
    deck = np.repeat(np.arange(len(cases)), times if len(set(times)) > 1 else 1)
    rng = np.random.default_rng(seed)
    rounds = -(-draws // len(deck))
    return [int(index) for index in np.concatenate([rng.permutation(deck) for _ in range(rounds)])[:draws]]


class DrawnPatches:
    """Training patches of volumes, from one step of a training to its end.

    Preprocessed volumes stay in memory while they fit into ``recipe.cache_gb``. The others are kept in files, of which
    only the patches are read, up to ``recipe.disk_gb``; the rest is read again for each patch.
    For a GPU, worker processes draw and augment patches ahead of time, into pinned memory. With too few cores for
    that, patches are augmented on the GPU, and stay there. Each of several processes that train together draws an
    equal part of a step's volumes.

    Args:
        ids: of the volumes.
        files: dictionaries of ``image``, ``label`` and ``annotated`` of each, for ``load``.
        load: transforms that preprocess a volume and bring its label to the network's grid.
        new: ids of the volumes that are drawn more often.
        recipe: how patches are drawn and augmented.
        prep: how volumes become network input.
        n_labels: number of labels.
        device: where the network trains.
        workers: number of processes that draw; None for as many as cores and shared memory allow, and 0 on a CPU.
        ranks: this process among those that train together.
        store: folder for files of preprocessed volumes; None for none.
    """

    def __init__(
        self,
        ids: Sequence[str],
        files: Sequence[Mapping[str, Any]],
        load: Sequence[Transform],
        *,
        new: Collection[str],
        recipe: Recipe,
        prep: Preprocessing,
        n_labels: int,
        device: str | torch.device = "cpu",
        workers: int | None = None,
        ranks: Ranks = ALONE,
        store: Path | None = None,
    ) -> None:
        self.ids = ids
        self.recipe = recipe
        self.ranks = ranks
        self.volumes = recipe.batch_size // recipe.patches_per_volume
        ranks.share(self.volumes, "batch_size / patches_per_volume")
        self.new = new
        device = torch.device(device)
        batch_bytes = 5 * recipe.batch_size * int(np.prod(prep.patch_size))
        self.workers = _workers(device, batch_bytes, ranks.local) if workers is None else workers
        self._pinned = device.type == "cuda" and self.workers > 0
        augmentation = training_augmentation(prep, recipe, device="cpu" if self.workers else device)
        transforms: list[Transform] = [*load, *augmentation]
        fixed = list(itertools.takewhile(lambda t: not isinstance(t, RandomizableTrait), transforms))
        # Only preprocessing a volume shows how much memory it takes: the first stands for all.
        first = CacheDataset(files[:1], fixed, cache_rate=1.0, progress=False)[0]
        each = sum(v.numel() * v.element_size() for v in first.values() if isinstance(v, torch.Tensor))
        keep = int(recipe.cache_gb * 1e9 / ranks.local / each)
        logger.info("keeping %d of %d volumes in memory (%.1f MB each)", min(keep, len(files)), len(files), each / 1e6)
        on_disk = None
        if store is not None and keep < len(files):
            # Volumes do not depend on what is kept of a result.
            plan = {"preprocessing": prep.without_output().to_dict(), "n_labels": n_labels}
            on_disk = PreprocessedStore(store, plan, most_bytes=int(recipe.disk_gb * 1e9))
        self._dataset = Volumes(files, fixed, transforms[len(fixed) :], keep=keep, store=on_disk)
        if self.workers:
            logger.info("drawing patches in %d processes", self.workers)

    def volume(self, index: int) -> Mapping[str, Any]:
        """Return a volume as it is before anything random."""
        return self._dataset.fixed(index)

    def loader(self, *, first_step: int, steps: int, seed: int) -> DataLoader:
        """Return batches for the steps ``first_step`` to ``steps`` - 1."""
        draws = steps * self.volumes
        order = draw_order(
            self.ids, self.new, oversampling=self.recipe.oversampling, draws=draws, seed=_mixed(seed, steps)
        )
        processes: dict[str, Any] = {}
        if self.workers:
            # Forked, they share the volumes in memory.
            processes = {"num_workers": self.workers, "prefetch_factor": _PREFETCH, "multiprocessing_context": "fork"}
        # Without its own generator the loader would draw from the global one, at unpredictable moments.
        return DataLoader(
            _Batches(self._dataset, seed, self.ranks.rank),
            batch_sampler=[
                [(step, volume) for volume in self.ranks.part(order[step * self.volumes : (step + 1) * self.volumes])]
                for step in range(first_step, steps)
            ],
            generator=torch.Generator(),
            pin_memory=self._pinned,
            **processes,
        )


class Patches(DrawnPatches):
    """Training patches of labelled volumes.

    Args:
        cases: volumes to draw from.
        labels: names of labels 1..N.
        options: the other arguments of ``DrawnPatches``.
    """

    def __init__(self, cases: Sequence[Case], *, prep: Preprocessing, labels: Sequence[str], **options: Any) -> None:
        n_labels = len(labels)
        files = [
            {
                "image": case.images,
                "label": case.label,
                "annotated": np.concatenate([[True], case.annotates(labels, n_labels)]),
            }
            for case in cases
        ]
        load = labelled_transforms(prep, n_labels=n_labels)
        super().__init__([case.id for case in cases], files, load, prep=prep, n_labels=n_labels, **options)


class _Batches(torch.utils.data.Dataset):
    """Volumes of a batch; every random choice follows from the seed and the step."""

    def __init__(self, dataset: CacheDataset, seed: int, rank: int) -> None:
        self.dataset, self.seed, self.rank = dataset, seed, rank

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, draws: Sequence[tuple[int, int]]) -> list[Any]:
        """Return the transformed volume of each (step, volume) of one step."""
        step = draws[0][0]
        seed_everything(self.seed, step, self.rank)
        self.dataset.transform.set_random_state(seed=_mixed(self.seed, step, self.rank))
        return [self.dataset[volume] for _, volume in draws]


def seed_everything(seed: int, step: int, rank: int = 0) -> None:
    """Make every random choice of the coming step, in this process, follow from ``seed``, ``step`` and ``rank``."""
    mixed = _mixed(seed, step, rank)
    random.seed(mixed)
    np.random.seed(mixed)  # noqa: NPY002 - what libraries below may use
    torch.manual_seed(mixed)


def _workers(device: torch.device, batch_bytes: int, ranks: int) -> int:
    """Return the number of processes that draw patches for each rank of this machine; 0 where ranks draw themselves."""
    if device.type != "cuda" or sys.platform != "linux":
        return 0
    # One core is for the training, one for everything else.
    cores = len(os.sched_getaffinity(0)) // ranks - 2
    # Batches travel through it; a container has 64 MB by default.
    memory = os.statvfs("/dev/shm")
    room = memory.f_bavail * memory.f_frsize // (2 * (_PREFETCH + 1) * batch_bytes * ranks)
    count = min(cores, room, _MAX_WORKERS)
    return count if count >= _MIN_WORKERS else 0


def _mixed(seed: int, step: int, rank: int = 0) -> int:
    # A single process draws as it did before there were several.
    return int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0])
