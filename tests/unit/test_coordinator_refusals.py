"""What a coordinator does while storage refuses, and with the shards of workers that come and go."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Sequence
from pathlib import Path

import pytest

from pronghorn.control import coordinator as module
from pronghorn.control import validations
from pronghorn.domain.duplicates import Originals
from pronghorn.domain.model import (
    DEFAULT_ACCOUNT,
    Batch,
    BatchStatus,
    BlobRef,
    File,
    Progress,
    Shard,
    ShardKey,
    ShardResult,
    Tally,
)
from pronghorn.errors import StorageError, StorageFull
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.worker.protocol import Moved, ShardProgress
from tests.coordinating import Refusing, Worker, Workers, add_batch, at_work, coordinator, done


async def found(metadata: Metadata, batch_id: str) -> Batch:
    batch = await metadata.batch(batch_id, DEFAULT_ACCOUNT)
    assert batch is not None
    return batch


async def test_a_batch_whose_input_cannot_be_read_waits_and_says_why_while_others_are_validated(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(validations, "VALIDATION_WAIT_S", 0.01)
    metadata, files, ended = Metadata(database), Files(database), asyncio.Event()
    coordinating = await coordinator(metadata, database, tmp_path, Workers(), batch_ended=ended.set)
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
    metadata, workers = Refusing(database, releases=[StorageFull("no room"), StorageError("locked")]), Workers()
    await add_batch(metadata, "1", lines=1)
    async with at_work(await coordinator(metadata, database, tmp_path, workers)):
        first = await workers.started.get()
        assert (await first.orders.get()).shard.epoch == 1
        first.die()
        assert (await (await workers.started.get()).orders.get()).shard.epoch == 2


async def test_a_shard_whose_originals_cannot_be_looked_up_is_given_out_later(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    metadata, workers = Refusing(database, lookups=[StorageError("locked")]), Workers()
    copying = Originals(array("Q", [0, 0, 1]), 1)
    await add_batch(metadata, "1", lines=2, originals=copying)
    async with at_work(await coordinator(metadata, database, tmp_path, workers)):
        worker = await workers.started.get()
        given = [(await worker.orders.get()).shard for _ in range(2)]
        assert [(shard.key.position, shard.epoch) for shard in given] == [(0, 1), (1, 2)]


async def test_a_shard_that_a_workers_successor_was_given_stays_with_it(database: Database, tmp_path: Path) -> None:
    workers, ended = Workers(), asyncio.Event()
    successors: asyncio.Queue[Worker] = asyncio.Queue()

    class Slow(Metadata):
        """Claims a shard for the first worker and takes so long that its successor is there."""

        async def claim_shard(self, batch_id: str) -> Shard | None:
            shard = await super().claim_shard(batch_id)
            if shard is not None:
                first.die()
                second = await workers.started.get()
                await second.heard.wait()
                successors.put_nowait(second)
            return shard

    metadata = Slow(database)
    coordinating = await coordinator(metadata, database, tmp_path, workers, batch_ended=ended.set)
    async with at_work(coordinating):
        first = await workers.started.get()
        await add_batch(metadata, "1", lines=1)
        coordinating.wake()
        second = await successors.get()
        second.say(done((await second.orders.get()).shard))
        await ended.wait()
    assert (await found(metadata, "batch_1")).status is BatchStatus.COMPLETED


async def test_a_shard_that_was_claimed_for_a_worker_that_is_gone_goes_to_the_next(
    database: Database, tmp_path: Path
) -> None:
    workers = Workers()

    class Slow(Metadata):
        """Claims a shard for the first worker and takes so long that it is gone."""

        async def claim_shard(self, batch_id: str) -> Shard | None:
            shard = await super().claim_shard(batch_id)
            first.die()
            await first.ended.wait()
            return shard

    metadata = Slow(database)
    coordinating = await coordinator(metadata, database, tmp_path, workers)
    async with at_work(coordinating):
        first = await workers.started.get()
        await add_batch(metadata, "1", lines=1)
        coordinating.wake()
        assert (await (await workers.started.get()).orders.get()).shard.epoch == 2


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

    metadata, workers = Stuck(database), Workers()
    await add_batch(metadata, "1", lines=2)
    coordinating = await coordinator(metadata, database, tmp_path, workers)
    async with at_work(coordinating):
        worker = await workers.started.get()
        first, second = [(await worker.orders.get()).shard for _ in range(2)]
        worker.say(done(first))
        await asked.wait()
        for completed in range(1, 101):
            worker.say(Moved([ShardProgress(second.key, second.epoch, Tally(completed))], []))
        worker.say(Moved([], []))
        await worker.silent.wait()
        assert coordinating.backlog <= 2
        room.set()
        await all_counted.wait()


async def test_a_worker_that_cannot_be_started_is_tried_for_ever(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pronghorn.control.crew.RESTART_WAIT_S_MAX", 0.0)
    tried_long = asyncio.Event()

    class Nowhere(Workers):
        tries = 0

        async def start(self) -> Worker:
            self.tries += 1
            if self.tries == 1100:
                tried_long.set()
            raise OSError("no process is left")

    async with at_work(await coordinator(Metadata(database), database, tmp_path, Nowhere())):
        await tried_long.wait()
