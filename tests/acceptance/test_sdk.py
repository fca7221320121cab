"""The official client, sync and async, on every route it has: each body that reaches it obeys OpenAI's schemas.

Runs with the newest client and, by `make test-compat`, with the one of November 2025.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jsonschema
import openai
import pytest
from openai.resources.webhooks import Webhooks
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured
from tests.receiver import Receiver

CONTRACT = json.loads((Path(__file__).parents[1] / "contract" / "openai-batch.schemas.json").read_text())
# What each route of OpenAI's answers; None where the body is no JSON or the engine's own.
ROUTES: dict[str, str | None] = {
    "POST /files": "OpenAIFileWire",
    "GET /files": "ListFilesResponse",
    "GET /files/{}": "OpenAIFileWire",
    "DELETE /files/{}": "DeleteFileResponse",
    "GET /files/{}/content": None,
    "POST /batches": "BatchWire",
    "GET /batches": "ListBatchesResponse",
    "GET /batches/{}": "BatchWire",
    "POST /batches/{}/cancel": "BatchWire",
    "POST /uploads": "UploadWire",
    "POST /uploads/{}/parts": "UploadPart",
    "POST /uploads/{}/complete": "UploadWire",
    "POST /uploads/{}/cancel": "UploadWire",
    "GET /models": "ListModelsResponse",
    "GET /models/{}": "Model",
    "POST /chat/completions": None,
    "POST /completions": None,
    "POST /embeddings": None,
    "POST /responses": None,
}
WEBHOOK_ROUTES: dict[str, str | None] = {
    "POST /webhook_endpoints": "WebhookEndpointWithSecret",
    "GET /webhook_endpoints": "WebhookEndpointList",
    "GET /webhook_endpoints/{}": "WebhookEndpoint",
    "POST /webhook_endpoints/{}": "WebhookEndpoint",
    "DELETE /webhook_endpoints/{}": "DeletedWebhookEndpoint",
    "POST /webhook_endpoints/{}/rotate_secret": "WebhookEndpointWithSecret",
    "POST /webhook_endpoints/{}/test": "WebhookEndpointTestResult",
    "GET /webhook_event_types": "WebhookEventTypeList",
}
CLIENT_MANAGES_WEBHOOKS = hasattr(Webhooks, "create")
MESSAGES: list[Any] = [{"role": "user", "content": "say this"}]
UNKNOWN_BATCH = "batch_" + "0" * 32


def check(schema: str, body: object) -> None:
    jsonschema.Draft202012Validator({"$ref": f"#/$defs/{schema}", "$defs": CONTRACT["$defs"]}).validate(body)


class Witness:
    """Reads what the server answers before the client does, and keeps what is wrong with it."""

    def __init__(self) -> None:
        self.seen: set[str] = set()
        self.deviations: list[str] = []

    def look(self, response: Any) -> None:
        response.read()
        self._judge(response)

    async def look_async(self, response: Any) -> None:
        await response.aread()
        self._judge(response)

    def _judge(self, response: Any) -> None:
        request = response.request
        path = request.url.raw_path.decode().partition("?")[0].removeprefix("/v1")
        route = next((route for route in ROUTES | WEBHOOK_ROUTES if _matches(route, f"{request.method} {path}")), None)
        try:
            assert response.headers["x-request-id"]
            if response.status_code >= 400:
                check("ErrorResponse", json.loads(response.content))
            else:
                assert response.status_code == 200
                assert route is not None, "a route that OpenAI does not have"
                self.seen.add(route)
                schema = (ROUTES | WEBHOOK_ROUTES)[route]
                if schema is not None:
                    assert response.headers["content-type"] == "application/json"
                    check(schema, json.loads(response.content))
        except (AssertionError, KeyError, ValueError, jsonschema.ValidationError) as error:
            self.deviations.append(f"{request.method} {path}: {error}")


def _matches(route: str, asked: str) -> bool:
    anything = ".+" if "/models/" in route else "[^/]+"  # older clients send the slashes in a model's name as they are
    return re.fullmatch(re.escape(route).replace(r"\{\}", anything), asked) is not None


class Site(NamedTuple):
    """A server, a client of it, and what the client was sent."""

    server: Server
    client: Any
    witness: Witness


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("sdk")
    with (
        ScriptedProcess(folder / "engine.log", models="scripted,org/m:x", latency_ms=5) as engine,
        Server(folder / "data", *configured(folder, engine.base_url, webhook_allow=["127.0.0.1"])) as server,
    ):
        yield server


@pytest.fixture(scope="module")
def witnesses() -> dict[str, Witness]:
    return {"sync": Witness(), "async": Witness()}


@pytest.fixture(params=["sync", "async"])
async def site(request: pytest.FixtureRequest, server: Server, witnesses: dict[str, Witness]) -> AsyncIterator[Site]:
    """The server and either client; a body that breaks the contract fails the test that caused it."""
    witness = witnesses[request.param]
    options: dict[str, Any] = {"base_url": f"{server.base_url}/v1", "api_key": "any", "max_retries": 0}
    if request.param == "sync":
        transport = openai.DefaultHttpxClient(event_hooks={"response": [witness.look]})
        with openai.OpenAI(http_client=transport, **options) as client:
            yield Site(server, client, witness)
    else:
        async_transport = openai.DefaultAsyncHttpxClient(event_hooks={"response": [witness.look_async]})
        async with openai.AsyncOpenAI(http_client=async_transport, **options) as client:
            yield Site(server, client, witness)
    deviations, witness.deviations = witness.deviations, []
    assert not deviations


async def done(answer: Any) -> Any:
    """Return what either client answers."""
    return await answer if inspect.isawaitable(answer) else answer


async def every(answer: Any) -> list[Any]:
    """Return all items of a listing, page by page, or of a stream."""
    if not hasattr(answer, "__aiter__"):
        answer = await done(answer)
    return [item async for item in answer] if hasattr(answer, "__aiter__") else list(answer)


async def uploaded(site: Site, content: bytes, **fields: Any) -> Any:
    return await done(site.client.files.create(file=("in.jsonl", content), purpose="batch", **fields))


async def started(site: Site, content: bytes, **fields: Any) -> Any:
    file = await uploaded(site, content)
    body: dict[str, Any] = {"endpoint": "/v1/chat/completions", "completion_window": "24h"} | fields
    extra = {"job_id": site.server.job_id}
    return await done(site.client.batches.create(input_file_id=file.id, extra_body=extra, **body))


async def ended(site: Site, batch: Any) -> Any:
    site.server.await_batch(batch.id)
    return await done(site.client.batches.retrieve(batch.id))


async def results(site: Site, file_id: str) -> list[dict[str, Any]]:
    content = await done(site.client.files.content(file_id))
    lines = [json.loads(line) for line in content.text.splitlines()]
    for line in lines:
        check("BatchRequestOutput", line)
        if line["response"] and line["response"]["status_code"] >= 400:
            check("ErrorResponse", line["response"]["body"])
        assert (line["response"] is None) != (line["error"] is None), "an answer or a reason for none"
    return lines


async def test_files(site: Site) -> None:
    file = await uploaded(site, b"{}\n", expires_after={"anchor": "created_at", "seconds": 3600})
    assert (file.object, file.bytes, file.filename, file.purpose) == ("file", 3, "in.jsonl", "batch")
    assert (file.status, file.expires_at) == ("processed", file.created_at + 3600)
    assert re.fullmatch(r"file-[0-9A-Za-z]+", file.id)
    assert (await done(site.client.files.retrieve(file.id))).to_dict() == file.to_dict()
    assert await done(site.client.files.wait_for_processing(file.id)) == file
    assert (await done(site.client.files.content(file.id))).content == b"{}\n"
    assert file._request_id
    deleted = await done(site.client.files.delete(file.id))
    assert (deleted.id, deleted.object, deleted.deleted) == (file.id, "file", True)


@pytest.mark.parametrize("purpose", ["assistants", "fine-tune", "vision", "user_data"])
async def test_a_file_of_each_purpose(site: Site, purpose: Any) -> None:
    file = await done(site.client.files.create(file=("notes.txt", b"hello"), purpose=purpose))
    assert (file.purpose, file.expires_at) == (purpose, None)
    with pytest.raises(openai.BadRequestError, match=f"Not allowed to download files of purpose: {purpose}"):
        await done(site.client.files.content(file.id))
    await done(site.client.files.delete(file.id))


async def test_files_page_by_page(site: Site) -> None:
    made = [(await uploaded(site, b"{}\n")).id for _ in range(5)]
    found = await every(site.client.files.list(purpose="batch", limit=2, order="asc"))
    assert [file.id for file in found if file.id in made] == made
    newest = await every(site.client.files.list(limit=2, after=made[3]))
    assert [file.id for file in newest if file.id in made] == made[2::-1]
    for file_id in made:
        await done(site.client.files.delete(file_id))
    assert await every(site.client.files.list(purpose="vision")) == []


async def test_a_batch_that_completes(site: Site) -> None:
    fields = {"metadata": {"team": "a"}, "output_expires_after": {"anchor": "created_at", "seconds": 3600}}
    bad = batch_input(2, "[[scripted fault=400 times=always]]").replace(b"line", b"bad")
    created = await started(site, batch_input(20) + bad, **fields)
    assert re.fullmatch(r"batch_[0-9a-f]{32}", created.id)
    assert (created.object, created.status, created.model) == ("batch", "validating", None)
    assert created.expires_at == created.created_at + 86400
    assert created.request_counts.to_dict() == {"total": 0, "completed": 0, "failed": 0}
    assert (created.metadata, created.usage.total_tokens) == ({"team": "a"}, 0)
    batch = await ended(site, created)
    assert (batch.status, batch.model, batch.errors) == ("completed", "scripted", None)
    assert batch.request_counts.to_dict() == {"total": 22, "completed": 20, "failed": 2}
    assert batch.usage.total_tokens == batch.usage.input_tokens + batch.usage.output_tokens > 0
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    stamps = (batch.failed_at, batch.expired_at, batch.cancelling_at, batch.cancelled_at)
    assert stamps == (None,) * 4
    answers, errors = await results(site, batch.output_file_id), await results(site, batch.error_file_id)
    assert {answer["custom_id"] for answer in answers} == {f"line-{number}" for number in range(20)}
    assert {answer["response"]["status_code"] for answer in answers} == {200}
    assert [(error["custom_id"], error["response"]["status_code"]) for error in errors] == [
        ("bad-0", 400),
        ("bad-1", 400),
    ]
    for file_id, kind in ((batch.output_file_id, "output"), (batch.error_file_id, "error")):
        file = await done(site.client.files.retrieve(file_id))
        assert (file.purpose, file.filename) == ("batch_output", f"{batch.id}_{kind}.jsonl")
        assert file.expires_at == file.created_at + 3600
    with pytest.raises(openai.ConflictError, match="Cannot cancel a batch with status 'completed'"):
        await done(site.client.batches.cancel(batch.id))


async def test_a_batch_whose_every_line_fails_is_completed(site: Site) -> None:
    batch = await ended(site, await started(site, batch_input(3, "[[scripted fault=400 times=always]]")))
    assert (batch.status, batch.output_file_id) == ("completed", None)
    assert batch.request_counts.to_dict() == {"total": 3, "completed": 0, "failed": 3}
    assert len(await results(site, batch.error_file_id)) == 3


async def test_a_batch_that_fails_validation(site: Site) -> None:
    batch = await ended(site, await started(site, batch_input(1) + b"nonsense\n" + batch_input(1)))
    assert (batch.status, batch.output_file_id, batch.error_file_id) == ("failed", None, None)
    assert [(error.line, error.code, error.param) for error in batch.errors.data] == [
        (2, "invalid_json_line", None),
        (3, "duplicate_custom_id", "custom_id"),
    ]
    with pytest.raises(openai.ConflictError):
        await done(site.client.batches.cancel(batch.id))


async def test_a_batch_of_a_file_that_is_not_there_fails(site: Site) -> None:
    extra = {"job_id": site.server.job_id}
    created = await done(
        site.client.batches.create(
            input_file_id="file-none", endpoint="/v1/embeddings", completion_window="24h", extra_body=extra
        )
    )
    batch = await ended(site, created)
    assert (batch.status, [error.param for error in batch.errors.data]) == ("failed", ["file_id"])


async def test_a_batch_that_is_cancelled(site: Site) -> None:
    created = await started(site, batch_input(2000, "[[scripted delay_ms=200]]"))
    cancelling = await done(site.client.batches.cancel(created.id))
    assert cancelling.status in ("cancelling", "cancelled")
    assert cancelling.cancelling_at is not None
    batch = await ended(site, created)
    assert (batch.status, batch.cancelling_at) == ("cancelled", cancelling.cancelling_at)
    assert batch.cancelled_at >= batch.cancelling_at
    assert (await done(site.client.batches.cancel(created.id))).to_dict() == batch.to_dict(), "again changes nothing"
    lines = await results(site, batch.error_file_id) if batch.error_file_id else []
    assert {line["error"]["code"] for line in lines} <= {"batch_cancelled"}


async def test_a_batch_that_expires(site: Site) -> None:
    lines = 30_000  # more than any window could run in so short a time, on a machine that notices late, too
    created = await started(site, batch_input(lines, "[[scripted delay_ms=1000]]"), completion_window="4s")
    batch = await ended(site, created)
    assert batch.status == "expired"
    assert batch.expired_at >= batch.expires_at == batch.created_at + 4
    answers = await results(site, batch.output_file_id) if batch.output_file_id else []
    unsent = await results(site, batch.error_file_id)
    assert {line["error"]["code"] for line in unsent} == {"batch_expired"}
    assert len(answers) + len(unsent) == lines
    assert batch.request_counts.to_dict() == {"total": lines, "completed": len(answers), "failed": 0}


async def test_batches_page_by_page(site: Site) -> None:
    made = [(await started(site, batch_input(1))).id for _ in range(5)]
    found = [batch.id for batch in await every(site.client.batches.list(limit=2))]
    assert found[:5] == made[::-1]
    assert len(found) == len(set(found))
    assert [batch.id for batch in await every(site.client.batches.list(after=made[2]))][:2] == made[1::-1]


async def test_an_upload_in_parts(site: Site) -> None:
    content = batch_input(10)
    chunked = site.client.uploads.upload_file_chunked
    upload = await done(
        chunked(
            file=content,
            filename="in.jsonl",
            bytes=len(content),
            mime_type="application/jsonl",
            purpose="batch",
            part_size=500,
        )
    )
    assert (upload.status, upload.object, upload.bytes) == ("completed", "upload", len(content))
    assert upload.expires_at == upload.created_at + 3600
    assert (await done(site.client.files.content(upload.file.id))).content == content
    assert upload.file.to_dict() == (await done(site.client.files.retrieve(upload.file.id))).to_dict()


async def test_an_upload_that_is_given_up(site: Site) -> None:
    fields: dict[str, Any] = {"filename": "in.jsonl", "bytes": 3, "mime_type": "text/jsonl", "purpose": "batch"}
    upload = await done(site.client.uploads.create(**fields))
    assert (upload.status, upload.file) == ("pending", None)
    part = await done(site.client.uploads.parts.create(upload.id, data=b"{}"))
    assert (part.object, part.upload_id) == ("upload.part", upload.id)
    with pytest.raises(openai.BadRequestError) as refused:
        await done(site.client.uploads.complete(upload.id, part_ids=[part.id]))
    assert refused.value.code == "bytes_mismatch"
    assert (await done(site.client.uploads.cancel(upload.id))).status == "cancelled"
    with pytest.raises(openai.BadRequestError):
        await done(site.client.uploads.parts.create(upload.id, data=b"{}"))


async def test_models(site: Site) -> None:
    assert [model.id for model in await every(site.client.models.list())] == ["scripted", "org/m:x"]
    assert (await done(site.client.models.retrieve("org/m:x"))).id == "org/m:x"
    with pytest.raises(openai.NotFoundError) as unknown:
        await done(site.client.models.retrieve("other"))
    assert unknown.value.code == "model_not_found"
    with pytest.raises(openai.APIStatusError) as refused:
        await done(site.client.models.delete("scripted"))
    assert refused.value.status_code == 405


async def test_live_answers_are_what_the_client_declares(site: Site) -> None:
    client = site.client
    chat = await done(client.chat.completions.create(model="scripted", messages=MESSAGES))
    assert ChatCompletion.model_validate(chat.to_dict()).choices[0].message.content
    completion = await done(client.completions.create(model="scripted", prompt="x"))
    assert Completion.model_validate(completion.to_dict()).choices[0].text
    embedding = await done(client.embeddings.create(model="scripted", input=["a", "b"]))
    assert len(CreateEmbeddingResponse.model_validate(embedding.to_dict()).data) == 2
    response = await done(client.responses.create(model="scripted", input="x"))
    assert Response.model_validate(response.to_dict()).output_text


async def test_live_streams(site: Site) -> None:
    client = site.client
    chunks = await every(client.chat.completions.create(model="scripted", messages=MESSAGES, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).endswith("say this")
    pieces = await every(client.completions.create(model="scripted", prompt="say this", stream=True))
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices).endswith("say this")


@pytest.mark.skipif(not CLIENT_MANAGES_WEBHOOKS, reason="this client has no webhooks.create and its kin (2026-09)")
async def test_webhook_endpoints(site: Site) -> None:
    webhooks = site.client.webhooks
    assert "batch.completed" in (await done(webhooks.event_types.list())).data
    with Receiver() as receiver:
        created = await done(webhooks.create(name="n", url=receiver.url, event_types=["batch.completed"]))
        assert created.signing_secret.startswith("whsec_")
        await done(webhooks.update(created.id, name="m"))
        assert (await done(webhooks.retrieve(created.id))).name == "m"
        assert created.id in [endpoint.id for endpoint in await every(webhooks.list(limit=1))]
        rotated = await done(webhooks.rotate_secret(created.id, keep_old_secret_active_for_24_hours=True))
        assert rotated.signing_secret != created.signing_secret
        assert (await done(webhooks.test(created.id, event_type="batch.failed"))).success is True
        received = receiver.take()
        event = webhooks.unwrap(received.body, received.headers, secret=rotated.signing_secret)
        assert event.type == "batch.failed"
        assert (await done(webhooks.delete(created.id))).deleted is True
    with pytest.raises(openai.NotFoundError):
        await done(webhooks.retrieve(created.id))


async def test_events_are_verified_and_typed(site: Site) -> None:
    with Receiver() as receiver:
        fields = {"name": "n", "url": receiver.url, "event_types": ["batch.completed", "batch.failed"]}
        endpoint = site.server.http.post("/v1/webhook_endpoints", json=fields).json()
        for content, kind in ((batch_input(1), "completed"), (b"{}\n", "failed")):
            batch = await ended(site, await started(site, content))
            received = receiver.take()
            check(f"WebhookBatch{kind.title()}", json.loads(received.body))
            event = site.client.webhooks.unwrap(received.body, received.headers, secret=endpoint["signing_secret"])
            assert (event.type, event.data.id) == (f"batch.{kind}", batch.id)
        site.server.http.delete(f"/v1/webhook_endpoints/{endpoint['id']}").raise_for_status()


BATCH: dict[str, Any] = {
    "input_file_id": "file-abc",
    "endpoint": "/v1/chat/completions",
    "completion_window": "24h",
}


@pytest.mark.parametrize(
    ("change", "param", "code", "message"),
    [
        ({"endpoint": "/v1/x"}, "endpoint", "invalid_value", "Invalid value: '/v1/x'. Supported values are: '/v1/"),
        (
            {"input_file_id": "x"},
            "input_file_id",
            "invalid_value",
            "Invalid 'input_file_id': 'x'. Expected an ID that begins with 'file'.",
        ),
        ({"completion_window": "soon"}, "completion_window", "invalid_value", "completion_window"),
        ({"completion_window": ""}, "completion_window", "invalid_value", "completion_window"),
        (
            {"metadata": {"tags": ["a"]}},
            "metadata.tags",
            "invalid_type",
            "Invalid type for 'metadata.tags': expected a string, but got an array instead.",
        ),
        (
            {"metadata": {str(number): "" for number in range(17)}},
            "metadata",
            "object_above_max_properties",
            "Invalid 'metadata': too many properties. Expected an object with at most 16 properties, but got an object "
            "with 17 properties instead.",
        ),
        ({"metadata": {"k" * 65: ""}}, "metadata", "property_name_above_max_length", "Invalid 'metadata'"),
        (
            {"metadata": {"k": "v" * 600}},
            "metadata.k",
            "string_above_max_length",
            "Invalid 'metadata.k': string too long. Expected a string with maximum length 512, but got a string with "
            "length 600 instead.",
        ),
        (
            {"output_expires_after": {"anchor": "created_at", "seconds": 60}},
            "output_expires_after.seconds",
            "integer_below_min_value",
            "Expected a value >= 3600, but got 60 instead.",
        ),
        ({"surprise": 1}, "surprise", "unknown_parameter", "Unknown parameter: 'surprise'."),
    ],
)
async def test_a_batch_that_cannot_be_is_refused_in_openais_words(
    site: Site, change: dict[str, Any], param: str, code: str, message: str
) -> None:
    body = {"job_id": site.server.job_id} | change
    with pytest.raises(openai.BadRequestError) as refused:
        await done(site.client.batches.create(**BATCH, extra_body=body))
    error = refused.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)
    assert isinstance(error.body, dict)
    assert message in error.body["message"]


async def test_what_does_not_exist(site: Site) -> None:
    client = site.client
    calls: list[Callable[[], Any]] = [
        lambda: client.batches.retrieve(UNKNOWN_BATCH),
        lambda: client.batches.retrieve("batch-nonexistent"),
        lambda: client.batches.cancel(UNKNOWN_BATCH),
        lambda: client.files.retrieve("file-none"),
        lambda: client.files.delete("file-none"),
        lambda: client.files.content("file-none"),
        lambda: client.uploads.cancel("upload_none"),
        lambda: client.uploads.complete("upload_none", part_ids=[]),
        lambda: client.uploads.parts.create("upload_none", data=b"x"),
        lambda: client.embeddings.create(model="none", input="x"),
        lambda: client.batches.list(after=UNKNOWN_BATCH),
        lambda: client.files.list(after="file-none"),
    ]
    for call in calls:
        with pytest.raises(openai.NotFoundError):
            await done(call())
    with pytest.raises(openai.NotFoundError, match=f"No batch found with id '{UNKNOWN_BATCH}'"):
        await done(client.batches.retrieve(UNKNOWN_BATCH))
    with pytest.raises(openai.NotFoundError, match="No such File object: file-none") as unknown:
        await done(client.files.retrieve("file-none"))
    assert unknown.value.param == "id"
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.BadRequestError, match="Expected an ID that begins with 'batch'") as refused:
            await done(call("x"))
        assert (refused.value.param, refused.value.code) == ("batch_id", "invalid_value")


@pytest.mark.parametrize(("limit", "code"), [(0, "integer_below_min_value"), (101, "integer_above_max_value")])
async def test_a_page_has_bounds(site: Site, limit: int, code: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        await done(site.client.batches.list(limit=limit))
    assert (refused.value.param, refused.value.code) == ("limit", code)


async def test_files_that_are_refused(site: Site) -> None:
    create = site.client.files.create
    refusals: list[tuple[Callable[[], Any], str]] = [
        (lambda: create(file=("in.txt", b"{}"), purpose="batch"), "Must be .jsonl"),
        (lambda: create(file=("in.jsonl", b""), purpose="batch"), "Must be .jsonl"),
        (lambda: create(file=("in.jsonl", b"nonsense\n"), purpose="batch"), "Must be .jsonl"),
        (lambda: create(file=("in.jsonl", b"{}"), purpose="x"), "'x' is not one of \\['fine-tune', 'assistants', "),
    ]
    for call, message in refusals:
        with pytest.raises(openai.BadRequestError, match=message) as refused:
            await done(call())
        assert (refused.value.param, refused.value.code) == (None, None)


def test_every_route_was_driven(server: Server, witnesses: dict[str, Witness]) -> None:
    """The last test: the ones before it have met each route that the server and OpenAI have in common."""
    paths = server.http.get("/openapi.json").json()["paths"]
    served = {
        f"{method.upper()} {re.sub('{[^}]*}', '{}', path.removeprefix('/v1'))}"
        for path, methods in paths.items()
        for method in methods
    }
    assert served >= set(ROUTES | WEBHOOK_ROUTES)
    expected = set(ROUTES | WEBHOOK_ROUTES if CLIENT_MANAGES_WEBHOOKS else ROUTES)
    for witness in witnesses.values():
        assert expected <= witness.seen
