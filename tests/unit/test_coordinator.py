"""A coordinator whose storage refuses waits and goes on; one with a bug ends, so that a restart can recover."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pronghorn.control import coordinator as module
from pronghorn.domain.model import Shard
from pronghorn.errors import InvariantError, StorageFull
from pronghorn.executors.local import LocalExecutor
from pronghorn.storage.database import Database
from pronghorn.storage.metadata import Metadata
from pronghorn.worker.protocol import Broken
from tests.coordinating import Refusing, Workers, add_batch, at_work, coordinator, done


def damaged(shard: Shard) -> Broken:
    return Broken(shard.key, shard.epoch, "is damaged")


async def test_it_waits_while_the_disk_is_full(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.01)
    metadata = Refusing(database, looks=[StorageFull("no room"), StorageFull("no room")])
    async with at_work(await coordinator(metadata, database, tmp_path, Workers())):
        await metadata.asked_again.wait()


async def test_it_ends_with_a_bug_and_takes_its_workers_with_it(database: Database, tmp_path: Path) -> None:
    metadata = Refusing(database, looks=[InvariantError("a bug")])
    coordinating = await coordinator(metadata, database, tmp_path, LocalExecutor())
    with pytest.raises(InvariantError):
        await coordinating.run()


async def test_a_shard_that_cannot_be_read_holds_up_no_other_of_its_batch(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 3600.0)
    metadata, workers = Metadata(database), Workers()
    await add_batch(metadata, "1", lines=4)
    async with at_work(await coordinator(metadata, database, tmp_path, workers)):
        worker = await workers.started.get()
        for _ in range(4):
            shard = (await worker.orders.get()).shard
            worker.say(done(shard) if shard.key.position else damaged(shard))
    tally, unfinished = await metadata.shard_progress("batch_1")
    assert (tally.completed, unfinished) == (3, 1)


async def test_a_worker_that_a_small_window_leaves_nothing_gets_no_shards(database: Database, tmp_path: Path) -> None:
    metadata, workers, ended = Metadata(database), Workers(done), asyncio.Event()
    await add_batch(metadata, "1", lines=9)
    coordinating = await coordinator(metadata, database, tmp_path, workers, count=3, window=2, batch_ended=ended.set)
    async with at_work(coordinating):
        await ended.wait()
    started = [await workers.started.get() for _ in range(3)]
    assert sorted(worker.windows for worker in started) == [[], [1], [1]]
    assert all(worker.windows for worker in started if not worker.orders.empty())


async def test_a_shard_that_cannot_be_read_is_tried_again(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BROKEN_WAIT_S", 0.0)
    metadata, workers = Metadata(database), Workers()
    await add_batch(metadata, "1", lines=1)
    async with at_work(await coordinator(metadata, database, tmp_path, workers)):
        worker = await workers.started.get()
        for _ in range(3):
            worker.say(damaged((await worker.orders.get()).shard))
