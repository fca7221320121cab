"""Checking inputs takes threads of its own, so that what is short never waits behind it."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pronghorn.checking import InputChecker
from pronghorn.domain.model import DEFAULT_ACCOUNT, BlobRef, Endpoint, File
from pronghorn.domain.planning import Plan
from pronghorn.engines.base import EnginePool
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from tests.storing import new_batch

LINE = {"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": {"model": "m", "input": "x"}}
BATCH = new_batch("batch_1", 10, endpoint=Endpoint.EMBEDDINGS)


class Pausing(EnginePool):
    """Knows every model, once it is told to go on."""

    def __init__(self) -> None:
        super().__init__([])
        self.asked, self.go_on = threading.Event(), threading.Event()

    def answers(self, endpoint: Endpoint, model: str) -> bool:
        self.asked.set()
        return self.go_on.wait(60)


async def test_short_work_does_not_wait_behind_a_check(database: Database, tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    files, blobs, engines = Files(database), await asyncio.to_thread(Blobs, tmp_path / "blobs"), Pausing()
    await Metadata(database).add_account(DEFAULT_ACCOUNT, "default", 1)
    content = json.dumps(LINE).encode()
    async with blobs.writing("files/1") as writer:
        await asyncio.to_thread(writer.write, content)
        await asyncio.to_thread(writer.commit)
    file = File("file-1", DEFAULT_ACCOUNT, "batch", "a.jsonl", len(content), 5)
    await files.add(file, [BlobRef("files/1", len(content))])
    checking = asyncio.create_task(InputChecker(files, blobs, engines, line_bytes_max=1024).check(BATCH))
    try:
        await asyncio.get_running_loop().run_in_executor(ThreadPoolExecutor(1), engines.asked.wait)
        async with asyncio.timeout(30):
            await asyncio.to_thread(lambda: None)
        assert not checking.done()
    finally:
        engines.go_on.set()
    assert isinstance(await checking, Plan)


async def test_a_blob_that_is_dropped_blocks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = await asyncio.to_thread(Blobs, tmp_path)
    async with blobs.writing("files/1") as writer:  # the tests' blockbuster raises for a call that blocks
        await asyncio.to_thread(writer.write, b"x")
    assert await asyncio.to_thread(lambda: list((tmp_path / "files").iterdir())) == []
