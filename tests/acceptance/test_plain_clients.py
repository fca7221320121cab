"""Programs that were written for OpenAI and know nothing of jobs run unchanged once `default_job` is set."""

from __future__ import annotations

import json
from pathlib import Path

import openai
import pytest
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured


def run_batch(client: openai.OpenAI, server: Server) -> openai.types.Batch:
    file = client.files.create(file=("in.jsonl", batch_input(3)), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h", metadata={"k": "v"}
    )
    assert batch.expires_at == batch.created_at + 86400
    server.await_batch(batch.id)
    return client.batches.retrieve(batch.id)


def test_a_batch_without_a_job_runs_under_the_default_one(tmp_path: Path, engine: ScriptedProcess) -> None:
    with Server(tmp_path / "data", "--upstream", engine.base_url) as server:
        other_job_id = server.job_id
        job_id = server.http.post("/v1/jobs", json={"name": "from OpenAI's clients"}).json()["id"]
        with (
            openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0) as client,
            pytest.raises(openai.BadRequestError) as refused,
        ):
            run_batch(client, server)
        assert (refused.value.param, refused.value.code) == ("job_id", "missing_required_parameter")
        assert server.terminate() == 0
    with (
        Server(tmp_path / "data", *configured(tmp_path, engine.base_url, default_job=job_id)) as server,
        openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0) as client,
    ):
        batch = run_batch(client, server)
        assert (batch.status, batch.to_dict()["job_id"]) == ("completed", job_id)
        assert batch.request_counts is not None
        assert batch.request_counts.completed == 3
        answers = client.files.content(batch.output_file_id or "").text.splitlines()
        assert [json.loads(answer)["custom_id"] for answer in answers] == ["line-0", "line-1", "line-2"]
        named = server.create_batch(batch.input_file_id, job_id=other_job_id)
        assert named["job_id"] == other_job_id != job_id, "a client that names one gets that one"
