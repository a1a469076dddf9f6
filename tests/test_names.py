"""One word, one thing: no public name is defined by two modules."""

import ast
from collections import defaultdict
from pathlib import Path

ROOTS = ("ops/deform3d", "training/deformux", "apps/deformux_label")
# Every module has its own logger, every command line its app.
ONE_IN_EACH_MODULE = {"app", "log", "logger"}
# The backends of the operator implement one interface.
BACKENDS = {
    "ops/deform3d/_cpu_forward.py",
    "ops/deform3d/_launch/backward.py",
    "ops/deform3d/_launch/forward.py",
    "ops/deform3d/cpu.py",
    "ops/deform3d/cuda.py",
    "ops/deform3d/reference.py",
}


def defined(module: ast.Module) -> set[str]:
    """Return the names that a module defines at its top level, imports excluded."""
    names: set[str] = set()
    for node in module.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return {name for name in names if not name.startswith("_")}


def test_no_public_name_is_defined_twice(repository: Path) -> None:
    modules = defaultdict(set)
    for root in ROOTS:
        for file in (repository / root).rglob("*.py"):
            for name in defined(ast.parse(file.read_text())) - ONE_IN_EACH_MODULE:
                modules[name].add(str(file.relative_to(repository)))
    assert {name: sorted(files) for name, files in modules.items() if len(files) > 1 and not files <= BACKENDS} == {}


def test_to_dict_gives_a_dict(repository: Path) -> None:
    """``to_json`` is for text."""
    for root in ROOTS:
        for file in (repository / root).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.FunctionDef) and node.name == "to_json":
                    assert node.returns is not None
                    assert ast.unparse(node.returns) == "str", f"{file}: to_json returns {ast.unparse(node.returns)}"
