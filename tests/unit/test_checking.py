"""Checking inputs takes threads of its own: what is short never waits behind it, nor a batch behind dry runs."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue

from pronghorn.checking import InputChecker
from pronghorn.domain.model import DEFAULT_ACCOUNT, BlobRef, Endpoint, File
from pronghorn.domain.planning import Census, Plan
from pronghorn.engines.base import EnginePool
from pronghorn.storage.blobs import WHOLE_FILES_MAX, Blobs
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
        self.go_on = threading.Event()
        self._asked: SimpleQueue[str] = SimpleQueue()
        self._waiting = ThreadPoolExecutor(1)

    def answers(self, endpoint: Endpoint, model: str) -> bool:
        self._asked.put(model)
        return self.go_on.wait(60)

    async def when_asked(self) -> None:
        """Return when one more check has come to its line."""
        await asyncio.get_running_loop().run_in_executor(self._waiting, lambda: self._asked.get(timeout=30))


async def checker_of_a_line(database: Database, tmp_path: Path) -> tuple[InputChecker, Pausing]:
    """Store the input of one line, and return who checks it."""
    files, blobs, engines = Files(database), await asyncio.to_thread(Blobs, tmp_path / "blobs"), Pausing()
    await Metadata(database).add_account(DEFAULT_ACCOUNT, "default", 1)
    content = json.dumps(LINE).encode()
    async with blobs.writing("files/1") as writer:
        await asyncio.to_thread(writer.write, content)
        await asyncio.to_thread(writer.commit)
    file = File("file-1", DEFAULT_ACCOUNT, "batch", "a.jsonl", len(content), 5)
    await files.add(file, [BlobRef("files/1", len(content))])
    return InputChecker(files, blobs, engines, line_bytes_max=1024), engines


async def test_short_work_does_not_wait_behind_a_check(database: Database, tmp_path: Path) -> None:
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
    checker, engines = await checker_of_a_line(database, tmp_path)
    checking = asyncio.create_task(checker.check(BATCH))
    try:
        await engines.when_asked()
        async with asyncio.timeout(30):
            await asyncio.to_thread(lambda: None)
        assert not checking.done()
    finally:
        engines.go_on.set()
    assert isinstance(await checking, Plan)


async def test_a_batch_is_planned_however_many_dry_runs_there_are(database: Database, tmp_path: Path) -> None:
    checker, engines = await checker_of_a_line(database, tmp_path)
    dry_runs = [asyncio.create_task(checker.check(BATCH, Census())) for _ in range(4 * WHOLE_FILES_MAX)]
    try:
        for _ in range(WHOLE_FILES_MAX):
            await engines.when_asked()
        planning = asyncio.create_task(checker.check(BATCH))
        await engines.when_asked()
    finally:
        engines.go_on.set()
    assert isinstance(await planning, Plan)
    assert all(isinstance(plan, Plan) for plan in await asyncio.gather(*dry_runs))


async def test_a_blob_that_is_dropped_blocks_nobody_and_leaves_nothing(tmp_path: Path) -> None:
    blobs = await asyncio.to_thread(Blobs, tmp_path)
    async with blobs.writing("files/1") as writer:  # the tests' blockbuster raises for a call that blocks
        await asyncio.to_thread(writer.write, b"x")
    assert await asyncio.to_thread(lambda: list((tmp_path / "files").iterdir())) == []
