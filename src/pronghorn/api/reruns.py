"""/v1/batches/{batch_id}/retry: only what failed, again. An extension of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from fastapi import APIRouter

from pronghorn.api import wire
from pronghorn.api.auth import AccountId
from pronghorn.api.launch import IdempotencyKey, Launcher, find_batch
from pronghorn.clock import Clock
from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import Batch, BatchStamps, BatchStatus, BlobRef, Endpoint, File
from pronghorn.domain.planning import RawLine, split_lines
from pronghorn.domain.selection import Selection, select
from pronghorn.errors import Conflict, InvalidRequest, NotStored, StorageError
from pronghorn.ids import Ids
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata

FILES_GONE = "There is nothing to retry: the batch has no failed lines, or its files are gone."
# A line of an error file holds an engine's whole answer, which has a bound of its own where it is received.
RESULT_BYTES_MAX = 1024 * MIB


@dataclass(frozen=True, slots=True)
class RetryApi:
    """Answers requests to retry; `batch_file_expires_s` is the life of the inputs that it makes."""

    metadata: Metadata
    files: Files
    blobs: Blobs
    launcher: Launcher
    clock: Clock
    ids: Ids
    line_bytes_max: int
    batch_file_expires_s: int | None

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Batch"])
        router.post("/v1/batches/{batch_id}/retry")(self.retry_batch)
        return router

    async def retry_batch(
        self, batch_id: str, body: wire.RetryBatch, account_id: AccountId, idempotency_key: IdempotencyKey = None
    ) -> wire.BatchObject:
        """Run the lines of an ended batch that failed or were not run, or some of them, as a new batch."""
        old = await find_batch(self.metadata, batch_id, account_id)
        path = f"/v1/batches/{batch_id}/retry"
        # What has been sent before is answered as then, whether or not the files of that time are still there.
        if repeated := await self.launcher.launched(account_id, path, body, idempotency_key):
            return wire.batch_object(repeated)
        if old.status not in TERMINAL:
            raise Conflict(f"Cannot retry a batch with status '{old.status}': wait for its end, or cancel it.")
        selection = Selection(frozenset(body.codes), frozenset(body.status_codes), body.overrides)
        file = await self._failed_lines(old, selection)
        launched: Batch | None = None
        try:
            launched = await self.launcher.launch(self._again(old, file, body), path, body, idempotency_key)
        finally:
            if launched is None or launched.input_file_id != file.id:
                await self.files.delete(file.id, account_id)  # refused, or the request has been sent before
        return wire.batch_object(launched)

    async def _failed_lines(self, old: Batch, selection: Selection) -> File:
        """Store the lines to run again as a file of their own."""
        source = await self.files.find(old.input_file_id, old.account_id)
        errors = old.error_file_id and await self.files.find(old.error_file_id, old.account_id)
        if source is None or not errors:
            raise InvalidRequest(FILES_GONE)
        lines = await self._lines_of(source, self.line_bytes_max)
        results = await self._lines_of(errors, RESULT_BYTES_MAX)
        file_id = self.ids.new("file-")
        key = f"files/{file_id}"
        try:
            size = await self.blobs.through_whole_files(partial(self._store, key, lines, results, selection))
        except NotStored as error:  # deleted while they were read
            raise InvalidRequest(FILES_GONE) from error
        if not size:
            raise InvalidRequest("There is nothing to retry: no failed line has one of these codes or statuses.")
        now = self.clock.now()
        expires_at = None if self.batch_file_expires_s is None else now + self.batch_file_expires_s
        file = File(file_id, old.account_id, "batch", f"{old.id}_retry.jsonl", size, now, expires_at)
        try:
            await self.files.add(file, [BlobRef(key, size)])
        except StorageError:
            await self.blobs.delete(key)
            raise
        return file

    async def _lines_of(self, file: File, bytes_max: int) -> Iterable[RawLine]:
        refs = await self.files.blobs(file.id)
        return split_lines(self.blobs.read_blocking(refs, 0, file.bytes), line_bytes_max=bytes_max)

    def _store(self, key: str, lines: Iterable[RawLine], results: Iterable[RawLine], selection: Selection) -> int:
        with self.blobs.writer(key) as writer:
            for line in select(lines, results, selection):
                writer.write(line)
            if writer.bytes:
                writer.commit()
            return writer.bytes

    def _again(self, old: Batch, file: File, body: wire.RetryBatch) -> Batch:
        now = self.clock.now()
        window = body.completion_window or old.completion_window
        window_s = wire.window_seconds(window)
        return Batch(
            id=self.ids.new("batch_"),
            order=0,
            account_id=old.account_id,
            job_id=old.job_id,
            endpoint=Endpoint(old.endpoint),
            input_file_id=file.id,
            completion_window=window,
            status=BatchStatus.VALIDATING,
            stamps=BatchStamps(created_at=now),
            expires_at=None if window_s is None else now + window_s,
            metadata=old.metadata if body.metadata is None else body.metadata,
            on_invalid=old.on_invalid,
            deduplicate=old.deduplicate,
            retry_of=old.id,
            output_expires_after_s=old.output_expires_after_s,
        )
