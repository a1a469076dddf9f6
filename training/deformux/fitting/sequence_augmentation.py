"""Augmentation of cases of several sequences: changes to each, and sequences that are taken away."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from monai.transforms import Randomizable, RandomizableTransform, Transform

from deformux.data.transforms import run_transforms

__all__ = ["EachSequenced", "RandDropSequencesd"]


class EachSequenced(Randomizable, Transform):
    """Changes the channels of ``image`` (C, x, y, z), each by transforms of its own; those of missing sequences stay 0.

    Args:
        steps: dictionary transforms for each channel ``(1, x, y, z)``.
    """

    def __init__(self, steps: Sequence[Sequence[Transform]]) -> None:
        super().__init__()
        self.steps = steps

    def set_random_state(self, seed: int | None = None, state: np.random.RandomState | None = None) -> EachSequenced:
        """Seed all transforms."""
        super().set_random_state(seed, state)
        for step in itertools.chain.from_iterable(self.steps):
            if isinstance(step, Randomizable):
                step.set_random_state(seed=int(self.R.randint(2**32 - 1, dtype="uint32")))
        return self

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        channels = [self._changed(image[n : n + 1], steps) for n, steps in enumerate(self.steps)]
        return {**data, "image": torch.cat(channels)}

    def _changed(self, channel: torch.Tensor, steps: Sequence[Transform]) -> torch.Tensor:
        return run_transforms(steps, {"image": channel})["image"] if bool(channel.any()) else channel


class RandDropSequencesd(RandomizableTransform):
    """Sets channels of ``image`` (C, x, y, z) to 0, each with a probability, as if their sequences were missing.

    If chance takes all that a case has, a random one of them stays.
    """

    def __init__(self, probability: float) -> None:
        super().__init__(prob=1.0)
        self.probability = probability

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        dropped = self.R.random(len(image)) < self.probability
        stays = int(self.R.randint(len(image)))
        present = [n for n in range(len(image)) if bool(image[n].any())]
        if present and dropped[present].all():
            dropped[present[stays % len(present)]] = False
        kept = torch.as_tensor(~dropped, device=image.device)
        return {**data, "image": image * kept[:, None, None, None]}
