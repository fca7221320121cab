"""A multipart/form-data body taken as it streams in: small fields are kept, the file goes straight to its blob."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import TracebackType
from typing import NamedTuple

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect

from pronghorn.errors import InvalidRequest, RequestError, SlowBody, TooLarge
from pronghorn.limits import FILE_CHUNK_BYTES, KIB, UPLOAD_STEP_BYTES, UPLOAD_STEP_S_MAX
from pronghorn.storage.blobs import BlobWriter

PARTS_MAX = 32
PART_HEADERS_MAX = 16
PART_HEADER_BYTES_MAX = 8 * KIB
FIELD_BYTES_MAX = 64 * KIB


class Form(NamedTuple):
    """A form: its small fields, the name of the file it carried, and the file's first bytes."""

    fields: dict[str, str]
    filename: str | None
    head: bytes


class UnsupportedBody(RequestError):
    """The body is of a kind that this route does not take."""

    status = 415


async def receive(
    headers: dict[str, str],
    chunks: AsyncIterator[bytes],
    writer: BlobWriter,
    *,
    file_field: str,
    file_bytes_max: int | None = None,
) -> Form:
    """Write the form's one file to `writer` and return the rest; memory stays flat whatever the file's size.

    Raises InvalidRequest for a body that is not a well-formed form or ends early, UnsupportedBody for a compressed one,
    SlowBody for one that stalls or trickles, TooLarge as soon as the file is above `file_bytes_max`.
    """
    boundary = _boundary(headers, file_field)
    try:
        parser = _FormReader(boundary, file_field, file_bytes_max)
    except FormParserError as error:
        raise InvalidRequest(f"The multipart body is malformed: {error}") from error
    try:
        async with _WriteBehind(writer) as written:
            async for chunk in _steady(chunks):
                parser.feed(chunk)
                if parser.waiting_bytes >= FILE_CHUNK_BYTES:
                    await written.write(parser.take())
            parser.finish()
            await written.write(parser.take())
    except ClientDisconnect as error:
        raise InvalidRequest("The connection was closed before the end of the body.") from error
    return Form(parser.fields, parser.filename, parser.head)


def _boundary(headers: dict[str, str], file_field: str) -> bytes:
    if headers.get("content-encoding", "identity") != "identity":
        raise UnsupportedBody("Compressed request bodies are not supported. Send the file as it is.")
    kind, options = parse_options_header(headers.get("content-type", ""))
    boundary = options.get(b"boundary")
    if kind != b"multipart/form-data" or not boundary:
        raise InvalidRequest(f"The request must be multipart/form-data, with the bytes in its field '{file_field}'.")
    return boundary


async def _steady(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Yield what comes, unless the next UPLOAD_STEP_BYTES keep us waiting for more than UPLOAD_STEP_S_MAX."""
    clock = asyncio.get_running_loop().time
    came, waited_s = 0, 0.0
    while True:
        since = clock()
        try:
            async with asyncio.timeout(UPLOAD_STEP_S_MAX - waited_s):
                chunk = await anext(chunks, None)
        except TimeoutError as error:
            message = f"The body does not arrive: {came} bytes in {UPLOAD_STEP_S_MAX:g} s."
            raise SlowBody(message) from error
        if chunk is None:
            return
        came, waited_s = came + len(chunk), waited_s + clock() - since
        if came >= UPLOAD_STEP_BYTES:
            came, waited_s = 0, 0.0
        yield chunk


class _WriteBehind:
    """Writes on a thread while the next bytes come in: one write is under way at most, and none once this is left."""

    def __init__(self, writer: BlobWriter) -> None:
        self._writer = writer
        self._under_way: asyncio.Future[None] | None = None

    async def write(self, pieces: list[bytes]) -> None:
        """Begin to write once the write before has ended, and raise what that one has met."""
        if self._under_way is not None:
            await asyncio.shield(self._under_way)
        self._under_way = asyncio.get_running_loop().run_in_executor(None, self._write, pieces)

    def _write(self, pieces: list[bytes]) -> None:
        self._writer.write(b"".join(pieces))

    async def __aenter__(self) -> _WriteBehind:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._under_way is not None:
            await asyncio.wait([self._under_way])
            if (failure := self._under_way.exception()) and error is None:
                raise failure


class _FormReader:
    """Follows one form through python-multipart's push parser."""

    def __init__(self, boundary: bytes, file_field: str, file_bytes_max: int | None) -> None:
        self.fields: dict[str, str] = {}
        self.filename: str | None = None
        self.head = b""
        self._file_field = file_field
        self._file_bytes_max = file_bytes_max
        self._file_bytes = 0
        self._data: list[bytes] = []
        self._waiting = 0
        self._parts = 0
        self._headers: dict[bytes, bytes] = {}
        self._header_name = b""
        self._header_value = b""
        self._field: str | None = None
        self._value = b""
        self._chunk = b""
        self._within_file = False
        self._ended = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )

    @property
    def waiting_bytes(self) -> int:
        return self._waiting

    def feed(self, chunk: bytes) -> None:
        # Within the file, what has no carriage return holds no boundary; to look for that alone is far quicker.
        if self._within_file and b"\r" not in chunk:
            self._take_of_file(chunk)
            return
        self._chunk, self._within_file = chunk, False
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise InvalidRequest(f"The multipart body is malformed: {error}") from error

    def finish(self) -> None:
        if not self._ended:
            raise InvalidRequest("The multipart body ends before its closing boundary. Was the upload cut off?")

    def take(self) -> list[bytes]:
        """Return what has come of the file since the last time, and forget it."""
        data, self._data = self._data, []
        self._waiting = 0
        return data

    def _on_part_begin(self) -> None:
        self._parts += 1
        self._headers = {}
        self._field = None
        self._value = b""
        if self._parts > PARTS_MAX:
            raise InvalidRequest(f"The form has more than {PARTS_MAX} parts.")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]
        self._check_header()

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]
        self._check_header()

    def _check_header(self) -> None:
        if len(self._header_name) + len(self._header_value) > PART_HEADER_BYTES_MAX:
            raise InvalidRequest(f"A part's header is longer than {PART_HEADER_BYTES_MAX} bytes.")

    def _on_header_end(self) -> None:
        self._headers[self._header_name.lower()] = self._header_value
        self._header_name = self._header_value = b""
        if len(self._headers) > PART_HEADERS_MAX:
            raise InvalidRequest(f"A part has more than {PART_HEADERS_MAX} headers.")

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        name = options.get(b"name", b"").decode("utf-8", errors="replace")
        if not name:
            raise InvalidRequest("A part of the form has no name.")
        self._field = name
        if name == self._file_field:
            if self.filename is not None:
                raise InvalidRequest(f"The form has more than one '{name}'.")
            self.filename = options.get(b"filename", b"").decode("utf-8", errors="replace")

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._field == self._file_field:
            self._take_of_file(data[start:end])
            self._within_file = data is self._chunk and end == len(data)  # else a boundary may have begun
            return
        self._value += data[start:end]
        if len(self._value) > FIELD_BYTES_MAX:
            raise InvalidRequest(f"The field '{self._field}' is longer than {FIELD_BYTES_MAX} bytes.")

    def _take_of_file(self, piece: bytes) -> None:
        self._file_bytes += len(piece)
        if self._file_bytes_max is not None and self._file_bytes > self._file_bytes_max:
            message = f"'{self._field}' is larger than the limit of {self._file_bytes_max} bytes."
            raise TooLarge(message, param=self._field, code="file_above_max_bytes")
        self._data.append(piece)
        self._waiting += len(piece)
        if len(self.head) < FILE_CHUNK_BYTES:
            self.head += piece

    def _on_part_end(self) -> None:
        if self._field is not None and self._field != self._file_field:
            self.fields[self._field] = self._value.decode("utf-8", errors="replace")

    def _on_end(self) -> None:
        self._ended = True
