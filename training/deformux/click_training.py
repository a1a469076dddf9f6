"""Training steps in which a simulated annotator clicks into the network's errors.

Iterative training in the manner of Mahadevan et al. (BMVC 2018) and Sofiiuk et al. (RITM, ICIP 2022), with few passes
through the network. Every step is an ordinary one, without clicks. A step with clicks goes on from its prediction: in
half of them a pass for the mask after the first clicks, and then one with guidance, whose gradient is added. Thus what
is learnt of clicks takes no step from the automatic network.

A network that knows its few training volumes by heart needs no clicks there, and would not learn what they are for. So
most annotators have a taste of their own: they want borders where the image does not tell, and only their clicks say
so. What was clicked into is then taught as they want it, and all else as it is labelled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from deformux.annotator import Click, ClickAnnotator
from deformux.guidance import encode_guidance
from deformux.inference import mixed_precision
from deformux.network import DeformUXNet
from deformux.recipe import Recipe
from deformux.transforms import UNLABELLED

__all__ = ["ClickStep", "ClickTraining"]

# Of the steps with clicks: those that start from another mask than the network's own, and those with a second round.
_FOREIGN_MASK = 0.15
_SECOND_ROUND = 0.5
# Of the second rounds: those that start from the mask after the first, as an annotator who saves in between does.
_SAVED_BETWEEN = 0.3
# Of the volumes: those with a click where nothing is wrong, and those whose annotator has a taste of his own.
_NEEDLESS_CLICK = 0.1
_OWN_TASTE = 0.5
# Voxels.
_LARGEST_SHIFT = 3
# Voxels by which a taste moves borders, at least and at most; and between the points where that is drawn.
_TASTE = (1.0, 4.0)
_TASTE_PERIOD = 8
# What sets these random numbers apart from others of the same step.
_STREAM = 0xC11C

Labels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class ClickStep:
    """What a step with clicks teaches.

    Args:
        guidance: the clicks and the mask to start from, ``(N, guidance channels, D, H, W)``.
        label: what they should lead to, ``(N, 1, D, H, W)``, 255 where unlabelled.
        emphasis: how much a voxel counts beside the others, ``(N, 1, D, H, W)``, 1 where it was clicked into.
    """

    guidance: Tensor
    label: Tensor
    emphasis: Tensor


class ClickTraining:
    """Clicks for training steps.

    Whether a step has clicks, how many and where follows from the seed, the step and the network's weights alone, so
    that a resumed training clicks as an uninterrupted one would have.

    Args:
        network: the network in training, which takes guidance.
        recipe: how often, and how many clicks at most.
        seed: of the training.
    """

    def __init__(self, network: DeformUXNet, recipe: Recipe, *, seed: int) -> None:
        self.network, self.recipe, self.seed = network, recipe, seed
        self.n_labels = network.out_channels - 1

    def step(self, step: int, image: Tensor, logits: Tensor, label: Tensor, annotated: Tensor) -> ClickStep | None:
        """What a step of the training teaches with clicks, or None for a step without.

        Args:
            step: of the training, from 1.
            image: ``(N, channels, D, H, W)``.
            logits: what the network says without clicks, ``(N, classes, D, H, W)``.
            label: ``(N, 1, D, H, W)``, 255 where unlabelled.
            annotated: ``(N, classes)``, which classes were looked for.
        """
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, step, _STREAM]))
        if step <= self.recipe.click_start * self.recipe.steps or rng.random() >= self.recipe.click_probability:
            return None
        truths = [truth.astype(np.uint8) for truth in label[:, 0].cpu().numpy()]
        known = annotated.cpu().numpy().astype(bool)
        start = [_spoilt(truth, rng) for truth in truths] if rng.random() < _FOREIGN_MASK else _classes(logits)
        counts = [_count(self.recipe.clicks, rng) for _ in truths]
        two_rounds = rng.random() < _SECOND_ROUND and max(counts) > 1
        first = [int(rng.integers(1, n)) if two_rounds and n > 1 else n for n in counts]
        sessions = [_Session(truth, classes, self.n_labels, rng) for truth, classes in zip(truths, known, strict=True)]
        for session, mask, n in zip(sessions, start, first, strict=True):
            session.click(mask, n)
        if two_rounds:
            result = self._predict(image, self._encode(sessions, start, image))
            for session, mask, n, before in zip(sessions, result, counts, first, strict=True):
                session.click(mask, n - before)
            if rng.random() < _SAVED_BETWEEN:
                start = result
        guidance = self._encode(sessions, start, image)
        asked = torch.from_numpy(np.stack([session.asked for session in sessions])[:, None]).to(image.device)
        wanted = torch.from_numpy(np.stack([session.wanted for session in sessions])[:, None]).to(label)
        # Of what the network says with clicks, only what is near to them is ever used.
        near = guidance[:, : self.n_labels + 1].amax(1, keepdim=True)
        return ClickStep(guidance, torch.where(asked, wanted, label), torch.maximum(near, asked.to(near)))

    @torch.inference_mode()
    def _predict(self, image: Tensor, guidance: Tensor) -> list[Labels]:
        if not self.recipe.mixed_precision:
            logits = self.network(image, guidance)
        else:
            with mixed_precision(image.device):
                logits = self.network(image, guidance)
        return _classes(logits)

    def _encode(self, sessions: Sequence[_Session], masks: Sequence[Labels], image: Tensor) -> Tensor:
        maps = []
        for session, mask in zip(sessions, masks, strict=True):
            by_label = {
                value: np.array([click.voxel for click in session.clicks if click.label == value])
                for value in {click.label for click in session.clicks}
            }
            maps.append(encode_guidance(by_label, torch.from_numpy(mask), n_labels=self.n_labels, size=image.shape[2:]))
        return torch.stack(maps).to(image.device)


class _Session:
    """An annotator in front of one volume.

    Attributes:
        clicks: made so far.
        wanted: the label as this annotator would draw it.
        asked: voxels of the errors that were clicked into.
    """

    def __init__(
        self, truth: Labels, annotated: npt.NDArray[np.bool_], n_labels: int, rng: np.random.Generator
    ) -> None:
        self.annotated, self.n_labels, self.rng = annotated, n_labels, rng
        self.wanted = _another_taste(truth, rng) if rng.random() < _OWN_TASTE else truth
        self.asked = np.zeros(truth.shape, dtype=bool)
        self.clicks: list[Click] = []

    def click(self, shown: Labels, most: int) -> None:
        """Add clicks into the largest errors of what is shown."""
        jitter = float(self.rng.random()) if self.rng.random() < 0.5 else 0.0
        annotator = ClickAnnotator(self.n_labels, jitter=jitter, seed=self.rng)
        for error in annotator.errors(self.wanted, shown, most=most, annotated=self.annotated):
            self.clicks.append(annotator.click(error, shown.shape))
            self.asked[error.box] |= error.inside
        if self.rng.random() < _NEEDLESS_CLICK:
            right = (self.wanted == shown) & (shown > 0)
            if right.any():
                x, y, z = (int(v) for v in self.rng.choice(np.argwhere(right)))
                self.clicks.append(Click(int(shown[x, y, z]), (x, y, z)))
                self.asked[x, y, z] = True


def _another_taste(truth: Labels, rng: np.random.Generator) -> Labels:
    """The truth with its borders moved smoothly, here this way and there that way."""
    most = rng.uniform(*_TASTE)
    points = [-(-length // _TASTE_PERIOD) + 1 for length in truth.shape]
    drawn = torch.from_numpy(rng.uniform(-most, most, (1, 3, *points)))
    shifts = F.interpolate(drawn, size=truth.shape, mode="trilinear", align_corners=True)[0].numpy()
    voxels = [
        np.clip(np.rint(index + shift).astype(np.int64), 0, length - 1)
        for index, shift, length in zip(np.indices(truth.shape), shifts, truth.shape, strict=True)
    ]
    return np.where(truth == UNLABELLED, truth, truth[tuple(voxels)])


def _classes(logits: Tensor) -> list[Labels]:
    return list(logits.argmax(1).to("cpu", torch.uint8).numpy())


def _count(most: int, rng: np.random.Generator) -> int:
    """1 to ``most`` clicks, n of them with a probability proportional to 1/n: most cases need few."""
    weights = 1 / np.arange(1, most + 1)
    return int(rng.choice(most, p=weights / weights.sum())) + 1


def _spoilt(truth: Labels, rng: np.random.Generator) -> Labels:
    """A mask from somewhere else: the truth with every label moved by some voxels, and some of them missing."""
    mask = np.zeros_like(truth)
    kept = rng.random(int(UNLABELLED)) < rng.choice([0.0, 0.7, 1.0], p=[0.1, 0.2, 0.7])
    for value in np.unique(truth):
        offset = rng.integers(-_LARGEST_SHIFT, _LARGEST_SHIFT + 1, 3)
        if 0 < value < UNLABELLED and kept[value]:
            # An axis of a single voxel has no room.
            offset = np.where(np.array(truth.shape) > 1, offset, 0)
            mask[ndimage.shift(truth == value, offset, order=0)] = value
    return mask
