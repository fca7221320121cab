"""The window belongs to the engine, not to the shard: slow lines hold up no others, and gauges are heeded."""

from __future__ import annotations

import json
from pathlib import Path

from tests.processes import ScriptedProcess, Server


def line(number: int, prompt: str) -> str:
    body = {"model": "scripted", "messages": [{"role": "user", "content": prompt}]}
    return json.dumps({"custom_id": str(number), "method": "POST", "url": "/v1/chat/completions", "body": body})


def test_lines_that_do_not_end_hold_up_no_line_of_any_shard(tmp_path: Path) -> None:
    prompts = [f"{n} [[scripted fault=hang]]" if n % 500 == 0 else "x" * 100 for n in range(4000)]
    content = "\n".join(line(n, prompt) for n, prompt in enumerate(prompts)).encode()
    with (
        ScriptedProcess(tmp_path / "engine.log", latency_ms=1) as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch = server.create_batch(server.upload(content))
        server.await_batch(batch["id"], lambda batch: batch["request_counts"]["completed"] == 4000 - 8)


def test_an_engine_with_gauges_gets_no_more_than_it_runs_and_a_short_queue(tmp_path: Path) -> None:
    content = "\n".join(line(n, "hello") for n in range(48)).encode()
    with (
        ScriptedProcess(tmp_path / "engine.log", capacity="slots", slots=4, latency_ms=500) as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch = server.run_batch(content)
        assert batch["request_counts"] == {"total": 48, "completed": 48, "failed": 0}
        # Without gauges the first round of answers, which takes 2.5 s, would be followed by one of 64.
        assert engine.ledger()["max_in_flight"] == 16
