"""Segments: the append-only records of the outcomes of one attempt at a shard.

A record is a header (payload length, CRC32 of the payload, both little-endian 32-bit) and a payload: the line's
number, its fate, its tokens, then the line as it goes into the result file. A crash can only tear the tail: reading
stops at the first record that is short or whose checksum is wrong, and the lines after it are simply run again.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pronghorn.domain.model import ShardKey, Tally, Usage
from pronghorn.storage.blobs import make_directory, sync_directory

_HEADER = struct.Struct("<II")
_OUTCOME = struct.Struct("<QBIIII")
_READ_BYTES = 1 << 20


class Fate(enum.IntEnum):
    """Which count, and so which result file, a line's outcome belongs to."""

    COMPLETED = 0
    FAILED = 1
    UNRUN = 2


class Outcome(NamedTuple):
    """The one final record of a line; `result` is its line of the output or error file, newline included."""

    line: int
    fate: Fate
    usage: Usage
    result: bytes


class Place(NamedTuple):
    """Where a recorded outcome lies: its segment, and the offset and length of its result there."""

    segment: Path
    offset: int
    length: int
    fate: Fate
    usage: Usage


def encode(outcome: Outcome) -> bytes:
    """Return the record of one outcome."""
    usage = outcome.usage
    head = _OUTCOME.pack(
        outcome.line,
        outcome.fate,
        usage.input_tokens,
        usage.cached_tokens,
        usage.output_tokens,
        usage.reasoning_tokens,
    )
    checksum = zlib.crc32(outcome.result, zlib.crc32(head))
    return b"".join((_HEADER.pack(len(head) + len(outcome.result), checksum), head, outcome.result))


class SegmentWriter:
    """Appends records in three steps: held, written (survives this process), synced (survives a power cut)."""

    def __init__(self, path: Path) -> None:
        make_directory(path.parent)
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        sync_directory(path.parent)
        self._held: list[bytes] = []
        self._end = 0

    def append(self, outcome: Outcome) -> Place:
        """Hold a record for the next `write`, and return where its result will lie."""
        record = encode(outcome)
        offset = self._end + _HEADER.size + _OUTCOME.size
        self._end += len(record)
        self._held.append(record)
        return Place(self.path, offset, len(outcome.result), outcome.fate, outcome.usage)

    def write(self) -> None:
        """Hand the held records to the operating system.

        Raises OSError; after one the file's end is unknown and only a new process may go on.
        """
        view = memoryview(b"".join(self._held))
        self._held.clear()
        while view:
            view = view[os.write(self._descriptor, view) :]

    def sync(self) -> None:
        """Wait until what was written is on disk; blocks.

        Raises OSError; after one the page cache can no longer be trusted and only a new process may go on.
        """
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        os.close(self._descriptor)


class Segments:
    """The segments below one directory, by batch, shard and epoch."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def create(self, key: ShardKey, epoch: int) -> SegmentWriter:
        """Start the segment of a new attempt; an epoch has one segment."""
        return SegmentWriter(self._path(key, epoch))

    def recover(self, key: ShardKey) -> dict[int, Place]:
        """Return what earlier attempts at a shard recorded, by line number; the earliest record of a line counts."""
        found: dict[int, Place] = {}
        paths = self._directory.glob(f"{key.batch_id}/{key.position}-*.segment")
        for path in sorted(paths, key=lambda path: int(path.stem.split("-")[1])):
            for line, place in _read_segment(path):
                found.setdefault(line, place)
        return found

    def discard(self, key: ShardKey) -> None:
        """Remove every segment of a shard, once its commit is durable."""
        for path in self._directory.glob(f"{key.batch_id}/{key.position}-*.segment"):
            path.unlink(missing_ok=True)

    def discard_batch(self, batch_id: str) -> None:
        """Remove what is left of a batch that has ended."""
        directory = self._directory / batch_id
        for path in directory.glob("*.segment"):
            path.unlink(missing_ok=True)
        if directory.is_dir():
            directory.rmdir()

    def _path(self, key: ShardKey, epoch: int) -> Path:
        return self._directory / key.batch_id / f"{key.position}-{epoch}.segment"


class Counter:
    """Adds outcomes up, cheaply enough for every line."""

    def __init__(self) -> None:
        self._fates = [0, 0, 0]
        self._input = self._cached = self._output = self._reasoning = 0

    def add(self, fate: Fate, usage: Usage) -> None:
        self._fates[fate] += 1
        self._input += usage.input_tokens
        self._cached += usage.cached_tokens
        self._output += usage.output_tokens
        self._reasoning += usage.reasoning_tokens

    def tally(self) -> Tally:
        completed, failed, unrun = self._fates
        return Tally(completed, failed, unrun, Usage(self._input, self._cached, self._output, self._reasoning))


def tally(places: Iterable[Place]) -> Tally:
    """Count outcomes by their fate and add up their tokens."""
    counter = Counter()
    for place in places:
        counter.add(place.fate, place.usage)
    return counter.tally()


def _read_segment(path: Path) -> Iterator[tuple[int, Place]]:
    with path.open("rb", buffering=_READ_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        offset = 0
        while len(header := file.read(_HEADER.size)) == _HEADER.size:
            length, checksum = _HEADER.unpack(header)
            if not _OUTCOME.size <= length <= size - offset - _HEADER.size:
                return
            payload = file.read(length)
            if zlib.crc32(payload) != checksum:
                return
            line, fate, *tokens = _OUTCOME.unpack_from(payload)
            result = offset + _HEADER.size + _OUTCOME.size
            yield line, Place(path, result, length - _OUTCOME.size, Fate(fate), Usage(*tokens))
            offset += _HEADER.size + length
