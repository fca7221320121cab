"""/v1/jobs: what batches are created under. An extension of OpenAI's API."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import APIRouter

from pronghorn.api import wire
from pronghorn.api.auth import AccountId
from pronghorn.clock import Clock
from pronghorn.domain.model import Job
from pronghorn.ids import Ids
from pronghorn.storage.metadata import Metadata


@dataclass(frozen=True, slots=True)
class JobsApi:
    """Answers the Jobs API."""

    metadata: Metadata
    clock: Clock
    ids: Ids

    def routes(self) -> APIRouter:
        router = APIRouter(tags=["Jobs"])
        router.post("/v1/jobs")(self.create_job)
        router.get("/v1/jobs")(self.list_jobs)
        return router

    async def create_job(self, body: wire.CreateJob, account_id: AccountId) -> wire.JobObject:
        """Make a job and return the id to give to a client."""
        job = Job(self.ids.new("job-"), account_id, body.name, body.weight, self.clock.now())
        await self.metadata.add_job(job)
        return wire.job_object(job)

    async def list_jobs(self, account_id: AccountId) -> wire.JobList:
        """Return every job."""
        return wire.JobList(data=[wire.job_object(job) for job in await self.metadata.jobs(account_id)])
