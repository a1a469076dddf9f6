"""Training of a locator: the model's labels on coarse voxels, in about a minute, and the check that it may be used."""

from __future__ import annotations

import dataclasses
import logging
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
import torch
from monai.data import MetaTensor
from nibabel.affines import voxel_sizes
from torch import Tensor
from torch.nn import functional as F

from deformux.data.cases import Case
from deformux.data.grid import Index, triple
from deformux.data.header import InvalidVolume
from deformux.data.label_values import UNLABELLED
from deformux.data.preprocessing import Preprocessing
from deformux.data.sequences import first_present
from deformux.data.transforms import labelled_transforms, run_transforms
from deformux.data.volume_reader import open_volume
from deformux.fitting.fit import TrainingError, TrainingStopped, fit
from deformux.fitting.recipe import RECIPES, Recipe
from deformux.inference.locate import (
    MANY_WINDOWS,
    Locator,
    Ranges,
    coarse_factors,
    coarse_window,
    coarsened,
    covered,
    missing_channels,
    seen_intensities,
    touched,
)
from deformux.inference.slabs import Windows
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["FittedLocator", "fit_locator"]

logger = logging.getLogger(__name__)

# Probabilities to call a voxel possibly labelled: the first at which no labelled voxel is lost is taken.
_THRESHOLDS = (0.3, 0.1, 0.03, 0.01)
_MARGIN_MM = 10.0
_MARGIN_VOX = 1.5
# A locator that leaves out fewer windows is not worth its time.
_MOST_SHARE = 0.8
_PRESET = "tiny"
# Volumes it learns from, and is checked on, at most; large ones take many seconds to read.
_MOST_CASES = 24
_LEAST_CASES = 3
_PROBE_STEPS = 4
_LEAST_STEPS, _MOST_STEPS = 20, 600
_RECIPE = RECIPES["finetune"].replace(clicks=0, elastic_probability=0.0, epochs=1, patience=None, ema_decay=None)


@dataclass(frozen=True)
class FittedLocator:
    """A locator, or None if it may not be used, and what the model's card says about it."""

    locator: Locator | None = None
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class _Coarse:
    """A labelled scan on coarse voxels.

    Args:
        case: its files.
        image: the preprocessed scan's geometry on the network's grid, without its voxels.
        windows: of the model.
        values: intensities ``(channels, x, y, z)``, 0 for missing sequences.
        label: ``(x, y, z)``, 255 where unlabelled.
        trained: whether the locator learns from it.
    """

    case: Case
    image: MetaTensor
    windows: Windows
    label: npt.NDArray[np.uint8]
    values: Tensor
    trained: bool


def fit_locator(
    cases: Sequence[Case],
    *,
    prep: Preprocessing,
    labels: Sequence[str],
    val_cases: Sequence[Case] = (),
    sequence_dropout: float = 0.0,
    device: str | torch.device = "cpu",
    seed: int = 0,
    seconds: float = 60.0,
    stop: Callable[[], bool] | None = None,
) -> FittedLocator:
    """Train a locator on a model's training cases, and check it on these and the validation cases.

    Args:
        cases, val_cases, prep, labels, sequence_dropout: of the model's training.
        device: where to compute.
        seed: of every random choice.
        seconds: for its training; its number of steps follows from the measured time of a few.
        stop: as for ``fit``.

    Returns:
        No locator and no facts if no scan is large. No locator, and the reason under ``refused``, if it failed, would
        lose a labelled voxel of any case that has all sequences, or would leave out few windows.

    Raises:
        TrainingStopped: ``stop`` returned true.
    """
    prep = prep.with_dropout(sequence_dropout)
    recipe = _RECIPE.replace(sequence_dropout=sequence_dropout)
    try:
        if not any(_is_large(case, prep) for case in cases):
            return FittedLocator()
        return _fitted(
            cases, val_cases, prep, labels, recipe=recipe, device=device, seed=seed, seconds=seconds, stop=stop
        )
    except TrainingStopped:
        raise
    except (TrainingError, InvalidVolume, OSError) as error:
        logger.warning("Large scans will be segmented without a locator: %s", error)
        return FittedLocator(None, {"refused": str(error)})


def _fitted(
    cases: Sequence[Case],
    val_cases: Sequence[Case],
    prep: Preprocessing,
    labels: Sequence[str],
    *,
    recipe: Recipe,
    device: str | torch.device,
    seed: int,
    seconds: float,
    stop: Callable[[], bool] | None,
) -> FittedLocator:
    began = time.monotonic()
    factors, scans = _coarse_scans(cases, val_cases, prep, len(labels), seconds)
    ranges = _ranges(scans, prep.channels)
    patch = coarse_window(triple(np.max([scan.label.shape for scan in scans], axis=0)))
    torch.manual_seed(seed)
    network = DeformUXNet(prep.channels, len(labels) + 1, _PRESET)
    with tempfile.TemporaryDirectory(prefix="deformux-locator-") as folder:
        coarse_cases = [_written(scan, Path(folder), ranges) for scan in scans if scan.trained]
        # They are normalised already, whatever the sequences' modalities.
        names = tuple(f"ct:{number}" for number in range(len(prep.sequences)))
        options: dict[str, Any] = {"labels": labels, "device": device, "seed": seed, "capture": False}
        options["prep"] = Preprocessing("ct", patch_size=patch, window_hu=(0.0, 1.0), sequences=names)
        _train(network, coarse_cases, recipe, options, seconds=seconds, stop=stop)
    sizes = voxel_sizes(np.asarray(scans[0].image.affine, dtype=float)) * factors
    locator = Locator(
        network.eval(),
        factors,
        patch,
        ranges,
        _THRESHOLDS[0],
        max(_MARGIN_MM, _MARGIN_VOX * float(sizes.max())),
        device=device,
    )
    found = _checked(locator, scans)
    if found.locator is not None and prep.missing_sequences:
        without = _without(found.locator, scans, prep.channels, seconds)
        found = dataclasses.replace(found, locator=dataclasses.replace(found.locator, without=without))
    facts = found.facts | {"cases": len(scans), "seconds": round(time.monotonic() - began, 1)}
    logger.info("Locator: %s", facts)
    return dataclasses.replace(found, facts=facts)


def _is_large(case: Case, prep: Preprocessing) -> bool:
    """Return whether a scan may need many windows, by its header."""
    with open_volume(case.image) as opened:
        header = opened.header
        voxels = float(np.prod(np.array(header.shape[:3], dtype=float)))
        if prep.spacing_mm is not None:
            voxels *= float(np.prod(voxel_sizes(np.asarray(header.affine)) / np.array(prep.spacing_mm)))
    return voxels >= MANY_WINDOWS * math.prod(prep.patch_size) * 0.75**3 / 2


def _coarse_scans(
    cases: Sequence[Case], val_cases: Sequence[Case], prep: Preprocessing, n_labels: int, seconds: float
) -> tuple[Index, list[_Coarse]]:
    """Return the voxels to merge along each axis, and the scans; fewer of them if reading takes long."""
    chosen = [(case, True) for case in _evenly(cases, _MOST_CASES)]
    chosen += [(case, False) for case in _evenly(val_cases, _MOST_CASES // 4)]
    if val_cases:
        # One that it does not learn from is read before time is up.
        chosen.insert(1, chosen.pop(-1))
    factors: Index | None = None
    scans: list[_Coarse] = []
    began = time.monotonic()
    for case, trained in chosen:
        if len(scans) >= _LEAST_CASES and time.monotonic() - began > seconds:
            break
        data = run_transforms(labelled_transforms(prep, n_labels=n_labels), {"image": case.images, "label": case.label})
        image = data["image"]
        size = triple(image.shape[1:])
        if factors is None:
            factors = coarse_factors(size, voxel_sizes(np.asarray(image.affine, dtype=float)))
        scans.append(
            _Coarse(
                case,
                MetaTensor(torch.zeros(1, 1, 1, 1), affine=image.affine),
                Windows(size, triple(prep.patch_size)),
                _coarse_label(data["label"].as_tensor(), factors),
                coarsened(image.as_tensor(), factors),
                trained,
            )
        )
    assert factors is not None
    if not any(len(scan.windows.starts) >= MANY_WINDOWS for scan in scans):
        raise TrainingError("no scan needs many windows")
    return factors, scans


def _ranges(scans: Sequence[_Coarse], channels: int) -> Ranges:
    """Return the lowest and highest intensity of each sequence, of the scans that have it."""
    found = []
    for number in range(channels):
        values = [scan.values[number] for scan in scans if number not in missing_channels(scan.values)]
        low = min((float(channel.min()) for channel in values), default=0.0)
        found.append((low, max((float(channel.max()) for channel in values), default=1.0)))
    return tuple(found)


def _evenly(cases: Sequence[Case], most: int) -> list[Case]:
    if len(cases) <= most:
        return list(cases)
    return [cases[int(i)] for i in np.linspace(0, len(cases) - 1, most)]


def _coarse_label(label: Tensor, factors: Index) -> npt.NDArray[np.uint8]:
    """Return the highest label of each block of voxels, 255 where none is labelled but some are unlabelled."""
    values = label[None].float()
    unlabelled = values == UNLABELLED
    highest = F.max_pool3d(values.masked_fill(unlabelled, 0), factors, ceil_mode=True)
    unknown = F.max_pool3d(unlabelled.float(), factors, ceil_mode=True) > 0
    return highest.masked_fill(unknown & (highest == 0), float(UNLABELLED))[0, 0].to(torch.uint8).numpy()


def _written(scan: _Coarse, folder: Path, ranges: Ranges) -> Case:
    """Write the sequences of a coarse scan, their intensities between 0 and 1, and its label, for ``fit`` to read."""
    number = len(list(folder.glob("*_label.nii")))
    label = folder / f"{number}_label.nii"
    nib.save(nib.Nifti1Image(scan.label, np.eye(4)), label)
    files = tuple(folder / f"{number}_image_{sequence}.nii" for sequence in range(len(ranges)))
    missing = missing_channels(scan.values)
    for sequence, values in enumerate(seen_intensities(scan.values, ranges)):
        if sequence not in missing:
            nib.save(nib.Nifti1Image(values.numpy().astype(np.float32), np.eye(4)), files[sequence])
    return Case(scan.case.id, first_present(files), label, annotated=scan.case.annotated, images=files)


def _train(
    network: DeformUXNet,
    cases: Sequence[Case],
    recipe: Recipe,
    options: Mapping[str, Any],
    *,
    seconds: float,
    stop: Callable[[], bool] | None,
) -> None:
    """Train for about ``seconds``; ``options`` are further arguments of ``fit``."""

    def run(recipe: Recipe, most: float) -> float:
        end = time.monotonic() + most
        asked = False

        def enough() -> bool:
            nonlocal asked
            asked = stop is not None and stop()
            return asked or time.monotonic() > end

        try:
            return fit(network, cases, recipe=recipe, stop=enough, **options).seconds
        except TrainingStopped:
            # Out of time, it keeps what it has learnt.
            if asked:
                raise
            return most

    each = run(recipe.replace(steps=_PROBE_STEPS, learning_rate=1e-5, schedule="constant"), seconds) / _PROBE_STEPS
    steps = min(_MOST_STEPS, max(_LEAST_STEPS, int(seconds / max(each, 1e-3))))
    run(recipe.replace(steps=steps), 1.5 * seconds)


def _checked(locator: Locator, scans: Sequence[_Coarse]) -> FittedLocator:
    """Return the locator with the highest threshold that loses nothing, or why there is none.

    Scans that lack a sequence do not count: see ``_without``.
    """
    scans = [scan for scan in scans if not missing_channels(scan.values)]
    if not scans:
        return FittedLocator(None, {"refused": "no case has all sequences"})
    seen = [locator.look(scan.values) for scan in scans]
    found = [set(one.found()) for one in seen]
    expected = tuple(sorted(set.intersection(*found)))
    recall, share = 0.0, 1.0
    for threshold in _THRESHOLDS:
        tried = dataclasses.replace(locator, threshold=threshold, expected=expected)
        recalls, shares = [], []
        for scan, one in zip(scans, seen, strict=True):
            wanted = touched(tried.region(one, scan.image), locator.factors, scan.windows)
            shares.append(sum(wanted) / len(wanted))
            recalls.append(_recall(scan, wanted, locator.factors))
        recall, share = min(recalls), float(np.mean(shares))
        facts = {"recall": round(recall, 6), "share_of_windows": round(share, 4)}
        if recall == 1:
            if share > _MOST_SHARE:
                reason = f"it would leave out only {1 - share:.0%} of the windows"
                return FittedLocator(None, facts | {"refused": reason})
            return FittedLocator(tried, facts)
    reason = f"it misses {1 - recall:.2%} of the labelled voxels of a case"
    return FittedLocator(None, {"recall": recall, "share_of_windows": round(share, 4), "refused": reason})


def _without(locator: Locator, scans: Sequence[_Coarse], channels: int, seconds: float) -> tuple[tuple[int, ...], ...]:
    """Return the sets of sequences without which a locator loses no labelled voxel of any scan.

    Tried are those that leave one, as when a client uploads one volume, and each alone, until ``seconds`` are over.
    """
    others = [tuple(n for n in range(channels) if n != left) for left in range(channels)]
    found = []
    began = time.monotonic()
    for lacking in dict.fromkeys([*others, *((n,) for n in range(channels))]):
        if time.monotonic() - began > seconds:
            break
        comparable = (scan for scan in scans if set(missing_channels(scan.values)) <= set(lacking))
        if all(_keeps_labels(locator, scan, lacking) for scan in comparable):
            found.append(lacking)
    return tuple(found)


def _keeps_labels(locator: Locator, scan: _Coarse, lacking: Sequence[int]) -> bool:
    """Return whether no labelled voxel of a scan is lost if sequences are taken away from it."""
    values = scan.values.clone()
    values[list(lacking)] = 0
    seen = locator.look(values)
    where = locator.region(seen, scan.image)
    if set(locator.expected) - set(seen.found()) or not where.any():
        # All windows are computed.
        return True
    return _recall(scan, touched(where, locator.factors, scan.windows), locator.factors) == 1


def _recall(scan: _Coarse, wanted: Sequence[bool], factors: Index) -> float:
    """Return the share of the labelled coarse voxels that lie wholly in wanted windows; 1 without any."""
    missed = torch.from_numpy(~covered(scan.windows, wanted))[None, None].float()
    partly = F.max_pool3d(missed, factors, ceil_mode=True)[0, 0].numpy() > 0
    labelled = (scan.label > 0) & (scan.label != UNLABELLED)
    return 1.0 if not labelled.any() else float((labelled & ~partly).sum() / labelled.sum())
