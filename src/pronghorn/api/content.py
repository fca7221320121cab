"""A stored file's bytes as an HTTP answer: whole or by range, so that an interrupted download can go on."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import NamedTuple
from urllib.parse import quote

from fastapi import Request
from fastapi.responses import Response, StreamingResponse

from pronghorn.domain.model import BlobRef, File
from pronghorn.errors import RequestError
from pronghorn.storage.blobs import Blobs

_RANGE = re.compile(r"bytes=(\d{0,19})-(\d{0,19})")


class Span(NamedTuple):
    """Bytes `start` to `end`, exclusive, of a file."""

    start: int
    end: int


class Unsatisfiable(RequestError):
    """The range lies outside the file."""

    status = 416

    def __init__(self, wanted: str, size: int) -> None:
        super().__init__(f"The file has {size} bytes; the range '{wanted}' lies outside it.")
        self.headers = {"Content-Range": f"bytes */{size}"}


async def respond(request: Request, file: File, refs: list[BlobRef], blobs: Blobs) -> Response:
    """Return a file's content, or the part that the request's Range asks for.

    Raises Unsatisfiable when the range lies outside the file, Damaged when its first chunk is not what was stored.
    """
    etag = f'"{file.id}"'  # a file never changes
    headers = {
        "ETag": etag,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f"attachment; filename*=UTF-8''{quote(file.filename, safe='')}",
        "X-Content-Type-Options": "nosniff",
    }
    if etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    wanted = request.headers.get("range")
    if request.headers.get("if-range", etag) != etag:
        wanted = None
    span = parse_range(wanted, file.bytes) if wanted else None
    status = 206 if span else 200
    if span:
        headers["Content-Range"] = f"bytes {span.start}-{span.end - 1}/{file.bytes}"
    start, end = span or Span(0, file.bytes)
    headers["Content-Length"] = str(end - start)
    if request.method == "HEAD":
        return Response(status_code=status, media_type="application/octet-stream", headers=headers)
    body = await begun(blobs.read(refs, start, end))
    return StreamingResponse(body, status_code=status, media_type="application/octet-stream", headers=headers)


async def begun(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Return the same chunks with the first one read: an error that it meets is still answered as one.

    What a later chunk meets can only break the connection off, short of the length that was announced.
    """
    first = await anext(chunks, b"")

    async def rest() -> AsyncIterator[bytes]:
        yield first
        async for chunk in chunks:
            yield chunk

    return rest()


def parse_range(header: str, size: int) -> Span | None:
    """Return the bytes that a Range header asks for, or None when it is to be ignored (RFC 9110, section 14.2).

    Raises Unsatisfiable when it asks for nothing that is there.
    """
    match = _RANGE.fullmatch(header.strip().replace(" ", ""))
    if not match or match[1] == match[2] == "":
        return None
    first, last = match[1], match[2]
    start, end = (int(first), int(last) + 1 if last else size) if first else (size - min(int(last), size), size)
    if first and last and int(last) < int(first):
        return None
    if start >= size:
        raise Unsatisfiable(header, size)
    return Span(start, min(end, size))
