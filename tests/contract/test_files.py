"""Files and their bytes: forgotten in one transaction, removed from storage whatever happens in between."""

from __future__ import annotations

import asyncio

import msgspec
import pytest

from pronghorn.checking import InputChecker
from pronghorn.control.maintenance import Maintenance
from pronghorn.domain.model import Batch, BatchStamps, BatchStatus, BlobRef, Endpoint, File
from pronghorn.domain.planning import Rejection
from pronghorn.engines.base import EnginePool
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.uploads import Uploads
from pronghorn.storage.webhooks import Webhooks
from tests.contract.world import ACCOUNT, START, World
from tests.storing import new_batch


async def add(world: World, name: str, *, expires_at: int | None = None) -> File:
    """Store a file of two blobs."""
    refs = [BlobRef(f"parts/{name}-{part}", 3) for part in (1, 2)]
    for ref in refs:
        await asyncio.to_thread(world.store, ref.key, b"abc")
    file = File(f"file-{name}", ACCOUNT, "batch", f"{name}.jsonl", 6, START, expires_at)
    await world.files.add(file, refs)
    return file


async def add_batch(world: World, file: File) -> Batch:
    batch = new_batch(
        f"batch_{file.id}", START, account_id=ACCOUNT, endpoint=Endpoint.EMBEDDINGS, input_file_id=file.id
    )
    return await Metadata(world.database).add_batch(batch)


async def test_a_file_goes_with_its_bytes_when_its_time_is_over(world: World) -> None:
    await add(world, "due", expires_at=START + 10)
    await add(world, "later", expires_at=START + 11)
    await add(world, "never")
    world.clock.time = START + 10
    await world.maintenance.sweep()
    assert world.stored() == {"later-1", "later-2", "never-1", "never-2"}
    assert await world.files.find("file-due", ACCOUNT) is None
    assert await world.files.find("file-later", ACCOUNT) is not None


async def test_the_input_of_an_open_batch_outlives_its_time(world: World) -> None:
    file = await add(world, "input", expires_at=START + 10)
    batch = await add_batch(world, file)
    world.clock.time = START + 10
    await world.maintenance.sweep()
    assert world.stored() == {"input-1", "input-2"}
    assert not await world.files.delete(file.id, ACCOUNT)
    await Metadata(world.database).advance(batch, BatchStatus.FAILED, START + 11)
    await world.maintenance.sweep()
    assert world.stored() == set()


async def test_a_crash_after_forgetting_leaves_the_bytes_to_the_next_sweep(world: World) -> None:
    file = await add(world, "gone")
    assert await world.files.delete(file.id, ACCOUNT)
    assert world.stored() == {"gone-1", "gone-2"}
    await Maintenance(
        Files(world.database),
        Uploads(world.database),
        Webhooks(world.database),
        world.blobs,
        world.orphans,
        world.clock,
    ).sweep()
    assert world.stored() == set()
    assert await world.files.removals() == []


async def test_a_crash_after_removing_is_no_trouble(world: World) -> None:
    file = await add(world, "gone")
    await world.files.delete(file.id, ACCOUNT)
    await world.blobs.delete("parts/gone-1")
    await world.maintenance.sweep()
    assert world.stored() == set()
    assert await world.files.removals() == []


async def test_one_blob_that_cannot_be_removed_holds_up_no_other(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "b"):
        await world.files.delete((await add(world, name)).id, ACCOUNT)
    stuck = world.blobs_dir / "parts" / "a-1"
    stuck.unlink()
    stuck.mkdir()  # a directory cannot be removed as a file
    (stuck / "inside").touch()
    await world.maintenance.sweep()
    assert await world.files.removals() == ["parts/a-1"]
    assert "cannot be removed" in caplog.text
    assert not (world.blobs_dir / "parts" / "b-2").exists()


async def test_a_file_whose_time_is_over_is_listed_no_more_and_no_input_of_a_new_batch(world: World) -> None:
    lasting, over = await add(world, "lasting"), await add(world, "over", expires_at=START + 10)
    checker = InputChecker(world.files, world.blobs, EnginePool([]), line_bytes_max=1024)
    batch = await add_batch(world, over)

    async def listed(now: int) -> list[File]:
        page = await world.files.page(ACCOUNT, now, purpose=None, limit=10, after=None, newest_first=False)
        return page.items if page else []

    async def param_of_problem(created_at: int) -> str | None:
        found = await checker.check(msgspec.structs.replace(batch, stamps=BatchStamps(created_at)))
        assert isinstance(found, Rejection)
        return found.problems[0].param

    assert await listed(START + 9) == [lasting, over]
    assert await listed(START + 10) == [lasting]
    assert await param_of_problem(START + 9) != "file_id", "its batch keeps it"
    assert await param_of_problem(START + 10) == "file_id"
