"""Which volume is drawn when, and how it is varied: a function of the seed and the step alone.

Nothing random is carried from step to step, so that a resumed training draws what an uninterrupted one would have.
"""

from __future__ import annotations

import itertools
import logging
import random
from collections.abc import Collection, Sequence

import numpy as np
import torch
from monai.data import CacheDataset, DataLoader
from monai.transforms import RandomizableTrait, Transform

from deformux.augmentation import training_augmentation
from deformux.cases import Case
from deformux.distributed import ALONE, Ranks
from deformux.recipe import Recipe
from deformux.transforms import Preprocessing, labelled_transforms

__all__ = ["Patches", "draw_order"]

logger = logging.getLogger(__name__)


def draw_order(cases: Sequence[str], new: Collection[str], *, oversampling: int, draws: int, seed: int) -> list[int]:
    """Indices into ``cases`` for every draw of a run: shuffled rounds in which new cases come ``oversampling`` times.

    Args:
        cases: ids.
        new: ids of those that are new; where all are, none is preferred.
    """
    times = [oversampling if case in new else 1 for case in cases]
    deck = np.repeat(np.arange(len(cases)), times if len(set(times)) > 1 else 1)
    rng = np.random.default_rng(seed)
    rounds = -(-draws // len(deck))
    return [int(index) for index in np.concatenate([rng.permutation(deck) for _ in range(rounds)])[:draws]]


class Patches:
    """Training patches of labelled volumes, from one step of a run to its end.

    Preprocessed volumes stay in memory while they fit into ``recipe.cache_gb``; the rest is read again for each patch.
    Image and label of a patch come on ``device``. Each of several processes draws an equal part of a step's volumes.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        *,
        new: Collection[str],
        recipe: Recipe,
        prep: Preprocessing,
        labels: Sequence[str],
        device: str | torch.device = "cpu",
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe = recipe
        self.ranks = ranks
        self.volumes = recipe.batch_size // recipe.patches_per_volume
        self.own_volumes = ranks.share(self.volumes, "batch_size / patches_per_volume")
        self.cases = cases
        self.new = new
        n_labels = len(labels)
        files = [
            {
                "image": case.image,
                "label": case.label,
                "annotated": np.concatenate([[True], case.annotates(labels, n_labels)]),
            }
            for case in cases
        ]
        augmentation = training_augmentation(prep, recipe, device=device)
        transforms: list[Transform] = [*labelled_transforms(prep, n_labels=n_labels), *augmentation]
        fixed = list(itertools.takewhile(lambda t: not isinstance(t, RandomizableTrait), transforms))
        # What a volume takes once it is preprocessed is known only by doing it: the first stands for all.
        first = CacheDataset(files[:1], fixed, cache_rate=1.0, progress=False)[0]
        each = sum(v.numel() * v.element_size() for v in first.values() if isinstance(v, torch.Tensor))
        keep = int(recipe.cache_gb * 1e9 / ranks.local / each)
        logger.info("keeping %d of %d volumes in memory (%.1f MB each)", min(keep, len(files)), len(files), each / 1e6)
        self._dataset = CacheDataset(files, transforms, cache_num=keep, num_workers=1, progress=False)

    def loader(self, *, first_step: int, steps: int, seed: int) -> DataLoader:
        """Batches for the steps ``first_step`` to ``steps`` - 1."""
        ids = [case.id for case in self.cases]
        draws = steps * self.volumes
        order = draw_order(ids, self.new, oversampling=self.recipe.oversampling, draws=draws, seed=_mixed(seed, steps))
        # A generator of its own: the loader would otherwise draw from the global one at moments of its choice.
        return DataLoader(
            self._dataset,
            batch_size=self.own_volumes,
            sampler=self.ranks.part(order[first_step * self.volumes :]),
            num_workers=0,
            generator=torch.Generator(),
        )

    def seed(self, seed: int, step: int) -> None:
        """Make every random choice of the coming step follow from ``seed``, ``step`` and the process."""
        mixed = _mixed(seed, step, self.ranks.rank)
        random.seed(mixed)
        np.random.seed(mixed)  # noqa: NPY002 - what libraries below may use
        torch.manual_seed(mixed)
        self._dataset.transform.set_random_state(seed=mixed)


def _mixed(seed: int, step: int, rank: int = 0) -> int:
    # A single process draws as it did before there were several.
    return int(np.random.SeedSequence([seed, step, rank] if rank else [seed, step]).generate_state(1)[0])
