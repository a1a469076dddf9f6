"""Who may import whom (the design's import rules), read from the source and checked in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {"deform3d": "ops/deform3d", "deformux": "training/deformux", "deformux_label": "apps/deformux_label"}


def imports_of(file: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def files_of(repository: Path, package: str) -> list[Path]:
    files = sorted((repository / PACKAGES[package]).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize(
    ("package", "forbidden"),
    [
        ("deform3d", {"monai", "monailabel", "deformux", "deformux_label", "ignite", "tests", "benchmarks"}),
        ("deformux", {"monailabel", "deformux_label", "lib", "tests", "benchmarks"}),
        ("deformux_label", {"cupy", "numba", "tests", "benchmarks"}),
    ],
)
def test_imports_run_downward(repository: Path, package: str, forbidden: set[str]) -> None:
    upward = {f.name: imports_of(f) & forbidden for f in files_of(repository, package) if imports_of(f) & forbidden}
    assert upward == {}


def test_only_one_file_imports_cupy_and_only_the_cpu_backend_numba(repository: Path) -> None:
    for file in files_of(repository, "deform3d"):
        names = imports_of(file)
        assert "cupy" not in names or file.name == "cuda.py"
        assert not {"numba", "llvmlite"} & names or file.name == "cpu.py" or file.name.startswith("_cpu_")


def test_nothing_imports_the_app_by_another_name(repository: Path) -> None:
    """A module that is imported as ``lib.x`` and as ``deformux_label.lib.x`` exists twice."""
    for package in PACKAGES:
        for file in files_of(repository, package):
            assert "lib" not in imports_of(file), file


def test_the_network_imports_no_training_code(repository: Path) -> None:
    network = {"deformux_net", "blocks", "guided_layers", "presets", "fast_cpu_conv"}
    for name in network:
        tree = ast.parse((repository / f"training/deformux/networks/{name}.py").read_text())
        modules = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
        own = {module for module in modules if module.startswith("deformux")}
        assert own <= {f"deformux.networks.{other}" for other in network}


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import deform3d", ["numba", "cupy", "monai"]),
        ("import deformux.networks.deformux_net", ["numba", "cupy", "monailabel"]),
        ("import deformux", ["torch", "monai", "numpy"]),
        ("from deformux import Preprocessing, Recipe", ["torch", "monai"]),
        ("import deformux.cli.main", ["torch", "monai", "scipy", "matplotlib", "monailabel"]),
    ],
)
def test_importing_is_light(statement: str, absent: list[str]) -> None:
    code = f"import sys; {statement}; print([name for name in {absent!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
