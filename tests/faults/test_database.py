"""A database that others hold or take away under a running server: what was acknowledged stays, and no more is."""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx2
import pytest
import sqlalchemy as sa
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server

from pronghorn.errors import StorageError
from pronghorn.storage import database
from pronghorn.storage.durable import EXIT_DISK_FAILED

LINES = 200


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a database as another process may: nobody else writes meanwhile."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def test_a_database_that_another_process_holds_cannot_be_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.1)
    path = tmp_path / "pronghorn.db"
    with held(path), pytest.raises(StorageError, match="locked"):
        database.Database(sa.URL.create("sqlite", database=str(path)))


def test_while_another_process_holds_the_database_requests_are_refused_and_batches_wait(tmp_path: Path) -> None:
    with (
        ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        with held(server.data_dir / "pronghorn.db"):
            refused = server.http.post("/v1/jobs", json={"name": "other"})
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "storage_busy")
        check_output(server, server.await_batch(batch_id), LINES)
        assert engine.ledger()["requests"] == LINES
        assert "Traceback" not in server.log()


@pytest.mark.parametrize("name", [".", "pronghorn.db", "pronghorn.db-wal"])
def test_a_server_whose_database_is_taken_away_acknowledges_nothing_more(tmp_path: Path, name: str) -> None:
    with (
        ScriptedProcess(tmp_path / "engine.log") as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        path = server.data_dir / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
        with pytest.raises(httpx2.TransportError):
            server.http.post("/v1/jobs", json={"name": "other"})
        assert server.wait() == EXIT_DISK_FAILED
        assert "has been removed or replaced" in server.log()
