"""Cancelling and expiring: what is in flight finishes, what was not sent says so, and partial results are kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured

LINES = 2000


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log", capacity="slots", slots=4, latency_ms=20) as engine:
        yield engine


@pytest.fixture
def server(tmp_path: Path, engine: ScriptedProcess) -> Iterator[Server]:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        yield server


def results(server: Server, file_id: str | None) -> list[dict[str, Any]]:
    return [json.loads(line) for line in server.content(file_id).splitlines()]


def check_partial(server: Server, batch: dict[str, Any], code: str) -> None:
    counts = batch["request_counts"]
    done, unrun = results(server, batch["output_file_id"]), results(server, batch["error_file_id"])
    assert 0 < counts["completed"] == len(done)
    assert counts["failed"] == 0, "a line that never ran did not fail"
    assert len(done) + len(unrun) == counts["total"] == LINES
    assert {result["error"]["code"] for result in unrun} == {code}
    numbers = sorted(int(result["custom_id"].removeprefix("line-")) for result in done + unrun)
    assert numbers == list(range(LINES))


def some_completed(batch: dict[str, Any]) -> bool:
    return bool(batch["request_counts"]["completed"] > 10)


def test_a_cancelled_batch_keeps_its_partial_results(server: Server, engine: ScriptedProcess) -> None:
    batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
    server.await_batch(batch_id, some_completed)
    answer = server.http.post(f"/v1/batches/{batch_id}/cancel")
    assert answer.status_code == 200
    assert answer.json()["status"] == "cancelling"
    assert answer.json()["cancelling_at"] is not None
    batch = server.await_batch(batch_id)
    assert batch["status"] == "cancelled"
    check_partial(server, batch, "batch_cancelled")
    assert engine.ledger()["requests"] == batch["request_counts"]["completed"]
    again = server.http.post(f"/v1/batches/{batch_id}/cancel")
    assert (again.status_code, again.json()["status"]) == (200, "cancelled")


def test_an_expired_batch_keeps_its_partial_results(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(LINES)), completion_window="3s")["id"]
    batch = server.await_batch(batch_id)
    assert batch["status"] == "expired"
    assert batch["expired_at"] >= batch["expires_at"]
    check_partial(server, batch, "batch_expired")


def test_a_batch_is_cancelled_while_its_engine_is_down(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        server.await_batch(batch_id, some_completed)
        engine.kill()
        waiting = server.await_batch(batch_id, lambda batch: (batch["progress"] or {}).get("reason") is not None)
        assert engine.base_url.removesuffix("/v1") in waiting["progress"]["reason"]
        server.http.post(f"/v1/batches/{batch_id}/cancel")
        batch = server.await_batch(batch_id)
        assert batch["status"] == "cancelled"
        check_partial(server, batch, "batch_cancelled")


def test_a_finished_batch_cannot_be_cancelled(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(3)))["id"]
    server.await_batch(batch_id)
    answer = server.http.post(f"/v1/batches/{batch_id}/cancel")
    assert answer.status_code == 409
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json()["error"]["message"] == "Cannot cancel a batch with status 'completed'."


def test_a_cancelled_batch_does_not_wait_behind_another(server: Server) -> None:
    long = server.create_batch(server.upload(batch_input(LINES)))["id"]
    server.await_batch(long, some_completed)
    short = server.create_batch(server.upload(batch_input(5, "short")))["id"]
    server.await_batch(short, lambda batch: batch["status"] == "in_progress")
    server.http.post(f"/v1/batches/{short}/cancel")
    assert server.await_batch(short)["status"] == "cancelled"
    assert server.batch(long)["status"] == "in_progress"


def test_a_batch_is_cancelled_though_no_engine_has_its_model(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", *configured(tmp_path, engine.base_url, models=["scripted"], window=1)) as server:
        older, younger = (server.create_batch(server.upload(batch_input(LINES)))["id"] for _ in range(2))
        for batch_id in (older, younger):
            server.await_batch(batch_id, lambda batch: batch["status"] == "in_progress")
        server.kill()
    with Server(tmp_path / "data", *configured(tmp_path, engine.base_url, models=["another"])) as server:
        server.http.post(f"/v1/batches/{younger}/cancel")
        assert server.await_batch(younger)["status"] == "cancelled"
        waiting = server.await_batch(older, lambda batch: bool((batch["progress"] or {}).get("reason")))
        assert waiting["progress"]["reason"] == "no engine answers model 'scripted' at present"


def test_an_engine_that_pauses_again_and_again_is_always_tried_again(server: Server, engine: ScriptedProcess) -> None:
    lines = b"".join(
        batch_input(1, f"[[scripted fault=503 times=2]] {n}").replace(b"line-0", b"%d" % n) for n in (1, 2)
    )
    batch = server.run_batch(lines, timeout_s=90)
    assert batch["request_counts"] == {"total": 2, "completed": 2, "failed": 0}
