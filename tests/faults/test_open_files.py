"""A process that may open few files: idle clients and lines in flight keep nobody from going on for long."""

from __future__ import annotations

import os
import resource
import signal
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import httpx2
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server, configured

LINES = 500
FILES_MAX = 64
WINDOW = 200


def upload(server: Server) -> httpx2.Response:
    return server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("a.jsonl", b"{}")})


def test_a_server_without_files_left_says_so_and_goes_on_when_clients_leave(tmp_path: Path) -> None:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine:
        settings = configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW)
        with Server(tmp_path / "data", *settings) as server:
            file_id = server.upload(batch_input(LINES))
            resource.prlimit(server.pid, resource.RLIMIT_NOFILE, (FILES_MAX, FILES_MAX))
            os.kill(server.worker_pid(), signal.SIGKILL)  # the one that follows has no more either
            host, port = server.base_url.removeprefix("http://").split(":")
            with ExitStack() as clients:
                for _ in range(4 * FILES_MAX):
                    clients.enter_context(socket.create_connection((host, int(port))))
                deadline = time.monotonic() + 60
                while (refused := upload(server)).status_code == 200:  # not all clients have been taken in yet
                    assert time.monotonic() < deadline, "no upload is ever refused"
                assert refused.status_code == 503, refused.text
                assert refused.json()["error"]["code"] == "too_many_open_files"
                server.await_log("raise the limit of open files")
            check_output(server, server.await_batch(server.create_batch(file_id)["id"]), LINES)
            assert engine.ledger()["requests"] == LINES, "no worker has ended for want of files"
