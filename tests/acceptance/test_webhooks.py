"""Webhooks as their receivers and the official client see them, against a real server."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import openai
import pytest
from openai.types.webhooks import WebhookEndpointWithSecret
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server, configured
from tests.receiver import Answer, Received, Receiver

EVENTS = ["batch.completed", "batch.failed", "batch.expired", "batch.cancelled"]


class Site(NamedTuple):
    """A server that may send to the receiver, and the official client for it."""

    server: Server
    client: openai.OpenAI
    receiver: Receiver

    def endpoint(self, *event_types: str, path: str = "") -> WebhookEndpointWithSecret:
        return self.client.webhooks.create(
            name="test",
            url=self.receiver.url + path,
            event_types=list(event_types or EVENTS),  # type: ignore[arg-type]
        )

    def unwrap(self, received: Received, secret: str) -> Any:
        return self.client.webhooks.unwrap(received.body, received.headers, secret=secret)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ScriptedProcess]:
    log = tmp_path_factory.mktemp("engine") / "engine.log"
    with ScriptedProcess(log, capacity="slots", slots=4, latency_ms=20) as engine:
        yield engine


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, engine: ScriptedProcess) -> Iterator[Server]:
    with start(tmp_path_factory.mktemp("server"), engine) as server:
        yield server


@pytest.fixture
def site(server: Server, receiver: Receiver) -> Iterator[Site]:
    """The server that all tests here share, without endpoints, and a receiver of the test's own."""
    with client_of(server) as client:
        yield Site(server, client, receiver)
        for endpoint in client.webhooks.list():
            client.webhooks.delete(endpoint.id)


def start(tmp_path: Path, engine: ScriptedProcess) -> Server:
    return Server(tmp_path / "data", *configured(tmp_path, engine.base_url, webhook_allow=["127.0.0.1"]))


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0)


def await_delivery(server: Server, endpoint_id: str, state: str) -> dict[str, Any]:
    """Return the newest delivery to an endpoint once it is in `state`."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        data = server.http.get(f"/v1/webhook_endpoints/{endpoint_id}/deliveries").json()["data"]
        if data and data[0]["state"] == state:
            return dict(data[0])
    raise AssertionError(f"no delivery is {state}")


def end_batch(server: Server, status: str) -> str:
    """Run a batch to `status` and return its id."""
    lines = {"completed": batch_input(3), "failed": batch_input(1) * 2}.get(status, batch_input(2000))
    window = {"completion_window": "1s"} if status == "expired" else {}
    batch_id = str(server.create_batch(server.upload(lines), **window)["id"])
    if status == "cancelled":
        server.http.post(f"/v1/batches/{batch_id}/cancel").raise_for_status()
    assert server.await_batch(batch_id)["status"] == status
    return batch_id


@pytest.mark.parametrize("status", ["completed", "failed", "expired", "cancelled"])
def test_each_end_of_a_batch_is_told_once(site: Site, status: str) -> None:
    endpoint = site.endpoint()
    batch_id = end_batch(site.server, status)
    received = site.receiver.take()
    event = site.unwrap(received, endpoint.signing_secret)
    assert (event.type, event.data.id, event.object) == (f"batch.{status}", batch_id, "event")
    assert event.id.startswith("evt_")
    batch = site.server.batch(batch_id)
    assert event.created_at == batch[f"{status}_at"]
    delivery = await_delivery(site.server, endpoint.id, "delivered")
    assert delivery["id"] == received.headers["webhook-id"]
    assert (delivery["batch_id"], delivery["event_type"]) == (batch_id, f"batch.{status}")
    assert (delivery["attempts"], delivery["last_status_code"], delivery["last_error"]) == (1, 200, None)
    assert site.receiver.waiting() == 0


def test_only_what_was_asked_for_is_told(site: Site) -> None:
    completed, failed = site.endpoint("batch.completed"), site.endpoint("batch.failed")
    end_batch(site.server, "failed")
    end_batch(site.server, "completed")
    assert site.unwrap(site.receiver.take(), failed.signing_secret).type == "batch.failed"
    assert site.unwrap(site.receiver.take(), completed.signing_secret).type == "batch.completed"
    await_delivery(site.server, completed.id, "delivered")
    assert site.receiver.waiting() == 0


def test_a_wrong_secret_does_not_verify(site: Site) -> None:
    site.endpoint()
    other = site.endpoint("batch.expired")
    end_batch(site.server, "failed")
    with pytest.raises(openai.InvalidWebhookSignatureError):
        site.unwrap(site.receiver.take(), other.signing_secret)


def test_a_killed_server_delivers_what_was_pending_when_it_starts_again(
    tmp_path: Path, engine: ScriptedProcess, receiver: Receiver
) -> None:
    receiver.will_answer(Answer(500))
    with start(tmp_path, engine) as server, client_of(server) as client:
        endpoint = Site(server, client, receiver).endpoint()
        batch_id = end_batch(server, "failed")
        first = receiver.take()
        server.kill()
    with start(tmp_path, engine) as server, client_of(server) as client:
        second = receiver.take()
        event = Site(server, client, receiver).unwrap(second, endpoint.signing_secret)
        assert event.data.id == batch_id
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        await_delivery(server, endpoint.id, "delivered")
        assert server.terminate() == 0


def test_a_stopping_server_does_not_wait_for_receivers(
    tmp_path: Path, engine: ScriptedProcess, receiver: Receiver
) -> None:
    receiver.will_answer(Answer(200, (("x-more", "x" * 70_000),) * 2))  # more headers than an answer may have
    with start(tmp_path, engine) as server, client_of(server) as client:
        endpoint = Site(server, client, receiver).endpoint()
        end_batch(server, "failed")
        receiver.take()
        await_delivery(server, endpoint.id, "pending")
        assert server.terminate(10) == 0


def test_redirects_and_refusals_show_in_the_log(site: Site) -> None:
    endpoint = site.endpoint()
    site.receiver.will_answer(Answer(302, (("location", site.receiver.url + "/elsewhere"),)))
    end_batch(site.server, "failed")
    site.receiver.take()
    deadline = time.monotonic() + 30
    delivery = await_delivery(site.server, endpoint.id, "pending")
    while not delivery["attempts"] and time.monotonic() < deadline:
        delivery = await_delivery(site.server, endpoint.id, "pending")
    assert delivery["last_status_code"] == 302
    assert "redirects are not followed" in delivery["last_error"]
    assert delivery["next_attempt_at"] > delivery["created_at"]


def test_410_disables_an_endpoint(site: Site) -> None:
    endpoint = site.endpoint()
    site.receiver.will_answer(Answer(410))
    end_batch(site.server, "failed")
    assert await_delivery(site.server, endpoint.id, "failed")["last_status_code"] == 410
    path = f"/v1/webhook_endpoints/{endpoint.id}"
    assert site.server.http.get(path).json()["disabled_at"] is not None
    assert site.server.http.post(path, json={"url": site.receiver.url}).json()["disabled_at"] is None


def test_both_secrets_sign_while_one_is_rotated_out(site: Site) -> None:
    endpoint = site.endpoint()
    rotated = site.client.webhooks.rotate_secret(endpoint.id, keep_old_secret_active_for_24_hours=True)
    assert rotated.signing_secret != endpoint.signing_secret
    end_batch(site.server, "failed")
    received = site.receiver.take()
    for secret in (endpoint.signing_secret, rotated.signing_secret):
        assert site.unwrap(received, secret).type == "batch.failed"
    again = site.client.webhooks.rotate_secret(endpoint.id)
    end_batch(site.server, "failed")
    received = site.receiver.take()
    assert site.unwrap(received, again.signing_secret).type == "batch.failed"
    with pytest.raises(openai.InvalidWebhookSignatureError):
        site.unwrap(received, rotated.signing_secret)


def test_the_official_client_manages_endpoints(site: Site) -> None:
    webhooks = site.client.webhooks
    assert webhooks.event_types.list().data == EVENTS
    created = [webhooks.create(name=f"n{i}", url=site.receiver.url, event_types=["batch.failed"]) for i in range(3)]
    assert created[0].object == "webhook_endpoint"
    assert created[0].created_at == created[0].updated_at
    assert created[0].signing_secret.startswith("whsec_")
    assert str(created[0].signing_secret_hint).startswith("whsec_...")
    kept = webhooks.retrieve(created[0].id)
    assert "signing_secret" not in kept.to_dict()
    assert kept.to_dict() == {k: v for k, v in created[0].to_dict().items() if k != "signing_secret"}
    assert [found.id for found in webhooks.list(limit=2)] == [endpoint.id for endpoint in reversed(created)]
    page = site.server.http.get("/v1/webhook_endpoints?limit=2").json()
    assert (page["first_id"], page["last_id"], page["has_more"]) == (created[2].id, created[1].id, True)
    updated = webhooks.update(created[0].id, name="new", event_types=["batch.expired", "batch.expired"])
    assert (updated.name, updated.event_types, updated.url) == ("new", ["batch.expired"], site.receiver.url)
    deleted = webhooks.delete(created[0].id)
    assert (deleted.id, deleted.object, deleted.deleted) == (created[0].id, "webhook_endpoint.deleted", True)
    with pytest.raises(openai.NotFoundError):
        webhooks.retrieve(created[0].id)


@pytest.mark.parametrize("status", [200, 500])
def test_a_test_event_answers_with_what_the_receiver_said(site: Site, status: int) -> None:
    endpoint = site.endpoint("batch.failed")
    site.receiver.will_answer(Answer(status))
    result = site.client.webhooks.test(endpoint.id, event_type="batch.completed")
    assert (result.object, result.webhook_endpoint_id) == ("webhook_endpoint.test", endpoint.id)
    assert (result.event_type, result.status_code, result.success) == ("batch.completed", status, True)
    event = site.unwrap(site.receiver.take(), endpoint.signing_secret)
    assert event.type == "batch.completed"
    assert site.server.http.get(f"/v1/webhook_endpoints/{endpoint.id}/deliveries").json()["data"] == []


def test_a_test_event_that_reaches_nobody_is_an_error(site: Site) -> None:
    endpoint = site.client.webhooks.create(
        name="nobody", url="https://does-not-exist.invalid/", event_types=["batch.failed"]
    )
    with pytest.raises(openai.BadRequestError) as refused:
        site.client.webhooks.test(endpoint.id, event_type="batch.failed")
    assert refused.value.code == "webhook_test_failed"


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"url": "http://hooks.example/"}, "url", "invalid_value"),
        ({"url": "http://127.0.0.2:9/"}, "url", "invalid_value"),
        ({"url": "https://127.0.0.2/"}, "url", "invalid_value"),
        ({"url": "https://[::ffff:10.0.0.1]/"}, "url", "invalid_value"),
        ({"url": "https://2130706433/"}, "url", "invalid_value"),
        ({"url": 5}, "url", "invalid_type"),
        ({"url": None}, "url", "invalid_type"),
        ({"url": f"https://hooks.example/{'x' * 2048}"}, "url", "string_above_max_length"),
        ({"name": ""}, "name", None),
        ({"name": "x" * 257}, "name", "string_above_max_length"),
        ({"event_types": []}, "event_types", None),
        ({"event_types": ["batch.created"]}, "event_types", "invalid_value"),
        ({"event_types": "batch.failed"}, "event_types", "invalid_type"),
        ({"secret": "x"}, "secret", "unknown_parameter"),
    ],
)
def test_what_cannot_be_is_refused_at_creation_and_update(
    site: Site, change: dict[str, Any], param: str, code: str | None
) -> None:
    valid = {"name": "n", "url": "https://hooks.example/in", "event_types": ["batch.failed"]}
    endpoint_id = site.server.http.post("/v1/webhook_endpoints", json=valid).json()["id"]
    for path in ("/v1/webhook_endpoints", f"/v1/webhook_endpoints/{endpoint_id}"):
        refused = site.server.http.post(path, json=valid | change)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert error["param"] == param, error
        assert code is None or error["code"] == code, error
    kept = site.server.http.get(f"/v1/webhook_endpoints/{endpoint_id}").json()
    assert {name: kept[name] for name in valid} == valid
    for name in valid:
        incomplete = {other: value for other, value in valid.items() if other != name}
        refused = site.server.http.post("/v1/webhook_endpoints", json=incomplete)
        assert refused.json()["error"]["code"] == "missing_required_parameter"


def test_what_does_not_exist_answers_404(site: Site) -> None:
    http, path = site.server.http, "/v1/webhook_endpoints/whe_none"
    answers = [
        http.get(path),
        http.post(path, json={"name": "n"}),
        http.delete(path),
        http.post(f"{path}/rotate_secret"),
        http.post(f"{path}/test", json={"event_type": "batch.failed"}),
        http.get(f"{path}/deliveries"),
        http.get("/v1/webhook_endpoints?after=whe_none"),
    ]
    assert [answer.status_code for answer in answers] == [404] * len(answers)
    assert all(set(answer.json()["error"]) == {"message", "type", "param", "code"} for answer in answers)
