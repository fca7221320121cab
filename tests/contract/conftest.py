"""What tests of files and uploads begin with."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pronghorn.domain.model import Job
from pronghorn.storage.database import Database
from pronghorn.storage.metadata import Metadata
from tests.contract.world import ACCOUNT, START, World


@pytest.fixture
async def world(database: Database, tmp_path: Path) -> World:
    """Storage that knows an account with a job, and holds nothing."""
    metadata = Metadata(database)
    await metadata.add_account(ACCOUNT, "ours", START)
    await metadata.add_job(Job("job-1", ACCOUNT, "default", 1, START))
    return await asyncio.to_thread(World, database, tmp_path)
