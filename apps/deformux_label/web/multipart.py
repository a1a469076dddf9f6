"""A parser of forms with files, with limits on every part; files are streamed into the request's folder."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import anyio.to_thread
from fastapi import HTTPException
from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, UploadFile

from deformux_label.lib.requests.request_folder import request_folder
from deformux_label.lib.requests.uploads import StoredUpload

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

__all__ = ["MAX_FIELD_BYTES", "read_multipart"]

MAX_FIELD_BYTES = 1_000_000
_MAX_FIELDS = 32
_MAX_NAME_BYTES = 1_000
_MAX_HEADER_BYTES = 8_000


async def read_multipart(headers: Headers, stream: AsyncIterator[bytes], *, most_files: int) -> FormData:
    """Read a ``multipart/form-data`` body.

    Raises:
        HTTPException: 400 for an invalid form or text that is not UTF-8, 413 for too many parts or too large ones.
    """
    _, options = parse_options_header(headers.get("content-type"))
    if options.get(b"charset", b"utf-8").lower() not in (b"utf-8", b"utf8"):
        raise HTTPException(400, "forms must be in UTF-8; leave out the charset")
    boundary = options.get(b"boundary")
    if not boundary or len(boundary) > 200:
        raise HTTPException(400, "the form's Content-Type must name its boundary; send multipart/form-data")
    form = _Form(most_files)
    try:
        parser = MultipartParser(boundary, form.callbacks())
        async for chunk in stream:
            parser.write(chunk)
            if form.waiting:
                await anyio.to_thread.run_sync(form.store)
        parser.finalize()
        await anyio.to_thread.run_sync(form.store)
    except FormParserError as error:
        raise HTTPException(400, f"the form is not valid multipart/form-data: {error}") from error
    finally:
        form.close()
    if not form.ended:
        raise HTTPException(400, "the form ends before its last boundary; send all of it")
    return FormData(form.items)


class _Form:
    """Collects fields and files from the parser's events; ``store`` writes files off the event loop."""

    def __init__(self, most_files: int) -> None:
        self.most_files = most_files
        self.items: list[tuple[str, str | UploadFile]] = []
        # Bytes for the file at a path; None once it is complete.
        self.waiting: list[tuple[Path, bytes | None]] = []
        self.ended = False
        self._files = 0
        self._fields = 0
        self._open: tuple[Path, BinaryIO] | None = None
        self._begin()

    def callbacks(self) -> MultipartCallbacks:
        return {
            "on_part_begin": self._begin,
            "on_header_field": self._header_field,
            "on_header_value": self._header_value,
            "on_header_end": self._header_end,
            "on_headers_finished": self._headers_finished,
            "on_part_data": self._data,
            "on_part_end": self._part_end,
            "on_end": self._end,
        }

    def store(self) -> None:
        """Write the bytes received since the last call."""
        waiting, self.waiting = self.waiting, []
        for path, data in waiting:
            if self._open is None or self._open[0] != path:
                self.close()
                self._open = (path, path.open("ab"))
            if data is None:
                self.close()
            else:
                self._open[1].write(data)

    def close(self) -> None:
        if self._open is not None:
            opened, self._open = self._open, None
            opened[1].close()

    def _begin(self) -> None:
        self._header = [bytearray(), bytearray()]
        self._header_bytes = 0
        self._disposition = b""
        self._name = ""
        self._path: Path | None = None
        self._text = bytearray()

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[0] += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._count_header(end - start)
        self._header[1] += data[start:end]

    def _count_header(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _MAX_HEADER_BYTES:
            raise HTTPException(413, f"the headers of a form's part must be at most {_MAX_HEADER_BYTES} bytes")

    def _header_end(self) -> None:
        if bytes(self._header[0]).lower() == b"content-disposition":
            self._disposition = bytes(self._header[1])
        self._header = [bytearray(), bytearray()]

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        if b"name" not in options:
            raise HTTPException(400, "each part of a form must have a name in its Content-Disposition")
        self._name = _decoded(options[b"name"], "the name of a form's part", _MAX_NAME_BYTES)
        # Older clients write the name as ``filename*``, which the parser ignores.
        if b"filename" not in options and b"filename*=" not in self._disposition.lower():
            self._fields += 1
            if self._fields > _MAX_FIELDS:
                raise HTTPException(413, f"a form may have at most {_MAX_FIELDS} fields; send fewer")
            return
        self._files += 1
        if self._files > self.most_files:
            raise HTTPException(413, f"this form may have at most {self.most_files} files; send fewer")
        folder = request_folder()
        assert folder is not None, "forms are read within a request"
        self._path = folder / f"part-{self._files}"
        name = _decoded(options.get(b"filename", b""), "the name of a file", 10 * _MAX_NAME_BYTES)
        self.items.append((self._name, StoredUpload(self._path, name)))
        self.waiting.append((self._path, b""))

    def _data(self, data: bytes, start: int, end: int) -> None:
        if self._path is not None:
            self.waiting.append((self._path, data[start:end]))
            return
        if len(self._text) + end - start > MAX_FIELD_BYTES:
            raise HTTPException(413, f"a form's field must be at most {MAX_FIELD_BYTES} bytes; send less")
        self._text += data[start:end]

    def _part_end(self) -> None:
        if self._path is not None:
            self.waiting.append((self._path, None))
        else:
            self.items.append((self._name, _decoded(bytes(self._text), "a form's field", MAX_FIELD_BYTES)))

    def _end(self) -> None:
        self.ended = True


def _decoded(data: bytes, what: str, most: int) -> str:
    if len(data) > most:
        raise HTTPException(413, f"{what} must be at most {most} bytes")
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise HTTPException(400, f"{what} must be text in UTF-8") from error
    if "\0" in text:
        raise HTTPException(400, f"{what} must not contain null bytes")
    return text
