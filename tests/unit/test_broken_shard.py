"""A shard whose input cannot be read on: what was sent is recorded, once, and the shards beside it go on."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from pronghorn.clock import SystemClock
from pronghorn.domain.model import BlobRef, Endpoint, Replica, Shard, ShardKey
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments
from pronghorn.worker.dispatch import Dispatcher
from pronghorn.worker.protocol import Assign, Broken, Configure, Moved, Report
from tests.faults.test_kill import batch_input
from tests.faults.test_odd_upstreams import OddEngine, running, unhurried

WINDOW = 16
LINES = 100
KEY = ShardKey("batch_1", 0)


@pytest.fixture(autouse=True)
def unwatched(blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # a worker writes in its loop: a thread would cost more than the write


class Attempts:
    """Runs one damaged shard again and again, each time to its end."""

    def __init__(self, directory: Path, engine: OddEngine) -> None:
        self._engine = engine
        self._blobs = Blobs(directory / "blobs")
        self._room = Room(directory)
        self.segments = Segments(directory / "segments")
        self.durable = 0
        self._broken = asyncio.Event()
        content = batch_input(LINES, "x" * (2 * MIB // LINES))
        with self._blobs.writer("input") as writer:
            writer.write(content)
            writer.commit()
        self._blob = BlobRef("input", len(content))
        stored = directory / "blobs" / "input"
        damaged = bytearray(stored.read_bytes())
        damaged[3 * MIB // 2] ^= 1
        stored.write_bytes(damaged)

    async def run(self, epoch: int) -> None:
        self._broken.clear()
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
            await self._broken.wait()
        await dispatcher.stop(0)
        running.cancel()
        await asyncio.wait({running})

    def _take(self, report: Report) -> None:
        match report:
            case Moved(shards):
                self.durable = max([self.durable, *(shard.tally.lines for shard in shards)])
            case Broken():
                self._broken.set()


async def test_every_line_that_can_be_read_is_sent_once(tmp_path: Path) -> None:
    with running(unhurried) as (engine,):
        attempts = Attempts(tmp_path, engine)
        for epoch in (1, 2, 3):
            await attempts.run(epoch)
            recorded = len(attempts.segments.recover(KEY))
            assert sum(engine.asked.values()) == recorded == attempts.durable, "an answer was paid for and thrown away"
    assert 0 < recorded < LINES
