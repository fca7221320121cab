"""Lines whose bodies are the same, byte for byte: the first of them is run, the others are copies of its outcome.

A body is known by 128 bits of BLAKE2b, of which no two have ever been found to be the same. They are gathered in
buckets, which spill to disk past a bound, and each bucket is looked through at the end; what is left in memory is one
number a line.
"""

from __future__ import annotations

import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Collection, Iterator, Sequence
from hashlib import blake2b
from typing import IO

from pronghorn.domain.model import Copy
from pronghorn.limits import PLANNING_DIGESTS_BYTES_MAX

_DIGEST_BYTES = 16
_NUMBER_BYTES = 8
_RECORD_BYTES = _DIGEST_BYTES + _NUMBER_BYTES
_BUCKETS = 256


class Bodies:
    """Every body of a file, by its digest and the number of its line."""

    def __init__(self) -> None:
        self._buckets = [bytearray() for _ in range(_BUCKETS)]
        self._held_bytes = 0
        self._spilled: list[IO[bytes]] = []
        self._last_line = 0

    def add(self, line: int, body: bytes) -> None:
        """Take in the next line's body; lines come in order."""
        digest = blake2b(body, digest_size=_DIGEST_BYTES).digest()
        self._buckets[digest[0]] += digest + line.to_bytes(_NUMBER_BYTES, "little")
        self._last_line = line
        self._held_bytes += _RECORD_BYTES
        if self._held_bytes >= PLANNING_DIGESTS_BYTES_MAX:
            self._spill()

    def originals(self, not_run: Collection[int] = ()) -> Originals:
        """Return whose copy each line is; lines that are `not_run` are no copies and have none."""
        found = array("Q" if self._last_line >> 32 else "I", [0]) * (self._last_line + 1)
        count = 0
        for bucket in self._all():
            first: dict[bytes, int] = {}
            for start in range(0, len(bucket), _RECORD_BYTES):
                digest = bytes(bucket[start : start + _DIGEST_BYTES])
                line = int.from_bytes(bucket[start + _DIGEST_BYTES : start + _RECORD_BYTES], "little")
                if line not in not_run and (original := first.setdefault(digest, line)) != line:
                    found[line] = original
                    count += 1
        return Originals(found, count)

    def close(self) -> None:
        """Give back the disk space that a very large file has taken."""
        for file in self._spilled:
            file.close()

    def _all(self) -> Iterator[bytes | bytearray]:
        for index, bucket in enumerate(self._buckets):
            if self._spilled:
                self._spilled[index].seek(0)
                yield self._spilled[index].read() + bucket
            else:
                yield bucket

    def _spill(self) -> None:
        if not self._spilled:
            self._spilled = [tempfile.TemporaryFile() for _ in range(_BUCKETS)]  # noqa: SIM115
        for file, bucket in zip(self._spilled, self._buckets, strict=True):
            file.write(bucket)
            bucket.clear()
        self._held_bytes = 0


class Originals:
    """Whose copy each line of a file is: at a line's number the number of the line that is run for it, or 0."""

    def __init__(self, by_line: array[int], copies: int) -> None:
        self._by_line = by_line
        self.copies = copies

    def between(self, first: int, end: int | None, shard_starts: Sequence[int]) -> list[Copy]:
        """Return the copies from line `first` up to `end`, or to the last, given the first line of every shard."""
        known = len(self._by_line)
        return [
            Copy(line, original, bisect_right(shard_starts, original) - 1)
            for line in range(first, known if end is None else min(end, known))
            if (original := self._by_line[line])
        ]


NONE = Originals(array("Q"), 0)
