"""A running batch, watched: its results as they grow and its status as it changes. Extensions of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query
from fastapi.responses import StreamingResponse

from pronghorn.api import content, wire
from pronghorn.api.auth import caller
from pronghorn.api.launch import find_batch
from pronghorn.clock import Clock
from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import Batch
from pronghorn.errors import NotFound
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, Result

LOOK_INTERVAL_S = 0.5
# Proxies close connections on which nothing moves; a comment line keeps this one.
HEARTBEAT_S = 15.0

Offset = Annotated[int, Query(ge=0, description="Bytes to leave out at the start, to go on after a break.")]
Follow = Annotated[bool, Query(description="Keep the connection open until the batch has ended.")]

_LINES: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-ndjson": {"schema": {"type": "string"}}}}}
_EVENTS: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}}}


def routes(metadata: Metadata, files: Files, blobs: Blobs, clock: Clock) -> APIRouter:
    """Return the routes that watch a batch."""
    router = APIRouter(tags=["Batch"])

    @router.get("/v1/batches/{batch_id}/output", response_class=StreamingResponse, responses=_LINES)
    async def stream_output(
        batch_id: str, account_id: Annotated[str, Depends(caller)], offset: Offset = 0, follow: Follow = False
    ) -> StreamingResponse:
        """Return the output file as far as it is known, in input order."""
        return await results(await find_batch(metadata, batch_id, account_id), Result.OUTPUT, offset, follow)

    @router.get("/v1/batches/{batch_id}/errors", response_class=StreamingResponse, responses=_LINES)
    async def stream_errors(
        batch_id: str, account_id: Annotated[str, Depends(caller)], offset: Offset = 0, follow: Follow = False
    ) -> StreamingResponse:
        """Return the error file as far as it is known, in input order."""
        return await results(await find_batch(metadata, batch_id, account_id), Result.ERRORS, offset, follow)

    @router.get("/v1/batches/{batch_id}/events", response_class=StreamingResponse, responses=_EVENTS)
    async def stream_events(batch_id: str, account_id: Annotated[str, Depends(caller)]) -> StreamingResponse:
        """Send the batch as a server-sent event whenever it changes, until it has ended."""
        events = changes(await find_batch(metadata, batch_id, account_id))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def results(batch: Batch, result: Result, offset: int, follow: bool) -> StreamingResponse:
        file_id = batch.output_file_id if result is Result.OUTPUT else batch.error_file_id
        if file_id is not None and await files.find(file_id, batch.account_id) is None:
            raise NotFound(f"No such File object: {file_id}", param="id")
        lines = growing(batch, result, offset, follow)
        return StreamingResponse(lines if follow else await content.begun(lines), media_type="application/x-ndjson")

    async def growing(batch: Batch, result: Result, offset: int, follow: bool) -> AsyncIterator[bytes]:
        """Yield the parts of the batch's finished shards up to the first that is not."""
        while True:
            refs = await metadata.finished_parts(batch.id, result)
            end = sum(ref.bytes for ref in refs)
            async for chunk in blobs.read(refs, offset, end):
                yield chunk
            offset = max(offset, end)
            if not follow or batch.status in TERMINAL:
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
            batch = await find_batch(metadata, batch.id, batch.account_id)

    async def changes(batch: Batch) -> AsyncIterator[bytes]:
        shown: bytes | None = None
        sent_at = clock.monotonic()
        while True:
            current = wire.batch_object(batch).model_dump_json().encode()
            if current != shown:
                yield b"event: batch\ndata: " + current + b"\n\n"
                shown, sent_at = current, clock.monotonic()
            elif clock.monotonic() - sent_at >= HEARTBEAT_S:
                yield b": still here\n\n"
                sent_at = clock.monotonic()
            if batch.status in TERMINAL:
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
            batch = await find_batch(metadata, batch.id, batch.account_id)

    return router
