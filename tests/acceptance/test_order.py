"""The order in which an engine gets a batch's lines, by its ledger; what comes back is in the file's order anyway."""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from pathlib import Path

import pytest
from tests.processes import ScriptedProcess, Server, configured

TOPICS = ("birds", "ships", "trees", "wells")
LINES = 40


def body(number: int) -> bytes:
    messages = [
        {"role": "system", "content": f"You know everything about {TOPICS[number % len(TOPICS)]}."},
        {"role": "user", "content": f"Question {number}"},
    ]
    return json.dumps({"model": "scripted", "max_tokens": 8, "messages": messages}).encode()


@pytest.mark.parametrize(("prompt_order", "runs"), [(True, len(TOPICS)), (False, LINES)])
def test_lines_with_a_common_prompt_run_together(tmp_path: Path, prompt_order: bool, runs: int) -> None:
    lines = [
        b'{"custom_id":"%d","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (number, body(number))
        for number in range(LINES)
    ]
    ledger = tmp_path / "ledger"
    with ScriptedProcess(tmp_path / "engine.log", ledger_path=ledger) as engine:
        settings = configured(tmp_path, engine.base_url, window=1, prompt_order=prompt_order)
        with Server(tmp_path / "data", *settings) as server:
            batch = server.run_batch(b"".join(lines))
            results = [json.loads(line) for line in server.content(batch["output_file_id"]).splitlines()]
    assert [result["custom_id"] for result in results] == [str(number) for number in range(LINES)]
    topics = {hashlib.sha256(body(number)).hexdigest(): number % len(TOPICS) for number in range(LINES)}
    sent = [topics[json.loads(entry)["key"]] for entry in ledger.read_text().splitlines()]
    assert len(sent) == LINES
    assert len(list(groupby(sent))) == runs
