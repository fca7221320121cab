"""A coordinator with workers on paper, which say what a test has them say, and metadata that refuses on demand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

from pronghorn.checking import InputChecker
from pronghorn.clock import SystemClock
from pronghorn.control.coordinator import Coordinator
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.planner import Planner
from pronghorn.domain.duplicates import NONE, Originals
from pronghorn.domain.model import DEFAULT_ACCOUNT, BlobRef, Job, Parts, Shard, ShardKey, ShardResult, Tally
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.engines.base import EnginePool
from pronghorn.engines.upstream import UpstreamEngine
from pronghorn.executors.base import Executor
from pronghorn.ids import RandomIds
from pronghorn.settings import UpstreamSettings
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, OpenState
from pronghorn.storage.segments import Segments
from pronghorn.worker.protocol import Assign, Configure, Done, Order, Ready, Report, Stop, UseReplicas
from tests.storing import new_batch


class Refusing(Metadata):
    """Metadata that raises what it is told to, then works, and says when it has been asked again."""

    def __init__(
        self,
        database: Database,
        *,
        looks: Iterable[Exception] = (),
        releases: Iterable[Exception] = (),
        lookups: Iterable[Exception] = (),
    ) -> None:
        super().__init__(database)
        self._looks, self._releases, self._lookups = list(looks), list(releases), list(lookups)
        self.asked_again = asyncio.Event()

    async def open_states(self) -> list[OpenState]:
        if self._looks:
            raise self._looks.pop(0)
        self.asked_again.set()
        return await super().open_states()

    async def release_shard(self, key: ShardKey, epoch: int) -> None:
        if self._releases:
            raise self._releases.pop(0)
        await super().release_shard(key, epoch)

    async def parts_of(self, batch_id: str, positions: Iterable[int]) -> dict[int, Parts]:
        if self._lookups:
            raise self._lookups.pop(0)
        return await super().parts_of(batch_id, positions)


class Worker:
    """A worker that is ready at once, says what it is told to, and ends when it is told to or stopped."""

    def __init__(self, answer: Callable[[Shard], Report] | None) -> None:
        self._answer = answer
        self._says: asyncio.Queue[Report | None] = asyncio.Queue()
        self.orders: asyncio.Queue[Assign] = asyncio.Queue()
        self.windows: list[int | None] = []
        self.heard, self.ended, self.silent = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self.say(Ready())

    def say(self, report: Report) -> None:
        self.silent.clear()
        self._says.put_nowait(report)

    def die(self) -> None:
        self._says.put_nowait(None)

    hang_up = kill = die

    def send(self, order: Order) -> None:
        match order:
            case UseReplicas(replicas):
                self.windows = [replica.window for replica in replicas]
            case Assign(shard):
                self.orders.put_nowait(order)
                if self._answer is not None:
                    self.say(self._answer(shard))
            case Stop():
                self.die()

    async def reports(self) -> AsyncIterator[Report]:
        while (report := await self._says.get()) is not None:
            yield report
            self.heard.set()
            if self._says.empty():
                self.silent.set()

    async def end(self) -> int | None:
        self.ended.set()
        return None


class Workers:
    """An executor of such workers; with `answer` they say that of each shard, at once."""

    def __init__(self, answer: Callable[[Shard], Report] | None = None) -> None:
        self._answer = answer
        self.started: asyncio.Queue[Worker] = asyncio.Queue()

    async def start(self) -> Worker:
        worker = Worker(self._answer)
        self.started.put_nowait(worker)
        return worker


def done(shard: Shard) -> Done:
    output = BlobRef(f"part{shard.key.position}", 1)
    return Done(shard.key, shard.epoch, ShardResult(output, None, Tally(1), []))


async def coordinator(
    metadata: Metadata,
    database: Database,
    directory: Path,
    workers: Executor,
    *,
    count: int = 1,
    window: int | None = None,
    batch_ended: Callable[[], None] = lambda: None,
) -> Coordinator:
    """Make a coordinator with one engine that takes any line, and that nobody asks."""
    engine = UpstreamEngine(UpstreamSettings("http://nowhere/v1", window=window))
    clock, pool, files = SystemClock(), EnginePool([engine]), Files(database)
    blobs = await asyncio.to_thread(Blobs, directory / "blobs")
    segments = Segments(directory / "segments")
    bounds: dict[str, Any] = {"answer_bytes_max": 1024, "line_timeout_s": 1.0}
    bounds |= {"refused_pause_s": 1.0, "model_grace_s": 1.0, "prompt_order": True}
    return Coordinator(
        metadata=metadata,
        files=files,
        segments=segments,
        engines=pool,
        executor=workers,
        planner=Planner(metadata, InputChecker(files, blobs, pool, line_bytes_max=1024), clock),
        finalizer=Finalizer(metadata, files, blobs, segments, clock, RandomIds()),
        clock=clock,
        configure=Configure(str(directory / "blobs"), str(directory / "segments"), **bounds),
        workers=count,
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


async def add_batch(metadata: Metadata, name: str, lines: int = 0, originals: Originals = NONE) -> None:
    """Add a batch over a file of its name; with lines it is in progress, each in a shard of its own."""
    if await metadata.job("job-1", DEFAULT_ACCOUNT) is None:
        await metadata.add_account(DEFAULT_ACCOUNT, "default", 1)
        await metadata.add_job(Job("job-1", DEFAULT_ACCOUNT, "job", 1, 1))
    batch = await metadata.add_batch(new_batch(f"batch_{name}", 10, input_file_id=f"file-{name}"))
    if lines:
        shards = [PlannedShard(number, 1, 100 * number, 100) for number in range(1, lines + 1)]
        await metadata.start_batch(batch, Plan(shards, lines, "m", (), originals), 11)
