"""Gives lines that are copies the outcomes of their originals, from this shard's records or from earlier shards' parts.

A part is in input order, and every result begins with an id that ends in its line's number in digits of fixed width: so
a result is found by halving, in a handful of reads, and no index is kept anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import groupby

from pronghorn.domain.model import BlobRef, Closing, Copy, Parts, Usage
from pronghorn.errors import Damaged
from pronghorn.ids import line_id
from pronghorn.limits import KIB, MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Fate, Outcome, Records
from pronghorn.worker import results
from pronghorn.worker.shard_run import ShardRun

# What a search reads at a time, which is what storage reads to check a single byte; and how much of it is kept, since
# the next original is likely to be near.
BLOCK_BYTES = 64 * KIB
BLOCKS_HELD_MAX = 256
# What is recorded between two writes: an answer may be large, and its copies many.
PIECE_BYTES = 4 * MIB


def missing(run: ShardRun) -> list[int]:
    """Return the positions of the shards that are not done and hold originals of the run's copies."""
    return sorted({copy.position for copy, _ in run.copies.values()} - {run.key.position} - run.originals.keys())


def outcomes(run: ShardRun, blobs: Blobs) -> Iterator[Outcome]:
    """Yield the outcomes of the run's copies, once no original is missing; blocks.

    They have no tokens: those were spent once, and are the original's.
    """
    search = Search(blobs)
    waiting = sorted(run.copies.values(), key=_original)
    own = {copy.original: run.places[copy.original] for copy, _ in waiting if copy.position == run.key.position}
    records = Records(own.values())
    try:
        for (position, original), copies in groupby(waiting, _original):
            if original in own:
                fate, result = own[original].fate, bytes(next(records.results([own[original]])))
            else:
                fate, result = _stored(run.key.batch_id, original, run.originals[position], search)
            for copy, custom_id in copies:
                yield Outcome(copy.line, fate, Usage(), results.copied(run.key.batch_id, copy, custom_id, result))
    finally:
        records.close()


def piece(found: Iterator[Outcome]) -> list[Outcome]:
    """Return the next outcomes, a bounded number of bytes of them; blocks."""
    taken, size = [], 0
    for outcome in found:
        taken.append(outcome)
        size += len(outcome.result)
        if size >= PIECE_BYTES:
            break
    return taken


def _original(waiting: tuple[Copy, bytes]) -> tuple[int, int]:
    copy, _ = waiting
    return copy.position, copy.original


def _stored(batch_id: str, original: int, parts: Parts, search: Search) -> tuple[Fate, bytes]:
    head = b'{"id":"%b"' % line_id(batch_id, original).encode()
    if (result := search.find(parts.output, head)) is not None:
        return Fate.COMPLETED, result
    if (result := search.find(parts.errors, head)) is not None:
        return (Fate.UNRUN if results.error_code(result) in set(Closing) else Fate.FAILED), result
    raise Damaged(f"line {original} of {batch_id} has no result, and other lines are copies of it")


class Search:
    """Finds results in parts by how they begin."""

    def __init__(self, blobs: Blobs) -> None:
        self._blobs = blobs
        self._block = lru_cache(BLOCKS_HELD_MAX)(self._read_block)

    def find(self, part: BlobRef | None, head: bytes) -> bytes | None:
        """Return the result that begins with `head`, newline included, or None."""
        low, high = 0, 0 if part is None else part.bytes
        while part is not None and low < high:
            middle = (low + high) // 2
            start = self._line_start(part, middle)
            if start >= high:
                high = middle
                continue
            found = self._read(part, start, start + len(head))
            if found == head:
                return self._read(part, start, self._line_start(part, start + 1))
            if found < head:
                low = start + 1
            else:
                high = middle
        return None

    def _line_start(self, part: BlobRef, at: int) -> int:
        """Return where the first line that starts at `at` or later does; the part's end if none does."""
        if at == 0:
            return 0
        for index in range((at - 1) // BLOCK_BYTES, -(-part.bytes // BLOCK_BYTES)):
            block_at = index * BLOCK_BYTES
            newline = self._block(part, index).find(b"\n", max(at - 1 - block_at, 0))
            if newline >= 0:
                return block_at + newline + 1
        return part.bytes

    def _read(self, part: BlobRef, start: int, end: int) -> bytes:
        first, last = start // BLOCK_BYTES, -(-min(end, part.bytes) // BLOCK_BYTES)
        blocks = b"".join(self._block(part, index) for index in range(first, last))
        return blocks[start - first * BLOCK_BYTES : end - first * BLOCK_BYTES]

    def _read_block(self, part: BlobRef, index: int) -> bytes:
        start = index * BLOCK_BYTES
        return b"".join(self._blobs.read_blocking([part], start, min(start + BLOCK_BYTES, part.bytes)))
