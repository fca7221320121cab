"""What every store of blobs promises."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pronghorn.domain.model import BlobRef
from pronghorn.errors import Damaged, NotStored
from pronghorn.limits import FILE_CHUNK_BYTES
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.checksums import BLOCK_BYTES
from tests.beds import Bed

OpenBlobs = Callable[[], Blobs]


@pytest.fixture(params=["directory"])
def open_blobs(request: pytest.FixtureRequest, tmp_path: Path) -> OpenBlobs:
    """Opens the same store anew, as a process that starts again does."""
    return {"directory": lambda: Blobs(tmp_path / "a" / "b")}[request.param]


@pytest.fixture
def blobs(open_blobs: OpenBlobs) -> Blobs:
    return open_blobs()


def store(blobs: Blobs, key: str, data: bytes) -> BlobRef:
    with blobs.writer(key) as writer:
        writer.write(data)
        writer.commit()
    return BlobRef(key, len(data))


def read(blobs: Blobs, refs: list[BlobRef], start: int, end: int) -> bytes:
    return b"".join(chunks(blobs, refs, start, end))


def chunks(blobs: Blobs, refs: list[BlobRef], start: int, end: int) -> list[bytes]:
    async def collect() -> list[bytes]:
        return [chunk async for chunk in blobs.read(refs, start, end)]

    return asyncio.run(collect())


def files_below(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_what_was_committed_is_there_for_the_next_process(open_blobs: OpenBlobs) -> None:
    ref = store(open_blobs(), "files/one", b"hello")
    assert read(open_blobs(), [ref], 0, 5) == b"hello"


def test_a_writer_counts_its_bytes_over_many_writes(blobs: Blobs) -> None:
    with blobs.writer("x") as writer:
        writer.write(b"ab")
        writer.write(memoryview(b"cde"))
        assert writer.bytes == 5
        writer.commit()
    assert read(blobs, [BlobRef("x", 5)], 0, 5) == b"abcde"


def test_a_range_over_several_blobs_is_exact_at_every_boundary(blobs: Blobs) -> None:
    parts = [b"abc", b"", b"d", b"efgh", b""]
    refs = [store(blobs, f"parts/{position}", part) for position, part in enumerate(parts)]
    whole = b"".join(parts)
    for start in range(len(whole) + 1):
        for end in range(start, len(whole) + 1):
            assert read(blobs, refs, start, end) == whole[start:end]
            assert b"".join(blobs.read_blocking(refs, start, end)) == whole[start:end]


def test_a_range_past_the_end_ends_at_the_end(blobs: Blobs) -> None:
    ref = store(blobs, "x", b"abc")
    assert read(blobs, [ref], 1, 99) == b"bc"
    assert read(blobs, [ref], 99, 100) == b""
    assert read(blobs, [], 0, 5) == b""


def test_a_blob_is_read_in_chunks_of_bounded_size(blobs: Blobs) -> None:
    data = bytes(range(256)) * (FILE_CHUNK_BYTES // 256) + b"tail"
    found = chunks(blobs, [store(blobs, "x", data)], 1, len(data))
    assert [len(chunk) for chunk in found] == [FILE_CHUNK_BYTES - 1, 4]
    assert b"".join(found) == data[1:]


def test_nothing_is_under_the_key_before_the_commit(blobs: Blobs) -> None:
    with blobs.writer("x") as writer:
        writer.write(b"abc")
        with pytest.raises(NotStored):
            read(blobs, [BlobRef("x", 3)], 0, 3)
        writer.commit()
        assert read(blobs, [BlobRef("x", 3)], 0, 3) == b"abc"


def test_an_abandoned_write_leaves_nothing_behind(blobs: Blobs, tmp_path: Path) -> None:
    with blobs.writer("d/x") as writer:
        writer.write(b"abc")
    with pytest.raises(NotStored):
        read(blobs, [BlobRef("d/x", 3)], 0, 3)
    assert files_below(tmp_path) == []


def test_an_abandoned_write_leaves_what_was_under_the_key(blobs: Blobs) -> None:
    ref = store(blobs, "x", b"old")
    with blobs.writer("x") as writer:
        writer.write(b"new")
    assert read(blobs, [ref], 0, 3) == b"old"


def test_a_later_commit_replaces_an_earlier_one(blobs: Blobs) -> None:
    store(blobs, "x", b"older and longer")
    assert read(blobs, [store(blobs, "x", b"new")], 0, 3) == b"new"


def test_a_missing_blob_is_named(blobs: Blobs) -> None:
    refs = [store(blobs, "here", b"abc"), BlobRef("gone", 3)]
    with pytest.raises(NotStored, match="stored file gone is gone"):
        read(blobs, refs, 0, 6)
    with pytest.raises(NotStored, match="stored file gone is gone"):
        list(blobs.read_blocking(refs, 0, 6))
    assert read(blobs, refs, 0, 3) == b"abc"


def test_a_blob_that_has_lost_its_end_is_damaged(blobs: Blobs, tmp_path: Path) -> None:
    ref = store(blobs, "x", b"abc" * BLOCK_BYTES)
    stored = tmp_path / "a" / "b" / "x"
    for size in (stored.stat().st_size - 1, ref.bytes, 5, 0):
        os.truncate(stored, size)
        with pytest.raises(Damaged, match="stored file x is damaged: its end is missing"):
            read(blobs, [ref], 0, ref.bytes)


def test_a_blob_of_which_a_byte_has_changed_is_damaged_there_and_nowhere_else(blobs: Blobs, tmp_path: Path) -> None:
    data = os.urandom(3 * BLOCK_BYTES + 7)
    ref = store(blobs, "x", data)
    stored = tmp_path / "a" / "b" / "x"
    for place in (0, BLOCK_BYTES - 1, BLOCK_BYTES, 2 * BLOCK_BYTES + 5, len(data) - 1):
        with stored.open("r+b") as file:
            file.seek(place)
            file.write(bytes([data[place] ^ 1]))
        block = place - place % BLOCK_BYTES
        with pytest.raises(Damaged, match=f"stored file x is damaged: bytes {block} to "):
            read(blobs, [ref], 0, len(data))
        with pytest.raises(Damaged):
            read(blobs, [ref], place, place + 1)
        assert read(blobs, [ref], 0, block) == data[:block]
        assert read(blobs, [ref], block + BLOCK_BYTES, len(data)) == data[block + BLOCK_BYTES :]
        with stored.open("r+b") as file:
            file.seek(place)
            file.write(data[place : place + 1])


def test_checksums_are_the_same_however_a_blob_is_written(blobs: Blobs, bed: Bed) -> None:
    data = bed.rng.randbytes(3 * BLOCK_BYTES)
    for _ in range(bed.times(small=20, ci=200, long=2000)):
        end = bed.rng.choice([0, 1, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES, len(data)])
        with blobs.writer("x") as writer:
            position = 0
            while position < end:
                size = bed.rng.choice([1, 600, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, 2 * BLOCK_BYTES])
                size = min(size, end - position) if size > 1 or end < 10 else min(997, end - position)
                writer.write(data[position : position + size])
                position += size
            writer.commit()
        assert read(blobs, [BlobRef("x", end)], 0, end) == data[:end]


def test_a_process_may_end_right_after_a_read(tmp_path: Path) -> None:
    script = f"""
import asyncio, pathlib
from pronghorn.domain.model import BlobRef
from pronghorn.storage.blobs import Blobs

async def read() -> None:
    blobs = Blobs(pathlib.Path({str(tmp_path)!r}))
    with blobs.writer("x") as writer:
        writer.write(b"abc")
        writer.commit()
    assert [chunk async for chunk in blobs.read([BlobRef("x", 3)], 0, 3)] == [b"abc"]
    await blobs.delete("x")

asyncio.run(read())
"""
    for _ in range(5):
        subprocess.run([sys.executable, "-c", script], check=True)


def test_a_blob_can_be_deleted_twice(blobs: Blobs) -> None:
    ref = store(blobs, "d/x", b"abc")
    asyncio.run(blobs.delete("d/x"))
    asyncio.run(blobs.delete("d/x"))
    asyncio.run(blobs.delete("never/there"))
    with pytest.raises(NotStored):
        read(blobs, [ref], 0, 3)


def test_deleting_a_blob_takes_what_an_interrupted_writer_left(blobs: Blobs, tmp_path: Path) -> None:
    interrupted = blobs.writer("x")
    interrupted.write(b"abc")
    assert files_below(tmp_path) != []
    asyncio.run(blobs.delete("x"))
    assert files_below(tmp_path) == []
    with interrupted:
        pass


def test_an_empty_blob_is_a_blob(blobs: Blobs) -> None:
    assert read(blobs, [store(blobs, "x", b"")], 0, 0) == b""


def test_nothing_is_made_before_something_is_stored(tmp_path: Path) -> None:
    """A worker that starts after its server has died must not make a data directory that has been removed anew."""
    assert Blobs(tmp_path / "gone").keys("files") == []
    assert files_below(tmp_path) == []
    assert not (tmp_path / "gone").exists()


def test_what_an_earlier_run_left_unfinished_is_among_the_keys(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    with blobs.writer("files/kept") as writer:
        writer.write(b"whole")
        writer.commit()
    with blobs.writer("files/lost") as interrupted:
        interrupted.write(b"half")
        assert sorted(Blobs(tmp_path).keys("files")) == ["files/kept", "files/lost.part"]
        assert Blobs(tmp_path).folders("") == ["/files"]
        assert Blobs(tmp_path).keys("nowhere") == []
