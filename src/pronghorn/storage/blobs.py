"""Stored bytes under server-made keys, read by range. A local directory today; obstore speaks S3, GCS and Azure too."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import obstore
from obstore.exceptions import BaseError
from obstore.store import LocalStore

from pronghorn.domain.model import BlobRef
from pronghorn.errors import Damaged, NotStored, StorageError
from pronghorn.limits import FILE_CHUNK_BYTES

_UNFINISHED = ".part"


class BlobWriter:
    """One blob being written: nothing is under its key until `commit` returns, and then it survives a power cut.

    Use it as a context manager: leaving it without `commit` leaves nothing behind. Calls block.
    """

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self._path = path
        self._unfinished = path.with_name(path.name + _UNFINISHED)
        self._file: BinaryIO = self._unfinished.open("wb", buffering=FILE_CHUNK_BYTES)
        self.bytes = 0

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.bytes += len(data)

    def commit(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        self._unfinished.rename(self._path)
        sync_directory(self._path.parent)

    def __enter__(self) -> BlobWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        self._unfinished.unlink(missing_ok=True)


class Blobs:
    """The blobs below one directory.

    Reads run on our threads, not on obstore's own: those abort a process that ends just after one
    (PyO3/pyo3-async-runtimes#40).
    """

    def __init__(self, directory: Path) -> None:
        make_directory(directory)
        self._directory = directory
        self._store = LocalStore(directory)

    def writer(self, key: str) -> BlobWriter:
        """Start a new blob; it replaces one that is already under the key."""
        return BlobWriter(self._directory / key)

    async def read(self, blobs: Sequence[BlobRef], start: int, end: int) -> AsyncIterator[bytes]:
        """Yield bytes `start` to `end` of the blobs laid end to end, in chunks of at most FILE_CHUNK_BYTES.

        Raises NotStored when a blob is gone, Damaged when it is shorter than it was, StorageError when it cannot be
        read.
        """
        for key, first, last in _ranges(blobs, start, end):
            yield await asyncio.to_thread(self._get, key, first, last)

    def read_blocking(self, blobs: Sequence[BlobRef], start: int, end: int) -> Iterator[bytes]:
        """Do what `read` does, for a thread that works on whole files."""
        for key, first, last in _ranges(blobs, start, end):
            yield self._get(key, first, last)

    def drop_unfinished(self, folder: str) -> None:
        """Remove what writers of an earlier run left unfinished below a folder; call it before there are new ones."""
        for path in (self._directory / folder).glob(f"*{_UNFINISHED}"):
            path.unlink()

    async def delete(self, key: str) -> None:
        """Remove a blob and what an interrupted writer left of it; what is not there is already removed."""
        for name in (key, key + _UNFINISHED):
            with contextlib.suppress(FileNotFoundError):
                await asyncio.to_thread(obstore.delete, self._store, name)

    def _get(self, key: str, first: int, last: int) -> bytes:
        try:
            data = bytes(self._store.get_range(key, start=first, end=last))
        except FileNotFoundError as error:
            raise NotStored(f"stored file {key} is gone") from error
        except BaseError as error:
            raise StorageError(f"stored file {key} cannot be read: {str(error).splitlines()[0]}") from error
        if len(data) != last - first:
            raise Damaged(f"stored file {key} ends before byte {last}")
        return data


def make_directory(directory: Path) -> None:
    """Create a directory and its missing parents so that their names survive a power cut."""
    if not directory.is_dir():
        make_directory(directory.parent)
        directory.mkdir(exist_ok=True)
        sync_directory(directory.parent)


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _ranges(blobs: Sequence[BlobRef], start: int, end: int) -> Iterator[tuple[str, int, int]]:
    offset = 0
    for blob in blobs:
        first, last = max(start - offset, 0), min(end - offset, blob.bytes)
        for position in range(first, last, FILE_CHUNK_BYTES):
            yield blob.key, position, min(position + FILE_CHUNK_BYTES, last)
        offset += blob.bytes
        if offset >= end:
            return
