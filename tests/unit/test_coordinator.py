"""A coordinator whose storage refuses waits and goes on; one with a bug ends, so that a restart can recover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pronghorn.checking import InputChecker
from pronghorn.clock import SystemClock
from pronghorn.control import coordinator as module
from pronghorn.control.coordinator import Coordinator
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.planner import Planner
from pronghorn.engines.base import EnginePool
from pronghorn.errors import InvariantError, StorageFull
from pronghorn.executors.local import LocalExecutor
from pronghorn.ids import RandomIds
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, OpenState
from pronghorn.storage.segments import Segments
from pronghorn.worker.protocol import Configure


class Refusing(Metadata):
    """Metadata that raises what it is told to, then works, and says when it has been asked again."""

    def __init__(self, database: Database, errors: list[Exception]) -> None:
        super().__init__(database)
        self.errors = errors
        self.asked_again = asyncio.Event()

    async def open_states(self) -> list[OpenState]:
        if self.errors:
            raise self.errors.pop(0)
        self.asked_again.set()
        return await super().open_states()


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await asyncio.to_thread(Database, sa.URL.create("sqlite", database=str(tmp_path / "test.db")))
    yield database
    await database.close()


async def coordinator(metadata: Metadata, database: Database, directory: Path) -> Coordinator:
    clock, engines, files = SystemClock(), EnginePool([]), Files(database)
    blobs = await asyncio.to_thread(Blobs, directory / "blobs")
    segments = Segments(directory / "segments")
    bounds: dict[str, Any] = {"line_bytes_max": 1024, "answer_bytes_max": 1024, "line_timeout_s": 1.0}
    bounds |= {"refused_pause_s": 1.0, "model_grace_s": 1.0, "prompt_order": True}
    return Coordinator(
        metadata=metadata,
        files=files,
        segments=segments,
        engines=engines,
        executor=LocalExecutor(),
        planner=Planner(metadata, InputChecker(files, blobs, engines, line_bytes_max=1024), clock),
        finalizer=Finalizer(metadata, files, blobs, segments, clock, RandomIds()),
        clock=clock,
        configure=Configure(str(directory / "blobs"), str(directory / "segments"), **bounds),
        workers=1,
        batch_ended=lambda: None,
    )


async def test_it_waits_while_the_disk_is_full(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    metadata = Refusing(database, [StorageFull("no room"), StorageFull("no room")])
    coordinating = await coordinator(metadata, database, tmp_path)
    running = asyncio.create_task(coordinating.run())
    await metadata.asked_again.wait()
    coordinating.stop(0)
    await running


async def test_it_ends_with_a_bug_and_takes_its_workers_with_it(database: Database, tmp_path: Path) -> None:
    metadata = Refusing(database, [InvariantError("a bug")])
    coordinating = await coordinator(metadata, database, tmp_path)
    with pytest.raises(InvariantError):
        await coordinating.run()
