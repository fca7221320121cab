"""Engines that die, hang, refuse or forget: the batch waits, says why and goes on, and only guilty lines fail."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kill import batch_input, check_output
from tests.processes import ScriptedProcess, Server, configured, restarted

LINES = 40


def with_markers(lines: int, markers: dict[int, str], model: str = "scripted") -> bytes:
    """Return a batch's input in which some lines say how the scripted engine is to treat them."""
    return b"".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/chat/completions",
                "body": {
                    "model": model,
                    "messages": [{"role": "user", "content": f"{markers.get(number, '')} number {number} "}],
                },
            }
        ).encode()
        + b"\n"
        for number in range(lines)
    )


def errors_of(server: Server, batch: dict[str, Any]) -> dict[str, dict[str, Any]]:
    lines = server.content(batch["error_file_id"]).splitlines()
    return {result["custom_id"]: result for result in map(json.loads, lines)}


def reason_of(batch: dict[str, Any]) -> str:
    return str((batch["progress"] or {}).get("reason"))


def test_a_line_that_kills_its_engine_is_found_and_the_others_complete(tmp_path: Path) -> None:
    lines = with_markers(LINES, {17: "[[scripted fault=crash times=always]]"})
    with (
        restarted(tmp_path / "engine.log", allow_crash="true", latency_ms=50) as (engine, deaths),
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch = server.run_batch(lines, timeout_s=100)
        assert batch["request_counts"] == {"total": LINES, "completed": LINES - 1, "failed": 1}
        errors = errors_of(server, batch)
        assert list(errors) == ["line-17"]
        assert errors["line-17"]["error"]["code"] == "upstream_crash_suspected"
        assert 3 <= len(deaths) <= 8, "three alone, and few beside others"


def test_a_line_that_hangs_fails_and_the_others_complete(tmp_path: Path) -> None:
    lines = with_markers(LINES, {3: "[[scripted fault=hang times=always]]", 5: "[[scripted fault=hang]]"})
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        arguments = configured(tmp_path, engine.base_url, line_timeout_s=0.5)
        with Server(tmp_path / "data", *arguments) as server:
            batch = server.run_batch(lines, timeout_s=100)
            assert batch["request_counts"] == {"total": LINES, "completed": LINES - 1, "failed": 1}
            assert errors_of(server, batch)["line-3"]["error"]["code"] == "request_timeout"


def test_an_engine_that_hangs_costs_no_line_an_attempt(tmp_path: Path) -> None:
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=20) as engine:
        arguments = configured(tmp_path, engine.base_url, window=8, line_timeout_s=0.5)
        with Server(tmp_path / "data", *arguments) as server:
            batch_id = server.create_batch(server.upload(batch_input(1000)))["id"]
            server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > 10)
            os.kill(engine.pid, signal.SIGSTOP)
            try:
                batch = server.await_batch(batch_id, lambda batch: "answers none" in reason_of(batch))
                assert batch["progress"]["stalled_since"] is not None
            finally:
                os.kill(engine.pid, signal.SIGCONT)
            check_output(server, server.await_batch(batch_id), 1000)


def test_a_model_that_an_engine_does_not_know_is_waited_for_and_holds_up_no_other(tmp_path: Path) -> None:
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        arguments = configured(tmp_path, engine.base_url, models=["scripted", "late"], model_grace_s=1.5)
        with Server(tmp_path / "data", *arguments) as server:
            late = server.create_batch(server.upload(with_markers(LINES, {}, model="late")))["id"]
            waiting = server.await_batch(late, lambda batch: "does not know" in reason_of(batch))
            assert waiting["request_counts"]["failed"] == 0
            check_output(server, server.run_batch(batch_input(50)), 50)
            batch = server.await_batch(late)
            assert batch["request_counts"] == {"total": LINES, "completed": 0, "failed": LINES}
            answers = [result["response"] for result in errors_of(server, batch).values()]
            assert {(answer["status_code"], answer["body"]["error"]["code"]) for answer in answers} == {
                (404, "model_not_found")
            }


@pytest.mark.parametrize(("fault", "code"), [(401, "invalid_api_key"), (403, "forbidden")])
def test_a_refusal_of_access_is_waited_out_and_shown_verbatim_at_the_deadline(
    tmp_path: Path, fault: int, code: str
) -> None:
    lines = with_markers(LINES, dict.fromkeys(range(LINES), f"[[scripted fault={fault} times=always]]"))
    with (
        ScriptedProcess(tmp_path / "engine.log") as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch_id = server.create_batch(server.upload(lines), completion_window="3s")["id"]
        server.await_batch(batch_id, lambda batch: f"status {fault}" in reason_of(batch))
        batch = server.await_batch(batch_id)
        assert batch["status"] == "expired"
        results = errors_of(server, batch)
        asked = engine.ledger()["requests"]
        refused = [result["response"] for result in results.values() if result["response"]]
        assert len(refused) == asked, "a line that was refused shows how"
        assert {(answer["status_code"], answer["body"]["error"]["code"]) for answer in refused} == {(fault, code)}
        unasked = [result["error"]["code"] for result in results.values() if result["error"]]
        assert unasked == ["batch_expired"] * (LINES - asked)


def test_an_engine_that_fails_every_line_does_not_spoil_the_whole_batch(tmp_path: Path) -> None:
    settings = {"fault_rate": 1, "fault_kinds": "bad_gateway"}
    with (
        ScriptedProcess(tmp_path / "engine.log", **settings) as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch_id = server.create_batch(server.upload(batch_input(3000)))["id"]
        server.await_batch(batch_id, lambda _: engine.ledger()["requests"] > 200)
        assert engine.ledger()["keys"] < 140, "lines are tried again before new ones are spoilt"


def test_a_deadline_is_kept_although_an_engine_hangs(tmp_path: Path) -> None:
    lines = with_markers(LINES, dict.fromkeys(range(LINES), "[[scripted fault=hang times=always]]"))
    with (
        ScriptedProcess(tmp_path / "engine.log") as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch_id = server.create_batch(server.upload(lines), completion_window="2s")["id"]
        batch = server.await_batch(batch_id)
        assert batch["status"] == "expired"
        assert {result["error"]["code"] for result in errors_of(server, batch).values()} == {"batch_expired"}
        assert batch["expired_at"] - batch["expires_at"] <= 15


def test_lines_that_hang_as_probes_do_not_keep_an_engine_paused_that_answers(tmp_path: Path) -> None:
    hanging, line_timeout_s = 20, 1
    hang, refusal = "[[scripted fault=hang times=always]]", "[[scripted fault=insufficient_quota delay_ms=500]]"
    lines = with_markers(300, dict.fromkeys(range(hanging), hang) | {hanging: refusal})
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        bounds = {"window": hanging + 1, "line_timeout_s": line_timeout_s, "refused_pause_s": 3}
        arguments = configured(tmp_path, engine.base_url, **bounds)
        with Server(tmp_path / "data", *arguments) as server:
            batch_id = server.create_batch(server.upload(lines))["id"]
            server.await_batch(batch_id, lambda batch: reason_of(batch) != "None")
            since = time.monotonic()
            server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] == 300 - hanging)
            assert time.monotonic() - since < hanging * line_timeout_s * 0.8, "one that hung was enough to find out"
            server.http.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
