"""Figures of annotation rounds: scans, truth, predictions and the learning curve."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import nibabel as nib
import numpy as np
import numpy.typing as npt
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import SubplotSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from deformux.data.volume_reader import read_volume
from deformux_label.demo.slices import SliceView, best_views, obliqueness_deg, scale_bar_mm

__all__ = [
    "DemoRound",
    "WindowedScan",
    "label_colours",
    "read_label",
    "read_scan",
    "save_comparison",
    "save_learning_curve",
    "save_montage",
]

# Okabe and Ito's palette suits every kind of colour vision; black and grey are left to the scan.
_OKABE_ITO = ("#E69F00", "#56B4E9", "#F0E442", "#CC79A7", "#009E73", "#D55E00", "#0072B2")
_INK, _PAPER, _FAINT = "#1a1a1a", "#ffffff", "#8a8a8a"
# Technicians tilt the planes of many "axial" scans a little; nobody needs to know.
_OBLIQUE_DEG = 5.0
_STYLE = {"font.family": "DejaVu Sans", "font.size": 10, "text.color": _INK, "axes.edgecolor": _FAINT}


@dataclass(frozen=True)
class DemoRound:
    """Result of one round of annotate, train and predict; Dice are means over the scored volumes (NaN: absent)."""

    number: int
    labelled: int
    unlabelled: int
    dice: Mapping[str, float]
    mean_dice: float
    edited: float
    """Share of the labelled voxels that the annotator had to change in this round's volumes, 0..1."""
    seconds: float
    training_seconds: float
    held_out_dice: float | None = None


@dataclass(frozen=True)
class WindowedScan:
    """An image (X, Y, Z) in RAS axes with its voxel size, and the values shown as black and white.

    ``oblique_deg`` is the angle between its axes and the patient's.
    """

    image: npt.NDArray[np.float32]
    spacing_mm: tuple[float, float, float]
    window: tuple[float, float] = field(default=(-160.0, 260.0))
    oblique_deg: float = 0.0


def read_scan(path: Path, *, modality: str = "ct") -> WindowedScan:
    """Return the scan of a file; CT gets a soft tissue window, other modalities their own percentiles."""
    volume = _canonical(path)
    image = np.nan_to_num(np.asarray(volume.dataobj, np.float32))
    spacing = tuple(float(s) for s in volume.header.get_zooms()[:3])
    low, high = (-160.0, 260.0) if modality == "ct" else (float(v) for v in np.percentile(image, (1, 99.5)))
    return WindowedScan(image, (spacing[0], spacing[1], spacing[2]), (low, high), obliqueness_deg(volume.affine))


def read_label(path: Path) -> npt.NDArray[np.uint8]:
    """Return the label (X, Y, Z) of a file in RAS axes."""
    return np.asarray(_canonical(path).dataobj).astype(np.uint8)


def _canonical(path: Path) -> nib.Nifti1Image:
    volume = read_volume(path)
    return nib.as_closest_canonical(nib.Nifti1Image(volume.values, volume.affine))


def label_colours(labels: Sequence[str]) -> dict[str, str]:
    """Return one colour per label, suitable for every kind of colour vision up to seven labels."""
    if len(labels) <= len(_OKABE_ITO):
        return dict(zip(labels, _OKABE_ITO, strict=False))
    wheel = matplotlib.colormaps["turbo"](np.linspace(0.05, 0.95, len(labels)))
    return {name: matplotlib.colors.to_hex(colour) for name, colour in zip(labels, wheel, strict=True)}


def _draw(
    axes: Axes, scan: WindowedScan, view: SliceView, label: npt.NDArray[np.uint8] | None, colours: Sequence[str]
) -> None:
    width, height = view.size_mm
    extent = (0.0, width, 0.0, height)
    axes.imshow(
        view.cut(scan.image), cmap="gray", vmin=scan.window[0], vmax=scan.window[1], origin="lower", extent=extent,
        interpolation="bicubic",
    )  # fmt: skip
    if label is not None:
        flat = view.cut(label)
        for value, colour in enumerate(colours, start=1):
            mask = (flat == value).astype(np.float32)
            if mask.any():
                padded = np.pad(mask, 1)  # closes outlines at the border of the scan
                rows, columns = mask.shape
                x = (np.arange(columns + 2) - 0.5) * width / columns
                y = (np.arange(rows + 2) - 0.5) * height / rows
                axes.contourf(x, y, padded, levels=[0.5, 2], colors=[colour], alpha=0.38)
                axes.contour(x, y, padded, levels=[0.5], colors=[colour], linewidths=1.3)
    axes.set_xlim(0, width)
    axes.set_ylim(0, height)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_facecolor("black")
    for spine in axes.spines.values():
        spine.set_visible(False)


def _orient(axes: Axes, scan: WindowedScan, view: SliceView) -> None:
    """Draw the patient's directions at the edges of a slice, a scale bar, and the plane's name."""
    width, height = view.size_mm
    outlined = [patheffects.withStroke(linewidth=2.2, foreground="black")]
    places = (
        (0.015, 0.5, "left", "center"),
        (0.985, 0.5, "right", "center"),
        (0.5, 0.015, "center", "bottom"),
        (0.5, 0.985, "center", "top"),
    )
    for letter, (x, y, across, up) in zip(view.letters, places, strict=True):
        axes.text(
            x, y, letter, color="white", fontsize=10, fontweight="bold", ha=across, va=up, transform=axes.transAxes,
            path_effects=outlined, gid="direction",
        )  # fmt: skip
    length = scale_bar_mm(width)
    right, bottom = width * 0.975, 0.03 * height
    bar = [patheffects.withStroke(linewidth=4.4, foreground="black")]
    axes.plot(
        [right - length, right], [bottom, bottom], color="white", linewidth=2.6, solid_capstyle="butt",
        path_effects=bar, gid="scale",
    )  # fmt: skip
    axes.annotate(
        f"{length:g} mm", (right - length / 2, bottom), xytext=(0, 4), textcoords="offset points", color="white",
        fontsize=8, ha="center", va="bottom", path_effects=outlined,
    )  # fmt: skip
    oblique = f"\noblique by {scan.oblique_deg:.0f}°:\nnearest directions" if scan.oblique_deg >= _OBLIQUE_DEG else ""
    axes.text(
        0.015, 0.015, view.plane + oblique, color="white", fontsize=8, va="bottom", transform=axes.transAxes,
        path_effects=outlined,
    )  # fmt: skip


def _legend_handles(labels: Sequence[str]) -> list[Line2D]:
    return [
        Line2D([], [], marker="s", linestyle="", markersize=9, color=colour, label=name.replace("_", " "))
        for name, colour in label_colours(labels).items()
    ]


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    figure.savefig(partial, format="png", facecolor=_PAPER)
    os.replace(partial, path)
    return path


def _draw_grid(
    figure: Figure,
    place: SubplotSpec | None,
    scan: WindowedScan,
    columns: Sequence[tuple[str, npt.NDArray[np.uint8] | None]],
    views: Sequence[SliceView],
    colours: Sequence[str],
) -> None:
    heights = [view.size_mm[1] for view in views]
    shape = {"height_ratios": heights, "wspace": 0.02, "hspace": 0.02}
    grid = (
        figure.add_gridspec(len(views), len(columns), left=0.01, right=0.99, **shape)
        if place is None
        else place.subgridspec(len(views), len(columns), **shape)
    )
    for row, view in enumerate(views):
        for column, (title, label) in enumerate(columns):
            axes = figure.add_subplot(grid[row, column])
            _draw(axes, scan, view, label, colours)
            axes.set_anchor("N")  # directly below its title
            if row == 0:
                axes.set_title(title, fontsize=10.5, linespacing=1.35, pad=6)
            if column == 0:
                _orient(axes, scan, view)


def save_comparison(
    path: Path,
    scan: WindowedScan,
    truth: npt.NDArray[np.uint8],
    prediction: npt.NDArray[np.uint8],
    labels: Sequence[str],
    *,
    title: str,
    dice: Mapping[str, float],
) -> Path:
    """Write a PNG of image, truth and prediction side by side, (X, Y, Z) in RAS axes, in slices of the finest plane."""
    views = best_views(truth, scan.spacing_mm, 2, shown=[prediction])
    columns = [("image", None), ("truth", truth), ("prediction (DeformUX-Net)", prediction)]
    width_mm = max(view.size_mm[0] for view in views)
    height_mm = sum(view.size_mm[1] for view in views)
    width = 10.5
    grid_height = width / 3 * height_mm / width_mm
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, grid_height + 1.2), dpi=110)
        top, bottom = 1 - 0.72 / (grid_height + 1.2), 0.5 / (grid_height + 1.2)
        _draw_grid(figure, None, scan, columns, views, list(label_colours(labels).values()))
        figure.subplots_adjust(top=top, bottom=bottom)
        figure.suptitle(title, fontsize=12.5, fontweight="bold", x=0.5, y=1 - 0.14 / (grid_height + 1.2), va="top")
        handles = _legend_handles(labels)
        for handle, name in zip(handles, labels, strict=True):
            score = dice.get(name, float("nan"))
            handle.set_label(f"{handle.get_label()}  {'–' if np.isnan(score) else f'{score:.3f}'}")
        figure.legend(
            handles=handles, loc="lower center", ncols=min(len(labels), 6), frameon=False, fontsize=10,
            title=None, bbox_to_anchor=(0.5, 0.0), handletextpad=0.3, columnspacing=1.8,
        )  # fmt: skip
        return _save(figure, path)


def _draw_curve(axes: Axes, rounds: Sequence[DemoRound], labels: Sequence[str]) -> None:
    x = [r.labelled for r in rounds]
    for name, colour in label_colours(labels).items():
        axes.plot(x, [r.dice[name] for r in rounds], color=colour, linewidth=1.6, marker="o", markersize=4)
    mean = [r.mean_dice for r in rounds]
    axes.plot(x, mean, color=_INK, linewidth=2.6, marker="o", markersize=6, label="mean, unlabelled volumes")
    for labelled, value in zip(x, mean, strict=True):
        axes.annotate(
            f"{value:.3f}", (labelled, value), xytext=(0, -15), textcoords="offset points", ha="center", fontsize=9,
            fontweight="bold", bbox={"facecolor": _PAPER, "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
        )  # fmt: skip
    held_out = [r.held_out_dice for r in rounds if r.held_out_dice is not None]
    if len(held_out) == len(rounds):
        axes.plot(x, held_out, color=_INK, linewidth=1.6, linestyle="--", marker="s", label="mean, held-out volumes")
    values = [v for r in rounds for v in (*r.dice.values(), r.mean_dice) if not np.isnan(v)]
    axes.set_ylim(max(0.0, np.floor((min(values, default=0.0) - 0.06) * 10) / 10), 1.0)
    axes.set_xticks(x)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 3, 5, 10])) if len(x) > 8 else None
    pad = 0.08 * max(1, x[-1] - x[0])
    axes.set_xlim(x[0] - pad, x[-1] + pad)
    axes.set_xlabel("labelled volumes")
    axes.set_ylabel("Dice on volumes never seen in training")
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    handles = [*axes.get_legend_handles_labels()[0], *_legend_handles(labels)]
    axes.legend(handles=handles, loc="lower right", frameon=True, framealpha=0.9, edgecolor="none", fontsize=8.5)


def save_learning_curve(path: Path, rounds: Sequence[DemoRound], labels: Sequence[str], *, title: str) -> Path:
    """Write a PNG with the Dice on unlabelled volumes, mean and per label, over the number of labelled volumes."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 4.6), dpi=110, layout="constrained")
        axes = figure.add_subplot()
        _draw_curve(axes, rounds, labels)
        axes.set_title(title, fontsize=12, fontweight="bold")
        return _save(figure, path)


def save_montage(
    path: Path,
    scan: WindowedScan,
    columns: Sequence[tuple[str, npt.NDArray[np.uint8] | None]],
    truth: npt.NDArray[np.uint8],
    rounds: Sequence[DemoRound],
    labels: Sequence[str],
    *,
    title: str,
) -> Path:
    """Write one wide PNG: a volume in `columns` (title, and a label or None), and the learning curve."""
    shown = [label for _, label in columns if label is not None]
    views = best_views(truth, scan.spacing_mm, 1, shown=shown)
    width_mm = max(view.size_mm[0] for view in views)
    height_mm = sum(view.size_mm[1] for view in views)
    column = 2.75
    curve = 4.3
    width = column * len(columns) + curve + 0.9
    height = max(3.6, column * height_mm / width_mm) + 1.25
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width, height), dpi=110)
        outer = figure.add_gridspec(
            1, 2, width_ratios=[column * len(columns), curve], left=0.008, right=0.99, wspace=0.11,
            top=1 - 1.05 / height, bottom=0.16 / height,
        )  # fmt: skip
        _draw_grid(figure, outer[0], scan, columns, views, list(label_colours(labels).values()))
        lower = outer[1].subgridspec(2, 1, height_ratios=[1, 0.12], hspace=0)
        _draw_curve(figure.add_subplot(lower[0]), rounds, labels)
        figure.text(0.5, 1 - 0.14 / height, title, fontsize=13, fontweight="bold", ha="center", va="top")
        return _save(figure, path)
