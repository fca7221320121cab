"""The end of a batch: its shards' parts are its files, and nothing else of it stays in storage."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from pronghorn.clock import SystemClock
from pronghorn.control.finalizer import Finalizer
from pronghorn.domain.model import BlobRef, ShardKey, ShardResult, Tally
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.errors import Fenced
from pronghorn.ids import RandomIds
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.segments import Segments
from tests.contract.test_files import add, add_batch
from tests.contract.world import START, World


async def test_what_refused_attempts_stored_goes_when_the_batch_ends(world: World, tmp_path: Path) -> None:
    metadata, segments = Metadata(world.database), Segments(tmp_path / "segments")
    batch = await add_batch(world, await add(world, "input"))
    await metadata.start_batch(batch, Plan([PlannedShard(1, 1, 0, 3)], 1, "m"), START)
    results = {}
    for epoch in (1, 2):
        claimed = await metadata.claim_shard(batch.id)
        assert claimed is not None
        part = BlobRef(f"batches/{batch.id}/0-{epoch}.output", 3)
        await asyncio.to_thread(world.store, part.key, b"abc")
        results[epoch] = ShardResult(part, None, Tally(1), [])
        if epoch == 1:
            await metadata.release_shard(claimed.key, 1)
    await asyncio.to_thread(world.store, f"batches/{batch.id}/0-1.errors.part", b"half of it")
    with pytest.raises(Fenced):
        await metadata.commit_shard(ShardKey(batch.id, 0), 1, results[1])
    await metadata.commit_shard(ShardKey(batch.id, 0), 2, results[2])
    (running,) = await metadata.open_batches()
    finalizer = Finalizer(metadata, world.files, world.blobs, segments, SystemClock(), RandomIds())
    await finalizer.finish(running)
    assert await metadata.has_ended(batch.id)
    assert await asyncio.to_thread(world.blobs.keys, f"batches/{batch.id}") == [f"batches/{batch.id}/0-2.output"]
