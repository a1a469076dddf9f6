"""Geometry of the demo's pictures: millimetres, directions and planes, measured in what is drawn."""

from __future__ import annotations

from pathlib import Path

import matplotlib.colors
import matplotlib.image
import nibabel as nib
import numpy as np
import numpy.typing as npt
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import ndimage
from scipy.spatial.transform import Rotation

from deformux_label.demo import figures
from deformux_label.demo.slices import best_views, scale_bar_mm

DPI = 110


def write(folder: Path, label: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> tuple[Path, Path]:
    """Write a label and a scan of noise around it."""
    noise = np.random.default_rng(0).normal(100, 10, label.shape).astype(np.float32)
    paths = folder / "image.nii.gz", folder / "label.nii.gz"
    for path, values in zip(paths, (noise + 50 * label, label), strict=True):
        nib.save(nib.Nifti1Image(values, affine), path)
    return paths


def draw(folder: Path, label: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64]) -> Path:
    image, path = write(folder, label, affine)
    scan, truth = figures.read_scan(image, modality="mr"), figures.read_label(path)
    return figures.save_comparison(folder / "picture.png", scan, truth, truth, ["ball"], title="T", dice={})


def extents(picture: Path) -> list[tuple[float, float]]:
    """Return width and height, in inches, of the outlined areas in the column of the truth."""
    pixels = matplotlib.image.imread(picture)[..., :3]
    width = pixels.shape[1]
    colour = np.array(matplotlib.colors.to_rgb(figures.label_colours(["ball"])["ball"]))
    outline = (np.abs(pixels - colour).max(-1) < 0.12)[:, width // 3 : 2 * width // 3]
    outline[int(pixels.shape[0] - 0.55 * DPI) :] = False  # the legend
    areas = ndimage.find_objects(ndimage.label(outline, np.ones((3, 3)))[0])
    found = [(s[1].stop - s[1].start, s[0].stop - s[0].start) for s in areas]
    return [(across / DPI, up / DPI) for across, up in found if min(across, up) > 20]


def sphere(size: tuple[int, int, int], spacing: tuple[float, float, float], radius_mm: float) -> npt.NDArray[np.uint8]:
    grid = np.stack(np.meshgrid(*map(np.arange, size), indexing="ij"), -1)
    centre = (np.array(size) - 1) / 2
    return (np.linalg.norm((grid - centre) * spacing, axis=-1) <= radius_mm).astype(np.uint8)


@pytest.mark.parametrize(
    ("size", "spacing", "plane"),
    [
        ((120, 120, 20), (1.0, 1.0, 8.0), "axial"),
        ((120, 20, 60), (1.0, 8.0, 2.0), "coronal"),
        ((24, 160, 80), (6.0, 0.8, 1.6), "sagittal"),
        ((80, 80, 80), (1.0, 1.0, 1.0), "axial"),
    ],
)
def test_a_sphere_is_drawn_as_a_circle(
    size: tuple[int, int, int], spacing: tuple[float, float, float], plane: str, tmp_path: Path
) -> None:
    label = sphere(size, spacing, 25.0)
    found = extents(draw(tmp_path, label, np.diag([*spacing, 1.0])))
    assert found
    for across, up in found:
        assert across == pytest.approx(up, abs=0.09)  # a voxel of 1.6 mm, drawn
    first = best_views(label, spacing, 2)[0]
    assert first.plane == plane
    areas = label.sum(axis=tuple(axis for axis in range(3) if axis != first.axis))
    assert any(areas[view.index] == areas.max() for view in best_views(label, spacing, 2) if view.plane == plane)


def test_the_scale_bar_has_the_length_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (axes, *_), _ = drawn(tmp_path, sphere((100, 100, 20), (1, 1, 5), 30.0), np.diag([1.0, 1, 5, 1]), monkeypatch)
    (bar,) = [line for line in axes.lines if line.get_gid() == "scale"]
    ends = axes.transData.transform(bar.get_xydata())
    (text,) = [text.get_text() for text in axes.texts if text.get_text().endswith(" mm")]
    # A ball of 60 mm, as large as it is drawn.
    outline = extents(draw(tmp_path, sphere((100, 100, 20), (1, 1, 5), 30.0), np.diag([1.0, 1, 5, 1])))
    widest = max(across for across, _ in outline)
    assert (ends[1, 0] - ends[0, 0]) / DPI == pytest.approx(float(text.removesuffix(" mm")) / 61 * widest, rel=0.04)


@pytest.mark.parametrize(("width", "length"), [(100, 20), (170, 50), (16, 2), (1.6, 0.2), (334, 100)])
def test_scale_bars_have_round_lengths(width: float, length: float) -> None:
    assert scale_bar_mm(width) == pytest.approx(length)


def drawn(
    folder: Path, label: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], monkeypatch: pytest.MonkeyPatch
) -> tuple[list[Axes], Path]:
    """Return the axes of the figure of a scan, and the picture."""
    kept: list[Figure] = []
    real = figures._save

    def save(figure: Figure, path: Path) -> Path:
        kept.append(figure)
        return real(figure, path)

    monkeypatch.setattr(figures, "_save", save)
    picture = draw(folder, label, affine)
    return kept[-1].axes, picture


def directions(axes: Axes) -> dict[str, str]:
    """Return the letters at the edges of a slice, by edge."""
    found = {}
    for text in axes.texts:
        if text.get_gid() == "direction":
            x, y = text.get_position()
            found["left" if x < 0.3 else "right" if x > 0.7 else "bottom" if y < 0.5 else "top"] = text.get_text()
    return found


ANGLED = Rotation.from_euler("xyz", [24, -31, 17], degrees=True).as_matrix()
ORIENTATIONS = {
    "RAS": np.eye(3),
    "LPS": np.diag([-1.0, -1, 1]),
    "permuted": np.array([[0.0, 0, 1], [-1, 0, 0], [0, -1, 0]]),
    "oblique": ANGLED @ np.array([[0.0, -1, 0], [0, 0, -1], [1, 0, 0]]),
    "left-handed": ANGLED.T @ np.diag([-1.0, 1, 1]),
    "oblique short axis": Rotation.from_euler("zx", [38, 49], degrees=True).as_matrix(),
}


@pytest.mark.parametrize("name", ORIENTATIONS)
@pytest.mark.parametrize("thick", [0, 1, 2])
def test_letters_say_where_the_patient_lies(
    name: str, thick: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ball at the far end of an axis of the file is drawn at the edge with the letter that nibabel gives that end."""
    spacing = np.ones(3)
    spacing[thick] = 5.0
    affine = np.eye(4)
    affine[:3, :3] = ORIENTATIONS[name] * spacing
    codes = nib.aff2axcodes(affine)
    size = np.where(spacing > 1, 16, 80)
    for axis in {0, 1, 2} - {thick}:
        corner = np.array([size[a] // 2 for a in range(3)])
        corner[axis] = size[axis] - 8
        label = np.zeros(size, np.uint8)
        label[
            tuple(slice(c - (2 if a == thick else 6), c + (2 if a == thick else 6)) for a, c in enumerate(corner))
        ] = 1
        label[tuple(slice(n // 2 - 1, n // 2 + 1) for n in size)] = 2
        image, path = write(tmp_path, label, affine)
        scan, truth = figures.read_scan(image, modality="mr"), figures.read_label(path)
        kept: list[Figure] = []
        monkeypatch.setattr(figures, "_save", lambda figure, path, kept=kept: kept.append(figure))
        figures.save_comparison(tmp_path / "p.png", scan, truth, truth, ["ball", "middle"], title="T", dice={})
        axes = kept[-1].axes[0]
        letters = directions(axes)
        assert set(letters.values()) == {c for a in {0, 1, 2} - {thick} for c in (codes[a], OPPOSITE[codes[a]])}
        view = best_views(truth, scan.spacing_mm, 2)[0]
        rows, columns = np.nonzero(view.cut(truth) == 1)
        middle = np.argwhere(view.cut(truth) == 2).mean(0)
        shift = np.array([rows.mean(), columns.mean()]) - middle
        if abs(shift[0]) > abs(shift[1]):
            edge = "top" if shift[0] > 0 else "bottom"  # drawn with the first row lowest
        else:
            edge = "right" if shift[1] > 0 else "left"
        assert letters[edge] == codes[axis]
        said = " ".join(text.get_text() for text in axes.texts)
        assert ("nearest directions" in said) == (name in ("oblique", "left-handed", "oblique short axis"))


OPPOSITE = dict(zip("RLAPSI", "LRPAIS", strict=True))


def test_the_patients_right_is_on_the_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The radiological convention, in each plane."""
    expected = {
        0: {"left": "A", "right": "P", "top": "S", "bottom": "I"},
        1: {"left": "R", "right": "L", "top": "S", "bottom": "I"},
        2: {"left": "R", "right": "L", "top": "A", "bottom": "P"},
    }
    for thick, edges in expected.items():
        spacing = [1.0, 1.0, 1.0]
        spacing[thick] = 4.0
        (axes, *_), _ = drawn(tmp_path, sphere((40, 40, 40), (1, 1, 1), 9.0), np.diag([*spacing, 1.0]), monkeypatch)
        assert directions(axes) == edges


@pytest.mark.parametrize(
    ("folder", "plane"),
    [("heart_mr_acdc", "axial"), ("spine_mr", "sagittal"), ("abdomen_mr", "axial"), ("hippocampus", "axial")],
)
def test_real_scans_are_shown_in_their_finest_plane(folder: str, plane: str, shared_data: Path) -> None:
    image = min((shared_data / folder / "images").glob("*.nii.gz"), default=None)
    if image is None:
        pytest.skip(f"{folder} is not at ../shared/data")
    scan = figures.read_scan(image, modality="mr")
    truth = figures.read_label(shared_data / folder / "labels" / image.name)
    views = best_views(truth, scan.spacing_mm, 2)
    assert views[0].plane == plane
    for view in views:
        across_mm, up_mm = view.size_mm
        rows, columns = view.cut(truth).shape
        pixel = sorted((across_mm / columns, up_mm / rows))
        assert pixel == pytest.approx(sorted(nib.load(image).header.get_zooms()[:3])[:2], rel=1e-4)
