"""/v1/batches: create, check, retrieve, list, cancel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import APIRouter, Query

from pronghorn.api import wire
from pronghorn.api.auth import AccountId
from pronghorn.api.launch import IdempotencyKey, Launcher, find_batch
from pronghorn.checking import InputChecker
from pronghorn.clock import Clock
from pronghorn.domain.lifecycle import may_follow
from pronghorn.domain.model import Batch, BatchStamps, BatchStatus, Closing, Endpoint, OnInvalid
from pronghorn.domain.planning import Census
from pronghorn.errors import Conflict, Fenced, InvalidRequest, NotFound
from pronghorn.ids import Ids
from pronghorn.storage.metadata import Metadata


@dataclass(frozen=True, slots=True)
class BatchApi:
    """Answers the Batch API; `default_job` stands in where a client names none."""

    metadata: Metadata
    launcher: Launcher
    checker: InputChecker
    clock: Clock
    ids: Ids
    default_job: str | None

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Batch"])
        router.post("/v1/batches")(self.create_batch)
        router.post("/v1/batches/validate")(self.validate_batch)
        router.get("/v1/batches/{batch_id}")(self.retrieve_batch)
        router.get("/v1/batches")(self.list_batches)
        router.post("/v1/batches/{batch_id}/cancel")(self.cancel_batch)
        return router

    async def create_batch(
        self, body: wire.CreateBatch, account_id: AccountId, idempotency_key: IdempotencyKey = None
    ) -> wire.BatchObject:
        """Start running the lines of an uploaded file."""
        batch = await self._requested(body, account_id)
        return wire.batch_object(await self.launcher.launch(batch, "/v1/batches", body, idempotency_key))

    async def validate_batch(self, body: wire.CreateBatch, account_id: AccountId) -> wire.BatchCheck:
        """Say everything that is wrong with a batch's input and what there is to run; nothing is started."""
        census = Census()
        outcome = await self.checker.check(await self._requested(body, account_id), census)
        return wire.batch_check(outcome, census)

    async def retrieve_batch(self, batch_id: str, account_id: AccountId) -> wire.BatchObject:
        """Return a batch as it is now."""
        return wire.batch_object(await find_batch(self.metadata, batch_id, account_id))

    async def list_batches(
        self,
        account_id: AccountId,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> wire.BatchList:
        """Return a page of batches, newest first; the next page starts `after` the last id of this one."""
        page = await self.metadata.list_batches(account_id, limit=limit, after=after)
        if page is None:
            raise NotFound(f"No batch found with id '{after}'.", param="after")
        return wire.BatchList.of(list(map(wire.batch_object, page.items)), has_more=page.has_more)

    async def cancel_batch(self, batch_id: str, account_id: AccountId) -> wire.BatchObject:
        """Send no further line of a batch; lines in flight finish and partial results are kept."""
        while True:
            batch = await find_batch(self.metadata, batch_id, account_id)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return wire.batch_object(batch)
            if not may_follow(batch.status, BatchStatus.CANCELLING):
                raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.")
            try:
                now = self.clock.now()
                batch = await self.metadata.advance(batch, BatchStatus.CANCELLING, now, closing=Closing.CANCELLED)
            except Fenced:
                continue  # it moved on between the two; every batch comes to rest
            self.launcher.changed()
            return wire.batch_object(batch)

    async def _requested(self, body: wire.CreateBatch, account_id: str) -> Batch:
        now, window_s = self.clock.now(), wire.window_seconds(body.completion_window)
        return Batch(
            id=self.ids.new("batch_"),
            order=0,
            account_id=account_id,
            job_id=await self._job_of(body.job_id, account_id),
            endpoint=Endpoint(body.endpoint),
            input_file_id=body.input_file_id,
            completion_window=body.completion_window,
            status=BatchStatus.VALIDATING,
            stamps=BatchStamps(created_at=now),
            expires_at=None if window_s is None else now + window_s,
            metadata=body.metadata,
            on_invalid=OnInvalid(body.on_invalid),
            deduplicate=body.deduplicate,
            output_expires_after_s=body.output_expires_after.seconds if body.output_expires_after else None,
        )

    async def _job_of(self, job_id: str | None, account_id: str) -> str:
        job_id = job_id if job_id is not None else self.default_job
        if job_id is None:
            message = "Missing required parameter: 'job_id'."
            raise InvalidRequest(message, param="job_id", code="missing_required_parameter")
        if await self.metadata.job(job_id, account_id) is None:
            raise InvalidRequest(f"No job found with id '{job_id}'.", param="job_id", code="job_not_found")
        return job_id
