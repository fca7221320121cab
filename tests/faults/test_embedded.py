"""The embedded engine's processes die: they are replaced, and the batch goes on."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from tests.processes import Server

LINES = 24


@pytest.mark.parametrize(
    ("use", "module"), [("never", "pronghorn.engines.llamacpp_child"), ("always", "pronghorn.engines.openvino.child")]
)
def test_a_killed_engine_is_replaced_and_no_line_is_lost(tmp_path: Path, use: str, module: str) -> None:
    lines = b"".join(
        json.dumps(
            {
                "custom_id": f"line-{number}",
                "method": "POST",
                "url": "/v1/completions",
                "body": {"model": "your-model", "prompt": f"Once upon a time {number}", "max_tokens": 32},
            }
        ).encode()
        + b"\n"
        for number in range(LINES)
    )
    config = tmp_path / "pronghorn.toml"
    config.write_text(f'[openvino]\nuse = "{use}"\n')
    with Server(tmp_path / "data", "--config", str(config)) as server:
        batch_id = server.create_batch(server.upload(lines), endpoint="/v1/completions")["id"]
        server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > 0)
        killed = [pid for pid, command in server.children() if module in command]
        for pid in killed:
            os.kill(pid, signal.SIGKILL)
        assert killed
        batch = server.await_batch(batch_id)
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        ids = [json.loads(result)["custom_id"] for result in server.content(batch["output_file_id"]).splitlines()]
        assert ids == [f"line-{number}" for number in range(LINES)]
