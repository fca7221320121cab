"""Processes that stand still, as a debugger, a stalled disk or a full host makes them, and then wake up again."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests import processes
from tests.faults.test_kill import batch_input, check_output
from tests.processes import POLL_S, ScriptedProcess, Server, alive, configured

LINES = 2000
# Stated, because it is what a kill can waste; an engine that is slow to listen does not see all of it in flight.
WINDOW = 64
SILENT_S = 2.0
TIMEOUT_S = 60.0


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=60) as engine:
        yield engine


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that wait 2 s for a silent worker rather than 30."""
    limits = f"from pronghorn.control import crew; crew.SILENT_S_MAX = {SILENT_S}"
    monkeypatch.setattr(
        processes, "COMMAND", [sys.executable, "-c", f"{limits}; from pronghorn.cli import main; main()"]
    )


@contextmanager
def frozen(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        if alive(pid):
            os.kill(pid, signal.SIGCONT)


def settings(tmp_path: Path, engine: ScriptedProcess) -> list[str]:
    return configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW)


def started(server: Server) -> str:
    """Start a batch and return its id once some of its lines are recorded."""
    batch_id = str(server.create_batch(server.upload(batch_input(LINES)))["id"])
    server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > 100)
    return batch_id


@pytest.mark.usefixtures("impatient")
def test_a_frozen_worker_is_replaced_and_nothing_is_lost_or_doubled(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", *settings(tmp_path, engine)) as server:
        batch_id = started(server)
        worker = server.worker_pid()
        with frozen(worker):
            check_output(server, server.await_batch(batch_id), LINES)
            assert not alive(worker), "what has stood still for long never wakes up again"
    assert engine.ledger()["requests"] <= LINES + WINDOW


def test_a_worker_that_wakes_up_after_its_server_was_replaced_changes_nothing(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    with Server(tmp_path / "data", *settings(tmp_path, engine)) as server:
        batch_id = started(server)
        worker = server.worker_pid()
        with frozen(worker):
            recorded = server.batch(batch_id)["request_counts"]["completed"]
            server.kill()
            with Server(tmp_path / "data", *settings(tmp_path, engine)) as second:
                second.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > recorded)
                os.kill(worker, signal.SIGCONT)
                check_output(second, second.await_batch(batch_id), LINES)
                await_end(worker)
    assert engine.ledger()["requests"] <= LINES + 2 * WINDOW, "it may send once more before it hears"


@pytest.mark.usefixtures("impatient")
def test_a_frozen_server_wakes_up_and_goes_on_with_its_workers(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", *settings(tmp_path, engine)) as server:
        batch_id = started(server)
        worker = server.worker_pid()
        with frozen(server.pid):
            since = time.monotonic()
            await_dry(engine)
            with pytest.raises(RuntimeError, match="is in use by another pronghorn"):
                Server(tmp_path / "data", *settings(tmp_path, engine))
            while time.monotonic() - since < 2 * SILENT_S:
                time.sleep(POLL_S)
        check_output(server, server.await_batch(batch_id), LINES)
        assert server.worker_pid() == worker, "it was the server that was silent"
    assert engine.ledger()["requests"] == LINES


def await_dry(engine: ScriptedProcess) -> None:
    """Wait until the worker has nothing left to send."""
    deadline = time.monotonic() + TIMEOUT_S
    while engine.ledger()["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def await_end(pid: int) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while alive(pid):
        assert time.monotonic() < deadline, "a worker without a server ends"
        time.sleep(POLL_S)
