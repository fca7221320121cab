"""Segments: the append-only records of the outcomes of one attempt at a shard.

A record is a header (payload length, CRC32 of the payload, both little-endian 32-bit) and a payload: the line's
number, its fate, its tokens, then the line as it goes into the result file. A crash can only tear the tail: reading
stops at the first record that is short or whose checksum is wrong, and the lines after it are simply run again.

Appending after a torn tail would destroy the next record too: a writer that finds no room cuts its file back to the
last whole record, keeps the rest, and writes it when there is room.
"""

from __future__ import annotations

import enum
import os
import struct
import zlib
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from pronghorn.domain.model import ShardKey, Tally, Usage
from pronghorn.errors import Damaged, is_full
from pronghorn.limits import MIB
from pronghorn.storage import durable

_HEADER = struct.Struct("<II")
_OUTCOME = struct.Struct("<QBIIII")
_BEFORE_RESULT = _HEADER.size + _OUTCOME.size
_READ_BYTES = 1 << 20
# Thousands of usual answers; a system call for each record would cost more than all else that is done with it.
IN_MEMORY_BYTES_MAX = 16 * MIB


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
        durable.make_directory(path.parent)
        self.path = path
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        durable.sync_directory(path.parent)
        self._held: list[bytes] = []
        self._end = 0
        self._written = 0

    @property
    def all_written(self) -> bool:
        return not self._held

    def append(self, outcome: Outcome) -> Place:
        """Hold a record for the next `write`, and return where its result will lie."""
        record = encode(outcome)
        offset = self._end + _HEADER.size + _OUTCOME.size
        self._end += len(record)
        self._held.append(record)
        return Place(self.path, offset, len(outcome.result), outcome.fate, outcome.usage)

    def write(self) -> None:
        """Hand the held records to the operating system.

        Raises OSError when the disk is full; then they are still held, and what was written of them is cut off again.
        Any other error ends the process.
        """
        view = memoryview(b"".join(self._held))
        try:
            while view:
                view = view[os.write(self._descriptor, view) :]
        except OSError as error:
            if is_full(error):
                self._cut_back()
            durable.refused(error, self.path)
        self._held.clear()
        self._written = self._end

    def sync(self) -> None:
        """Wait until what was written is on disk; blocks. Any error ends the process, that of a full disk too."""
        _sync(self._descriptor, self.path)

    def _cut_back(self) -> None:
        os.lseek(self._descriptor, self._written, os.SEEK_SET)
        try:
            os.ftruncate(self._descriptor, self._written)
        except OSError as error:
            durable.refused(error, self.path)

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
        """Return what earlier attempts at a shard recorded, by line number; the earliest record of a line counts.

        It is on disk then: a process that was killed may have written it and not synced it.
        """
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

    def batches(self) -> list[str]:
        """Return the ids of the batches that have segments."""
        return [path.name for path in self._directory.iterdir()] if self._directory.is_dir() else []

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


class Records:
    """The records of a shard's segments, read back. Making one and closing it block; so does reading from the disk.

    Segments that fit `IN_MEMORY_BYTES_MAX` together are held, for records that are wanted in another order than theirs.
    """

    def __init__(self, places: Collection[Place]) -> None:
        self._files = {path: path.open("rb", buffering=0) for path in {place.segment for place in places}}
        sizes = [os.fstat(file.fileno()).st_size for file in self._files.values()]
        self.in_memory = sum(sizes) <= IN_MEMORY_BYTES_MAX
        self._held = {path: memoryview(file.read()) for path, file in self._files.items()} if self.in_memory else {}

    def results(self, places: Iterable[Place]) -> Iterator[memoryview]:
        """Yield the results that lie at the places. Raises Damaged when one is not what was recorded."""
        for place in places:
            record = self._record(place.segment, place.offset - _BEFORE_RESULT, place.offset + place.length)
            if (
                len(record) != _BEFORE_RESULT + place.length
                or zlib.crc32(record[_HEADER.size :]) != _HEADER.unpack_from(record)[1]
            ):
                raise Damaged(f"the outcomes in {place.segment} have changed at byte {place.offset}")
            yield record[_BEFORE_RESULT:]

    def _record(self, path: Path, start: int, end: int) -> memoryview:
        if self.in_memory:
            return self._held[path][start:end]
        return memoryview(os.pread(self._files[path].fileno(), end - start, start))

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _sync(descriptor: int, path: Path) -> None:
    """Wait until a segment is on disk; where its room was only promised, what was written is lost, and so are we."""
    try:
        durable.sync_file(descriptor, path)
    except OSError as error:
        durable.end_process(f"{path} has no room for what was written to it: {error.strerror}")


def _read_segment(path: Path) -> Iterator[tuple[int, Place]]:
    with path.open("rb", buffering=_READ_BYTES) as file:
        _sync(file.fileno(), path)
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
