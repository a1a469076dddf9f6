"""Stored voxels as a stream of bytes, never longer than the header asks for."""

from __future__ import annotations

import bz2
import zlib
from collections.abc import Callable
from typing import BinaryIO, Protocol

import numpy as np

from deformux.data.header import VolumeHeader

__all__ = ["Damaged", "is_too_short", "open_voxels"]

_CHUNK = 256 * 1024
# Bytes after the voxels that are decompressed to reach the checksum at the end of a stream.
_TAIL = 64 * 1024
_MAX_NUMBER_LENGTH = 64
# The largest factor by which a format can shrink a volume: bzip2 holds 46 MB of zeros in a block of some 40 bytes.
_MAX_INFLATION = {"raw": 1, "gzip": 1040, "zlib": 1040, "bzip2": 2_000_000, "hex": 1}


class Damaged(Exception):
    """The voxels of a file end too early, or do not match their encoding."""


class _Decompressor(Protocol):
    """The interface of bz2's decompressors."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


class _Inflate:
    """A member of a gzip or zlib stream, with the interface of ``bz2.BZ2Decompressor``."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=47)

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    @property
    def needs_input(self) -> bool:
        return not self._inner.unconsumed_tail

    def decompress(self, data: bytes, max_length: int = -1) -> bytes:
        return self._inner.decompress(self._inner.unconsumed_tail + data, max_length)


class _Compressed:
    """Decompresses member after member of a file, only as far as it is read."""

    def __init__(self, file: BinaryIO, make: Callable[[], _Decompressor]) -> None:
        self._file = file
        self._make = make
        self._member = make()
        self._waiting = b""

    def read(self, n: int) -> bytes:
        """Return at most ``n`` bytes; none at the end."""
        while True:
            if self._member.eof:
                self._waiting = self._member.unused_data or self._file.read(_CHUNK)
                # Other bytes may follow the last member.
                if not self._waiting.startswith((b"\x1f\x8b", b"BZh")):
                    return b""
                self._member = self._make()
            elif not self._waiting and self._member.needs_input:
                self._waiting = self._file.read(_CHUNK)
                if not self._waiting:
                    raise Damaged
            data, self._waiting = self._waiting, b""
            try:
                found = self._member.decompress(data, n)
            except (zlib.error, OSError, ValueError) as error:
                raise Damaged from error
            if found:
                return found

    def finish(self) -> None:
        """Check the checksum at the end of the stream, if that is near."""
        left = _TAIL
        while left > 0 and not self._member.eof and (found := self.read(left)):
            left -= len(found)


class _Plain:
    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def read(self, n: int) -> bytes:
        return self._file.read(n)

    def finish(self) -> None:
        """Nothing follows."""


class _Hex:
    """Two hexadecimal digits for each byte; white space between them is ignored."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._odd = b""

    def read(self, n: int) -> bytes:
        while True:
            digits = self._file.read(min(2 * n, _CHUNK))
            if not digits:
                return b""
            digits = self._odd + b"".join(digits.split())
            even = len(digits) // 2 * 2
            self._odd = digits[even:]
            try:
                found = bytes.fromhex(digits[:even].decode("ascii"))
            except ValueError as error:
                raise Damaged from error
            if found:
                return found

    def finish(self) -> None:
        """Nothing follows."""


class _Text:
    """Numbers in plain text, converted to the bytes of a binary file."""

    def __init__(self, file: BinaryIO, dtype: np.dtype) -> None:
        self._file = file
        self._dtype = dtype
        self._cut = b""
        self._waiting = b""

    def read(self, n: int) -> bytes:
        while not self._waiting:
            text = self._file.read(_CHUNK)
            if not text and not self._cut:
                return b""
            self._waiting = self._numbers(text)
        found, self._waiting = self._waiting[:n], self._waiting[n:]
        return found

    def _numbers(self, text: bytes) -> bytes:
        words = (self._cut + text).split()
        self._cut = b""
        if words and text and not text[-1:].isspace():
            self._cut = words.pop()
        if len(self._cut) > _MAX_NUMBER_LENGTH or any(len(word) > _MAX_NUMBER_LENGTH for word in words):
            raise Damaged
        try:
            convert = float if self._dtype.kind == "f" else int
            return np.array([convert(word) for word in words], dtype=self._dtype).tobytes()
        except (ValueError, OverflowError) as error:
            raise Damaged from error

    def finish(self) -> None:
        """Nothing follows."""


def is_too_short(size: int, header: VolumeHeader) -> bool:
    """Return whether a file of ``size`` bytes cannot hold its voxels, however well compressed."""
    least = 2 * header.n_values - 1 if header.encoding == "text" else header.n_bytes
    return (size - header.start) * _MAX_INFLATION.get(header.encoding, 1) < least


def open_voxels(file: BinaryIO, size: int, header: VolumeHeader) -> _Compressed | _Plain | _Hex | _Text:
    """Return a stream of the decoded bytes of a file's voxels.

    Raises:
        Damaged: the file is too short for them.
    """
    if is_too_short(size, header):
        raise Damaged
    file.seek(header.start)
    if header.encoding == "text":
        return _Text(file, header.dtype)
    if header.encoding == "hex":
        return _Hex(file)
    if header.encoding == "raw":
        return _Plain(file)
    make: Callable[[], _Decompressor] = bz2.BZ2Decompressor if header.encoding == "bzip2" else _Inflate
    stream = _Compressed(file, make)
    left = header.skip
    while left:
        found = stream.read(min(left, _CHUNK))
        if not found:
            raise Damaged
        left -= len(found)
    return stream
