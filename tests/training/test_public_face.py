"""Names that ``from deformux import …`` offers."""

import subprocess
import sys

import pytest

import deformux


@pytest.mark.parametrize("name", deformux.__all__)
def test_every_public_name_is_there(name: str) -> None:
    assert getattr(deformux, name).__name__ == name if name != "__version__" else deformux.__version__.count(".") == 2
    assert name in dir(deformux)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'deformux' has no attribute 'fitt'"):
        deformux.fitt  # noqa: B018


def test_a_name_stays_what_it_is_after_its_subpackage_is_imported() -> None:
    """``deformux.fit`` is the function, whatever is imported before it."""
    code = "import deformux.fitting.fit, deformux.inference.evaluate, deformux; print(deformux.fit, deformux.evaluate)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.count("<function ") == 2


def test_what_monai_does_is_silent_from_the_first_name_on() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from deformux import fit"], capture_output=True, text=True, check=True
    )
    assert done.stderr == ""
