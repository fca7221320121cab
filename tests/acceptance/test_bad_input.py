"""Input that is wrong, or odd: a clear answer, and nothing lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.processes import ScriptedProcess, Server

MIB = 1 << 20
REFUSAL = "Invalid file format for Batch API. Must be .jsonl"


def line(custom_id: object = "a", **changes: Any) -> bytes:
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}
    fields = {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body} | changes
    return json.dumps({name: value for name, value in fields.items() if value is not ...}).encode()


def body(**changes: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]} | changes


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (line("a") + b"\n" + line("b"), 2),
        (line("a") + b"\r\n" + line("b") + b"\r\n", 2),
        (b"\xef\xbb\xbf" + line("a") + b"\n", 1),
        (b"\n\n" + line("a") + b"\n   \n\t\n" + line("b") + b"\n\n", 2),
        (line("a\u2028b") + b"\n", 1),
    ],
    ids=["no newline at the end", "CRLF", "byte order mark", "blank lines", "a line separator inside"],
)
def test_what_is_merely_odd_runs(server: Server, content: bytes, lines: int) -> None:
    batch = server.run_batch(content)
    assert (batch["status"], batch["request_counts"]["completed"]) == ("completed", lines)


@pytest.mark.parametrize(
    ("bad", "code", "param"),
    [
        (b"not json", "invalid_json_line", None),
        (b"[1]", "invalid_json_line", None),
        (b'{"custom_id": "\xff"}', "invalid_json_line", None),
        (line("x", body=body(temperature=float("nan"))), "invalid_json_line", None),
        (b'{"a":' * 5000 + b"1" + b"}" * 5000, "invalid_json_line", None),
        (line("a"), "duplicate_custom_id", "custom_id"),
        (line(...), "missing_required_parameter", "custom_id"),
        (line("x", url=...), "missing_required_parameter", "url"),
        (line("x", body=...), "missing_required_parameter", "body"),
        (line(7), "invalid_type", "custom_id"),
        (line("x", body="text"), "invalid_type", "body"),
        (line("x", method="GET"), "invalid_value", "method"),
        (line("x", url="/v1/embeddings"), "invalid_url", "url"),
        (line("x", body=body(stream=True)), "streaming_unsupported", "body.stream"),
        (line("x", body=body(model="unheard-of")), "model_not_found", "body.model"),
        (line("x", body={"model": "scripted"}), "invalid_request", "body.messages"),
    ],
)
def test_one_bad_line_fails_the_batch_and_is_named(
    server: Server, engine: ScriptedProcess, bad: bytes, code: str, param: str | None
) -> None:
    before = engine.ledger()["requests"]
    batch = server.run_batch(line("a") + b"\n" + bad + b"\n" + line("c") + b"\n")
    assert batch["status"] == "failed"
    assert [(error["line"], error["code"], error["param"]) for error in batch["errors"]["data"]] == [(2, code, param)]
    assert (batch["output_file_id"], batch["error_file_id"]) == (None, None)
    assert engine.ledger()["requests"] == before, "nothing has run"


def test_a_line_of_100_mb_is_named_and_memory_stays_flat(server: Server) -> None:
    before = server.peak_bytes()
    batch = server.run_batch(
        line("a") + b"\n" + line("b", body=body(user="x" * (100 * MIB))) + b"\n" + line("c") + b"\n"
    )
    assert [(error["line"], error["code"]) for error in batch["errors"]["data"]] == [(2, "line_too_long")]
    assert server.peak_bytes() - before < 64 * MIB


def test_a_large_upload_does_not_raise_memory(server: Server, tmp_path: Path) -> None:
    large = tmp_path / "large.bin"
    with large.open("wb") as file:
        file.truncate(512 * MIB)
    before = server.peak_bytes()
    with large.open("rb") as file:
        answer = server.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("large.bin", file)})
    assert answer.json()["bytes"] == 512 * MIB
    assert server.peak_bytes() - before < 64 * MIB
    server.http.delete(f"/v1/files/{answer.json()['id']}")


def test_an_unknown_file_and_one_of_another_purpose_fail_the_batch(server: Server) -> None:
    for file_id in (
        "file-unknown",
        server.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("a.jsonl", line())}).json()["id"],
    ):
        batch = server.await_batch(server.create_batch(file_id)["id"])
        assert batch["status"] == "failed"
        assert [(e["code"], e["param"], e["line"]) for e in batch["errors"]["data"]] == [
            ("invalid_request", "file_id", None)
        ]


@pytest.mark.parametrize(
    ("fields", "name", "content", "message"),
    [
        ({}, "x.jsonl", b"{}", "Missing required parameter: 'purpose'."),
        ({"purpose": "batch"}, "x.txt", b"{}", REFUSAL),
        ({"purpose": "batch"}, "x.jsonl", b"", f"{REFUSAL}: the file is empty."),
        ({"purpose": "batch"}, "x.jsonl", b"hello\n", f"{REFUSAL}: the first line is not a JSON object."),
        (
            {"purpose": "nonsense"},
            "x.jsonl",
            b"{}",
            "'nonsense' is not one of ['fine-tune', 'assistants', 'batch', 'user_data', 'vision', 'evals'] - 'purpose'",
        ),
    ],
)
def test_an_upload_is_refused_with_the_reason_and_leaves_nothing(
    server: Server, fields: dict[str, str], name: str, content: bytes, message: str
) -> None:
    before = sorted((server.data_dir / "blobs").rglob("*"))
    answer = server.http.post("/v1/files", data=fields, files={"file": (name, content)})
    assert (answer.status_code, answer.json()["error"]["message"]) == (400, message)
    assert sorted((server.data_dir / "blobs").rglob("*")) == before


@pytest.mark.parametrize(
    ("content", "headers", "status"),
    [
        (b"{}", {"content-type": "application/json"}, 400),
        (b"garbage", {"content-type": "multipart/form-data; boundary=abc"}, 400),
        (
            b'--abc\r\nContent-Disposition: form-data; name="file"; filename="a.jsonl"\r\n\r\n{}',
            {"content-type": "multipart/form-data; boundary=abc"},
            400,
        ),
        (b"x", {"content-type": "multipart/form-data; boundary=abc", "content-encoding": "gzip"}, 415),
    ],
    ids=["no form", "malformed", "cut off", "compressed"],
)
def test_a_body_that_is_no_form_is_refused(
    server: Server, content: bytes, headers: dict[str, str], status: int
) -> None:
    answer = server.http.post("/v1/files", content=content, headers=headers)
    assert answer.status_code == status
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_names_of_files_never_become_paths(server: Server) -> None:
    answer = server.http.post("/v1/files", data={"purpose": "user_data"}, files={"file": ("../../etc/passwd", b"x")})
    assert answer.json()["filename"] == "passwd"
