"""The record of the label lists for which a studies folder was served."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from deformux.data.atomic_files import write_text
from deformux.data.sequences import SequenceNaming

__all__ = ["ProjectRecord"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProjectRecord:
    """The record ``.deformux/project.json``.

    Args:
        labels: the list of the last start.
        unnamed: the list assumed for labels that were stored without names; written once.
        image_channels: how the files of a case's sequences were named at the last start.
    """

    labels: tuple[str, ...]
    unnamed: tuple[str, ...]
    image_channels: str = ""

    @classmethod
    def read(cls, path: Path, warn: Callable[[str], None] = logger.error) -> ProjectRecord | None:
        """Return the record, or None; rename a damaged one, and pass a sentence to ``warn``."""
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
            labels, unnamed = _names(record["labels"]), _names(record["unnamed"])
            return cls(labels, unnamed, SequenceNaming.parse(record.get("image_channels", "")).text)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
            logger.error("The record %s cannot be used: %s", path, error)
            warn(f"the record {path} was damaged, and is replaced by one with the labels of this start")
            try:
                os.replace(path, path.with_name(f"{path.name}.damaged"))
            except OSError as other:
                logger.warning("It could not be set aside: %s", other)
            return None

    @classmethod
    def begin(
        cls, path: Path, labels: Sequence[str], warn: Callable[[str], None], *, image_channels: str = ""
    ) -> ProjectRecord:
        """Return the record for a start with these options, without writing it: the start may be refused."""
        before = cls.read(path, warn)
        if before is not None and before.labels != tuple(labels):
            logger.warning(
                "The labels were %s at the last start and are %s now; stored labels are used by their names",
                ", ".join(before.labels),
                ", ".join(labels),
            )
        return cls(tuple(labels), before.unnamed if before else tuple(labels), image_channels)

    def write(self, path: Path) -> None:
        """Write the record if it differs from the one on disk."""
        if self != ProjectRecord.read(path):
            values: dict[str, object] = {"labels": list(self.labels), "unnamed": list(self.unnamed)}
            if self.image_channels:
                values["image_channels"] = self.image_channels
            write_text(path, json.dumps(values) + "\n")


def _names(value: object) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name for name in value):
        raise ValueError(f"expected a list of names, got {value!r}")
    return tuple(value)
