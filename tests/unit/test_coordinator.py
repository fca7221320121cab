"""A coordinator whose storage refuses waits and goes on; one with a bug ends, so that a restart can recover."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
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
from pronghorn.domain.model import (
    DEFAULT_ACCOUNT,
    Batch,
    BatchStamps,
    BatchStatus,
    BlobRef,
    Endpoint,
    File,
    Job,
    ShardKey,
    ShardResult,
    Tally,
)
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.engines.base import Engine, EnginePool
from pronghorn.engines.upstream import UpstreamEngine
from pronghorn.errors import InvariantError, StorageFull
from pronghorn.executors.base import Executor
from pronghorn.executors.local import LocalExecutor
from pronghorn.ids import RandomIds
from pronghorn.settings import UpstreamSettings
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, OpenState
from pronghorn.storage.segments import Segments
from pronghorn.worker.protocol import Assign, Broken, Configure, Done, Order, Ready, Report, Stop, UseReplicas


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


class Committing(Metadata):
    """Metadata that says when a shard has been committed."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self.committed = 0
        self.news = asyncio.Event()

    async def commit_shard(self, key: ShardKey, epoch: int, result: ShardResult) -> None:
        await super().commit_shard(key, epoch, result)
        self.committed += 1
        self.news.set()


class Workers:
    """An executor whose workers do every shard at once, except those that cannot be read."""

    def __init__(self, *unreadable: int) -> None:
        self.unreadable = unreadable
        self.links: list[WorkerOnPaper] = []
        self.refused = 0
        self.news = asyncio.Event()

    async def start(self) -> WorkerOnPaper:
        self.links.append(WorkerOnPaper(self))
        return self.links[-1]


class WorkerOnPaper:
    """What a worker is told and says."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self._reports: asyncio.Queue[Report | None] = asyncio.Queue()
        self._reports.put_nowait(Ready())
        self.windows: list[int | None] = []
        self.shards = 0

    def send(self, order: Order) -> None:
        match order:
            case UseReplicas(replicas):
                self.windows = [replica.window for replica in replicas]
            case Assign(shard) if shard.key.position in self._workers.unreadable:
                self._reports.put_nowait(Broken(shard.key, shard.epoch, "is damaged"))
                self._workers.refused += 1
                self._workers.news.set()
            case Assign(shard):
                self.shards += 1
                result = ShardResult(None, None, Tally(completed=shard.lines), [])
                self._reports.put_nowait(Done(shard.key, shard.epoch, result))
            case Stop():
                self.hang_up()

    async def reports(self) -> AsyncIterator[Report]:
        while (report := await self._reports.get()) is not None:
            yield report

    def hang_up(self) -> None:
        self._reports.put_nowait(None)

    kill = hang_up

    async def end(self) -> int | None:
        return 0


async def add_batch(metadata: Metadata, files: Files, shards: int) -> None:
    """Plan a batch of shards with one line each."""
    await metadata.add_account(DEFAULT_ACCOUNT, "default", 0)
    await metadata.add_job(Job("job-1", DEFAULT_ACCOUNT, "job", 1, 0))
    await files.add(File("file-input", DEFAULT_ACCOUNT, "batch", "f.jsonl", shards, 0), [BlobRef("input", shards)])
    batch = Batch(
        id="batch_1",
        order=0,
        account_id=DEFAULT_ACCOUNT,
        job_id="job-1",
        endpoint=Endpoint.CHAT_COMPLETIONS,
        input_file_id="file-input",
        completion_window="unlimited",
        status=BatchStatus.VALIDATING,
        stamps=BatchStamps(0),
        expires_at=None,
        metadata=None,
    )
    batch = await metadata.add_batch(batch)
    plan = Plan([PlannedShard(number + 1, 1, number, 1) for number in range(shards)], shards, "scripted")
    await metadata.start_batch(batch, plan, 1)


async def coordinator(
    metadata: Metadata,
    database: Database,
    directory: Path,
    executor: Executor | None = None,
    engines: Sequence[Engine] = (),
    workers: int = 1,
) -> Coordinator:
    clock, pool, files = SystemClock(), EnginePool(engines), Files(database)
    blobs = await asyncio.to_thread(Blobs, directory / "blobs")
    segments = Segments(directory / "segments")
    bounds: dict[str, Any] = {"answer_bytes_max": 1024, "line_timeout_s": 1.0}
    bounds |= {"refused_pause_s": 1.0, "model_grace_s": 1.0, "prompt_order": True}
    return Coordinator(
        metadata=metadata,
        files=files,
        segments=segments,
        engines=pool,
        executor=executor or LocalExecutor(),
        planner=Planner(metadata, InputChecker(files, blobs, pool, line_bytes_max=1024), clock),
        finalizer=Finalizer(metadata, files, blobs, segments, clock, RandomIds()),
        clock=clock,
        configure=Configure(str(directory / "blobs"), str(directory / "segments"), **bounds),
        workers=workers,
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


async def test_a_shard_that_cannot_be_read_holds_up_no_other_of_its_batch(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 3600.0)
    metadata, executor = Committing(database), Workers(0)
    await add_batch(metadata, Files(database), shards=4)
    engine = UpstreamEngine(UpstreamSettings("http://127.0.0.1:9/v1", models=("scripted",)))
    coordinating = await coordinator(metadata, database, tmp_path, executor, [engine])
    running = asyncio.create_task(coordinating.run())
    async with asyncio.timeout(60):
        while metadata.committed < 3:
            await metadata.news.wait()
            metadata.news.clear()
    coordinating.stop(0)
    await running
    await engine.stop()


async def test_a_worker_that_a_small_window_leaves_nothing_gets_no_shards(database: Database, tmp_path: Path) -> None:
    metadata, executor = Committing(database), Workers()
    await add_batch(metadata, Files(database), shards=9)
    engine = UpstreamEngine(UpstreamSettings("http://127.0.0.1:9/v1", models=("scripted",), window=2))
    coordinating = await coordinator(metadata, database, tmp_path, executor, [engine], workers=3)
    running = asyncio.create_task(coordinating.run())
    async with asyncio.timeout(60):
        while metadata.committed < 9:
            await metadata.news.wait()
            metadata.news.clear()
    coordinating.stop(0)
    await running
    await engine.stop()
    assert sorted(link.windows for link in executor.links) == [[], [1], [1]]
    assert all(link.windows for link in executor.links if link.shards)


async def test_a_shard_that_cannot_be_read_is_tried_again(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.0)
    metadata, executor = Metadata(database), Workers(0)
    await add_batch(metadata, Files(database), shards=1)
    engine = UpstreamEngine(UpstreamSettings("http://127.0.0.1:9/v1", models=("scripted",)))
    coordinating = await coordinator(metadata, database, tmp_path, executor, [engine])
    running = asyncio.create_task(coordinating.run())
    async with asyncio.timeout(60):
        while executor.refused < 3:
            await executor.news.wait()
            executor.news.clear()
    coordinating.stop(0)
    await running
    await engine.stop()
