"""The embedded engine's processes die or do not start: they are replaced, and the batch goes on."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from tests.processes import Server

from pronghorn.domain.model import Endpoint
from pronghorn.engines.openvino.engine import suits
from pronghorn.errors import EngineError
from pronghorn.settings import OpenVinoSettings, Settings
from pronghorn.system import build_engines

LINES = 24
# A model loads in seconds on a quiet machine.
LOAD_S_MAX = 200


@pytest.mark.timeout(2 * LOAD_S_MAX)
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
        batch = server.await_batch(batch_id, timeout_s=LOAD_S_MAX)
        assert batch["request_counts"] == {"total": LINES, "completed": LINES, "failed": 0}
        ids = [json.loads(result)["custom_id"] for result in server.content(batch["output_file_id"]).splitlines()]
        assert ids == [f"line-{number}" for number in range(LINES)]


@pytest.fixture
def broken_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let child processes find an OpenVINO GenAI that lacks one of its libraries."""
    (tmp_path / "openvino_genai.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("broken_openvino")
@pytest.mark.skipif(not suits(), reason="auto chooses llama.cpp on this processor")
async def test_llamacpp_answers_in_place_of_an_openvino_that_was_chosen_and_does_not_start(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engines = await asyncio.to_thread(build_engines, Settings())  # it reads what the processor can do
    await engines.start()
    try:
        assert engines.answers(Endpoint.CHAT_COMPLETIONS, "your-model")
        assert engines.answers(Endpoint.EMBEDDINGS, "your-model")
        assert {model.owned_by for model in engines.models()} == {"llama.cpp"}
    finally:
        await engines.stop()
    [line] = [record.getMessage() for record in caplog.records if "in its place" in record.getMessage()]
    assert "libtbb.so.12" in line


@pytest.mark.usefixtures("broken_openvino")
async def test_an_openvino_that_was_asked_for_and_does_not_start_is_an_error() -> None:
    with pytest.raises(EngineError, match=r"OpenVINO cannot run .*libtbb\.so\.12"):
        await build_engines(Settings(openvino=OpenVinoSettings(use="always"))).start()
