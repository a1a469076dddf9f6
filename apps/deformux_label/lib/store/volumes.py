"""Volumes and labels in a studies folder: their files and ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from deformux.data.sequences import SequenceNaming
from deformux.data.volume_reader import VOLUME_SUFFIXES
from deformux_label.lib.requests.identifiers import is_image_id

__all__ = [
    "LABEL_SUFFIXES",
    "Found",
    "find_volumes",
    "free_id",
    "labels_in",
    "one_of_each_case",
    "split_suffix",
    "with_ids",
]

LABEL_SUFFIXES = (".seg.nrrd", *VOLUME_SUFFIXES)
_DEEPEST_FOLDER = 16
# Files that users may expect to be served: they are listed as not served. Others, such as text, are ignored.
_OTHER_KINDS = (
    *(".dcm", ".ima", ".mhd", ".nhdr", ".hdr", ".img", ".mgz", ".mgh", ".mnc", ".nia", ".vti", ".img.gz"),
    *(".zip", ".tar", ".tar.gz", ".tgz", ".7z", ".rar"),
)


@dataclass
class Found:
    """The content of a folder.

    Args:
        volumes: paths of all volumes, relative to the folder, with ``/``; sorted.
        not_served: relative path to the reason, for everything else that looks like a volume.
    """

    volumes: list[str] = field(default_factory=list)
    not_served: dict[str, str] = field(default_factory=dict)


def split_suffix(name: str, suffixes: tuple[str, ...] = VOLUME_SUFFIXES) -> tuple[str, str] | None:
    """Return the stem and the suffix (case kept) of a volume's file name; None for any other file."""
    lower = name.lower()
    for suffix in suffixes:
        if lower.endswith(suffix) and len(name) > len(suffix):
            return name[: -len(suffix)], name[-len(suffix) :]
    return None


def find_volumes(folder: Path, known: Collection[str] = ()) -> Found:
    """Find the volumes in a folder and its subfolders.

    Hidden files and folders, and ``labels``, are left out. Links to files, common in hospitals, are followed; links to
    folders are not. A relative path in ``known`` was served before, and stays a volume whatever its name.
    """
    found = Found()
    _scan_folder(folder, "", 0, found, known)
    found.volumes.sort()
    return found


def _scan_folder(folder: Path, inside: str, depth: int, found: Found, known: Collection[str]) -> None:
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        if depth:
            found.not_served[inside.rstrip("/")] = f"the folder cannot be read: {error.strerror or error}"
        return
    for entry in entries:
        if entry.name.startswith(".") or (depth == 0 and entry.name == "labels"):
            continue
        path = inside + entry.name
        if entry.is_dir(follow_symlinks=False):
            if split_suffix(entry.name):
                found.not_served[path] = "it is a folder, not a file"
            if depth < _DEEPEST_FOLDER:
                _scan_folder(Path(entry.path), f"{path}/", depth + 1, found, known)
            else:
                found.not_served[path] = f"it is more than {_DEEPEST_FOLDER} folders deep"
        elif reason := _refusal(entry, known=path in known):
            found.not_served[path] = reason
        elif split_suffix(entry.name):
            found.volumes.append(path)


def _refusal(entry: os.DirEntry[str], *, known: bool) -> str | None:
    """Return why a file is not served; None for a volume or an unrelated file."""
    try:
        return _refusal_of(entry, known=known)
    except OSError as error:
        # For example a link to itself, or into a folder that the server may not enter.
        what = "link" if entry.is_symlink() else "file"
        return f"it is a {what} that cannot be followed: {error.strerror or error}"


def _refusal_of(entry: os.DirEntry[str], *, known: bool) -> str | None:
    if entry.is_symlink() and entry.is_dir():
        return "it is a link to a folder, which is not followed"
    lower = entry.name.lower()
    if lower.endswith(".seg.nrrd") and not known:
        return "it is a segmentation, not a scan; labels belong in labels/final, under the id of their scan"
    if not split_suffix(entry.name):
        is_other = lower.endswith(_OTHER_KINDS)
        return f"it is not one of the formats {', '.join(VOLUME_SUFFIXES)}" if is_other else None
    if not entry.is_file():
        return "it is a link to nothing" if entry.is_symlink() else "it is not a file"
    if not os.access(entry.path, os.R_OK):
        return "the server may not read it"
    if entry.stat().st_size == 0:
        return "it is empty"
    return None


def one_of_each_case(volumes: Sequence[str], naming: SequenceNaming, labelled: Container[str]) -> list[str]:
    """Return one file for each case of several sequences, and all files that are labelled or cases themselves.

    A case has the file that is labelled, else that of its first sequence.
    """
    if not naming.suffixes:
        return list(volumes)
    there, chosen = set(volumes), set()
    for files in naming.group(map(Path, volumes)):
        present = [path for path in map(Path.as_posix, files) if path in there]
        chosen |= {path for path in present if path in labelled} or set(present[:1])
    return [path for path in volumes if path in chosen]


def with_ids(
    found: Found, known: Mapping[str, str], belongs: Callable[[str, str], bool], naming: SequenceNaming
) -> dict[str, tuple[str, str]]:
    """Return id to (relative path, suffix) of every volume; add those without a valid id to ``found.not_served``.

    Args:
        found: the volumes.
        known: relative path to id, for volumes that keep their id.
        belongs: whether the labels kept under an id, if any, may belong to the volume at a relative path.
        naming: how the files of a case's sequences are named: their suffixes are not part of the id.
    """
    volumes = {known[path]: path for path in found.volumes if path in known}
    for path in found.volumes:
        if path in known:
            continue
        names = _candidates(path, naming)
        if not is_image_id(next(names)):
            found.not_served[path] = (
                "its name cannot be an id: at most 200 bytes of text, without control characters, or spaces at its ends"
            )
            continue
        chosen = next(
            (n for n in _candidates(path, naming) if is_image_id(n) and n not in volumes and belongs(n, path)), None
        )
        if chosen is None:
            found.not_served[path] = "all ids that it could have are taken; rename it"
        else:
            volumes[chosen] = path
    # In order of path, as in earlier versions.
    return {image: (volumes[image], suffix_of(volumes[image])) for image in sorted(volumes, key=volumes.__getitem__)}


def suffix_of(path: str) -> str:
    """Return the volume suffix of a path, or an empty text."""
    parts = split_suffix(path)
    return parts[1] if parts else ""


def _candidates(path: str, naming: SequenceNaming) -> Iterator[str]:
    """Yield possible ids of a file, best first: its case, its stem, its whole name, the whole name with a number."""
    stem, _ = split_suffix(path) or (path, "")
    whole = path.replace("/", "__")
    name = stem.replace("/", "__")
    if (case := naming.split(name)[0]) != name:
        yield case
    yield name
    yield whole
    for number in range(2, 100):
        yield f"{whole}-{number}"


def free_id(name: str, taken: Callable[[str], bool]) -> str:
    """Return the first of ``name-2``, ``name-3``, … that is not taken."""
    number = 2
    while taken(f"{name}-{number}"):
        number += 1
    return f"{name}-{number}"


def labels_in(folder: Path) -> tuple[dict[str, dict[str, os.stat_result]], dict[str, str]]:
    """Return the label files of a tag's folder as id to {suffix: status}, and name to reason for other files.

    Hidden files are left out: they are unfinished writes, or metadata of macOS.
    """
    found: dict[str, dict[str, os.stat_result]] = {}
    refused: dict[str, str] = {}
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}
    for entry in entries:
        parts = None if entry.name.startswith(".") else split_suffix(entry.name, LABEL_SUFFIXES)
        if parts is None:
            continue
        try:
            if not entry.is_file():
                refused[entry.name] = "it is not a file"
                continue
            found.setdefault(parts[0], {})[parts[1]] = entry.stat()
        except OSError as error:
            refused[entry.name] = error.strerror or str(error)
    return found, refused
