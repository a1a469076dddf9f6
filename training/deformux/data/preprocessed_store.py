"""Preprocessed volumes in files, from which training cuts patches without reading whole volumes.

Each volume is a folder of plain ``.npy`` arrays, written under another name and renamed when whole. Arrays are mapped
into memory: only what a patch touches is read.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["PreprocessedStore", "store_key"]

logger = logging.getLogger(__name__)

# In the name of the folder of each plan: another version of this file reads it as another plan's.
_FORMAT = 1
_FACTS = "facts.json"
_UNFINISHED = ".writing-"

_Arrays = Mapping[str, npt.NDArray[Any]]


class PreprocessedStore:
    """The preprocessed volumes of one plan; those of earlier plans are deleted.

    Damaged, truncated and half-written volumes count as missing. Several processes may use a store at once.

    Args:
        root: folder of the stores.
        plan: everything that decides how volumes are preprocessed, as plain values.
        most_bytes: limit of the files; volumes beyond it are not stored.
    """

    def __init__(self, root: Path, plan: Mapping[str, Any], *, most_bytes: int) -> None:
        self.folder = root / _digest({"format": _FORMAT, **plan})
        self.most_bytes = most_bytes
        self._sound: set[str] = set()
        self._closed = False
        if root.is_dir():
            for other in root.iterdir():
                if other != self.folder:
                    shutil.rmtree(other, ignore_errors=True)

    def get(self, key: str) -> dict[str, npt.NDArray[Any]] | None:
        """Return the arrays of a volume, mapped into memory and copied where written to; None if it is not stored."""
        folder = self.folder / key
        try:
            facts = json.loads((folder / _FACTS).read_text())
            if not isinstance(facts, dict) or not facts:
                raise ValueError("its list of arrays is empty")
            arrays = {name: np.load(folder / f"{name}.npy", mmap_mode="c", allow_pickle=False) for name in facts}
            if key not in self._sound:
                # Once in each process: it reads the volume, which the training is about to do anyway.
                if any(_checksum(arrays[name]) != facts[name] for name in facts):
                    raise ValueError("a checksum differs")
                self._sound.add(key)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError, EOFError) as error:
            logger.warning("A preprocessed volume in %s is damaged, and is made again: %s", folder, error)
            shutil.rmtree(folder, ignore_errors=True)
            return None
        return arrays

    def put(self, key: str, arrays: _Arrays) -> bool:
        """Store a volume, and return whether there was room for it."""
        if self._closed:
            return False
        needed = sum(array.nbytes for array in arrays.values())
        temporary: Path | None = None
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if self._bytes() + needed > self.most_bytes:
                self._close(f"they would take more than {self.most_bytes / 1e9:.3g} GB")
                return False
            temporary = Path(tempfile.mkdtemp(prefix=_UNFINISHED, dir=self.folder))
            for name, array in arrays.items():
                np.save(temporary / f"{name}.npy", array, allow_pickle=False)
            facts = {name: _checksum(array) for name, array in arrays.items()}
            (temporary / _FACTS).write_text(json.dumps(facts))
            if not (self.folder / key).exists():
                temporary.rename(self.folder / key)
        except OSError as error:
            if not (self.folder / key).exists():
                self._close(str(error))
                return False
        finally:
            if temporary is not None:
                shutil.rmtree(temporary, ignore_errors=True)
        return True

    def _close(self, reason: str) -> None:
        self._closed = True
        logger.warning("No more preprocessed volumes are kept on disk, others are read again each time: %s", reason)

    def _bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.rglob("*.npy"))


def store_key(*files: Path) -> str:
    """Return the key of a volume made from files in their current state."""
    states = [(str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return _digest(states)


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:32]


def _checksum(array: npt.NDArray[Any]) -> int:
    # ravel of a mapped array is a view, and crc32 reads it page by page.
    values: Any = np.ascontiguousarray(array).ravel().view(np.uint8)
    return zlib.crc32(values)
