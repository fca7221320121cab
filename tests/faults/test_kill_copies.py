"""kill -9 while identical lines run once: each line has one result, and no body is asked again that has its outcome."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from tests.acceptance.test_deduplicate import check, content, results
from tests.beds import Bed
from tests.faults.test_kill import await_more
from tests.processes import ScriptedProcess, Server


def test_copies_survive_kills_of_servers_and_workers(tmp_path: Path, bed: Bed) -> None:
    lines, kills = bed.times(small=2000, ci=20_000, long=60_000), bed.times(small=3, ci=15, long=60)
    numbers = bed.rng.choices(range(lines // 3), k=lines)
    distinct, recorded = len(set(numbers)), 0
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine:
        with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
            batch_id = server.create_batch(server.upload(content(numbers)), deduplicate=True)["id"]
            recorded = await_more(server, batch_id, bed.rng, recorded)
            os.kill(server.worker_pid(), signal.SIGKILL)
            recorded = await_more(server, batch_id, bed.rng, recorded)
            server.kill()
        for _ in range(kills - 2):
            with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
                recorded = await_more(server, batch_id, bed.rng, recorded)
                server.kill()
        with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
            batch = server.await_batch(batch_id, timeout_s=600)
            check(numbers, results(server, batch))
        assert batch["duplicate_bodies"] == lines - distinct
        books = engine.ledger()
    assert books["requests"] <= distinct + kills * books["max_in_flight"]
