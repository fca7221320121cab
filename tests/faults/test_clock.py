"""A wall clock that jumps by a day under a running server: nothing expires early, late or comes back."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.beds import require_program
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured
from tests.receiver import Answer, Receiver

DAY_S = 86_400
# The wait after a first failed delivery is 5 s, give or take a fifth, by a clock that counts whole seconds.
RETRY_S_MIN = 3.0


class WallClock:
    """The wall clock of servers that are started inside `preloaded`; monotonic time stays as it is."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.jump(0)

    def jump(self, seconds: int) -> None:
        """Set it to so far from the machine's."""
        new = self._path.with_suffix(".new")
        new.write_text(f"{seconds:+d}\n")
        new.rename(self._path)

    def preloaded(self, monkeypatch: pytest.MonkeyPatch) -> None:
        require_program("faketime")
        (library, *_) = Path("/usr/lib").glob("**/faketime/libfaketimeMT.so.1")
        monkeypatch.setenv("LD_PRELOAD", str(library))
        monkeypatch.setenv("FAKETIME_TIMESTAMP_FILE", str(self._path))
        monkeypatch.setenv("FAKETIME_NO_CACHE", "1")
        monkeypatch.setenv("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        monkeypatch.setenv("DONT_FAKE_MONOTONIC", "1")


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        yield engine


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_what_has_a_deadline_keeps_it_when_the_wall_clock_jumps(
    tmp_path: Path, engine: ScriptedProcess, receiver: Receiver, monkeypatch: pytest.MonkeyPatch, jump_s: int
) -> None:
    clock = WallClock(tmp_path / "wall")
    settings = configured(tmp_path, engine.base_url, window=1, webhook_allow=["127.0.0.1"])
    with monkeypatch.context() as preloading:
        clock.preloaded(preloading)
        server = Server(tmp_path / "data", *settings)
    with server:
        http = server.http
        endpoint = {"name": "n", "url": receiver.url, "event_types": ["batch.failed"]}
        http.post("/v1/webhook_endpoints", json=endpoint).raise_for_status()
        slow = batch_input(2, "[[scripted delay_ms=600000]]")
        running = server.create_batch(server.upload(slow), completion_window="1h")["id"]
        life = {"purpose": "batch", "expires_after[anchor]": "created_at", "expires_after[seconds]": "3600"}
        file_id = http.post("/v1/files", data=life, files={"file": ("x.jsonl", batch_input(1))}).json()["id"]
        announced = {"filename": "x.jsonl", "purpose": "batch", "bytes": 5, "mime_type": "text/jsonl"}
        upload_id = http.post("/v1/uploads", json=announced).json()["id"]
        short = server.create_batch(server.upload(slow), completion_window="3s")["id"]
        receiver.will_answer(Answer(500))
        server.create_batch(server.upload(batch_input(1) * 2))
        refused = receiver.take()

        clock.jump(jump_s)
        assert server.batch(running)["status"] == "in_progress"
        assert http.get(f"/v1/files/{file_id}").status_code == 200
        part = http.post(f"/v1/uploads/{upload_id}/parts", files={"data": b"12345"})
        assert part.status_code == 200, part.text
        again = receiver.take()
        assert again.at - refused.at >= RETRY_S_MIN
        assert abs(int(again.headers["webhook-timestamp"]) - (time.time() + jump_s)) < 60, "receivers check it"
        assert server.await_batch(short)["status"] == "expired"
        assert server.batch(running)["status"] == "in_progress"

        clock.jump(0)
        assert server.batch(short)["status"] == "expired"
        assert http.get(f"/v1/files/{file_id}").status_code == 200
    for left in ("faketime_shm_", "sem.faketime_sem_"):  # which the library keeps for a process that was killed
        Path(f"/dev/shm/{left}{server.pid}").unlink(missing_ok=True)
