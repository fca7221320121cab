"""Ends a batch whose every line has its outcome: its shards' parts become its files, and nothing is copied."""

from __future__ import annotations

import logging

from pronghorn.clock import Clock
from pronghorn.control.orphans import remove_leftovers
from pronghorn.domain.lifecycle import final_status
from pronghorn.domain.model import Batch, BatchStatus, File
from pronghorn.errors import Fenced, StorageError
from pronghorn.ids import Ids
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.segments import Segments

log = logging.getLogger("pronghorn.finalizer")


class Finalizer:
    """Moves batches to their terminal status."""

    def __init__(
        self, metadata: Metadata, files: Files, blobs: Blobs, segments: Segments, clock: Clock, ids: Ids
    ) -> None:
        self._metadata = metadata
        self._files = files
        self._blobs = blobs
        self._segments = segments
        self._clock = clock
        self._ids = ids

    async def finish(self, batch: Batch) -> None:
        """End a batch that has no unfinished shard; one that was cancelled meanwhile is left for the next look."""
        try:
            if batch.status is BatchStatus.IN_PROGRESS:
                batch = await self._metadata.advance(batch, BatchStatus.FINALIZING, self._clock.now())
            await self._metadata.finish_batch(
                batch,
                final_status(batch.closing),
                self._clock.now(),
                output=self._file(batch, "output"),
                errors=self._file(batch, "error"),
            )
        except Fenced as fenced:
            log.info("not finished yet: %s", fenced)
            return
        await self._clean_up(batch)

    async def _clean_up(self, batch: Batch) -> None:
        """Remove what refused and broken-off attempts have left; what cannot be removed, the next start tries again."""
        try:
            await remove_leftovers(batch.id, self._files, self._blobs, self._segments)
        except (OSError, StorageError) as error:
            log.warning("leftovers of %s stay until the next start: %s", batch.id, error)

    def _file(self, batch: Batch, kind: str) -> File:
        now, keep_s = self._clock.now(), batch.output_expires_after_s
        return File(
            id=self._ids.new("file-"),
            account_id=batch.account_id,
            purpose="batch_output",
            filename=f"{batch.id}_{kind}.jsonl",
            bytes=0,
            created_at=now,
            expires_at=None if keep_s is None else now + keep_s,
        )
