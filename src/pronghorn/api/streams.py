"""A running batch, watched: its results as they grow and its status as it changes. Extensions of OpenAI's API."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import StreamingResponse

from pronghorn.api import content, wire
from pronghorn.api.auth import AccountId
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


@dataclass(frozen=True, slots=True)
class StreamsApi:
    """Answers those who watch a batch."""

    metadata: Metadata
    files: Files
    blobs: Blobs
    clock: Clock

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Batch"], default_response_class=StreamingResponse)
        router.get("/v1/batches/{batch_id}/output", responses=_LINES)(self.stream_output)
        router.get("/v1/batches/{batch_id}/errors", responses=_LINES)(self.stream_errors)
        router.get("/v1/batches/{batch_id}/events", responses=_EVENTS)(self.stream_events)
        return router

    async def stream_output(
        self, batch_id: str, account_id: AccountId, offset: Offset = 0, follow: Follow = False
    ) -> StreamingResponse:
        """Return the output file as far as it is known, in input order."""
        batch = await find_batch(self.metadata, batch_id, account_id)
        return await self._results(batch, Result.OUTPUT, offset, follow)

    async def stream_errors(
        self, batch_id: str, account_id: AccountId, offset: Offset = 0, follow: Follow = False
    ) -> StreamingResponse:
        """Return the error file as far as it is known, in input order."""
        batch = await find_batch(self.metadata, batch_id, account_id)
        return await self._results(batch, Result.ERRORS, offset, follow)

    async def stream_events(self, batch_id: str, account_id: AccountId) -> StreamingResponse:
        """Send the batch as a server-sent event whenever it changes, until it has ended."""
        events = self._changes(await find_batch(self.metadata, batch_id, account_id))
        return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})

    async def _results(self, batch: Batch, result: Result, offset: int, follow: bool) -> StreamingResponse:
        file_id = batch.output_file_id if result is Result.OUTPUT else batch.error_file_id
        if file_id is not None and await self.files.find(file_id, batch.account_id) is None:
            raise NotFound(f"No such File object: {file_id}", param="id")
        lines = self._growing(batch, result, offset, follow)
        return StreamingResponse(lines if follow else await content.begun(lines), media_type="application/x-ndjson")

    async def _growing(self, batch: Batch, result: Result, offset: int, follow: bool) -> AsyncIterator[bytes]:
        """Yield the parts of the batch's finished shards up to the first that is not."""
        while True:
            refs = await self.metadata.finished_parts(batch.id, result)
            end = sum(ref.bytes for ref in refs)
            async for chunk in self.blobs.read(refs, offset, end):
                yield chunk
            offset = max(offset, end)
            if not follow or batch.status in TERMINAL:
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
            batch = await find_batch(self.metadata, batch.id, batch.account_id)

    async def _changes(self, batch: Batch) -> AsyncIterator[bytes]:
        shown: bytes | None = None
        sent_at = self.clock.monotonic()
        while True:
            current = wire.batch_object(batch).model_dump_json().encode()
            if current != shown:
                yield b"event: batch\ndata: " + current + b"\n\n"
                shown, sent_at = current, self.clock.monotonic()
            elif self.clock.monotonic() - sent_at >= HEARTBEAT_S:
                yield b": still here\n\n"
                sent_at = self.clock.monotonic()
            if batch.status in TERMINAL:
                return
            await asyncio.sleep(LOOK_INTERVAL_S)
            batch = await find_batch(self.metadata, batch.id, batch.account_id)
