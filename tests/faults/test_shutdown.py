"""Stopping: what is in flight gets its time and is recorded; whoever is in a hurry loses nothing either."""

from __future__ import annotations

import json
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server, configured

LINES = 64
WINDOW = 8


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=500) as engine:
        yield engine


def settings(tmp_path: Path, engine: ScriptedProcess, drain_s: float) -> list[str]:
    return configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW, drain_s=drain_s)


def start_batch(server: Server, engine: ScriptedProcess, lines: bytes) -> str:
    """Create a batch and return once its window is full."""
    batch_id = str(server.create_batch(server.upload(lines))["id"])
    server.await_batch(batch_id, lambda _: engine.ledger()["in_flight"] == WINDOW)
    return batch_id


def test_sigterm_records_what_is_in_flight_sends_nothing_more_and_exits_0(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=30)) as server:
        batch_id = start_batch(server, engine, batch_input(LINES))
        assert server.terminate() == 0
    ledger = engine.ledger()
    assert (ledger["abandoned"], ledger["answered"]) == (0, ledger["requests"])
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=30)) as server:
        check_output(server, server.await_batch(batch_id), LINES)
    assert engine.ledger()["requests"] == LINES


def test_lines_that_take_longer_than_the_drain_are_given_up_and_asked_again(
    tmp_path: Path, engine: ScriptedProcess
) -> None:
    slow = batch_input(WINDOW, "[[scripted delay_ms=600000 times=1]]")
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=0.5)) as server:
        batch_id = start_batch(server, engine, slow)
        assert server.terminate() == 0
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=0.5)) as server:
        assert server.batch(batch_id)["request_counts"]["completed"] == 0
        server.await_batch(batch_id, lambda _: engine.ledger()["requests"] == 2 * WINDOW)


def test_a_second_signal_ends_at_once_and_loses_nothing(tmp_path: Path, engine: ScriptedProcess) -> None:
    quick, slow = batch_input(LINES), batch_input(WINDOW, "[[scripted delay_ms=600000]]")
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=600)) as server:
        batch_id = server.create_batch(server.upload(quick))["id"]
        check_output(server, server.await_batch(batch_id), LINES)
        start_batch(server, engine, slow)
        server.signal(signal.SIGTERM)
        server.await_log("stopping")
        begin = time.monotonic()
        server.signal(signal.SIGTERM)
        assert server.wait() == 1
        assert time.monotonic() - begin < 60, "it did not wait for the drain"
    asked = engine.ledger()["requests"]
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=0)) as server:
        check_output(server, server.batch(batch_id), LINES)
        server.await_batch(batch_id, lambda _: engine.ledger()["requests"] == asked + WINDOW)


def test_a_request_that_outlasts_the_drain_is_answered_with_503(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", *settings(tmp_path, engine, drain_s=0)) as server:
        host, port = server.base_url.removeprefix("http://").rsplit(":", 1)
        with socket.create_connection((host, int(port)), timeout=60) as stalled:
            stalled.sendall(
                b"POST /v1/files HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=b\r\n"
                b"Content-Length: 100000\r\n\r\n--b\r\nContent-Disposition: form-data; name=purpose\r\n\r\nba"
            )
            server.batch(start_batch(server, engine, batch_input(LINES)))  # so it has been read before
            assert server.terminate() == 0
            answer = b"".join(iter(lambda: stalled.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 503 ")
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "server_stopping"
    assert "Traceback" not in server.log()
