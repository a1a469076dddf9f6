"""Small volumes for the training tests."""

from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from deformux.data.cases import Case

WriteCase = Callable[..., Case]


@pytest.fixture
def write_case(tmp_path: Path) -> WriteCase:
    """Return a function that writes a noisy CT-like volume with a bright ball (label 1) and a dark box (label 2)."""

    def write(name: str, *, seed: int = 0, size: tuple[int, int, int] = (32, 32, 24), affine=None) -> Case:
        rng = np.random.default_rng(seed)
        grid = np.stack(np.meshgrid(*[np.arange(n) for n in size], indexing="ij"))
        centre = np.array(size) * rng.uniform(0.25, 0.4, 3)
        ball = ((grid - centre[:, None, None, None]) ** 2).sum(0) < 36
        corner = (np.array(size) * 0.6).astype(int)
        box = np.all((grid >= corner[:, None, None, None]) & (grid < corner[:, None, None, None] + 7), axis=0)
        label = np.where(ball, 1, np.where(box, 2, 0)).astype(np.uint8)
        hu = 20 + 120 * ball - 120 * box + rng.normal(0, 10, size)
        affine = np.diag([2.0, 2.0, 3.0, 1.0]) if affine is None else affine
        folders = [tmp_path / "images", tmp_path / "labels"]
        for folder in folders:
            folder.mkdir(exist_ok=True)
        image_path, label_path = (folder / f"{name}.nii.gz" for folder in folders)
        nib.save(nib.Nifti1Image(hu.astype(np.float32), affine), image_path)
        nib.save(nib.Nifti1Image(label, affine), label_path)
        return Case(name, image_path, label_path)

    return write


@pytest.fixture
def oblique() -> np.ndarray:
    """Return an affine with rotation about two axes, anisotropic spacing, flips and permuted axes."""
    a, b = np.deg2rad([17, -9])
    rx = np.array([[1, 0, 0], [0, np.cos(a), -np.sin(a)], [0, np.sin(a), np.cos(a)]])
    rz = np.array([[np.cos(b), -np.sin(b), 0], [np.sin(b), np.cos(b), 0], [0, 0, 1]])
    permuted = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]])
    affine = np.eye(4)
    affine[:3, :3] = rx @ rz @ permuted @ np.diag([1.1, 2.3, 3.7])
    affine[:3, 3] = [-31.5, 12.25, 104.0]
    return affine
