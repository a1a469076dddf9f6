"""The examples in docstrings run and print what they say."""

import doctest
import importlib
from pathlib import Path

import pytest

DOCUMENTED = [
    "deform3d.deform_conv3d",
    "deform3d.DeformConv3d",
    "deformux.networks.deformux_net.DeformUXNet",
    "deformux.fitting.fit.fit",
    "deformux.inference.sliding_window.segment",
]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_examples_print_what_they_say(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module, _, attribute = name.rpartition(".")
    documented = getattr(importlib.import_module(module), attribute)
    # No globals: an example imports what it uses, as its reader must.
    (test,) = doctest.DocTestFinder(recurse=False, exclude_empty=False).find(documented, name, module=False, globs={})
    assert test.examples, f"{name} has no example"
    monkeypatch.chdir(tmp_path)  # for examples that write files
    report: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not runner.run(test, out=report.append).failed, "".join(report)
