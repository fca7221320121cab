"""What Pronghorn adds to OpenAI's Batch API, through a real server and a scripted engine."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server


def line(custom_id: str, text: str, **body: Any) -> bytes:
    message = {"role": "user", "content": text}
    request = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions"}
    return json.dumps(request | {"body": {"model": "scripted", "messages": [message]} | body}).encode() + b"\n"


FAILING = [
    line("fine", "hello"),
    line("bad-1", "[[scripted fault=400 times=always]] one"),
    line("bad-2", "[[scripted fault=400 times=always]] two"),
    line("long", "[[scripted fault=context_length times=always]] three"),
]


def test_an_ended_batch_sums_up_its_errors(server: Server) -> None:
    batch = server.run_batch(b"".join(FAILING))
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 4, "completed": 1, "failed": 3}
    causes = {(cause["status_code"], cause["code"]): cause for cause in batch["error_summary"]}
    assert causes[400, "context_length_exceeded"]["sample_custom_ids"] == ["long"]
    (other,) = [cause for key, cause in causes.items() if key != (400, "context_length_exceeded")]
    assert (other["count"], other["sample_custom_ids"]) == (2, ["bad-1", "bad-2"])
    assert other["message"]


def test_only_failed_lines_are_retried_with_overrides(server: Server) -> None:
    old = server.run_batch(b"".join(FAILING), metadata={"team": "a"})
    answer = server.http.post(
        f"/v1/batches/{old['id']}/retry",
        json={"codes": ["context_length_exceeded"], "overrides": {"max_tokens": 4096, "user": None}},
    )
    assert answer.status_code == 200, answer.text
    new = server.await_batch(answer.json()["id"])
    assert (new["retry_of"], new["metadata"], new["request_counts"]["total"]) == (old["id"], {"team": "a"}, 1)
    sent = json.loads(server.content(new["input_file_id"]))
    assert (sent["custom_id"], sent["body"]["max_tokens"]) == ("long", 4096)
    everything = server.http.post(f"/v1/batches/{old['id']}/retry", json={}).json()
    assert server.await_batch(everything["id"])["request_counts"]["total"] == 3


def test_a_retry_that_is_sent_again_has_the_same_answer_when_the_files_are_gone(server: Server) -> None:
    old = server.run_batch(FAILING[0] + FAILING[1])
    path, headers = f"/v1/batches/{old['id']}/retry", {"Idempotency-Key": "retry-of-the-gone"}
    first = server.http.post(path, json={}, headers=headers).json()
    assert server.http.delete(f"/v1/files/{old['error_file_id']}").status_code == 200
    assert server.http.post(path, json={}, headers=headers).json() == first
    other = server.http.post(path, json={"codes": ["x"]}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")


def test_a_retry_whose_input_goes_while_it_is_read_says_so(server: Server) -> None:
    old = server.run_batch(b"".join(FAILING))
    (server.data_dir / "blobs" / "files" / old["input_file_id"]).unlink()  # as a deletion at that moment does
    answer = server.http.post(f"/v1/batches/{old['id']}/retry", json={})
    assert (answer.status_code, "its files are gone" in answer.text) == (400, True)
    server.http.delete(f"/v1/files/{old['input_file_id']}").raise_for_status()


def test_a_retry_that_starts_nothing_leaves_nothing_behind(server: Server) -> None:
    old = server.run_batch(b"".join(FAILING))
    path, headers = f"/v1/batches/{old['id']}/retry", {"Idempotency-Key": "retry-1"}
    first = server.http.post(path, json={}, headers=headers).json()
    listed = server.http.get("/v1/files", params={"purpose": "batch"}).json()["data"]
    assert first["input_file_id"] in {file["id"] for file in listed}
    assert server.http.post(path, json={}, headers=headers).json()["id"] == first["id"]
    assert server.http.post(path, json={"codes": ["x"]}, headers=headers).status_code == 400
    assert server.http.post(path, json={"metadata": {"other": "body"}}, headers=headers).status_code == 400
    assert server.http.get("/v1/files", params={"purpose": "batch"}).json()["data"] == listed
    server.http.delete(f"/v1/files/{old['output_file_id']}").raise_for_status()  # which removes all that waits for it
    assert {path.name for path in (server.data_dir / "blobs" / "files").iterdir()} == {file["id"] for file in listed}


def test_cancelled_lines_can_be_retried(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(3000)))["id"]
    server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > 0)
    server.http.post(f"/v1/batches/{batch_id}/cancel")
    cancelled = server.await_batch(batch_id)
    answer = server.http.post(f"/v1/batches/{batch_id}/retry", json={"codes": ["batch_cancelled"]})
    rest = server.await_batch(answer.json()["id"])
    assert cancelled["request_counts"]["completed"] + rest["request_counts"]["completed"] == 3000


@pytest.mark.parametrize("body", [{"codes": ["no_such_code"]}, {"status_codes": [599]}])
def test_a_retry_of_nothing_says_so(server: Server, body: dict[str, Any]) -> None:
    batch = server.run_batch(b"".join(FAILING))
    answer = server.http.post(f"/v1/batches/{batch['id']}/retry", json=body)
    assert answer.status_code == 400
    assert "nothing to retry" in answer.json()["error"]["message"]


def test_a_dry_run_tells_everything_and_starts_nothing(server: Server, engine: ScriptedProcess) -> None:
    before = engine.ledger()["requests"]
    content = line("a", "same text") + line("b", "same text") + line("c", "other") + b"nonsense\n" + line("a", "again")
    body = {
        "input_file_id": server.upload(content),
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        "job_id": server.job_id,
    }
    newest = server.http.get("/v1/batches", params={"limit": 1}).json()["data"]
    check = server.http.post("/v1/batches/validate", json=body).json()
    assert (check["valid"], check["lines"], check["models"]) == (False, 5, {"scripted": 4})
    assert [(problem["line"], problem["code"]) for problem in check["errors"]["data"]] == [
        (4, "invalid_json_line"),
        (5, "duplicate_custom_id"),
    ]
    assert check["duplicate_bodies"] == 1
    assert check["estimated_prompt_tokens"] > 10
    assert server.http.get("/v1/batches", params={"limit": 1}).json()["data"] == newest
    assert engine.ledger()["requests"] == before


def test_invalid_lines_can_be_skipped(server: Server) -> None:
    content = line("a", "one") + b"nonsense\n" + line("b", "two") + line("a", "again") + line("c", "x", stream=True)
    batch = server.run_batch(content, on_invalid="skip")
    assert batch["status"] == "completed"
    assert batch["request_counts"] == {"total": 5, "completed": 2, "failed": 3}
    errors = [json.loads(result) for result in server.content(batch["error_file_id"]).splitlines()]
    assert [(error["custom_id"], error["response"], error["error"]["code"]) for error in errors] == [
        (None, None, "invalid_json_line"),
        ("a", None, "duplicate_custom_id"),
        ("c", None, "streaming_unsupported"),
    ]


def test_a_file_of_invalid_lines_only_still_fails(server: Server) -> None:
    assert server.run_batch(b"{}\n{}\n", on_invalid="skip")["status"] == "failed"


def test_results_are_read_while_they_grow(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(4000)))["id"]
    with server.http.stream("GET", f"/v1/batches/{batch_id}/output", params={"follow": "true"}) as growing:
        chunks = growing.iter_raw()
        first = next(chunks)
        assert server.batch(batch_id)["status"] == "in_progress", "the first part comes before the end"
        followed = first + b"".join(chunks)
    batch = server.await_batch(batch_id)
    output = server.content(batch["output_file_id"])
    assert len(output.splitlines()) == 4000
    assert output.startswith(first)
    whole = server.http.get(f"/v1/batches/{batch_id}/output").content
    assert whole == output
    resumed = server.http.get(f"/v1/batches/{batch_id}/output", params={"offset": len(followed) - 1000}).content
    assert resumed == output[len(followed) - 1000 :]
    assert server.http.get(f"/v1/batches/{batch_id}/errors").content == b""


def test_following_reads_to_the_very_end(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(1000)))["id"]
    followed = server.http.get(f"/v1/batches/{batch_id}/output", params={"follow": "true"}).content
    assert followed == server.content(server.await_batch(batch_id)["output_file_id"])


def test_events_tell_every_status_and_end_with_the_batch(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(1500)))["id"]
    events = []
    with server.http.stream("GET", f"/v1/batches/{batch_id}/events") as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(text.removeprefix("data: ")) for text in stream.iter_lines() if text.startswith("data: ")]
    assert events[-1]["status"] == "completed"
    counts = [event["request_counts"]["completed"] for event in events]
    assert counts == sorted(counts)
    assert len(set(counts)) > 2


def test_progress_is_measured_while_a_batch_runs_and_gone_after(server: Server) -> None:
    batch_id = server.create_batch(server.upload(batch_input(3000)))["id"]
    running = server.await_batch(batch_id, lambda batch: bool((batch["progress"] or {}).get("lines_per_second")))
    progress = running["progress"]
    assert 0 < progress["eta_seconds_min"] <= progress["eta_seconds_max"]
    assert progress["tokens_per_second"] > 0
    assert progress["reason"] is None
    assert server.await_batch(batch_id)["progress"] is None


def test_the_same_key_and_body_start_one_batch(server: Server) -> None:
    body = {
        "input_file_id": server.upload(batch_input(3)),
        "endpoint": "/v1/chat/completions",
        "completion_window": "unlimited",
        "job_id": server.job_id,
    }
    headers = {"Idempotency-Key": "key-1"}
    first = server.http.post("/v1/batches", json=body, headers=headers).json()
    server.await_batch(first["id"])
    again = server.http.post("/v1/batches", json=body, headers=headers)
    assert (again.status_code, again.json()) == (200, first), "the very answer of the first time"
    other = server.http.post("/v1/batches", json=body | {"metadata": {"a": "b"}}, headers=headers)
    assert (other.status_code, other.json()["error"]["code"]) == (400, "idempotency_key_reused")
    without = server.http.post("/v1/batches", json=body).json()
    assert without["id"] != first["id"]


def test_output_files_expire_when_the_client_says_so(server: Server) -> None:
    batch = server.run_batch(batch_input(2), output_expires_after={"anchor": "created_at", "seconds": 3600})
    output = server.http.get(f"/v1/files/{batch['output_file_id']}").json()
    assert output["expires_at"] == output["created_at"] + 3600
