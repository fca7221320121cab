"""Prompts, answers and keys stay out of logs and errors, whatever goes wrong, with the logs at their most talkative."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tests.faults.test_odd_upstreams import Wire, running
from tests.processes import Server, configured

PROMPT, ANSWER, KEY = "canary-in-the-prompt", "canary-in-the-answer", "canary-in-the-key"
# Python runs it at the start of each of the server's processes, which knows no other way to make them log everything.
TALKATIVE = """
import logging
set_up = logging.basicConfig
def talk(**options):
    set_up(**{**options, "level": logging.DEBUG})
    logging.debug("this process logs everything")
logging.basicConfig = talk
"""


async def misbehaves(wire: Wire) -> None:
    """Show the prompt and an answer in every part of an answer that may be wrong."""
    said = f"{wire.prompt} {ANSWER}".encode()
    error = json.dumps({"error": {"message": said.decode()}}).encode()
    match wire.prompt.partition(" ")[0]:
        case "500":
            await wire.answer(500, error)
        case "400":
            await wire.answer(400, error)
        case "429":
            await wire.answer(429, error, f"Retry-After: {said.decode()}")
        case "no-http":
            await wire.send(said * 2)
            wire.close()
        case "no-json":
            await wire.answer(200, said)
        case "no-choices":
            await wire.answer(200, b'{"choices": [], "said": "%b"}' % said)
        case "bad-header":
            await wire.send(b"HTTP/1.1 200 OK\r\n" + said + b"\r\n\r\n")
        case "bad-chunk":
            await wire.send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + said)
        case "cut":
            await wire.send(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + said)
            wire.close()
        case "unasked":
            await wire.answer(200, wire.fair_body)
            await wire.send(said)
        case _:
            await wire.answer(200, wire.fair_body.replace(b'"assistant"', b'"' + ANSWER.encode() + b'"'))


KINDS = ["500", "400", "429", "no-http", "no-json", "no-choices", "bad-header", "bad-chunk", "cut", "unasked", "fair"]


def body_of(kind: str) -> dict[str, object]:
    return {"model": "scripted", "messages": [{"role": "user", "content": f"{kind} {PROMPT}"}]}


def test_no_prompt_answer_or_key_is_logged_or_in_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(TALKATIVE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("CANARY_KEY", KEY)
    lines = [
        {"custom_id": kind, "method": "POST", "url": "/v1/chat/completions", "body": body_of(kind)} for kind in KINDS
    ]
    content = "\n".join(map(json.dumps, lines)).encode()
    with running(misbehaves) as (engine,):
        settings = configured(tmp_path, engine.base_url, api_key_env="CANARY_KEY")
        with Server(tmp_path / "data", *settings) as server:
            batch_id = server.create_batch(server.upload(content), completion_window="6s")["id"]
            server.await_batch(batch_id, lambda batch: batch["request_counts"]["failed"] >= 1)
            wrong = server.create_batch(server.upload(content + b'\n{"body": "' + PROMPT.encode()))["id"]
            said = [json.dumps(server.await_batch(wrong)["errors"])]
            posts = [server.http.post("/v1/chat/completions", json=body_of(kind)) for kind in KINDS if kind != "429"]
            posts += [
                server.http.post(path, content=f'{{"{PROMPT}": "{PROMPT}'.encode())
                for path in ("/v1/batches", "/v1/chat/completions", "/v1/files", "/v1/uploads")
            ]
            # What an engine says is shown as it came, and is the engine's; the others are ours.
            said += [post.text for post in posts if post.status_code >= 400 and ANSWER not in post.text]
            batch = server.await_batch(batch_id)
            said.append(str(batch["progress"]))
            assert ANSWER.encode() in server.content(batch["output_file_id"])
    said.append(server.log())
    assert said[-1].count("this process logs everything") == 2, "the server does, and its worker"
    assert [text for text in said if PROMPT in text or ANSWER in text or KEY in text] == []
