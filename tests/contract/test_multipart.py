"""A form that comes too slowly, and a disk that refuses what is written behind the reading."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from pronghorn.api import multipart
from pronghorn.errors import InvalidRequest, SlowBody
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs, BlobWriter

HEADERS = {"content-type": "multipart/form-data; boundary=bnd"}
HEAD = b'--bnd\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
TAIL = b"\r\n--bnd--\r\n"


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[BlobWriter]:
    with Blobs(tmp_path).writer("x") as writer:
        yield writer


async def receive(chunks: AsyncIterator[bytes], writer: BlobWriter) -> multipart.Form:
    return await multipart.receive(HEADERS, chunks, writer, file_field="file")


@pytest.mark.parametrize("interval_s", [3600.0, 0.001], ids=["stalled", "trickling"])
async def test_a_body_that_does_not_come_on_is_given_up(
    writer: BlobWriter, monkeypatch: pytest.MonkeyPatch, interval_s: float
) -> None:
    monkeypatch.setattr(multipart, "UPLOAD_STEP_S_MAX", 0.1)

    async def slow() -> AsyncIterator[bytes]:
        yield HEAD
        while True:
            await asyncio.sleep(interval_s)
            yield b"x"

    with pytest.raises(SlowBody, match=r"bytes in 0\.1 s"):
        await receive(slow(), writer)


async def test_a_body_that_comes_on_may_take_longer(writer: BlobWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multipart, "UPLOAD_STEP_S_MAX", 2.0)
    monkeypatch.setattr(multipart, "UPLOAD_STEP_BYTES", 1)
    begin = asyncio.get_running_loop().time()

    async def steady() -> AsyncIterator[bytes]:
        yield HEAD
        while asyncio.get_running_loop().time() < begin + 3:
            await asyncio.sleep(0.05)
            yield b"x"
        yield TAIL

    assert (await receive(steady(), writer)).filename == "f"


class FullDisk:
    """Takes a number of writes, and refuses the next."""

    def __init__(self, room: int) -> None:
        self._room = room
        self.refused = 0

    def write(self, data: bytes) -> None:
        self._room -= 1
        if self._room < 0:
            self.refused += 1
            raise OSError(errno.ENOSPC, "no room")


@pytest.mark.parametrize("room", [0, 1, 2, 3])
async def test_what_a_write_behind_the_reading_meets_is_raised(room: int) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield HEAD
        for _ in range(3):
            yield bytes(MIB)
        yield b"rest" + TAIL

    disk = FullDisk(room)
    with pytest.raises(OSError, match="no room"):
        await receive(chunks(), disk)  # type: ignore[arg-type]
    assert disk.refused == 1, "nothing is written after what was refused"


async def test_what_is_wrong_with_the_form_comes_before_what_the_disk_says() -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield HEAD
        yield bytes(MIB)

    with pytest.raises(InvalidRequest, match="before its closing boundary"):
        await receive(chunks(), FullDisk(0))  # type: ignore[arg-type]
