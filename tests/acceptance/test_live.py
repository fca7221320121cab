"""Live requests as clients make them: the official SDK, a server process, the scripted and the embedded engine."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured

MESSAGES: list[openai.types.chat.ChatCompletionMessageParam] = [{"role": "user", "content": "say this"}]


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0)


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with client_of(server) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="scripted", messages=MESSAGES)
    assert "say this" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer._request_id is not None


def test_a_streamed_chat(client: openai.OpenAI) -> None:
    with client.chat.completions.create(model="scripted", messages=MESSAGES, stream=True) as stream:
        pieces = [choice.delta.content or "" for chunk in stream for choice in chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces).endswith("say this")


def test_completions_embeddings_and_responses(client: openai.OpenAI) -> None:
    assert "say this" in client.completions.create(model="scripted", prompt="say this").choices[0].text
    embedded = client.embeddings.create(model="scripted", input=["one", "two"])
    assert [len(item.embedding) for item in embedded.data] == [8, 8]
    assert "say this" in client.responses.create(model="scripted", input="say this").output_text


async def test_the_asynchronous_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.base_url}/v1", api_key="any", max_retries=0) as client:
        answer = await client.chat.completions.create(model="scripted", messages=MESSAGES)
        assert "say this" in (answer.choices[0].message.content or "")
        stream = await client.chat.completions.create(model="scripted", messages=MESSAGES, stream=True)
        pieces = [choice.delta.content or "" async for chunk in stream for choice in chunk.choices]
        assert "".join(pieces).endswith("say this")
        assert (await client.embeddings.create(model="scripted", input="x")).data
        assert (await client.completions.create(model="scripted", prompt="x")).choices
        assert (await client.responses.create(model="scripted", input="x")).output_text


def test_what_goes_wrong_is_raised_as_what_it_is(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="unknown", messages=MESSAGES)
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(model="scripted", messages=[])
    assert refused.value.param is not None, "the engine says what is wrong"
    limited = "[[scripted fault=429 times=always]]"
    with pytest.raises(openai.RateLimitError) as busy:
        client.completions.create(model="scripted", prompt=limited)
    assert busy.value.response.headers["retry-after"] == "1"


def test_the_document_of_the_api_names_the_routes(server: Server) -> None:
    document = server.http.get("/openapi.json").json()
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"):
        operation = document["paths"][path]["post"]
        schema = operation["requestBody"]["content"]["application/json"]["schema"]
        assert (schema["required"], schema["additionalProperties"]) == (["model"], True)
        assert {"application/json", "text/event-stream"} == set(operation["responses"]["200"]["content"])


@pytest.mark.parametrize("path", ["org/m:x", "org%2Fm:x", "org%2Fm%3Ax", "scripted"])
def test_models_are_found_by_any_spelling_of_their_name(server: Server, path: str) -> None:
    found = server.http.get(f"/v1/models/{path}").json()
    assert (found["id"], found["object"]) == ("scripted" if path == "scripted" else "org/m:x", "model")


def test_models_by_the_client(client: openai.OpenAI) -> None:
    assert [client.models.retrieve(model.id).id for model in client.models.list()] == ["scripted", "org/m:x"]
    with pytest.raises(openai.NotFoundError) as unknown:
        client.models.retrieve("org/other")
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as refused:
        client.models.delete("org/m:x")
    assert 400 <= refused.value.status_code < 500
    assert isinstance(refused.value.body, dict)
    assert set(refused.value.body) == {"message", "type", "param", "code"}


def test_a_live_request_does_not_wait_for_a_batch(tmp_path: Path) -> None:
    line_s, lines = 0.5, 200
    with ScriptedProcess(tmp_path / "engine.log", capacity="slots", slots=4, latency_ms=line_s * 1000) as engine:
        settings = configured(tmp_path, engine.base_url, window=4)
        with Server(tmp_path / "data", *settings) as server, client_of(server) as client:
            batch_id = server.create_batch(server.upload(batch_input(lines)))["id"]
            server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] >= 4)
            took = []
            for number in range(4):
                start = time.perf_counter()
                client.completions.create(model="scripted", prompt=f"live {number}")
                took.append(time.perf_counter() - start)
            during = server.batch(batch_id)["request_counts"]["completed"]
            assert during < lines / 2, "the batch is still running"
            server.http.post(f"/v1/batches/{batch_id}/cancel")
    assert took[0] < 2 * line_s + 0.4, "one running line, and its own time"
    assert max(took[1:]) < line_s + 0.4, "room is kept for those that follow"


def test_the_embedded_engine_answers_live(tmp_path: Path) -> None:
    with Server(tmp_path / "data") as server, client_of(server) as client:
        chat = client.chat.completions.create(model="your-model", messages=MESSAGES, max_tokens=8)
        assert chat.choices[0].message.content
        with client.chat.completions.create(model="your-model", messages=MESSAGES, max_tokens=8, stream=True) as stream:
            assert [chunk for chunk in stream if chunk.choices]
        assert client.completions.create(model="your-model", prompt="Once", max_tokens=4).choices[0].text
        assert len(client.embeddings.create(model="your-model", input="x").data[0].embedding) > 8
        assert client.responses.create(model="your-model", input="Say hi", max_output_tokens=8).output
        refused = server.http.post("/v1/chat/completions", content=json.dumps({"model": "your-model"}))
        assert refused.status_code == 400
        assert "error" in refused.json()
