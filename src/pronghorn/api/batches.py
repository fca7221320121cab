"""/v1/batches: create, check, retrieve, list, cancel."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query

from pronghorn.api import wire
from pronghorn.api.auth import caller
from pronghorn.api.launch import IdempotencyKey, Launcher, find_batch
from pronghorn.checking import InputChecker
from pronghorn.clock import Clock
from pronghorn.domain.lifecycle import may_follow
from pronghorn.domain.model import Batch, BatchStamps, BatchStatus, Closing, Endpoint, OnInvalid
from pronghorn.domain.planning import Census
from pronghorn.errors import Conflict, Fenced, InvalidRequest, NotFound
from pronghorn.ids import Ids
from pronghorn.storage.metadata import Metadata


def routes(
    metadata: Metadata,
    launcher: Launcher,
    checker: InputChecker,
    clock: Clock,
    ids: Ids,
    *,
    default_job: str | None,
) -> APIRouter:
    """Return the routes of the Batch API; `default_job` stands in where a client names none."""
    router = APIRouter(tags=["Batch"])

    @router.post("/v1/batches")
    async def create_batch(
        body: wire.CreateBatch,
        account_id: Annotated[str, Depends(caller)],
        idempotency_key: IdempotencyKey = None,
    ) -> wire.BatchObject:
        """Start running the lines of an uploaded file."""
        batch = await requested(body, account_id)
        return wire.batch_object(await launcher.launch(batch, "/v1/batches", body, idempotency_key))

    @router.post("/v1/batches/validate")
    async def validate_batch(body: wire.CreateBatch, account_id: Annotated[str, Depends(caller)]) -> wire.BatchCheck:
        """Say everything that is wrong with a batch's input and what there is to run; nothing is started."""
        census = Census()
        outcome = await checker.check(await requested(body, account_id), census)
        return wire.batch_check(outcome, census)

    @router.get("/v1/batches/{batch_id}")
    async def retrieve_batch(batch_id: str, account_id: Annotated[str, Depends(caller)]) -> wire.BatchObject:
        """Return a batch as it is now."""
        return wire.batch_object(await find_batch(metadata, batch_id, account_id))

    @router.get("/v1/batches")
    async def list_batches(
        account_id: Annotated[str, Depends(caller)],
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        after: str | None = None,
    ) -> wire.BatchList:
        """Return a page of batches, newest first; the next page starts `after` the last id of this one."""
        page = await metadata.list_batches(account_id, limit=limit, after=after)
        if page is None:
            raise NotFound(f"No batch found with id '{after}'.", param="after")
        return wire.BatchList.of(list(map(wire.batch_object, page.items)), has_more=page.has_more)

    @router.post("/v1/batches/{batch_id}/cancel")
    async def cancel_batch(batch_id: str, account_id: Annotated[str, Depends(caller)]) -> wire.BatchObject:
        """Send no further line of a batch; lines in flight finish and partial results are kept."""
        while True:
            batch = await find_batch(metadata, batch_id, account_id)
            if batch.status in (BatchStatus.CANCELLING, BatchStatus.CANCELLED):
                return wire.batch_object(batch)
            if not may_follow(batch.status, BatchStatus.CANCELLING):
                raise Conflict(f"Cannot cancel a batch with status '{batch.status}'.")
            try:
                batch = await metadata.advance(batch, BatchStatus.CANCELLING, clock.now(), closing=Closing.CANCELLED)
            except Fenced:
                continue  # it moved on between the two; every batch comes to rest
            launcher.changed()
            return wire.batch_object(batch)

    async def requested(body: wire.CreateBatch, account_id: str) -> Batch:
        now, window_s = clock.now(), wire.window_seconds(body.completion_window)
        return Batch(
            id=ids.new("batch_"),
            order=0,
            account_id=account_id,
            job_id=await job_of(body.job_id, account_id),
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

    async def job_of(job_id: str | None, account_id: str) -> str:
        job_id = job_id if job_id is not None else default_job
        if job_id is None:
            message = "Missing required parameter: 'job_id'."
            raise InvalidRequest(message, param="job_id", code="missing_required_parameter")
        if await metadata.job(job_id, account_id) is None:
            raise InvalidRequest(f"No job found with id '{job_id}'.", param="job_id", code="job_not_found")
        return job_id

    return router
