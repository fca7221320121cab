"""Disks that are full, and disks that change what was written: refused, waited for, noticed; never served."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.beds import Bed, require_root
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server

from pronghorn.limits import KIB, MIB
from pronghorn.storage.room import RESERVE_SHARE

DISK_BYTES = 64 * MIB
RESERVE_BYTES = int(RESERVE_SHARE * DISK_BYTES)
LINES = 1500


class SmallDisk:
    """A file system in memory, and one file on it that takes the room away."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def leave(self, free_bytes: int) -> None:
        """Fill the disk so that this much is free."""
        self.give_room()
        with self._filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while (disk := os.statvfs(self.path)).f_bavail * disk.f_frsize > free_bytes:
                file.write(bytes(64 * KIB if disk.f_bavail * disk.f_frsize - free_bytes > MIB else disk.f_frsize))

    def give_room(self) -> None:
        self._filler.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    require_root()
    path = tmp_path / "disk"
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", path], check=True)
    try:
        yield SmallDisk(path)
    finally:
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(
        tmp_path / "engine.log", capacity="slots", slots=8, latency_ms=20, answer_bytes=4000
    ) as engine:
        yield engine


def some_are_done(batch: dict[str, Any]) -> bool:
    return int(batch["request_counts"]["completed"]) > 50


def says_why(batch: dict[str, Any]) -> bool:
    return "disk is full" in str((batch["progress"] or {}).get("reason"))


def is_refused(answer: httpx2.Response) -> None:
    error = answer.json()["error"]
    assert (answer.status_code, error["type"], error["code"]) == (507, "server_error", "disk_full"), answer.text


def stored(server: Server, folder: str = "files") -> list[Path]:
    return sorted(path for path in (server.data_dir / "blobs" / folder).glob("**/*") if path.is_file())


def flip(path: Path, place: int) -> None:
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 0x10]))


def test_an_upload_that_does_not_fit_is_refused_and_leaves_nothing(disk: SmallDisk, engine: ScriptedProcess) -> None:
    def endless() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="x.jsonl"\r\n\r\n'
        for _ in range(2 * DISK_BYTES // MIB):
            yield batch_input(1) + b" " * MIB
        yield b"\r\n--b--\r\n"

    headers = {"content-type": "multipart/form-data; boundary=b"}
    with Server(disk.path / "data", "--upstream", engine.base_url) as server:
        is_refused(server.http.post("/v1/files", content=endless(), headers=headers))
        assert stored(server) == []
        assert server.http.get("/v1/files").json()["data"] == []
        server.upload(batch_input(10))


def test_a_full_disk_refuses_what_would_be_written_and_serves_what_is_there(
    disk: SmallDisk, engine: ScriptedProcess
) -> None:
    with Server(disk.path / "data", "--upstream", engine.base_url) as server:
        file_id = server.upload(batch_input(10))
        upload = {"filename": "x.jsonl", "purpose": "batch", "bytes": 10, "mime_type": "text/jsonl"}
        upload_id = server.http.post("/v1/uploads", json=upload).json()["id"]
        disk.leave(RESERVE_BYTES // 2)
        content = {"file": ("x.jsonl", batch_input(10))}
        is_refused(server.http.post("/v1/files", data={"purpose": "batch"}, files=content))
        is_refused(server.http.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"0123456789"}))
        assert server.content(file_id) == batch_input(10)
        disk.leave(0)
        for _ in range(2000):  # until there is no room left in the database's log either
            answer = server.http.post("/v1/uploads", json=upload)
            if answer.status_code != 200:
                break
        is_refused(answer)
        assert server.content(file_id) == batch_input(10)
        disk.give_room()
        check_output(server, server.await_batch(server.create_batch(file_id)["id"]), 10)
        assert len(stored(server)) == 1


@pytest.mark.parametrize("free_bytes", [RESERVE_BYTES // 2, 0])
def test_a_batch_waits_for_room_says_so_and_wastes_no_call(
    disk: SmallDisk, engine: ScriptedProcess, free_bytes: int
) -> None:
    with Server(disk.path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        server.await_batch(batch_id, some_are_done)
        disk.leave(free_bytes)
        batch = server.await_batch(batch_id, says_why)
        assert batch["status"] == "in_progress"
        asked = engine.ledger()["requests"]
        assert asked < LINES
        disk.give_room()
        check_output(server, server.await_batch(batch_id), LINES)
    assert engine.ledger()["requests"] == LINES


def test_a_server_killed_on_a_full_disk_goes_on_when_there_is_room(disk: SmallDisk, engine: ScriptedProcess) -> None:
    with Server(disk.path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        server.await_batch(batch_id, some_are_done)
        disk.leave(0)
        server.await_batch(batch_id, says_why)
        server.kill()
    with Server(disk.path / "data", "--upstream", engine.base_url) as server:
        assert server.batch(batch_id)["status"] == "in_progress"
        disk.give_room()
        check_output(server, server.await_batch(batch_id), LINES)
    ledger = engine.ledger()
    assert ledger["requests"] <= LINES + ledger["max_in_flight"]


def test_a_stored_file_that_has_changed_is_reported_and_not_served(tmp_path: Path, engine: ScriptedProcess) -> None:
    content = batch_input(30_000)
    assert len(content) > 3 * MIB
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        file_id = server.upload(content)
        flip(stored(server)[0], len(content) // 2)
        url = f"/v1/files/{file_id}/content"
        whole = server.http.get(url, headers={"range": "bytes=0-999"})
        assert (whole.status_code, whole.content) == (206, content[:1000])
        damaged = server.http.get(url, headers={"range": f"bytes={len(content) // 2}-"})
        assert (damaged.status_code, damaged.json()["error"]["code"]) == (500, "file_damaged")
        with pytest.raises(httpx2.RemoteProtocolError):
            server.http.get(url)
        server.await_log(f"GET {url} breaks off: ")
        assert "Traceback" not in server.log()
        batch = server.await_batch(server.create_batch(file_id)["id"])
        assert batch["status"] == "failed"
        assert "is damaged: bytes" in batch["errors"]["data"][0]["message"]
    assert engine.ledger()["requests"] == 0


def test_an_input_that_changes_while_its_batch_runs_stops_it_with_the_reason(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    content = batch_input(LINES)
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(content))["id"]
        server.await_batch(batch_id, some_are_done)
        path, place = stored(server)[0], len(content) - 100
        flip(path, place)
        server.await_batch(batch_id, lambda batch: "is damaged" in str((batch["progress"] or {}).get("reason")))
        flip(path, place)
        check_output(server, server.await_batch(batch_id), LINES)


def test_an_outcome_that_has_changed_on_disk_is_run_again(tmp_path: Path, engine: ScriptedProcess, bed: Bed) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        server.await_batch(batch_id, some_are_done)
        server.kill()
    segments = [path for path in (tmp_path / "data" / "segments").glob("*/*.segment") if path.stat().st_size]
    for path in segments:
        flip(path, bed.rng.randrange(path.stat().st_size))
    assert segments
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        check_output(server, server.await_batch(batch_id), LINES)


def test_what_a_crash_has_left_and_nothing_names_is_removed_at_the_next_start(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        file_id = server.upload(batch_input(100))
        batch = server.await_batch(server.create_batch(file_id)["id"])
        named = {folder: stored(server, folder) for folder in ("files", "parts", "batches")}
        server.kill()
    blobs = tmp_path / "data" / "blobs"
    orphans = ["files/file-lost", "files/file-cut.part", "parts/part_lost", f"batches/{batch['id']}/0-9.output"]
    orphans += ["batches/batch_never/0-1.errors", f"batches/{batch['id']}/0-8.output.part"]
    for name in orphans:
        (blobs / name).parent.mkdir(parents=True, exist_ok=True)
        (blobs / name).write_bytes(b"left")
    leftover = tmp_path / "data" / "segments" / "batch_never" / "0-1.segment"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"left")
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        server.await_batch(batch["id"], lambda _: {folder: stored(server, folder) for folder in named} == named)
        assert not leftover.parent.exists()
        check_output(server, server.batch(batch["id"]), 100)
