"""The order of things in the hot path, on which depends what a kill can cost."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
from blockbuster import BlockBuster

from pronghorn.clock import SystemClock
from pronghorn.domain.model import BlobRef, Endpoint, Replica, Shard, ShardKey
from pronghorn.engines.client import EngineClient
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments, SegmentWriter
from pronghorn.worker.dispatch import Dispatcher
from pronghorn.worker.protocol import Assign, Configure, Done, Report
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess

LINES = 100
WINDOW = 8


async def test_what_was_answered_is_written_before_anything_more_is_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blockbuster: BlockBuster
) -> None:
    blockbuster.deactivate()  # a worker writes in its loop: a thread would cost more than the write
    writers: list[SegmentWriter] = []
    sent = early = 0

    class Watched(Segments):
        def create(self, key: ShardKey, epoch: int) -> SegmentWriter:
            writers.append(super().create(key, epoch))
            return writers[-1]

    send = EngineClient.send

    def send_watched(client: EngineClient, *arguments: Any) -> Any:
        nonlocal sent, early
        sent += 1
        early += not all(writer.all_written for writer in writers)
        return send(client, *arguments)

    monkeypatch.setattr(EngineClient, "send", send_watched)
    blobs, segments, done = Blobs(tmp_path / "blobs"), Watched(tmp_path / "segments"), asyncio.Event()

    def report(said: Report) -> None:
        if isinstance(said, Done):
            done.set()

    dispatcher = Dispatcher(
        Configure("", "", 1 << 20, 60.0, 60.0, 60.0, prompt_order=False),
        blobs=blobs,
        segments=segments,
        room=Room(tmp_path),
        clock=SystemClock(),
        rng=random.Random(1),
        report=report,
    )
    content = batch_input(LINES)
    with blobs.writer("input") as writer:
        writer.write(content)
        writer.commit()
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        running = asyncio.create_task(dispatcher.run())
        dispatcher.use_replicas([Replica(engine.base_url, window=WINDOW)])
        shard = Shard(ShardKey("batch_1", 0), 1, LINES, 0, len(content), epoch=1)
        blob = BlobRef("input", len(content))
        dispatcher.assign(Assign(shard, [blob], Endpoint.CHAT_COMPLETIONS, "scripted"))
        finished = asyncio.create_task(done.wait())
        await asyncio.wait({running, finished}, return_when=asyncio.FIRST_COMPLETED)
        assert not running.done()
        await dispatcher.stop(0)
        running.cancel()
        await asyncio.wait({running})
    assert (sent, early) == (LINES, 0), "a kill before the write would waste more than what is in flight"
