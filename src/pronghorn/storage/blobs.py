"""Stored bytes under server-made keys, read by range and never unchecked: `checksums` follow the content of each."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, TypeVar

from pronghorn.domain.model import BlobRef
from pronghorn.errors import Damaged, NotStored, StorageError
from pronghorn.limits import FILE_CHUNK_BYTES, MIB
from pronghorn.storage import durable
from pronghorn.storage.checksums import BLOCK_BYTES, CHECKSUM_BYTES, Checksums, blocks_of, first_bad_block
from pronghorn.storage.room import Room

Result = TypeVar("Result")

# How much is written between two looks at the room that is left, far less than the reserve; it then goes to the disk
# while more comes.
STRETCH_BYTES = 8 * MIB
# Reading whole files takes minutes each; so many at once keep the disk and the cores busy.
WHOLE_FILES_MAX = 4
_UNFINISHED = ".part"


class BlobWriter:
    """One blob being written: nothing is under its key until `commit` returns, and then it survives a power cut.

    Use it as a context manager: leaving it without `commit` leaves nothing behind. `bytes` is the content's length.
    Calls block, and raise StorageFull or an OSError that `errors.is_full` knows when there is no room.
    """

    def __init__(self, path: Path, room: Room | None = None) -> None:
        self._room = room
        self._look_at_room()
        durable.make_directory(path.parent)
        self._path = path
        self._unfinished = path.with_name(path.name + _UNFINISHED)
        self._file: BinaryIO = self._unfinished.open("wb", buffering=FILE_CHUNK_BYTES)
        self._checksums = Checksums()
        self._renamed = False
        self._stretch_start = 0
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            durable.refused(error, self._unfinished)
        self._checksums.add(data)
        self.bytes += len(data)
        stretch = self.bytes - self._stretch_start
        if stretch >= STRETCH_BYTES:
            self._look_at_room()
            durable.begin_sync(self._file.fileno(), self._stretch_start, stretch)
            self._stretch_start = self.bytes

    def commit(self) -> None:
        try:
            self._file.write(self._checksums.trailer())
            self._file.flush()
        except OSError as error:
            durable.refused(error, self._unfinished)
        durable.sync_file(self._file.fileno(), self._unfinished)
        self._file.close()
        self._unfinished.rename(self._path)
        self._renamed = True
        durable.sync_directory(self._path.parent)

    def _look_at_room(self) -> None:
        if self._room is not None:
            self._room.require()

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave nothing behind unless the blob is committed."""
        if self._renamed:
            return
        with contextlib.suppress(OSError):  # what is still buffered may find no room, and is not wanted
            self._file.close()
        self._unfinished.unlink(missing_ok=True)


class Blobs:
    """The blobs below one directory; given a room, writers leave its reserve alone."""

    def __init__(self, directory: Path, room: Room | None = None) -> None:
        self._directory = directory
        self._room = room
        self._whole_files = ThreadPoolExecutor(WHOLE_FILES_MAX, "whole-files")

    async def through_whole_files(self, work: Callable[[], Result]) -> Result:
        """Run `work`, which goes through whole files, on one of a few threads for that: nothing short waits behind it.

        A caller that is cancelled does not end it.
        """
        return await asyncio.get_running_loop().run_in_executor(self._whole_files, work)

    @contextlib.asynccontextmanager
    async def writing(self, key: str) -> AsyncIterator[BlobWriter]:
        """Start a new blob as `writer` does, for a coroutine: beginning one, and dropping a large one, takes time."""
        writer = await asyncio.to_thread(self.writer, key)
        try:
            yield writer
        finally:
            await asyncio.to_thread(writer.close)

    def writer(self, key: str) -> BlobWriter:
        """Start a new blob; it replaces one that is already under the key."""
        return BlobWriter(self._directory / key, self._room)

    async def read(self, blobs: Sequence[BlobRef], start: int, end: int) -> AsyncIterator[bytes]:
        """Yield bytes `start` to `end` of the blobs laid end to end, in chunks of at most FILE_CHUNK_BYTES.

        Raises NotStored when a blob is gone, Damaged when it is not what was written, StorageError when it cannot be
        read.
        """
        for blob, first, last in _ranges(blobs, start, end):
            yield await asyncio.to_thread(self._get, blob, first, last)

    def read_blocking(self, blobs: Sequence[BlobRef], start: int, end: int) -> Iterator[bytes]:
        """Do what `read` does, for a thread that works on whole files."""
        for blob, first, last in _ranges(blobs, start, end):
            yield self._get(blob, first, last)

    def keys(self, folder: str) -> list[str]:
        """Return the keys directly below a folder, those of blobs that writers have left unfinished included."""
        return [f"{folder}/{path.name}" for path in self._below(folder) if not path.is_dir()]

    def folders(self, folder: str) -> list[str]:
        """Return the folders directly below a folder."""
        return [f"{folder}/{path.name}" for path in self._below(folder) if path.is_dir()]

    def _below(self, folder: str) -> Iterator[os.DirEntry[str]]:
        with contextlib.suppress(FileNotFoundError), os.scandir(self._directory / folder) as entries:
            yield from entries

    async def delete(self, key: str) -> None:
        """Remove a blob and what an interrupted writer left of it; what is not there is already removed."""
        for name in (key, key + _UNFINISHED):
            await asyncio.to_thread((self._directory / name).unlink, missing_ok=True)

    def _get(self, blob: BlobRef, first: int, last: int) -> bytes:
        """Return a range, read and checked as the whole blocks that it touches."""
        first_block, end_block = blocks_of(first, last)
        start, end = first_block * BLOCK_BYTES, min(end_block * BLOCK_BYTES, blob.bytes)
        checksums_at = blob.bytes + first_block * CHECKSUM_BYTES
        checksums_bytes = (end_block - first_block) * CHECKSUM_BYTES
        try:
            with (self._directory / blob.key).open("rb", buffering=0) as file:
                content = os.pread(file.fileno(), end - start, start)
                checksums = os.pread(file.fileno(), checksums_bytes, checksums_at)
        except FileNotFoundError as error:
            raise NotStored(f"stored file {blob.key} is gone") from error
        except OSError as error:
            raise StorageError(f"stored file {blob.key} cannot be read: {error.strerror}") from error
        if len(content) != end - start or len(checksums) != checksums_bytes:
            raise Damaged(f"stored file {blob.key} is damaged: its end is missing")
        if (bad := first_bad_block(memoryview(content), checksums)) is not None:
            place = start + bad * BLOCK_BYTES
            raise Damaged(f"stored file {blob.key} is damaged: bytes {place} to {place + BLOCK_BYTES} have changed")
        return content if (start, end) == (first, last) else content[first - start : last - start]


def _ranges(blobs: Sequence[BlobRef], start: int, end: int) -> Iterator[tuple[BlobRef, int, int]]:
    offset = 0
    for blob in blobs:
        position, last = max(start - offset, 0), min(end - offset, blob.bytes)
        while position < last:
            chunk_end = min(position - position % FILE_CHUNK_BYTES + FILE_CHUNK_BYTES, last)
            yield blob, position, chunk_end
            position = chunk_end
        offset += blob.bytes
        if offset >= end:
            return
