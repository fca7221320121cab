"""/v1/jobs: what batches are created under. An extension of OpenAI's API."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends

from pronghorn.api import wire
from pronghorn.api.auth import caller
from pronghorn.clock import Clock
from pronghorn.domain.model import Job
from pronghorn.ids import Ids
from pronghorn.storage.metadata import Metadata


def routes(metadata: Metadata, clock: Clock, ids: Ids) -> APIRouter:
    """Return the routes of the Jobs API."""
    router = APIRouter(tags=["Jobs"])

    @router.post("/v1/jobs")
    async def create_job(body: wire.CreateJob, account_id: Annotated[str, Depends(caller)]) -> wire.JobObject:
        """Make a job and return the id to give to a client."""
        job = Job(ids.new("job-"), account_id, body.name, body.weight, clock.now())
        await metadata.add_job(job)
        return wire.job_object(job)

    @router.get("/v1/jobs")
    async def list_jobs(account_id: Annotated[str, Depends(caller)]) -> wire.JobList:
        """Return every job."""
        return wire.JobList(data=[wire.job_object(job) for job in await metadata.jobs(account_id)])

    return router
