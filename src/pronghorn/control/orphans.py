"""Removes what a crash has left in storage and nothing names: it would lie there for ever.

A blob is stored before the row that names it, so a crash between the two leaves one that nobody can know of. Whatever
lies there before the first request is either named or such a one; a batch that has ended gets no further part.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
from collections.abc import Iterable, Iterator

from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.segments import Segments

log = logging.getLogger("pronghorn.orphans")

# Keys that are looked up in one query.
KEYS_MAX = 500
_UPLOADED = ("files", "parts")


class Orphans:
    """What lay in storage at the start; make it before the first request is taken."""

    def __init__(self, metadata: Metadata, files: Files, blobs: Blobs, segments: Segments) -> None:
        self._metadata = metadata
        self._files = files
        self._blobs = blobs
        self._segments = segments
        self._uploaded = [key for folder in _UPLOADED for key in blobs.keys(folder)]
        self._batches = {key.split("/")[1] for key in blobs.folders("batches")} | set(segments.batches())

    async def remove(self) -> int:
        """Remove what nothing names, and return how much that was."""
        removed = await _remove_unnamed(self._files, self._blobs, self._uploaded)
        for batch_id in sorted(self._batches):
            if await self._metadata.has_ended(batch_id):
                removed += await remove_leftovers(batch_id, self._files, self._blobs, self._segments)
        if removed:
            log.info("removed %d stored pieces that a crash had left and nothing named", removed)
        return removed


async def remove_leftovers(batch_id: str, files: Files, blobs: Blobs, segments: Segments) -> int:
    """Remove what attempts at an ended batch's shards have left beside its files; return how many parts that was."""
    await asyncio.to_thread(segments.discard_batch, batch_id)
    return await _remove_unnamed(files, blobs, await asyncio.to_thread(blobs.keys, f"batches/{batch_id}"))


async def _remove_unnamed(files: Files, blobs: Blobs, keys: Iterable[str]) -> int:
    removed = 0
    for some in _in_groups(keys):
        named = await files.named(some)
        for key in some:
            if key not in named:
                await blobs.delete(key)
                removed += 1
    return removed


def _in_groups(keys: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(keys)
    while some := list(itertools.islice(rest, KEYS_MAX)):
        yield some
