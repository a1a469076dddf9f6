"""Sequences of a case, such as FLAIR and T1: which files belong together, and the id that they share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from deformux.data.volume_reader import VOLUME_SUFFIXES, volume_suffix

__all__ = ["ScanFiles", "SequenceNaming", "first_present", "named_in", "nnunet_naming", "split_stem"]

# One file, or a file for each sequence; one that does not exist is a missing sequence.
ScanFiles: TypeAlias = Path | str | Sequence[Path]

_NNUNET = re.compile(r"(.+)_(\d{4})")
_FORBIDDEN = frozenset("/\\,=")
# More would be a file with a time axis, which the network does not take.
_MAX_SEQUENCES = 16


@dataclass(frozen=True)
class SequenceNaming:
    """How the files of the sequences of a case are named: its id, a suffix for each sequence, a volume's suffix.

    Args:
        suffixes: one for each sequence, in the order of the network's channels, such as ``_0000``; without any, every
            file is a case.
        names: of the sequences; by default their suffixes without punctuation in front.

    Raises:
        ValueError: a suffix is empty or ambiguous, or there are not as many names as suffixes.
    """

    suffixes: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.names:
            object.__setattr__(self, "names", tuple(suffix.lstrip("_-. ") or suffix for suffix in self.suffixes))
        if len(self.names) != len(self.suffixes) or not all(name.strip() for name in self.names):
            raise ValueError(f"each of the sequences {', '.join(self.suffixes)} needs a name; got {self.names}")
        if len(self.suffixes) > _MAX_SEQUENCES:
            raise ValueError(f"at most {_MAX_SEQUENCES} sequences are possible; got {len(self.suffixes)}")
        for suffix in self.suffixes:
            if not suffix.strip() or _FORBIDDEN & set(suffix):
                raise ValueError(
                    f"image channels must be endings of file names such as _0000 or _flair; got {suffix!r}"
                )
            if sum(other.endswith(suffix) for other in self.suffixes) > 1:
                raise ValueError(f"image channels must not end in each other; got {', '.join(self.suffixes)}")
        if len(set(self.names)) < len(self.names):
            raise ValueError(f"each sequence must have its own name; got {', '.join(self.names)}")

    @classmethod
    def parse(cls, text: str) -> SequenceNaming:
        """Parse what a user types: ``_0000,_0001`` or ``_0000=flair,_0001=t1c``; nothing for one file per case.

        Raises:
            ValueError: it is not such a list.
        """
        pairs = [part.partition("=") for part in text.split(",")] if text.strip() else []
        suffixes = tuple(suffix.strip() for suffix, _, _ in pairs)
        names = tuple(name.strip() if equals else suffix.strip().lstrip("_-. ") for suffix, equals, name in pairs)
        return cls(suffixes, names)

    @property
    def text(self) -> str:
        """Return the text from which ``parse`` makes this naming."""
        return ",".join(f"{suffix}={name}" for suffix, name in zip(self.suffixes, self.names, strict=True))

    @property
    def channels(self) -> tuple[str, ...]:
        """Return the names of several sequences, as ``Preprocessing.sequences`` holds them; none for one sequence."""
        return self.names if len(self.names) > 1 else ()

    def split(self, stem: str) -> tuple[str, int | None]:
        """Return the id of a file's case and the number of its sequence; a file of no sequence is a case itself."""
        for number, suffix in enumerate(self.suffixes):
            if stem.endswith(suffix) and len(stem) > len(suffix):
                return stem.removesuffix(suffix), number
        return stem, None

    def group(self, paths: Iterable[Path]) -> list[tuple[Path, ...]]:
        """Return the files of each case among ``paths``, in the order of their first files.

        A case has a path for each sequence; those of missing ones do not exist. Files of no sequence, and a second file
        of a sequence, are cases of their own.
        """
        cases: dict[Path, dict[int, Path]] = {}
        for path in paths:
            name, number = self.split(split_stem(path.name)[0])
            members = cases.get(path.parent / name, {})
            if number is None or number in members:
                # The key is the file itself, which no id without a volume's suffix equals.
                cases[path] = {-1: path}
            else:
                cases.setdefault(path.parent / name, members)[number] = path
        return [(members[-1],) if -1 in members else self._filled(base, members) for base, members in cases.items()]

    def files_of(self, path: Path) -> tuple[Path, ...]:
        """Return the files of all sequences of the case to which a file belongs, one for each, existing or not."""
        stem, _ = split_stem(path.name)
        name, number = self.split(stem)
        if number is None:
            return (path,)
        members = {number: path}
        for other, suffix in enumerate(self.suffixes):
            found = (path.with_name(name + suffix + kind) for kind in _kinds(path))
            if other != number and (there := next((file for file in found if file.is_file()), None)):
                members[other] = there
        return self._filled(path.with_name(name), members)

    def _filled(self, base: Path, members: Mapping[int, Path]) -> tuple[Path, ...]:
        _, kind = split_stem(members[min(members)].name)
        return tuple(
            members.get(number, base.with_name(base.name + suffix + kind))
            for number, suffix in enumerate(self.suffixes)
        )


def nnunet_naming(images: Iterable[str], labels: Iterable[str], names: Sequence[str] = ()) -> SequenceNaming:
    """Return the naming of a data set that follows nnU-Net's convention, by the labels: ``x`` for ``x_0000``.

    Args:
        images, labels: stems of the files. Images whose label has the same stem are no sequences.
        names: of the sequences, if known.
    """
    images, labelled = set(images), set(labels)
    found = [-1]
    for stem in images - labelled:
        match = _NNUNET.fullmatch(stem)
        if match and match[1] in labelled and match[1] not in images:
            found.append(int(match[2]))
    last = max(number for number in found if number < _MAX_SEQUENCES)
    if last < 0:
        return SequenceNaming()
    # The number is the channel, also where no case has the first one.
    if len(names) > last:
        return SequenceNaming(tuple(f"_{number:04d}" for number in range(len(names))), tuple(names))
    return SequenceNaming(tuple(f"_{number:04d}" for number in range(last + 1)))


def named_in(values: Mapping[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return the setting ``image_channels`` of a ``dataset.json``, if it has one, and the names of its sequences.

    nnU-Net normalises a channel named CT by a window, and others by scan: among several names they get the prefix
    ``mr:``, which ``Preprocessing`` reads.

    Raises:
        ValueError: they are not of the expected kind.
    """
    setting = values.get("image_channels")
    if isinstance(setting, list):
        setting = ",".join(map(str, setting))
    if setting is not None and not isinstance(setting, str):
        raise ValueError('"image_channels" must be a list such as ["_0000=flair", "_0001=t1c"]')
    found = values.get("channel_names", values.get("modality", {}))
    if not isinstance(found, Mapping):
        return setting, ()
    try:
        names = [str(found[key]).strip() for key in sorted(found, key=int)]
    except ValueError:
        return setting, ()
    plain = ["_".join(name.lower().replace(",", " ").split()) for name in names]
    if len(plain) > 1 and "ct" in plain:
        plain = [name if name == "ct" or ":" in name else f"mr:{name}" for name in plain]
    unique = len(set(plain)) == len(plain) and all(plain)
    return setting, tuple(plain) if unique else ()


def first_present(files: Sequence[Path]) -> Path:
    """Return the first file that exists, which gives a case its grid; the first one if none does."""
    return next((file for file in files if file.is_file()), files[0])


def split_stem(name: str) -> tuple[str, str]:
    """Return a file name without its volume suffix, and the suffix, empty if it has none."""
    suffix = volume_suffix(name) or ""
    return name.removesuffix(suffix), suffix


def _kinds(path: Path) -> list[str]:
    """Return the volume suffixes that the other sequences of a file may have, its own first."""
    own = split_stem(path.name)[1]
    return [own, *(suffix for suffix in VOLUME_SUFFIXES if suffix != own)]
