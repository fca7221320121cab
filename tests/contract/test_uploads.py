"""Uploads in the database: every transition, what a part may still do after each, and which blobs are removed."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from pronghorn.control.maintenance import HISTORY_S, Maintenance
from pronghorn.domain.model import BlobRef
from pronghorn.domain.uploads import Upload, UploadPart, UploadStatus
from pronghorn.errors import Fenced
from pronghorn.storage.uploads import digest
from pronghorn.storage.webhooks import Webhooks
from tests.contract.world import ACCOUNT, END, START, World

ONLY = UploadPart("part_only", "upload_a", ACCOUNT, "parts/part_only", START)


async def _expire(world: World, upload: Upload) -> None:
    world.clock.time = upload.expires_at
    await world.uploads.expire(world.clock.now())


END_WAYS: dict[UploadStatus, Callable[[World, Upload], Awaitable[object]]] = {
    UploadStatus.COMPLETED: lambda world, upload: world.complete(upload, ONLY),
    UploadStatus.CANCELLED: lambda world, upload: world.uploads.cancel(upload),
    UploadStatus.EXPIRED: _expire,
}


async def test_what_is_added_is_found_by_its_account_alone(world: World) -> None:
    upload = await world.upload("a")
    assert await world.uploads.find(upload.id, ACCOUNT) == upload
    assert await world.uploads.find(upload.id, "org-other") is None
    assert await world.uploads.find_with_parts(upload.id, "org-other") is None
    assert await world.uploads.find("upload_b", ACCOUNT) is None


async def test_completing_makes_the_parts_in_order_the_file_and_removes_the_others(world: World) -> None:
    upload = await world.upload("a")
    first, unused, second = [await world.part(upload, name, name.encode() * 5) for name in "bca"]
    completed = await world.complete(upload, second, first)
    assert completed.status is UploadStatus.COMPLETED
    assert completed == await world.uploads.find(upload.id, ACCOUNT)
    assert completed.part_ids_digest == digest([second.id, first.id]) != digest([first.id, second.id])
    refs = await world.files.blobs(str(completed.file_id))
    assert refs == [BlobRef(second.key, 5), BlobRef(first.key, 5)]
    await world.maintenance.sweep()
    assert world.stored() == {first.id, second.id}
    assert b"".join([chunk async for chunk in world.blobs.read(refs, 0, 10)]) == b"aaaaabbbbb"
    assert await world.known_parts() == set()
    assert unused.id not in world.stored()


@pytest.mark.parametrize("second", END_WAYS)
@pytest.mark.parametrize("first", END_WAYS)
async def test_an_upload_ends_once(world: World, first: UploadStatus, second: UploadStatus) -> None:
    upload = await world.upload("a")
    await world.part(upload, "only", b"12345")
    await END_WAYS[first](world, upload)
    ended = await world.uploads.find(upload.id, ACCOUNT)
    if second is UploadStatus.EXPIRED:
        await END_WAYS[second](world, upload)
    else:
        with pytest.raises(Fenced):
            await END_WAYS[second](world, upload)
    assert await world.uploads.find(upload.id, ACCOUNT) == ended
    assert await world.status(upload) is first
    assert (await world.files.find(f"file-{upload.id}", ACCOUNT) is not None) == (first is UploadStatus.COMPLETED)


@pytest.mark.parametrize("way", END_WAYS)
async def test_an_upload_that_has_ended_takes_no_part(world: World, way: UploadStatus) -> None:
    upload = await world.upload("a")
    await world.part(upload, "only", b"12345")
    arriving = await world.begin(upload, "arriving")
    await END_WAYS[way](world, upload)
    with pytest.raises(Fenced):
        await world.begin(upload, "late")
    with pytest.raises(Fenced):
        await world.uploads.store_part(arriving, 5, START)
    await world.uploads.drop_part(arriving)
    assert await world.known_parts() == set()


async def test_an_upload_whose_time_is_over_takes_no_part_before_a_sweep_has_noted_it(world: World) -> None:
    upload = await world.upload("a")
    arriving = await world.begin(upload, "arriving")
    world.clock.time = END
    with pytest.raises(Fenced):
        await world.begin(upload, "late")
    with pytest.raises(Fenced):
        await world.uploads.store_part(arriving, 5, END)
    assert upload.status_at(END - 1) is UploadStatus.PENDING
    assert upload.status_at(END) is UploadStatus.EXPIRED


async def test_completing_with_a_part_that_is_gone_changes_nothing(world: World) -> None:
    upload = await world.upload("a")
    there = await world.part(upload, "there", b"12345")
    gone = await world.part(upload, "gone", b"67890")
    await world.uploads.drop_part(gone)
    with pytest.raises(Fenced):
        await world.complete(upload, there, gone)
    assert await world.status(upload) is UploadStatus.PENDING
    assert await world.files.find(f"file-{upload.id}", ACCOUNT) is None
    assert await world.known_parts() == {there.id}


async def test_a_part_that_streams_in_counts_but_cannot_be_used(world: World) -> None:
    upload = await world.upload("a")
    whole = await world.part(upload, "whole", b"12345")
    await world.begin(upload, "arriving")
    assert await world.uploads.find_with_parts(upload.id, ACCOUNT) == (upload, {whole.id: BlobRef(whole.key, 5)})
    assert await world.uploads.count_parts(upload.id) == 2


async def test_a_sweep_expires_uploads_in_time_and_removes_their_parts(world: World) -> None:
    late = await world.upload("late")
    await world.part(late, "late", b"12345")
    world.clock.time = END - 1
    await world.maintenance.sweep()
    assert await world.status(late) is UploadStatus.PENDING
    assert world.stored() == {"part_late"}
    world.clock.time = END
    await world.maintenance.sweep()
    assert await world.status(late) is UploadStatus.EXPIRED
    assert world.stored() == set()


async def test_a_sweep_removes_the_parts_of_cancelled_uploads_and_no_others(world: World) -> None:
    cancelled, pending = await world.upload("a"), await world.upload("b")
    await world.part(cancelled, "a", b"12345")
    await world.part(pending, "b", b"12345")
    await world.uploads.cancel(cancelled)
    await world.maintenance.sweep()
    assert world.stored() == {"part_b"}
    assert await world.known_parts() == {"part_b"}


async def test_a_sweep_forgets_uploads_that_ended_long_ago(world: World) -> None:
    ended, streaming, pending = await world.upload("a"), await world.upload("b"), await world.upload("c")
    await world.uploads.cancel(ended)
    await world.begin(streaming, "b")
    await world.uploads.cancel(streaming)
    world.clock.time = END + HISTORY_S - 1
    await world.maintenance.sweep()
    assert await world.status(ended) is UploadStatus.CANCELLED
    assert await world.status(pending) is UploadStatus.EXPIRED
    world.clock.time = END + HISTORY_S
    await world.maintenance.sweep()
    assert await world.uploads.find(ended.id, ACCOUNT) is None
    assert await world.uploads.find(pending.id, ACCOUNT) is None
    assert await world.status(streaming) is UploadStatus.CANCELLED, "its part still streams in"


async def test_a_sweep_leaves_a_part_that_is_being_written_alone(world: World) -> None:
    upload = await world.upload("a")
    arriving = await world.begin(upload, "arriving")
    writer = await asyncio.to_thread(world.blobs.writer, arriving.key)
    await asyncio.to_thread(writer.write, b"12345")
    await world.uploads.cancel(upload)
    await world.maintenance.sweep()
    await asyncio.to_thread(writer.commit)
    with pytest.raises(Fenced):
        await world.uploads.store_part(arriving, 5, START)
    await world.uploads.drop_part(arriving)
    await world.maintenance.sweep()
    assert world.stored() == set()


async def test_a_sweep_that_dies_between_the_blobs_and_their_marks_is_made_good_by_the_next(world: World) -> None:
    upload = await world.upload("a")
    for name in "bcd":
        await world.part(upload, name, b"12345")
    await world.uploads.cancel(upload)
    await world.blobs.delete("parts/part_c")  # a sweep got this far, and its process was killed
    await world.maintenance.sweep()
    assert world.stored() == set()
    assert await world.files.removals() == []


async def test_what_a_killed_server_was_receiving_is_removed_at_the_next_start(world: World) -> None:
    upload = await world.upload("a")
    await world.part(upload, "whole", b"12345")
    half, unnoted = await world.begin(upload, "half"), await world.begin(upload, "unnoted")
    (world.blobs_dir / f"{half.key}.part").write_bytes(b"123")
    (world.blobs_dir / unnoted.key).write_bytes(b"12345")
    await world.uploads.drop_interrupted()
    await world.maintenance.sweep()
    assert world.stored() == {"part_whole"}
    assert await world.status(upload) is UploadStatus.PENDING


async def test_maintenance_sweeps_at_once_and_outlives_a_failed_sweep(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    upload = await world.upload("a")
    await world.uploads.cancel(upload)
    swept = asyncio.Event()

    class Watched(Maintenance):
        async def sweep(self) -> None:
            await super().sweep()
            swept.set()
            raise OSError("the disk is gone")

    webhooks = Webhooks(world.database)
    watched = Watched(world.files, world.uploads, webhooks, world.blobs, world.orphans, world.clock)
    running = asyncio.create_task(watched.run())
    await swept.wait()
    await asyncio.sleep(0)
    assert not running.done()
    assert "a sweep failed" in caplog.text
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
