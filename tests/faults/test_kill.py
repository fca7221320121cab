"""kill -9 at any moment: every line ends in exactly one result, in order, and recorded lines are not sent again."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.processes import ScriptedProcess, Server, alive

LINES = 3000


def batch_input(lines: int, marker: str = "") -> bytes:
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {"model": "scripted", "messages": [{"role": "user", "content": f"{marker} number {number} "}]},
            }
        ).encode()
        + b"\n"
        for number in range(lines)
    )


def check_output(server: Server, batch: dict[str, Any], lines: int) -> None:
    assert batch["status"] == "completed", batch
    assert batch["request_counts"] == {"total": lines, "completed": lines, "failed": 0}
    results = [json.loads(line) for line in server.content(str(batch["output_file_id"])).splitlines()]
    assert [result["custom_id"] for result in results] == [f"line-{number}" for number in range(lines)]
    for number, result in enumerate(results):
        assert f" number {number} " in result["response"]["body"]["choices"][0]["message"]["content"] + " "


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[ScriptedProcess]:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine:
        yield engine


def await_more(server: Server, batch_id: str, rng: random.Random, previous: int) -> int:
    """Wait until some more lines are recorded, and return how many are."""
    wanted = previous + rng.randrange(1, 400)

    def enough(batch: dict[str, Any]) -> bool:
        return batch["status"] not in ("validating", "in_progress") or batch["request_counts"]["completed"] >= wanted

    return int(server.await_batch(batch_id, enough)["request_counts"]["completed"])


@pytest.mark.parametrize("seed", [1, 2])
def test_killed_servers_lose_and_double_nothing(tmp_path: Path, engine: ScriptedProcess, seed: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    kills, recorded = 4, 0
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        recorded = await_more(server, batch_id, rng, recorded)
        server.kill()
    for _ in range(kills - 1):
        with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
            recorded = await_more(server, batch_id, rng, recorded)
            server.kill()
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        check_output(server, server.await_batch(batch_id), LINES)
    ledger = engine.ledger()
    assert ledger["requests"] <= LINES + kills * ledger["max_in_flight"]


@pytest.mark.parametrize("seed", [3])
def test_a_killed_worker_is_replaced_and_loses_nothing(tmp_path: Path, engine: ScriptedProcess, seed: int) -> None:
    rng = random.Random(seed)
    print(f"seed {seed}")
    kills, recorded = 3, 0
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        for _ in range(kills):
            recorded = await_more(server, batch_id, rng, recorded)
            os.kill(server.worker_pid(), signal.SIGKILL)
        check_output(server, server.await_batch(batch_id), LINES)
    ledger = engine.ledger()
    assert ledger["requests"] <= LINES + kills * ledger["max_in_flight"]


def test_a_stopped_server_records_what_is_in_flight_and_exits_0(tmp_path: Path, engine: ScriptedProcess) -> None:
    rng = random.Random(4)
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        await_more(server, batch_id, rng, 0)
        assert server.terminate() == 0
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        check_output(server, server.await_batch(batch_id), LINES)
    assert engine.ledger()["requests"] == LINES, "a clean stop wastes no call"


def test_children_end_with_a_killed_server(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        worker = server.worker_pid()
        server.kill()
    with Server(tmp_path / "data", "--upstream", engine.base_url):
        assert not alive(worker)
