"""However a form is cut into chunks, its file and fields are the same."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from hypothesis import example, given
from hypothesis import strategies as st

from pronghorn.api import multipart
from pronghorn.domain.model import BlobRef
from pronghorn.storage.blobs import Blobs

HEADERS = {"content-type": "multipart/form-data; boundary=bnd"}
# What looks like a boundary, or like its beginning, to a parser that takes too much or too little for one.
pieces = st.sampled_from(
    [b"\r", b"\n", b"\r\n", b"\r\n-", b"\r\n--", b"\r\n--b", b"\r\n--bn", b"\r\n--bndx", b"\n--bnd", b"-", b"bnd", b"x"]
)
contents = st.lists(pieces, max_size=12).map(b"".join)
contents = contents.filter(lambda content: b"\r\n--bnd" not in content.replace(b"bndx", b""))


def form(content: bytes, last: bool) -> bytes:
    file = b'--bnd\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n' + content + b"\r\n"
    field = b'--bnd\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
    return (field + file if last else file + field) + b"--bnd--\r\n"


def received(chunks: list[bytes]) -> tuple[bytes, multipart.Form]:
    async def stream() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    with tempfile.TemporaryDirectory() as folder:
        blobs = Blobs(Path(folder))
        with blobs.writer("x") as writer:
            taken = asyncio.run(multipart.receive(HEADERS, stream(), writer, file_field="file"))
            writer.commit()
        return b"".join(blobs.read_blocking([BlobRef("x", writer.bytes)], 0, writer.bytes)), taken


@given(contents, st.booleans(), st.lists(st.integers(0, 300), max_size=8), st.integers(0, 40))
@example(b"\r\n\r\nx", True, [], 1)
def test_chunks_do_not_show(content: bytes, last: bool, places: list[int], every: int) -> None:
    body = form(content, last)
    cuts = sorted({*(place for place in places if place < len(body)), *(range(0, len(body), every) if every else ())})
    chunks = [body[start:end] for start, end in zip([0, *cuts], [*cuts, len(body)], strict=True)]
    assert received(chunks) == (content, multipart.Form({"purpose": "batch"}, "f", content))
