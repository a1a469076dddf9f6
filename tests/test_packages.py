"""The two wheels: their files, their requirements, and the types that their users see."""

import os
import subprocess
import sys
from importlib.metadata import PathDistribution
from pathlib import Path
from zipfile import Path as ZipPath
from zipfile import ZipFile

import pytest
from packaging.requirements import Requirement

PROJECTS = {"deform3d": "ops", "deformux_label": "."}


@pytest.fixture(scope="module")
def wheels(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Build both wheels; no index is asked."""
    folder = tmp_path_factory.mktemp("wheels")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    for project in PROJECTS.values():
        subprocess.run(command, cwd=repository / project, check=True, capture_output=True, text=True)
    built = {file.name.partition("-")[0]: file for file in folder.glob("*.whl")}
    assert built.keys() == PROJECTS.keys()
    return built


def files_of(wheel: Path) -> set[str]:
    with ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def distribution_of(wheel: Path) -> PathDistribution:
    (metadata,) = (folder for folder in ZipPath(wheel).iterdir() if folder.name.endswith(".dist-info"))
    return PathDistribution(metadata)


def needed(wheel: Path, extra: str = "") -> dict[str, Requirement]:
    """Return what a wheel requires, by name."""
    requirements = [Requirement(text) for text in distribution_of(wheel).requires or ()]
    return {r.name: r for r in requirements if r.marker is None or r.marker.evaluate({"extra": extra})}


@pytest.mark.parametrize(
    ("wheel", "package"),
    [("deform3d", "deform3d"), ("deformux_label", "deformux"), ("deformux_label", "deformux_label")],
)
def test_packages_are_whole_and_typed(wheels: dict[str, Path], repository: Path, wheel: str, package: str) -> None:
    folder = repository / {"deform3d": "ops", "deformux": "training", "deformux_label": "apps"}[package]
    sources = [file for suffix in ("py", "cu", "typed") for file in (folder / package).rglob(f"*.{suffix}")]
    assert folder / package / "py.typed" in sources
    assert {file.relative_to(folder).as_posix() for file in sources} <= files_of(wheels[wheel])


def test_no_file_belongs_to_two_wheels(wheels: dict[str, Path]) -> None:
    assert not files_of(wheels["deform3d"]) & files_of(wheels["deformux_label"])


def test_deform3d_is_light(wheels: dict[str, Path]) -> None:
    wheel = wheels["deform3d"]
    assert {Path(name).suffix for name in files_of(wheel)} == {".py", ".cu", ".typed"}
    assert {name.partition("/")[0] for name in files_of(wheel)} == {"deform3d"}
    assert wheel.stat().st_size < 150_000
    assert not distribution_of(wheel).entry_points
    assert needed(wheel).keys() == {"torch", "numpy", "numba"}
    assert needed(wheel, "cuda12").keys() - needed(wheel).keys() == {"cupy-cuda12x"}
    assert needed(wheel, "cuda13").keys() - needed(wheel).keys() == {"cupy-cuda13x"}


def test_only_our_deform3d_satisfies_the_main_project(wheels: dict[str, Path]) -> None:
    """Public indexes refuse versions with a local part: nobody can publish a ``deform3d`` that pip would take."""
    version = distribution_of(wheels["deform3d"]).version
    assert "+" in version
    assert str(needed(wheels["deformux_label"])["deform3d"].specifier) == f"=={version}"


def test_both_wheels_hold_the_license(wheels: dict[str, Path], repository: Path) -> None:
    for wheel in wheels.values():
        assert distribution_of(wheel).read_text("licenses/LICENSE") == (repository / "LICENSE").read_text()


def test_the_wheel_of_deform3d_runs_alone(wheels: dict[str, Path], tmp_path: Path) -> None:
    with ZipFile(wheels["deform3d"]) as archive:
        archive.extractall(tmp_path)
    script = (
        "import deform3d, torch; from deform3d import _launch\n"
        "tensors = torch.ones(1, 1, 2, 2, 2), torch.zeros(1, 3, 2, 2, 2), torch.ones(1, 1, 1, 1, 1)\n"
        "print(deform3d.deform_conv3d(*tensors, backend='reference').sum().item())\n"
        "print(all(_launch.source(kernel.unit) for kernel in _launch.all_kernels()))\n"
        "print(deform3d.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == ["8.0", "True", str(tmp_path / "deform3d" / "__init__.py")]


USER_SCRIPT = """\
import torch
from deform3d import DeformConv3d, deform_conv3d
from deformux.networks.deformux_net import DeformUXNet
from deformux_label.app import DeformUXLabel

volume, offset = torch.zeros(1, 4, 5, 5, 5), torch.zeros(1, 81, 3, 3, 3)
reveal_type(deform_conv3d(volume, offset, torch.zeros(4, 1, 3, 3, 3)))
reveal_type(DeformConv3d(4, 4, 3).forward(volume, offset))
reveal_type(DeformUXNet(1, 2).forward(volume))
reveal_type(DeformUXLabel("app", "studies", {}))
"""


def test_users_see_types(wheels: dict[str, Path], tmp_path: Path, pytestconfig: pytest.Config) -> None:
    """mypy takes the types of an installed package only if it holds ``py.typed``."""
    installed, script = tmp_path / "installed", tmp_path / "script.py"
    for wheel in wheels.values():
        with ZipFile(wheel) as archive:
            archive.extractall(installed)
    script.write_text(USER_SCRIPT)
    assert pytestconfig.cache is not None
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", pytestconfig.cache.mkdir("mypy"), script.name],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
        check=False,
    )
    revealed = [line.partition("Revealed type is ")[2] for line in done.stdout.splitlines() if "Revealed" in line]
    assert revealed == [*['"torch._tensor.Tensor"'] * 3, '"deformux_label.app.DeformUXLabel"'], done.stdout
    assert done.returncode == 0, done.stdout
