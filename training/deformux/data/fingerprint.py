"""The fingerprint of a project: facts of all its scans and labels, kept in a file so that each is read once."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from deformux.data.cases import Case
from deformux.data.checked_json import read_checked, write_checked
from deformux.data.header import InvalidVolume
from deformux.data.scan_facts import LEVELS, LabelFacts, ScanFacts, read_case, read_scan

__all__ = ["Fingerprint", "FingerprintStopped", "declared_modality", "read_fingerprint"]

logger = logging.getLogger(__name__)

_VERSION = 1
# Facts read so far are kept this often, so that a stop costs little.
_SAVE_SECONDS = 30.0
# Points at which the percentiles of each case are read to pool them.
_POOLED = 10_000

_State: TypeAlias = tuple[int, int]
_T = TypeVar("_T", ScanFacts, LabelFacts)


class FingerprintStopped(RuntimeError):
    """Reading was asked to stop; what was read is kept."""


@dataclass(frozen=True)
class Fingerprint:
    """Facts of all scans of a project.

    Args:
        scans: by the scan's path.
        labels: facts of labels, by the path of their scan.
        unusable: why a file was skipped, one sentence for each.
        modality: of the whole set, as ``dataset.json`` states it; empty if it states none.
    """

    scans: Mapping[str, ScanFacts]
    labels: Mapping[str, LabelFacts] = field(default_factory=dict)
    unusable: tuple[str, ...] = ()
    modality: str = ""

    @property
    def affines(self) -> list[npt.NDArray[np.float64]]:
        """Return the affine ``(4, 4)`` of each scan."""
        return [np.array(scan.affine) for scan in self.scans.values()]

    @property
    def shapes(self) -> list[tuple[int, int, int]]:
        """Return the voxels of each scan along its file's axes."""
        return [scan.shape for scan in self.scans.values()]

    @property
    def labelled(self) -> list[tuple[ScanFacts, LabelFacts]]:
        """Return the facts of each labelled scan and its label."""
        return [(self.scans[path], facts) for path, facts in self.labels.items()]

    def labelled_percentiles(self, percentages: Sequence[float]) -> tuple[float, ...] | None:
        """Return percentiles of the labelled voxels of all scans, each scan counting the same; None without any.

        Source: nnU-Net's fingerprint, which draws as many labelled voxels from each case (Isensee et al., 2021).
        """
        known = [facts.percentiles for facts in self.labels.values() if facts.percentiles]
        if not known:
            return None
        points = (np.arange(_POOLED) + 0.5) / _POOLED * 100
        pooled = np.concatenate([np.interp(points, LEVELS, values) for values in known])
        return tuple(float(value) for value in np.percentile(pooled, percentages))


def read_fingerprint(
    images: Sequence[Path],
    cases: Sequence[Case] = (),
    *,
    cache: Path | None = None,
    modality: str = "",
    seconds: float = float("inf"),
    on_progress: Callable[[int, int], None] | None = None,
    stop: Callable[[], bool] | None = None,
) -> Fingerprint:
    """Read the facts of all scans; of files that did not change since they were kept, only their state is asked.

    A file that cannot be used is skipped, with a sentence.

    Args:
        images: all scans.
        cases: those of them that are labelled, and perhaps others.
        cache: file that keeps the facts; None keeps none.
        modality: of the whole set, where something besides the scans states it.
        seconds: after which only headers of unlabelled scans are read; their intensities follow the next time.
        on_progress: called with the number of scans done and of all.
        stop: asked after each scan whether to stop.

    Raises:
        FingerprintStopped: ``stop`` returned true.
        OSError: the cache cannot be written.
    """
    kept = _Kept.load(cache)
    label_of = {str(case.image): case.label for case in cases}
    paths = list(dict.fromkeys([*map(str, images), *label_of]))
    scans: dict[str, ScanFacts] = {}
    labels: dict[str, LabelFacts] = {}
    unusable: list[str] = []
    began = time.monotonic()
    try:
        for done, path in enumerate(paths, start=1):
            in_time = time.monotonic() - began < seconds
            try:
                scans[path], label = kept.facts(path, label_of.get(path), intensities=in_time)
                if label is not None:
                    labels[path] = label
            except InvalidVolume as error:
                unusable.append(str(error))
                _keep_scan_alone(kept, path, scans, has_label=path in label_of)
            if on_progress is not None:
                on_progress(done, len(paths))
            if done < len(paths) and stop is not None and stop():
                raise FingerprintStopped("reading the scans was stopped, and can be continued")
            kept.save_if_due()
        kept.forget_others(paths)
    finally:
        kept.save()
    return Fingerprint(scans, labels, tuple(unusable), modality)


def _keep_scan_alone(kept: _Kept, path: str, scans: dict[str, ScanFacts], *, has_label: bool) -> None:
    """Take the facts of a scan whose label cannot be used."""
    if not has_label:
        return
    try:
        scans[path], _ = kept.facts(path, None, intensities=True)
    except InvalidVolume:
        logger.debug("%s cannot be read without its label either", path)


def declared_modality(folder: Path) -> str:
    """Return the modality that a data set's ``dataset.json`` states for its first channel; empty if it states none.

    ``modality`` is the decathlon's and nnU-Net v1's name for it, ``channel_names`` nnU-Net v2's.
    """
    try:
        values = json.loads((folder / "dataset.json").read_text())
        channels = values.get("channel_names") or values.get("modality") or {}
        return str(channels["0"]).strip().upper() if isinstance(channels, dict) else str(channels).strip().upper()
    except (OSError, ValueError, AttributeError, KeyError):
        return ""


class _Kept:
    """Facts of files in a cache, each with the size and time of change that its file had."""

    def __init__(self, file: Path | None, scans: dict[str, Any], labels: dict[str, Any]) -> None:
        self.file, self.scans, self.labels = file, scans, labels
        self.changed = False
        self.saved = time.monotonic()

    @classmethod
    def load(cls, file: Path | None) -> _Kept:
        """Read a cache; a damaged one, or one of another version, is made anew."""
        if file is not None:
            try:
                return cls(file, *read_checked(file, _scans_and_labels))
            except FileNotFoundError:
                pass
            except ValueError as error:
                logger.warning("%s; all scans are read again", error)
        return cls(file, {}, {})

    def facts(self, path: str, label: Path | None, *, intensities: bool) -> tuple[ScanFacts, LabelFacts | None]:
        """Return the facts of a scan and its label, from the cache or from the files."""
        state = _state(Path(path))
        scan = _known(self.scans.get(path), [state], ScanFacts)
        if label is None:
            if scan is None or (intensities and scan.intensities is None):
                scan = read_scan(Path(path), intensities=intensities)
                self._keep(self.scans, path, [state], scan)
            return scan, None
        states = [state, _state(label)]
        found = _known(self.labels.get(str(label)), states, LabelFacts)
        if scan is None or scan.intensities is None or found is None:
            scan, found = read_case(Path(path), label)
            self._keep(self.scans, path, [state], scan)
            self._keep(self.labels, str(label), states, found)
        return scan, found

    def forget_others(self, paths: Sequence[str]) -> None:
        """Forget scans that are not among ``paths``, and labels whose files are gone."""
        present = set(paths)
        for path in [path for path in self.scans if path not in present]:
            del self.scans[path]
            self.changed = True
        for path in [path for path in self.labels if not os.path.exists(path)]:
            del self.labels[path]
            self.changed = True

    def save_if_due(self) -> None:
        """Save from time to time."""
        if self.changed and time.monotonic() - self.saved >= _SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Save what changed."""
        if self.file is not None and self.changed:
            write_checked(self.file, {"version": _VERSION, "scans": self.scans, "labels": self.labels})
        self.changed = False
        self.saved = time.monotonic()

    def _keep(self, where: dict[str, Any], path: str, states: Sequence[_State], facts: ScanFacts | LabelFacts) -> None:
        where[path] = {"states": [list(state) for state in states], "facts": facts.to_dict()}
        self.changed = True


def _scans_and_labels(values: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the two parts of a cache; empty ones if another version wrote it."""
    if values["version"] != _VERSION:
        return {}, {}
    return dict(values["scans"]), dict(values["labels"])


def _known(entry: Any, states: Sequence[_State], kind: type[_T]) -> _T | None:
    """Return kept facts if their files did not change."""
    try:
        if entry is None or [tuple(state) for state in entry["states"]] != list(states):
            return None
        return kind.from_dict(entry["facts"])
    except (KeyError, TypeError, ValueError, AttributeError):
        return None


def _state(path: Path) -> _State:
    """Return size and time of change of a file.

    Raises:
        InvalidVolume: there is no such file.
    """
    try:
        found = os.stat(path)
    except OSError as error:
        raise InvalidVolume(f"{path.name} cannot be read: there is no such file") from error
    return found.st_size, found.st_mtime_ns
