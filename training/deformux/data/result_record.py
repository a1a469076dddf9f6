"""What a result was made of, kept in the header of the result itself.

A result and its record are one file, written by one rename, so they cannot disagree; processes that write different
results share no file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import numpy.typing as npt
from nibabel.filebasedimages import ImageFileError
from nibabel.nifti1 import Nifti1Extension

from deformux.data.atomic_files import replacing
from deformux.data.label_values import in_file_order

__all__ = ["FileState", "ResultRecord", "read_record", "write_recorded"]

# NIfTI's code of an extension that holds plain text.
_COMMENT = 6
_KEY = "deformux_result"
_BLOCK = 4 * 2**20


@dataclass(frozen=True)
class FileState:
    """Size, time of last change and content of a file."""

    size: int
    mtime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> FileState:
        """Read a file; raise OSError if it cannot be read."""
        # First the times: a file that changes while it is read differs from its record.
        before = path.stat()
        return cls(before.st_size, before.st_mtime_ns, _checksum(path))

    def holds_for(self, path: Path) -> bool:
        """Return whether a file is still as it was; its content is read only if its time differs."""
        try:
            now = path.stat()
            if now.st_size != self.size:
                return False
            return now.st_mtime_ns == self.mtime_ns or _checksum(path) == self.sha256
        except OSError:
            return False


@dataclass(frozen=True)
class ResultRecord:
    """The model and the files that a result was made of.

    Args:
        model: identity of the model.
        scans: state of each file of the scan that there is.
    """

    model: str
    scans: tuple[FileState, ...]

    @classmethod
    def of(cls, model: str, scans: Sequence[Path]) -> ResultRecord:
        """Record a model and the files of a scan as they are now; raise OSError if one cannot be read.

        Files of missing sequences do not exist; a result is made again once they do.
        """
        return cls(model, tuple(FileState.of(path) for path in scans if path.exists()))

    def holds_for(self, scans: Sequence[Path]) -> bool:
        """Return whether the files of a scan are still as they were."""
        present = [path for path in scans if path.exists()]
        return len(present) == len(self.scans) and all(
            state.holds_for(path) for state, path in zip(self.scans, present, strict=True)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the record as it is stored."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> ResultRecord:
        """Invert ``to_dict``; raise ValueError, TypeError or KeyError if the values are not a record."""
        return cls(str(values["model"]), tuple(FileState(**state) for state in values["scans"]))


def write_recorded(
    path: Path, labels: npt.NDArray[np.uint8], affine: npt.NDArray[np.float64], record: ResultRecord
) -> None:
    """Write a label volume ``(X, Y, Z)`` (.nii.gz) with its record, by rename; raise OSError if that fails."""
    image = nib.Nifti1Image(in_file_order(labels), affine)
    text = json.dumps({_KEY: record.to_dict()})
    image.header.extensions.append(Nifti1Extension(_COMMENT, text.encode()))
    with replacing(path) as temporary:
        nib.save(image, temporary)


def read_record(path: Path) -> ResultRecord | None:
    """Return the record of a result, or None if the file has none or is damaged; raise OSError if it is unreadable."""
    try:
        extensions = nib.load(path).header.extensions
    except (ImageFileError, EOFError, ValueError):
        return None
    for extension in extensions:
        if extension.get_code() != _COMMENT:
            continue
        try:
            return ResultRecord.from_dict(json.loads(_text(extension))[_KEY])
        except (ValueError, TypeError, KeyError):
            continue
    return None


def _text(extension: Nifti1Extension) -> str:
    content = extension.get_content()
    return content.decode() if isinstance(content, bytes) else str(content)


def _checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
