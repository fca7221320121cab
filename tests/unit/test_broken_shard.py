"""A shard that cannot go on now: what was sent is recorded, once, and another attempt takes it up."""

from __future__ import annotations

import asyncio
import errno
import random
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from pronghorn.clock import SystemClock
from pronghorn.domain.model import BlobRef, Endpoint, Replica, Shard, ShardKey
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs, BlobWriter
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments
from pronghorn.worker.dispatch import Dispatcher
from pronghorn.worker.protocol import Assign, Broken, Configure, Done, Moved, Report
from tests.faults.test_kill import batch_input
from tests.faults.test_odd_upstreams import OddEngine, fair, running, unhurried

WINDOW = 16
LINES = 100
KEY = ShardKey("batch_1", 0)


@pytest.fixture(autouse=True)
def unwatched(blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # a worker writes in its loop: a thread would cost more than the write


class ShortOfFiles(Blobs):
    """Blobs that cannot be written once, for want of files."""

    short = True

    def writer(self, key: str) -> BlobWriter:
        if key != "input" and self.short:
            self.short = False
            raise OSError(errno.EMFILE, "Too many open files")
        return super().writer(key)


class Attempts:
    """Runs one shard again and again, each time to its end."""

    def __init__(self, directory: Path, engine: OddEngine, blobs: Blobs) -> None:
        self._engine = engine
        self._blobs = blobs
        self._room = Room(directory)
        self.segments = Segments(directory / "segments")
        self.durable = 0
        self.done = False
        self._ended = asyncio.Event()
        content = batch_input(LINES, "x" * (2 * MIB // LINES))
        with self._blobs.writer("input") as writer:
            writer.write(content)
            writer.commit()
        self._blob = BlobRef("input", len(content))

    async def run(self, epoch: int) -> None:
        self._ended.clear()
        dispatcher = Dispatcher(
            Configure("", "", 1 << 20, 60.0, 60.0, 60.0, prompt_order=False),
            blobs=self._blobs,
            segments=self.segments,
            room=self._room,
            clock=SystemClock(),
            rng=random.Random(1),
            report=self._take,
        )
        running = asyncio.create_task(dispatcher.run())
        dispatcher.use_replicas([Replica(self._engine.base_url, window=WINDOW)])
        shard = Shard(KEY, 1, LINES, 0, self._blob.bytes, epoch=epoch)
        dispatcher.assign(Assign(shard, [self._blob], Endpoint.CHAT_COMPLETIONS, "scripted"))
        async with asyncio.timeout(60):
            ended = asyncio.create_task(self._ended.wait())
            await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        assert not running.done(), "the worker has ended"
        await dispatcher.stop(0)
        running.cancel()
        await asyncio.wait({running})

    def _take(self, report: Report) -> None:
        match report:
            case Moved(shards):
                self.durable = max([self.durable, *(shard.tally.lines for shard in shards)])
            case Broken() | Done():
                self.done = isinstance(report, Done)
                self._ended.set()


def damage(stored: Path) -> None:
    content = bytearray(stored.read_bytes())
    content[3 * MIB // 2] ^= 1
    stored.write_bytes(content)


async def test_a_shard_whose_parts_find_no_file_left_is_finished_later(tmp_path: Path) -> None:
    with running(fair) as (engine,):
        attempts = Attempts(tmp_path, engine, ShortOfFiles(tmp_path / "blobs"))
        await attempts.run(epoch=1)
        assert not attempts.done
        await attempts.run(epoch=2)
        assert attempts.done
    assert sum(engine.asked.values()) == LINES, "an answer was paid for twice"


async def test_every_line_that_can_be_read_is_sent_once(tmp_path: Path) -> None:
    with running(unhurried) as (engine,):
        attempts = Attempts(tmp_path, engine, Blobs(tmp_path / "blobs"))
        damage(tmp_path / "blobs" / "input")
        for epoch in (1, 2, 3):
            await attempts.run(epoch)
            recorded = len(attempts.segments.recover(KEY))
            assert sum(engine.asked.values()) == recorded == attempts.durable, "an answer was paid for and thrown away"
    assert 0 < recorded < LINES
