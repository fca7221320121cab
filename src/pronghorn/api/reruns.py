"""/v1/batches/{batch_id}/retry: only what failed, again. An extension of OpenAI's API."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Annotated

from fastapi import APIRouter, Depends

from pronghorn.api import wire
from pronghorn.api.auth import caller
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


def routes(
    metadata: Metadata,
    files: Files,
    blobs: Blobs,
    launcher: Launcher,
    clock: Clock,
    ids: Ids,
    *,
    line_bytes_max: int,
    batch_file_expires_s: int | None,
) -> APIRouter:
    """Return the route that retries; `batch_file_expires_s` is the life of the inputs that it makes."""
    router = APIRouter(tags=["Batch"])

    @router.post("/v1/batches/{batch_id}/retry")
    async def retry_batch(
        batch_id: str,
        body: wire.RetryBatch,
        account_id: Annotated[str, Depends(caller)],
        idempotency_key: IdempotencyKey = None,
    ) -> wire.BatchObject:
        """Run the lines of an ended batch that failed or were not run, or some of them, as a new batch."""
        old = await find_batch(metadata, batch_id, account_id)
        path = f"/v1/batches/{batch_id}/retry"
        # What has been sent before is answered as then, whether or not the files of that time are still there.
        if repeated := await launcher.launched(account_id, path, body, idempotency_key):
            return wire.batch_object(repeated)
        if old.status not in TERMINAL:
            raise Conflict(f"Cannot retry a batch with status '{old.status}': wait for its end, or cancel it.")
        selection = Selection(frozenset(body.codes), frozenset(body.status_codes), body.overrides)
        file = await failed_lines(old, selection)
        launched: Batch | None = None
        try:
            launched = await launcher.launch(again(old, file, body), path, body, idempotency_key)
        finally:
            if launched is None or launched.input_file_id != file.id:
                await files.delete(file.id, account_id)  # refused, or the request has been sent before
        return wire.batch_object(launched)

    async def failed_lines(old: Batch, selection: Selection) -> File:
        """Store the lines to run again as a file of their own."""
        source = await files.find(old.input_file_id, old.account_id)
        errors = old.error_file_id and await files.find(old.error_file_id, old.account_id)
        if source is None or not errors:
            raise InvalidRequest(FILES_GONE)
        lines = await lines_of(source, line_bytes_max)
        results = await lines_of(errors, RESULT_BYTES_MAX)
        file_id = ids.new("file-")
        key = f"files/{file_id}"
        try:
            size = await blobs.through_whole_files(partial(store, key, lines, results, selection))
        except NotStored as error:  # deleted while they were read
            raise InvalidRequest(FILES_GONE) from error
        if not size:
            raise InvalidRequest("There is nothing to retry: no failed line has one of these codes or statuses.")
        now = clock.now()
        expires_at = None if batch_file_expires_s is None else now + batch_file_expires_s
        file = File(file_id, old.account_id, "batch", f"{old.id}_retry.jsonl", size, now, expires_at)
        try:
            await files.add(file, [BlobRef(key, size)])
        except StorageError:
            await blobs.delete(key)
            raise
        return file

    async def lines_of(file: File, bytes_max: int) -> Iterable[RawLine]:
        refs = await files.blobs(file.id)
        return split_lines(blobs.read_blocking(refs, 0, file.bytes), line_bytes_max=bytes_max)

    def store(key: str, lines: Iterable[RawLine], results: Iterable[RawLine], selection: Selection) -> int:
        with blobs.writer(key) as writer:
            for line in select(lines, results, selection):
                writer.write(line)
            if writer.bytes:
                writer.commit()
            return writer.bytes

    def again(old: Batch, file: File, body: wire.RetryBatch) -> Batch:
        now = clock.now()
        window = body.completion_window or old.completion_window
        window_s = wire.window_seconds(window)
        return Batch(
            id=ids.new("batch_"),
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

    return router
