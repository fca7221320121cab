"""Identical lines once: the engine's ledger shows each body asked once, and every line has a result of its own."""

from __future__ import annotations

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
from tests.processes import COMMAND, ScriptedProcess, Server, configured

BODIES = 150
LINES = 1500


def body(number: int, **fields: Any) -> bytes:
    """Return a body of about 500 bytes, so that the batch has a dozen shards; every seventh fails."""
    text = "[[scripted fault=400 times=always]] " if number % 7 == 3 else ""
    messages = [{"role": "user", "content": f"{text}{number} " + "word " * 90}]
    return json.dumps({"model": "scripted", "messages": messages} | fields).encode()


def content(numbers: list[int]) -> bytes:
    return b"".join(
        b'{"custom_id":"id \\"%d\\",\\"response\\":","method":"POST","url":"/v1/chat/completions","body":%b}\n'
        % (place, body(number))
        for place, number in enumerate(numbers)
    )


def results(server: Server, batch: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every result in the order of the input; each of the two files has to be in that order by itself."""
    files = [server.content(batch[name]).splitlines() for name in ("output_file_id", "error_file_id")]
    for file in files:
        ids = [json.loads(line)["id"] for line in file]
        assert ids == sorted(ids)
    return sorted((json.loads(line) for file in files for line in file), key=lambda result: result["id"])


def check(numbers: list[int], found: list[dict[str, Any]]) -> None:
    """Every line has one result under its own names, and lines of one body the same answer."""
    assert [result["custom_id"] for result in found] == [f'id "{n}","response":' for n in range(len(numbers))]
    assert [int(result["id"][-12:], 16) for result in found] == list(range(1, len(numbers) + 1))
    answers: dict[int, Any] = {}
    for number, result in zip(numbers, found, strict=True):
        response = result["response"]
        assert (response["status_code"], result["error"]) == (400 if number % 7 == 3 else 200, None)
        if response["request_id"].startswith("batch_req_"):
            assert response["request_id"] == result["id"]
        assert answers.setdefault(number, response["body"]) == response["body"]


@pytest.mark.parametrize("workers", [1, 3])
def test_identical_lines_run_once_across_the_whole_batch(tmp_path: Path, workers: int) -> None:
    numbers = random.Random(1).choices(range(BODIES), k=LINES)
    distinct = len(set(numbers))
    with (
        ScriptedProcess(tmp_path / "engine.log", latency_ms=5) as engine,
        Server(tmp_path / "data", *configured(tmp_path, engine.base_url, workers=workers)) as server,
    ):
        batch = server.create_batch(server.upload(content(numbers)), deduplicate=True)
        assert (batch["deduplicate"], batch["duplicate_bodies"]) == (True, 0)
        batch = server.await_batch(batch["id"])
        assert batch["request_counts"]["total"] == LINES
        assert batch["duplicate_bodies"] == LINES - distinct
        found = results(server, batch)
        check(numbers, found)
        books = engine.ledger()
        assert (books["requests"], books["keys"]) == (distinct, distinct)
        spent = {
            json.dumps(result["response"]["body"]): result["response"]["body"]["usage"]["total_tokens"]
            for result in found
            if result["response"]["status_code"] == 200
        }
        assert batch["usage"]["total_tokens"] == sum(spent.values())

        again = server.http.post(f"/v1/batches/{batch['id']}/retry", json={}).json()
        assert again["deduplicate"]
        again = server.await_batch(again["id"])
        failing = [number for number in numbers if number % 7 == 3]
        assert again["request_counts"]["failed"] == len(failing)
        assert engine.ledger()["requests"] == distinct + len(set(failing))


def test_lines_run_each_by_itself_unless_asked(tmp_path: Path) -> None:
    with (
        ScriptedProcess(tmp_path / "engine.log") as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch = server.run_batch(content([1, 1, 2]))
        assert (batch["deduplicate"], batch["duplicate_bodies"]) == (False, None)
        assert engine.ledger()["requests"] == 3


def test_a_line_that_is_skipped_is_nobodys_original(tmp_path: Path) -> None:
    bad = b'{"custom_id":"a","method":"POST","url":"/v1/chat/completions","body":%b}\n' % body(1)
    lines = bad + bad + bad.replace(b'"a"', b'"b"') + bad.replace(b'"a"', b'"c"').replace(b"scripted", b"other")
    with (
        ScriptedProcess(tmp_path / "engine.log", models="scripted,other") as engine,
        Server(tmp_path / "data", "--upstream", engine.base_url) as server,
    ):
        batch = server.create_batch(server.upload(lines), deduplicate=True, on_invalid="skip")
        batch = server.await_batch(batch["id"])
        assert (batch["request_counts"], batch["duplicate_bodies"]) == ({"total": 4, "completed": 2, "failed": 2}, 1)
        found = results(server, batch)
        assert [result["error"] and result["error"]["code"] for result in found] == [
            None,
            "duplicate_custom_id",
            None,
            "mismatched_model",
        ]


def test_copies_end_as_their_originals_do_when_time_runs_out(tmp_path: Path) -> None:
    with (
        ScriptedProcess(tmp_path / "engine.log", latency_ms=6000) as engine,
        Server(tmp_path / "data", *configured(tmp_path, engine.base_url, window=1)) as server,
    ):
        content_id = server.upload(content([0, 1, 2] * 100))
        batch = server.await_batch(server.create_batch(content_id, deduplicate=True, completion_window="4s")["id"])
        assert batch["status"] == "expired"
        found = results(server, batch)
    codes = [result["error"] and result["error"]["code"] for result in found]
    assert codes == [None, "batch_expired", "batch_expired"] * 100


def test_run_takes_it_as_an_option(tmp_path: Path) -> None:
    source, target = tmp_path / "input.jsonl", tmp_path / "output.jsonl"
    source.write_bytes(content([1, 1, 2, 1]))
    with ScriptedProcess(tmp_path / "engine.log") as engine:
        command = [*COMMAND, "run", "--input", str(source), "--output", str(target), "--upstream", engine.base_url]
        command += ["--deduplicate", "--data-dir", str(tmp_path / "data")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert "2 lines were not run" in done.stderr
        assert engine.ledger()["requests"] == 2
    assert len(target.read_bytes().splitlines()) == 4
