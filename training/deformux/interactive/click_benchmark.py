"""Benchmark of clicks: a simulated annotator corrects labelled volumes, and every click is scored and timed."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from nibabel.affines import voxel_sizes
from scipy.integrate import trapezoid

from deformux.data.cases import Case
from deformux.data.label_values import UNLABELLED
from deformux.data.loading import LoadLabeld, LoadVolumed
from deformux.data.preprocessing import Preprocessing
from deformux.data.transforms import run_transforms
from deformux.inference.metrics import dice_per_label, surface_dice_per_label
from deformux.interactive.editor import Editor
from deformux.interactive.open_scan import open_scan
from deformux.interactive.simulated_annotator import ClickAnnotator
from deformux.networks.deformux_net import DeformUXNet

__all__ = ["CLICK_COUNTS", "THRESHOLDS", "CaseResult", "ClickSummary", "Robot", "play_case", "summarise_clicks"]

# Numbers of clicks after which a mask is reported.
CLICK_COUNTS = (0, 1, 2, 3, 5, 10)
THRESHOLDS = (0.80, 0.85, 0.90)
_AREA = (1, 5)


@dataclass(frozen=True)
class Robot:
    """A simulated annotator: its name, and the jitter of its clicks (``ClickAnnotator``)."""

    name: str
    jitter: float = 0.0


@dataclass(frozen=True)
class CaseResult:
    """Result of one robot on one volume.

    Args:
        case, robot: names.
        dice: mean over labels after 0, 1, 2, … clicks, all labels counted together.
        surface_dice: the same at 2 mm, after each of ``CLICK_COUNTS``.
        seconds: of each click, from the clicks to the mask on the scan's grid.
        cap: number of clicks after which the robot gives up.
    """

    case: str
    robot: str
    dice: tuple[float, ...]
    surface_dice: tuple[float, ...]
    seconds: tuple[float, ...]
    cap: int

    def after(self, clicks: int) -> float:
        """Return mean Dice after a number of clicks, or after the last one if nothing was left to correct."""
        return self.dice[min(clicks, len(self.dice) - 1)]

    @property
    def area(self) -> float:
        """Return the area under Dice over 1 to 5 clicks, 0 to 4."""
        return float(trapezoid([self.after(n) for n in range(_AREA[0], _AREA[1] + 1)]))

    def clicks_to(self, threshold: float) -> int | None:
        """Return the number of clicks until mean Dice reaches a threshold; None if the robot gave up."""
        return next((n for n, dice in enumerate(self.dice[: self.cap + 1]) if dice >= threshold), None)


@dataclass(frozen=True)
class ClickSummary:
    """Means of one robot over all volumes, and the time of a click in seconds.

    ``clicks_to`` counts a volume that did not reach the threshold as the cap; ``failures`` counts these volumes.
    """

    robot: str
    cases: int
    dice: tuple[float, ...]
    surface_dice: tuple[float, ...]
    area: float
    clicks_to: tuple[float, ...]
    failures: tuple[int, ...]
    median_s: float
    p95_s: float


@dataclass(frozen=True)
class _Truth:
    """The label of a case: values ``(X, Y, Z)``, which labels were annotated ``(N,)``, voxel sizes in mm."""

    values: npt.NDArray[np.uint8]
    annotated: npt.NDArray[np.bool_]
    spacing: tuple[float, ...]

    @classmethod
    def of(cls, case: Case, labels: Sequence[str]) -> _Truth:
        n_labels = len(labels)
        load = (LoadVolumed("image"), LoadLabeld("label", n_labels=n_labels, unlabelled=True))
        label = run_transforms(load, {"image": case.image, "label": case.label})["label"]
        return cls(
            values=label[0].numpy().astype(np.uint8),
            annotated=case.annotates(labels, n_labels),
            spacing=tuple(float(size) for size in voxel_sizes(np.asarray(label.affine, dtype=float))),
        )

    def dice(self, shown: npt.NDArray[np.uint8]) -> float:
        """Return mean Dice over the labels that are annotated and present."""
        return self._mean(dice_per_label(*self._known(shown), len(self.annotated)))

    def surface_dice(self, shown: npt.NDArray[np.uint8]) -> float:
        """Return mean surface Dice at 2 mm over these labels."""
        return self._mean(surface_dice_per_label(*self._known(shown), len(self.annotated), spacing_mm=self.spacing))

    def _known(self, shown: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.uint8]]:
        known = self.values != UNLABELLED
        return shown * known, self.values * known

    def _mean(self, values: npt.NDArray[np.float64]) -> float:
        values = values[self.annotated & ~np.isnan(values)]
        return float(values.mean()) if len(values) else float("nan")


def play_case(
    network: DeformUXNet,
    case: Case,
    prep: Preprocessing,
    *,
    labels: Sequence[str],
    robots: Sequence[Robot],
    cap: int = 20,
    seed: int = 0,
    device: str = "cpu",
) -> Iterator[CaseResult]:
    """Let simulated annotators correct one volume, each starting from the automatic mask.

    Each makes the last number of ``CLICK_COUNTS``, then continues up to the cap until it reaches the highest of
    ``THRESHOLDS``. It ends where nothing is left to correct.

    Raises:
        InvalidVolume: the scan or its label is not usable.
    """
    truth = _Truth.of(case, labels)
    scan = open_scan(network, case.images, prep, device=device)
    for robot in robots:
        editor = Editor(scan, network, prep, device=device)
        annotator = ClickAnnotator(len(labels), jitter=robot.jitter, spacing=truth.spacing, seed=seed)
        shown = scan.labels
        dice, surface, seconds = [truth.dice(shown)], {0: truth.surface_dice(shown)}, []
        points: dict[int, list[tuple[int, int, int]]] = {}
        for number in range(1, max(cap, CLICK_COUNTS[-1]) + 1):
            if number > CLICK_COUNTS[-1] and max(dice) >= THRESHOLDS[-1]:
                break
            clicks = annotator.clicks(truth.values, shown, annotated=np.array([True, *truth.annotated]))
            if not clicks:
                break
            points.setdefault(clicks[0].label, []).append(clicks[0].voxel)
            began = time.perf_counter()
            shown = editor.apply(points)
            seconds.append(time.perf_counter() - began)
            dice.append(truth.dice(shown))
            if number in CLICK_COUNTS:
                surface[number] = truth.surface_dice(shown)
        last = truth.surface_dice(shown)
        yield CaseResult(
            case=case.id,
            robot=robot.name,
            dice=tuple(dice),
            surface_dice=tuple(surface.get(count, last) for count in CLICK_COUNTS),
            seconds=tuple(seconds),
            cap=cap,
        )


def summarise_clicks(results: Sequence[CaseResult]) -> list[ClickSummary]:
    """Summarise each robot, in order of appearance."""
    lines = []
    for robot in dict.fromkeys(result.robot for result in results):
        own = [result for result in results if result.robot == robot]
        needed = [[result.clicks_to(threshold) for result in own] for threshold in THRESHOLDS]
        seconds = np.array([second for result in own for second in result.seconds] or [np.nan])
        lines.append(
            ClickSummary(
                robot=robot,
                cases=len(own),
                dice=tuple(float(np.nanmean([result.after(count) for result in own])) for count in CLICK_COUNTS),
                surface_dice=tuple(float(v) for v in np.nanmean([result.surface_dice for result in own], axis=0)),
                area=float(np.nanmean([result.area for result in own])),
                clicks_to=tuple(float(np.mean([own[0].cap if n is None else n for n in counts])) for counts in needed),
                failures=tuple(sum(n is None for n in counts) for counts in needed),
                median_s=float(np.median(seconds)),
                p95_s=float(np.percentile(seconds, 95)),
            )
        )
    return lines
