"""The quickstart's commands, character for character: only their placeholders are filled in."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from openai import OpenAI
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from tests.processes import Server

INPUT = """\
{"custom_id":"req-1","method":"POST","url":"/v1/chat/completions","body":{"model":"your-model","messages":[{"role":"user","content":"Summarize: ..."}]}}
{"custom_id":"req-2","method":"POST","url":"/v1/chat/completions","body":{"model":"your-model","messages":[{"role":"user","content":"Translate: ..."}]}}
"""  # noqa: E501
UPLOAD = """\
curl -X POST "$BASE_URL/v1/files" \\
  -F "purpose=batch" \\
  -F "file=@input.jsonl"
"""
CREATE = """\
curl -X POST "$BASE_URL/v1/batches" \\
  -H "Content-Type: application/json" \\
  -d '{
    "input_file_id": "file-abc123",
    "endpoint": "/v1/chat/completions",
    "completion_window": "unlimited",
    "job_id": "job-xxxxxxxx"
  }'
"""
POLL = 'curl "$BASE_URL/v1/batches/batch-xyz789"\n'
DOWNLOAD = 'curl "$BASE_URL/v1/files/<output_file_id>/content" > output.jsonl\n'
PROGRAM = """\
from openai import OpenAI

client = OpenAI(
  base_url="<BASE_URL>/v1",  # use your Impala base URL
  api_key="reserved",        # placeholder (not used today)
)

# 1. Upload
with open("input.jsonl", "rb") as f:
  file = client.files.create(file=f, purpose="batch")

# 2. Create batch
batch = client.batches.create(
  input_file_id=file.id,
  endpoint="/v1/chat/completions",
  completion_window="unlimited",
  extra_body={"job_id": "job-xxxxxxxx"},
)

# 3. Poll
batch = client.batches.retrieve(batch.id)
print(batch.status)

# 4. Download when completed
if batch.status == "completed":
  content = client.files.content(batch.output_file_id)
  with open("output.jsonl", "wb") as f:
    f.write(content.content)
"""


# A tiny model may go on to the end of its context when no bound is set, which takes a minute on two cores.
BOUNDED_INPUT = INPUT.replace('"model":"your-model",', '"model":"your-model","max_tokens":32,')


@pytest.fixture(params=["built_in_server", "scripted_server"])
def server_at_hand(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Server:
    """A server whose BASE_URL is in the environment, with the input file in the working directory."""
    server: Server = request.getfixturevalue(request.param)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BASE_URL", server.base_url)
    (tmp_path / "input.jsonl").write_text(BOUNDED_INPUT if request.param == "built_in_server" else INPUT)
    return server


def shell(command: str) -> str:
    ran = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def check_output(path: Path) -> None:
    """Every line of the input has a good answer of the model, in the input's order."""
    results = [json.loads(line) for line in path.read_text().splitlines()]
    assert [result["custom_id"] for result in results] == ["req-1", "req-2"]
    for result in results:
        assert result["error"] is None
        assert result["response"]["status_code"] == 200
        answer = ChatCompletion.model_validate(result["response"]["body"])
        assert answer.choices[0].message.content


def test_the_curl_commands(server_at_hand: Server) -> None:
    server = server_at_hand
    file = json.loads(shell(UPLOAD))
    assert {name: file[name] for name in ("object", "bytes", "filename", "purpose")} == {
        "object": "file",
        "bytes": Path("input.jsonl").stat().st_size,
        "filename": "input.jsonl",
        "purpose": "batch",
    }
    create = CREATE.replace("file-abc123", file["id"]).replace("job-xxxxxxxx", server.job_id)
    created = json.loads(shell(create))
    assert (created["object"], created["status"]) == ("batch", "validating")
    server.await_batch(created["id"])
    batch = json.loads(shell(POLL.replace("batch-xyz789", created["id"])))
    assert batch["status"] == "completed"
    assert batch["error_file_id"] is None
    shell(DOWNLOAD.replace("<output_file_id>", batch["output_file_id"]))
    check_output(Path("output.jsonl"))


def test_the_python_program(server_at_hand: Server, capsys: pytest.CaptureFixture[str]) -> None:
    server = server_at_hand
    program = PROGRAM.replace("<BASE_URL>", server.base_url).replace("job-xxxxxxxx", server.job_id)
    beginning, poll, rest = program.partition("# 3. Poll\n")
    names: dict[str, Any] = {}
    exec(beginning, names)
    exec(poll + rest, names)
    server.await_batch(names["batch"].id)
    exec(poll + rest, names)
    names["client"].close()
    statuses = capsys.readouterr().out.split()
    assert statuses[0] in ("validating", "in_progress", "finalizing", "completed")
    assert statuses[-1] == "completed"
    check_output(Path("output.jsonl"))


SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "enum": ["Lisbon", "Oslo", "Toronto"]},
        "quantity": {"type": "integer", "minimum": 1, "maximum": 99},
    },
    "required": ["city", "quantity"],
    "additionalProperties": False,
}
ORDER = {
    "messages": [
        {"role": "user", "content": "Extract the order as JSON: Please ship 25 red mugs to our cafe in Oslo."},
        {"role": "assistant", "content": '{"city": "Oslo", "quantity": 25}'},
        {"role": "user", "content": "Extract the order as JSON: Please send 12 oak shelves to our shop in Lisbon."},
    ],
    "max_tokens": 96,
    "temperature": 0,
    "response_format": {"type": "json_schema", "json_schema": {"name": "order", "strict": True, "schema": SCHEMA}},
}


def check_chat(body: dict[str, Any]) -> None:
    answer = ChatCompletion.model_validate(body)
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMA)


def check_completion(body: dict[str, Any]) -> None:
    assert Completion.model_validate(body).choices[0].text


def check_embedding(body: dict[str, Any]) -> None:
    vector = CreateEmbeddingResponse.model_validate(body).data[0].embedding
    assert len(vector) > 100
    assert any(vector)


def check_response(body: dict[str, Any]) -> None:
    assert Response.construct(**body).output_text  # as the SDK reads it: llama.cpp leaves required fields out


@pytest.mark.parametrize(
    ("endpoint", "body", "check"),
    [
        ("/v1/chat/completions", ORDER, check_chat),
        ("/v1/completions", {"prompt": "The capital of France is", "max_tokens": 8}, check_completion),
        ("/v1/embeddings", {"input": "A ferry leaves the harbour."}, check_embedding),
        ("/v1/responses", {"input": "Name a colour.", "max_output_tokens": 16}, check_response),
    ],
)
def test_every_endpoint_with_the_built_in_model(built_in_server: Server, endpoint: Any, body: Any, check: Any) -> None:
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": endpoint, "body": {"model": "your-model"} | body})
        for name in ("first", "second")
    ]
    content = "\n".join(lines).encode()
    with OpenAI(base_url=f"{built_in_server.base_url}/v1", api_key="reserved", max_retries=0) as client:
        file = client.files.create(file=("input.jsonl", content), purpose="batch")
        batch = client.batches.create(
            input_file_id=file.id,
            endpoint=endpoint,
            completion_window="unlimited",  # type: ignore[arg-type]
            extra_body={"job_id": built_in_server.job_id},
        )
        built_in_server.await_batch(batch.id)
        batch = client.batches.retrieve(batch.id)
        assert batch.status == "completed"
        assert batch.error_file_id is None
        assert batch.usage
        assert batch.usage.total_tokens > 0
        results = [json.loads(line) for line in client.files.content(batch.output_file_id or "").text.splitlines()]
    assert [result["custom_id"] for result in results] == ["first", "second"]
    for result in results:
        check(result["response"]["body"])
