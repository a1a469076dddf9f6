"""The locator of a model file, as commands use it."""

from __future__ import annotations

from pathlib import Path

from deformux.cli.common import print_sentences
from deformux.inference.locate import Locator
from deformux.inference.locator_file import load_locator
from deformux.networks.model_file import InvalidModel, ModelCard

__all__ = ["locator_beside"]


def locator_beside(model: Path, card: ModelCard, *, device: str) -> Locator | None:
    """Return the locator of a model; None, and a printed sentence, if its file is missing or damaged."""
    try:
        return load_locator(model, card, device=device)
    except InvalidModel as error:
        # The result is the same without it.
        print_sentences([f"Large scans are segmented in all windows, which is slower: {error}"])
        return None
