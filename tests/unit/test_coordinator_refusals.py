"""What a coordinator does while storage refuses, and with the shards of workers that come and go.

Its workers are `Link`s, which say what a test has them say.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from pronghorn.checking import InputChecker
from pronghorn.clock import SystemClock
from pronghorn.control import coordinator as module
from pronghorn.control import validations
from pronghorn.control.coordinator import Coordinator
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.planner import Planner
from pronghorn.domain.duplicates import NONE, Originals
from pronghorn.domain.model import (
    DEFAULT_ACCOUNT,
    Batch,
    BatchStamps,
    BatchStatus,
    BlobRef,
    Endpoint,
    File,
    Job,
    Parts,
    Progress,
    Replica,
    Shard,
    ShardKey,
    ShardResult,
    Tally,
)
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.engines.base import Engine, EnginePool, ModelInfo
from pronghorn.errors import StorageError, StorageFull
from pronghorn.executors.base import Executor
from pronghorn.executors.local import LocalExecutor
from pronghorn.ids import RandomIds
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, OpenState
from pronghorn.storage.segments import Segments
from pronghorn.worker.protocol import Assign, Configure, Done, Moved, Order, Ready, Report, ShardProgress, Stop


class Refusing(Metadata):
    """Metadata that raises what it is told to, then works, and says when it has been asked again."""

    def __init__(
        self,
        database: Database,
        errors: Iterable[Exception] = (),
        *,
        releases: Iterable[Exception] = (),
        lookups: Iterable[Exception] = (),
    ) -> None:
        super().__init__(database)
        self.errors, self.releases, self.lookups = list(errors), list(releases), list(lookups)
        self.asked_again = asyncio.Event()

    async def open_states(self) -> list[OpenState]:
        if self.errors:
            raise self.errors.pop(0)
        self.asked_again.set()
        return await super().open_states()

    async def release_shard(self, key: ShardKey, epoch: int) -> None:
        if self.releases:
            raise self.releases.pop(0)
        await super().release_shard(key, epoch)

    async def parts_of(self, batch_id: str, positions: Iterable[int]) -> dict[int, Parts]:
        if self.lookups:
            raise self.lookups.pop(0)
        return await super().parts_of(batch_id, positions)


class OneReplica:
    """An engine that answers everything at one place, which nobody asks."""

    async def start(self, changed: Callable[[], None]) -> None: ...

    async def stop(self) -> None: ...

    def replicas(self) -> list[Replica]:
        return [Replica("http://nowhere/v1")]

    def models(self) -> list[ModelInfo]:
        return []

    async def survey(self) -> list[ModelInfo]:
        return []


class Link:
    """A worker that is ready at once, says what it is told to, and ends when it is told to or stopped."""

    def __init__(self) -> None:
        self.orders: asyncio.Queue[Assign] = asyncio.Queue()
        self._says: asyncio.Queue[Report | None] = asyncio.Queue()
        self.heard, self.ended, self.silent = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.say(Ready())

    def say(self, report: Report) -> None:
        self.silent.clear()
        self._says.put_nowait(report)

    def die(self) -> None:
        self._says.put_nowait(None)

    def send(self, order: Order) -> None:
        if isinstance(order, Assign):
            self.orders.put_nowait(order)
        elif isinstance(order, Stop):
            self.die()

    async def reports(self) -> AsyncIterator[Report]:
        while (report := await self._says.get()) is not None:
            yield report
            self.heard.set()
            if self._says.empty():
                self.silent.set()

    def hang_up(self) -> None:
        self.die()

    def kill(self) -> None:
        self.die()

    async def end(self) -> int | None:
        self.ended.set()
        return None


class Links:
    """Places workers that are `Link`s."""

    def __init__(self) -> None:
        self.started: asyncio.Queue[Link] = asyncio.Queue()

    async def start(self) -> Link:
        link = Link()
        self.started.put_nowait(link)
        return link


@pytest.fixture
async def database(tmp_path: Path) -> AsyncIterator[Database]:
    database = await asyncio.to_thread(Database, sa.URL.create("sqlite", database=str(tmp_path / "test.db")))
    yield database
    await database.close()


async def coordinator(
    metadata: Metadata,
    database: Database,
    directory: Path,
    *,
    engines: Iterable[Engine] = (),
    executor: Executor | None = None,
    batch_ended: Callable[[], None] = lambda: None,
) -> Coordinator:
    clock, pool, files = SystemClock(), EnginePool(list(engines)), Files(database)
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
        workers=1,
        batch_ended=batch_ended,
    )


@contextlib.asynccontextmanager
async def at_work(coordinating: Coordinator) -> AsyncIterator[None]:
    running = asyncio.create_task(coordinating.run())
    try:
        yield
    finally:
        coordinating.stop(0)
        await running


async def add_batch(metadata: Metadata, name: str, lines: int = 0, originals: Originals = NONE) -> Batch:
    """Add a batch over a file of its name; with lines it is in progress, each in a shard of its own."""
    if await metadata.job("job", DEFAULT_ACCOUNT) is None:
        await metadata.add_account(DEFAULT_ACCOUNT, "default", 1)
        await metadata.add_job(Job("job", DEFAULT_ACCOUNT, "job", 1, 1))
    new = Batch(
        id=f"batch_{name}",
        order=0,
        account_id=DEFAULT_ACCOUNT,
        job_id="job",
        endpoint=Endpoint.CHAT_COMPLETIONS,
        input_file_id=f"file-{name}",
        completion_window="unlimited",
        status=BatchStatus.VALIDATING,
        stamps=BatchStamps(10),
        expires_at=None,
        metadata=None,
    )
    batch = await metadata.add_batch(new)
    if lines:
        shards = [PlannedShard(number, 1, 100 * number, 100) for number in range(1, lines + 1)]
        await metadata.start_batch(batch, Plan(shards, lines, "m", (), originals), 11)
    return batch


async def found(metadata: Metadata, batch_id: str) -> Batch:
    batch = await metadata.batch(batch_id, DEFAULT_ACCOUNT)
    assert batch is not None
    return batch


def done(shard: Shard) -> Done:
    output = BlobRef(f"part{shard.key.position}", 1)
    return Done(shard.key, shard.epoch, ShardResult(output, None, Tally(1), []))


async def test_a_batch_whose_input_cannot_be_read_waits_and_says_why_while_others_are_validated(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validations, "VALIDATION_WAIT_S", 0.01)
    metadata, files, ended = Metadata(database), Files(database), asyncio.Event()
    coordinating = await coordinator(metadata, database, tmp_path, batch_ended=ended.set)
    for name in ("unreadable", "readable"):
        await add_batch(metadata, name)
        key = f"files/{name}"
        await files.add(File(f"file-{name}", DEFAULT_ACCOUNT, "batch", "a.jsonl", 1, 5), [BlobRef(key, 1)])
    unreadable = tmp_path / "blobs/files/unreadable"
    await asyncio.to_thread(unreadable.mkdir, parents=True)  # reading it fails, which is not what is called missing

    async def status_of(name: str, wanted: BatchStatus) -> Batch:
        while (batch := await found(metadata, f"batch_{name}")).status is not wanted:
            ended.clear()
            await ended.wait()
        return batch

    async with at_work(coordinating):
        await status_of("readable", BatchStatus.FAILED)
        waiting = await status_of("unreadable", BatchStatus.VALIDATING)
        assert waiting.progress is not None
        assert "stored file files/unreadable cannot be read: Is a directory" in (waiting.progress.reason or "")
        assert waiting.progress.stalled_since is not None
        await asyncio.to_thread(unreadable.rmdir)
        failed = await status_of("unreadable", BatchStatus.FAILED)
        assert failed.progress is None


async def test_shards_of_a_worker_that_dies_while_the_database_refuses_go_to_the_next(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    metadata, links = Refusing(database, releases=[StorageFull("no room"), StorageError("locked")]), Links()
    await add_batch(metadata, "1", lines=1)
    async with at_work(await coordinator(metadata, database, tmp_path, engines=[OneReplica()], executor=links)):
        first = await links.started.get()
        assert (await first.orders.get()).shard.epoch == 1
        first.die()
        assert (await (await links.started.get()).orders.get()).shard.epoch == 2


async def test_a_shard_whose_originals_cannot_be_looked_up_is_given_out_later(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    metadata, links = Refusing(database, lookups=[StorageError("locked")]), Links()
    copying = Originals(array("Q", [0, 0, 1]), 1)
    await add_batch(metadata, "1", lines=2, originals=copying)
    async with at_work(await coordinator(metadata, database, tmp_path, engines=[OneReplica()], executor=links)):
        link = await links.started.get()
        given = [(await link.orders.get()).shard for _ in range(2)]
        assert [(shard.key.position, shard.epoch) for shard in given] == [(0, 1), (1, 2)]


async def test_a_shard_that_a_workers_successor_was_given_stays_with_it(database: Database, tmp_path: Path) -> None:
    links, ended = Links(), asyncio.Event()
    successors: asyncio.Queue[Link] = asyncio.Queue()

    class Slow(Metadata):
        """Claims a shard for the first worker and takes so long that its successor is there."""

        async def claim_shard(self, batch_id: str) -> Shard | None:
            shard = await super().claim_shard(batch_id)
            if shard is not None:
                first.die()
                second = await links.started.get()
                await second.heard.wait()
                successors.put_nowait(second)
            return shard

    metadata = Slow(database)
    coordinating = await coordinator(
        metadata, database, tmp_path, engines=[OneReplica()], executor=links, batch_ended=ended.set
    )
    async with at_work(coordinating):
        first = await links.started.get()
        await add_batch(metadata, "1", lines=1)
        coordinating.wake()
        second = await successors.get()
        second.say(done((await second.orders.get()).shard))
        await ended.wait()
    assert (await found(metadata, "batch_1")).status is BatchStatus.COMPLETED


async def test_a_shard_that_was_claimed_for_a_worker_that_is_gone_goes_to_the_next(
    database: Database, tmp_path: Path
) -> None:
    links = Links()

    class Slow(Metadata):
        """Claims a shard for the first worker and takes so long that it is gone."""

        async def claim_shard(self, batch_id: str) -> Shard | None:
            shard = await super().claim_shard(batch_id)
            first.die()
            await first.ended.wait()
            return shard

    metadata = Slow(database)
    coordinating = await coordinator(metadata, database, tmp_path, engines=[OneReplica()], executor=links)
    async with at_work(coordinating):
        first = await links.started.get()
        await add_batch(metadata, "1", lines=1)
        coordinating.wake()
        assert (await (await links.started.get()).orders.get()).shard.epoch == 2


async def test_what_has_moved_waits_as_one_report_while_the_database_refuses(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    room, asked, all_counted = asyncio.Event(), asyncio.Event(), asyncio.Event()

    class Stuck(Metadata):
        async def commit_shard(self, key: ShardKey, epoch: int, result: ShardResult) -> None:
            asked.set()
            if not room.is_set():
                raise StorageFull("no room")
            await super().commit_shard(key, epoch, result)

        async def record_progress(self, shown: Sequence[tuple[str, Tally, Progress]]) -> None:
            if any(tally.completed == 101 for _, tally, _ in shown):
                all_counted.set()

    metadata, links = Stuck(database), Links()
    await add_batch(metadata, "1", lines=2)
    coordinating = await coordinator(metadata, database, tmp_path, engines=[OneReplica()], executor=links)
    async with at_work(coordinating):
        link = await links.started.get()
        first, second = [(await link.orders.get()).shard for _ in range(2)]
        link.say(done(first))
        await asked.wait()
        for completed in range(1, 101):
            link.say(Moved([ShardProgress(second.key, second.epoch, Tally(completed))], []))
        link.say(Moved([], []))
        await link.silent.wait()
        assert coordinating.backlog <= 2
        room.set()
        await all_counted.wait()


async def test_a_worker_that_cannot_be_started_is_tried_for_ever(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pronghorn.control.crew.RESTART_WAIT_S_MAX", 0.0)
    tried_long = asyncio.Event()

    class Nowhere(Links):
        tries = 0

        async def start(self) -> Link:
            self.tries += 1
            if self.tries == 1100:
                tried_long.set()
            raise OSError("no process is left")

    async with at_work(await coordinator(Metadata(database), database, tmp_path, executor=Nowhere())):
        await tried_long.wait()
