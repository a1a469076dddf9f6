"""Training steps in which a simulated annotator clicks into the network's errors.

Iterative training in the manner of Mahadevan et al. (BMVC 2018) and Sofiiuk et al. (RITM, ICIP 2022), with few passes
through the network. Every step first trains without clicks. A step with clicks continues from its prediction: in half
of them with a pass for the mask after the first clicks, and then with a pass with guidance, whose gradient is added.
Learning from clicks thus takes no step from the automatic network.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from deformux.data.label_values import UNLABELLED
from deformux.fitting.recipe import Recipe
from deformux.interactive.simulated_annotator import Click, ClickAnnotator
from deformux.networks.deformux_net import DeformUXNet
from deformux.networks.guidance import encode_guidance
from deformux.networks.precision import mixed_precision

__all__ = ["ClickTraining"]

# Share of the steps with clicks that start from a mask other than the network's own, and that have a second round.
_FOREIGN_MASK = 0.15
_SECOND_ROUND = 0.5
# Share of the second rounds that start from the mask after the first, like an annotator who saves in between.
_SAVED_BETWEEN = 0.3
# Share of the volumes with a click where nothing is wrong.
_NEEDLESS_CLICK = 0.1
# Voxels.
_MAX_SHIFT = 3
# Separates these random numbers from others of the same step.
_STREAM = 0xC11C

_Labels = npt.NDArray[np.uint8]


class ClickTraining:
    """Guidance for training steps.

    The clicks of a step follow from the seed, the step and the network's weights alone, so that a resumed training
    clicks as an uninterrupted one would have.

    Args:
        network: the network in training, which takes guidance.
        recipe: how often to click, and how many times at most.
        seed: of the training.
    """

    def __init__(self, network: DeformUXNet, recipe: Recipe, *, seed: int) -> None:
        self.network, self.recipe, self.seed = network, recipe, seed
        self.n_labels = network.out_channels - 1

    def takes_part(self, step: int) -> bool:
        """Return whether a step, counted from 1, has clicks."""
        return self._drawn(step) is not None

    def guidance(self, step: int, image: Tensor, logits: Tensor, label: Tensor, annotated: Tensor) -> Tensor:
        """Return guidance ``(N, guidance channels, D, H, W)``, on the image's device, for a step that has clicks.

        Args:
            step: number of the step, from 1.
            image: ``(N, channels, D, H, W)``.
            logits: prediction without clicks, ``(N, classes, D, H, W)``.
            label: ``(N, 1, D, H, W)``, 255 where unlabelled.
            annotated: ``(N, classes)``, which classes were annotated.

        Raises:
            ValueError: the step has no clicks.
        """
        rng = self._drawn(step)
        if rng is None:
            raise ValueError(f"step {step} has no clicks")
        truths = [truth.astype(np.uint8) for truth in label[:, 0].cpu().numpy()]
        known = list(annotated.cpu().numpy().astype(bool))
        foreign = rng.random() < _FOREIGN_MASK
        start = [_spoilt(truth, rng) for truth in truths] if foreign else _classes(logits)
        counts = [_count(self.recipe.clicks, rng) for _ in truths]
        two_rounds = rng.random() < _SECOND_ROUND and max(counts) > 1
        first = [int(rng.integers(1, n)) if two_rounds and n > 1 else n for n in counts]
        clicks = [
            self._clicks(truth, mask, annotated=here, most=n, rng=rng)
            for truth, mask, here, n in zip(truths, start, known, first, strict=True)
        ]
        if two_rounds:
            result = self._predict(image, self._encode(clicks, start, image))
            for given, truth, mask, here, n, before in zip(clicks, truths, result, known, counts, first, strict=True):
                given += self._clicks(truth, mask, annotated=here, most=n - before, rng=rng)
            if rng.random() < _SAVED_BETWEEN:
                start = result
        return self._encode(clicks, start, image)

    def _drawn(self, step: int) -> np.random.Generator | None:
        """Return the random numbers of a step with clicks, or None for a step without."""
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, step, _STREAM]))
        if step <= self.recipe.click_start * self.recipe.steps or rng.random() >= self.recipe.click_probability:
            return None
        return rng

    def _clicks(
        self, truth: _Labels, shown: _Labels, *, annotated: npt.NDArray[np.bool_], most: int, rng: np.random.Generator
    ) -> list[Click]:
        jitter = float(rng.random()) if rng.random() < 0.5 else 0.0
        annotator = ClickAnnotator(self.n_labels, jitter=jitter, seed=rng)
        clicks = annotator.clicks(truth, shown, most=most, annotated=annotated)
        if rng.random() < _NEEDLESS_CLICK:
            right = np.argwhere((truth == shown) & (truth > 0) & (truth != UNLABELLED))
            if len(right):
                x, y, z = (int(v) for v in right[rng.integers(len(right))])
                clicks.append(Click(int(truth[x, y, z]), (x, y, z)))
        return clicks

    @torch.inference_mode()
    def _predict(self, image: Tensor, guidance: Tensor) -> list[_Labels]:
        if not self.recipe.mixed_precision:
            logits = self.network(image, guidance)
        else:
            with mixed_precision(image.device):
                logits = self.network(image, guidance)
        return _classes(logits)

    def _encode(self, clicks: Sequence[Sequence[Click]], masks: Sequence[_Labels], image: Tensor) -> Tensor:
        maps = []
        for given, mask in zip(clicks, masks, strict=True):
            by_label = {
                value: np.array([click.voxel for click in given if click.label == value])
                for value in {click.label for click in given}
            }
            maps.append(encode_guidance(by_label, torch.from_numpy(mask), n_labels=self.n_labels, size=image.shape[2:]))
        return torch.stack(maps).to(image.device)


def _classes(logits: Tensor) -> list[_Labels]:
    return list(logits.argmax(1).to("cpu", torch.uint8).numpy())


def _count(most: int, rng: np.random.Generator) -> int:
    """Draw a number of clicks, 1 to ``most``, n with a probability proportional to 1/n: most cases need few."""
    weights = 1 / np.arange(1, most + 1)
    return int(rng.choice(most, p=weights / weights.sum())) + 1


def _spoilt(truth: _Labels, rng: np.random.Generator) -> _Labels:
    """Return a mask from another source: the truth with every label moved by some voxels, and some labels missing."""
    mask = np.zeros_like(truth)
    kept = rng.random(int(UNLABELLED)) < rng.choice([0.0, 0.7, 1.0], p=[0.1, 0.2, 0.7])
    for value in np.unique(truth):
        offset = rng.integers(-_MAX_SHIFT, _MAX_SHIFT + 1, 3)
        if 0 < value < UNLABELLED and kept[value]:
            # Nothing moves along an axis of a single voxel.
            offset = np.where(np.array(truth.shape) > 1, offset, 0)
            mask[ndimage.shift(truth == value, offset, order=0)] = value
    return mask
