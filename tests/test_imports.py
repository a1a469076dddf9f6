"""The import rules between packages, read from the source and checked in fresh processes."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = {"deform3d": "ops/deform3d", "deformux": "training/deformux", "deformux_label": "apps/deformux_label"}

# The parts of a package (subpackages, and modules beside them), and which others each may import. The package's own
# ``__init__`` may import all.
TRAINING_PARTS: dict[str, set[str]] = {
    "data": set(),  # files and arrays: no network
    "networks": {"data"},  # a model's card says how its input is preprocessed
    "inference": {"data", "networks"},  # a whole volume through a network
    "interactive": {"data", "networks", "inference"},  # clicks start from an automatic segmentation
    "fitting": {"data", "networks", "inference", "interactive"},  # trains on simulated clicks, validates whole volumes
    "active_learning": {"data", "networks", "inference", "fitting"},  # simulations train a model each round
    "publishing": {"data", "networks", "inference", "fitting"},  # trains, compares and writes versions
    "cli": {"data", "networks", "inference", "interactive", "fitting", "active_learning", "publishing"},
}
APP_PARTS: dict[str, set[str]] = {
    "lib.configs": set(),  # options of the command line: no request, no file of the studies
    "lib.requests": {"lib.configs"},  # what a client sends, checked without looking at the studies
    "lib.background": {"lib.requests"},  # processes, whatever they run, on the GPUs that a request chooses
    "lib.store": {"lib.configs", "lib.requests"},  # keeps what was checked, for the caller that requests know
    "lib.infers": {"lib.configs", "lib.requests", "lib.background", "lib.store"},  # answers requests, stores results
    "lib.scoring": {"lib.configs", "lib.store"},  # compares labels as the store hands them to training
    "lib.activelearning": {"lib.configs", "lib.requests", "lib.store", "lib.infers"},  # the served model scores volumes
    "lib.trainers": {"lib.configs", "lib.requests", "lib.background", "lib.store", "lib.infers"},  # replaces the model
    "web": {  # translates HTTP for all of lib
        *("lib.configs", "lib.requests", "lib.background", "lib.store", "lib.infers", "lib.scoring"),
        *("lib.activelearning", "lib.trainers"),
    },
    "app": {  # connects the parts
        *("lib.configs", "lib.requests", "lib.background", "lib.store", "lib.infers", "lib.scoring"),
        *("lib.activelearning", "lib.trainers", "web"),
    },
    "main": {"app"},  # the file that MONAI Label loads by path
    "server": {"web"},  # the name for --uvicorn_app
    "cli": {"lib.configs", "lib.requests", "lib.store", "web"},  # changes studies, users and options without the app
    "demo": {"lib.configs", "cli"},  # starts the command, and talks HTTP
}


def imports_of(file: Path) -> set[str]:
    """Top-level names of every import in a file, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.partition(".")[0])
    return names


def modules_of(file: Path, package: str) -> set[str]:
    """Full names of everything of its own package that a file imports, those inside functions included."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file} imports relatively"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.partition(".")[0] == package and not name.startswith(f"{package}.__")}


def part_of(module: str) -> str:
    """Return the part of a module, such as ``lib.store`` for ``deformux_label.lib.store.trash``."""
    parts = module.split(".")[1:]
    return ".".join(parts[: 2 if parts[0] == "lib" else 1])


def arrows_of(repository: Path, package: str) -> dict[str, dict[str, set[str]]]:
    """Return which parts of a package each of its parts imports, with the files that do."""
    root = repository / PACKAGES[package]
    arrows: dict[str, dict[str, set[str]]] = {}
    for file in files_of(repository, package):
        path = file.relative_to(root.parent).with_suffix("")
        if file.name == "__init__.py" and file.parent in (root, root / "lib"):
            continue
        part = part_of(".".join(path.parts))
        found = arrows.setdefault(part, {})
        for other in map(part_of, modules_of(file, package)):
            if other != part:
                found.setdefault(other, set()).add(str(path))
    return arrows


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


@pytest.mark.parametrize(("package", "allowed"), [("deformux", TRAINING_PARTS), ("deformux_label", APP_PARTS)])
def test_parts_import_only_what_the_table_allows(repository: Path, package: str, allowed: dict[str, set[str]]) -> None:
    arrows = arrows_of(repository, package)
    assert arrows.keys() == allowed.keys(), "each part has a line in the table"
    refused = {
        (part, other): sorted(files)
        for part, others in arrows.items()
        for other, files in others.items()
        if other not in allowed[part]
    }
    assert refused == {}


def test_the_tables_have_no_cycle() -> None:
    for parts in (TRAINING_PARTS, APP_PARTS):
        left = dict(parts)
        while left:
            bottom = {part for part, others in left.items() if not others & left.keys()}
            assert bottom, f"these parts import each other: {sorted(left)}"
            left = {part: others for part, others in left.items() if part not in bottom}


def test_only_one_file_imports_cupy_and_only_the_cpu_backend_numba(repository: Path) -> None:
    for file in files_of(repository, "deform3d"):
        names = imports_of(file)
        assert "cupy" not in names or file.name == "cuda.py"
        assert not {"numba", "llvmlite"} & names or file.name == "cpu.py" or file.name.startswith("_cpu_")


def test_the_network_and_the_app_use_numba_in_one_file(repository: Path) -> None:
    """Everything else works, more slowly, where an installed Numba is broken."""
    files = [file for package in ("deformux", "deformux_label") for file in files_of(repository, package)]
    assert [file.name for file in files if "numba" in imports_of(file)] == ["label_interpolation.py"]
    assert not [file for file in files if "from deformux.data.label_interpolation" in file.read_text()]


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
