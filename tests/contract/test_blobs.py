"""What every store of blobs promises."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pronghorn.domain.model import BlobRef
from pronghorn.errors import Damaged, NotStored, StorageError
from pronghorn.limits import FILE_CHUNK_BYTES
from pronghorn.storage.blobs import Blobs

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
    assert [len(chunk) for chunk in found] == [FILE_CHUNK_BYTES, 3]
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


def test_a_blob_that_has_lost_its_end_is_damaged(blobs: Blobs) -> None:
    store(blobs, "x", b"abc")
    with pytest.raises(Damaged, match="stored file x ends before byte 5"):
        read(blobs, [BlobRef("x", 5)], 0, 5)
    with pytest.raises(StorageError, match="stored file x cannot be read: "):
        read(blobs, [BlobRef("x", 9)], 4, 9)


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


def test_what_an_earlier_run_left_unfinished_is_dropped(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    with blobs.writer("files/kept") as writer:
        writer.write(b"whole")
        writer.commit()
    interrupted = blobs.writer("files/lost")
    interrupted.write(b"half")
    Blobs(tmp_path).drop_unfinished("files")
    assert [path.name for path in (tmp_path / "files").iterdir()] == ["kept"]
    interrupted.__exit__(None, None, None)
