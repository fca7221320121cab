"""Webhooks over every database: an event is recorded with its batch's end, and brought to its receivers."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
import time
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import standardwebhooks

from pronghorn.control.webhooks import ANSWER_BYTES_MAX, Courier, resolve, signature
from pronghorn.domain.addresses import AllowedHosts
from pronghorn.domain.model import Batch, BatchStatus, Closing, Job
from pronghorn.domain.webhooks import (
    Delivery,
    DeliveryState,
    Event,
    EventType,
    NoReply,
    Reply,
    Verdict,
    WebhookEndpoint,
)
from pronghorn.errors import Fenced, StorageError
from pronghorn.storage.database import Database
from pronghorn.storage.metadata import Metadata
from pronghorn.storage.webhooks import ENDPOINTS_PER_ACCOUNT_MAX, Webhooks
from tests.receiver import CERTIFICATE, Answer, Received, Receiver
from tests.storing import SetClock, new_batch

S = BatchStatus
OURS, THEIRS = "org-ours", "org-theirs"
NOW = 1_750_000_000
SECRETS = ["whsec_" + letter * 43 + "=" for letter in "AQg"]
TO_STATUS = {
    S.FAILED: [S.FAILED],
    S.EXPIRED: [S.EXPIRED],
    S.CANCELLED: [S.CANCELLING, S.CANCELLED],
    S.COMPLETED: [S.IN_PROGRESS, S.FINALIZING, S.COMPLETED],
}


@pytest.fixture
async def metadata(database: Database) -> Metadata:
    memory = Metadata(database)
    for account in (OURS, THEIRS):
        await memory.add_account(account, account, 1)
        await memory.add_job(Job(f"job-{account}", account, "default", 1, 1))
    return memory


@pytest.fixture
def webhooks(database: Database, metadata: Metadata) -> Webhooks:
    return Webhooks(database)


@pytest.fixture
def clock() -> SetClock:
    return SetClock(NOW)


def endpoint(number: int = 1, account: str = OURS, **fields: Any) -> WebhookEndpoint:
    values = {
        "id": f"whe_{number}",
        "account_id": account,
        "name": f"endpoint {number}",
        "url": "https://hooks.example/in",
        "event_types": tuple(EventType),
        "secret": SECRETS[0],
        "created_at": NOW,
        "updated_at": NOW,
    }
    return WebhookEndpoint(**values | fields)


async def end_batch(metadata: Metadata, number: int = 1, status: BatchStatus = S.FAILED, account: str = OURS) -> str:
    """Bring a new batch to its end, and return its id."""
    new = new_batch(f"batch_{account}_{number}", NOW, account_id=account, job_id=f"job-{account}")
    batch = await metadata.add_batch(new)
    for step in TO_STATUS[status]:
        closing = Closing.CANCELLED if step is S.CANCELLING else None
        batch = await metadata.advance(batch, step, NOW, closing=closing)
    return batch.id


async def deliveries(webhooks: Webhooks, endpoint_id: str = "whe_1") -> list[Delivery]:
    page = await webhooks.list_deliveries(endpoint_id, limit=100)
    assert page is not None
    return page.items


async def due(webhooks: Webhooks, now: int = NOW, per_endpoint: int = 100, limit: int = 100) -> list[Delivery]:
    return [found.delivery for found in await webhooks.due(now, per_endpoint=per_endpoint, limit=limit)]


def replied(found: Reply | NoReply) -> int | NoReply:
    """Return the status of a reply, or why there was none."""
    return found.status if isinstance(found, Reply) else found


async def test_deliveries_that_ended_long_ago_are_forgotten(metadata: Metadata, webhooks: Webhooks) -> None:
    await webhooks.add_endpoint(endpoint())
    for number in (1, 2):
        await end_batch(metadata, number)
    delivered, pending = await due(webhooks)
    await webhooks.record(delivered, Verdict(DeliveryState.DELIVERED), NOW)
    assert await webhooks.forget_ended(NOW - 1) == 0
    assert await webhooks.forget_ended(NOW) == 1
    assert await deliveries(webhooks) == [pending]


class TestEndpoints:
    async def test_one_is_kept_as_it_was_given(self, webhooks: Webhooks) -> None:
        assert await webhooks.add_endpoint(endpoint(event_types=(EventType.BATCH_FAILED, EventType.BATCH_EXPIRED)))
        kept = await webhooks.endpoint("whe_1", OURS)
        assert kept == endpoint(event_types=(EventType.BATCH_FAILED, EventType.BATCH_EXPIRED))

    async def test_another_accounts_is_as_good_as_none(self, webhooks: Webhooks) -> None:
        await webhooks.add_endpoint(endpoint())
        assert await webhooks.endpoint("whe_1", THEIRS) is None
        assert await webhooks.update_endpoint("whe_1", THEIRS, NOW, name="x") is None
        assert await webhooks.rotate_secret("whe_1", THEIRS, SECRETS[1], NOW, keep_old_s=0) is None
        assert not await webhooks.delete_endpoint("whe_1", THEIRS)
        assert await webhooks.list_endpoints(THEIRS, limit=1, after="whe_1") is None
        listed = await webhooks.list_endpoints(THEIRS, limit=1)
        assert listed is not None
        assert listed.items == []
        assert await webhooks.endpoint("whe_1", OURS) == endpoint()

    async def test_a_listing_is_paged_newest_first(self, webhooks: Webhooks) -> None:
        for number in range(5):
            await webhooks.add_endpoint(endpoint(number))
        seen, after, more = [], None, True
        while more:
            page = await webhooks.list_endpoints(OURS, limit=2, after=after)
            assert page is not None
            seen += [found.id for found in page.items]
            after, more = seen[-1], page.has_more
        assert seen == ["whe_4", "whe_3", "whe_2", "whe_1", "whe_0"]
        assert await webhooks.list_endpoints(OURS, limit=2, after="whe_9") is None

    async def test_there_is_a_limit_an_account(self, webhooks: Webhooks) -> None:
        for number in range(ENDPOINTS_PER_ACCOUNT_MAX):
            assert await webhooks.add_endpoint(endpoint(number))
        assert not await webhooks.add_endpoint(endpoint(-1))
        assert await webhooks.add_endpoint(endpoint(-2, THEIRS))

    async def test_an_update_changes_what_it_names(self, webhooks: Webhooks) -> None:
        await webhooks.add_endpoint(endpoint())
        only = (EventType.BATCH_EXPIRED,)
        updated = await webhooks.update_endpoint("whe_1", OURS, NOW + 5, event_types=only)
        assert updated == endpoint(event_types=only, updated_at=NOW + 5)
        assert await webhooks.endpoint("whe_1", OURS) == updated

    async def test_an_update_that_changes_nothing_leaves_no_trace(self, webhooks: Webhooks) -> None:
        await webhooks.add_endpoint(endpoint())
        assert await webhooks.update_endpoint("whe_1", OURS, NOW + 5, name="endpoint 1") == endpoint()

    async def test_rotation_drops_the_old_secret_or_keeps_the_last_one(self, webhooks: Webhooks) -> None:
        await webhooks.add_endpoint(endpoint())
        for secret, keep_old_s in ((SECRETS[1], 60), (SECRETS[2], 60)):
            rotated = await webhooks.rotate_secret("whe_1", OURS, secret, NOW, keep_old_s=keep_old_s)
            assert rotated is not None
        assert rotated.secrets_at(NOW + 59) == [SECRETS[2], SECRETS[1]]
        assert rotated.secrets_at(NOW + 60) == [SECRETS[2]]
        rotated = await webhooks.rotate_secret("whe_1", OURS, SECRETS[0], NOW, keep_old_s=0)
        assert rotated is not None
        assert rotated.secrets_at(NOW) == [SECRETS[0]]

    async def test_a_deleted_one_takes_its_deliveries_along(self, webhooks: Webhooks, metadata: Metadata) -> None:
        await webhooks.add_endpoint(endpoint())
        await end_batch(metadata)
        assert await webhooks.delete_endpoint("whe_1", OURS)
        assert await webhooks.endpoint("whe_1", OURS) is None
        assert await due(webhooks) == []
        assert not await webhooks.delete_endpoint("whe_1", OURS)


class TestEvents:
    @pytest.mark.parametrize("status", list(TO_STATUS))
    async def test_each_end_of_a_batch_is_one_event(
        self, webhooks: Webhooks, metadata: Metadata, status: BatchStatus
    ) -> None:
        await webhooks.add_endpoint(endpoint())
        batch_id = await end_batch(metadata, status=status)
        (delivery,) = await deliveries(webhooks)
        assert delivery.event.type == f"batch.{status}"
        assert (delivery.event.batch_id, delivery.event.created_at) == (batch_id, NOW)
        assert (delivery.state, delivery.attempts, delivery.next_attempt_at) == (DeliveryState.PENDING, 0, NOW)
        assert delivery.id.startswith("wh_")
        assert delivery.event.id.startswith("evt_")

    async def test_it_goes_to_those_of_the_account_who_asked_for_it(
        self, webhooks: Webhooks, metadata: Metadata
    ) -> None:
        await webhooks.add_endpoint(endpoint(1))
        await webhooks.add_endpoint(endpoint(2))
        await webhooks.add_endpoint(endpoint(3, event_types=(EventType.BATCH_COMPLETED,)))
        await webhooks.add_endpoint(endpoint(4, disabled_at=NOW))
        await webhooks.add_endpoint(endpoint(5, THEIRS))
        await end_batch(metadata, status=S.FAILED)
        told = await due(webhooks)
        assert [delivery.endpoint_id for delivery in told] == ["whe_1", "whe_2"]
        assert len({delivery.event.id for delivery in told}) == 1
        assert len({delivery.id for delivery in told}) == 2

    async def test_an_end_that_is_refused_is_no_event(self, webhooks: Webhooks, metadata: Metadata) -> None:
        await webhooks.add_endpoint(endpoint())
        batch = await metadata.batch(await end_batch(metadata), OURS)
        assert batch is not None
        stale = {"status": S.VALIDATING}
        with pytest.raises(Fenced):
            await metadata.advance(
                Batch(**{n: getattr(batch, n) for n in Batch.__struct_fields__} | stale), S.FAILED, 1
            )
        assert len(await deliveries(webhooks)) == 1


class TestDue:
    async def test_an_endpoint_with_many_leaves_room_for_others(self, webhooks: Webhooks, metadata: Metadata) -> None:
        await webhooks.add_endpoint(endpoint(1))
        for number in range(5):
            await end_batch(metadata, number)
        await webhooks.add_endpoint(endpoint(2))
        await end_batch(metadata, 5)
        found = await due(webhooks, per_endpoint=2)
        assert sorted(delivery.endpoint_id for delivery in found) == ["whe_1", "whe_1", "whe_2"]
        assert len(await due(webhooks, limit=4)) == 4

    async def test_nothing_is_due_before_its_time_or_while_its_endpoint_is_held(
        self, webhooks: Webhooks, metadata: Metadata
    ) -> None:
        await webhooks.add_endpoint(endpoint())
        await end_batch(metadata, 1)
        await end_batch(metadata, 2)
        assert await due(webhooks, NOW - 1) == []
        first, second = await due(webhooks)
        held = Verdict(DeliveryState.PENDING, 429, "slow", next_attempt_at=NOW + 60, held_until=NOW + 60)
        assert await webhooks.record(first, held, NOW)
        assert await due(webhooks, NOW + 59) == []
        assert [delivery.id for delivery in await due(webhooks, NOW + 60)] == [second.id, first.id]

    async def test_an_attempt_is_recorded_once(self, webhooks: Webhooks, metadata: Metadata) -> None:
        await webhooks.add_endpoint(endpoint())
        await end_batch(metadata)
        (delivery,) = await due(webhooks)
        again = Verdict(DeliveryState.PENDING, 500, "failed", next_attempt_at=NOW + 5)
        assert await webhooks.record(delivery, again, NOW)
        assert not await webhooks.record(delivery, Verdict(DeliveryState.DELIVERED, 200), NOW)
        (delivery,) = await deliveries(webhooks)
        assert (delivery.state, delivery.attempts, delivery.last_status) == (DeliveryState.PENDING, 1, 500)
        assert await webhooks.record(delivery, Verdict(DeliveryState.DELIVERED, 200), NOW + 9)
        (delivery,) = await deliveries(webhooks)
        assert (delivery.attempts, delivery.delivered_at, delivery.last_error) == (2, NOW + 9, None)
        assert delivery.next_attempt_at is None

    async def test_the_log_is_paged_newest_first(self, webhooks: Webhooks, metadata: Metadata) -> None:
        await webhooks.add_endpoint(endpoint())
        ended = [await end_batch(metadata, number) for number in range(3)]
        first = await webhooks.list_deliveries("whe_1", limit=2)
        assert first is not None
        rest = await webhooks.list_deliveries("whe_1", limit=2, after=first.items[-1].id)
        assert rest is not None
        assert [found.event.batch_id for found in first.items + rest.items] == ended[::-1]
        assert (first.has_more, rest.has_more) == (True, False)
        assert await webhooks.list_deliveries("whe_1", limit=2, after="wh_x") is None


class Addresses:
    """A resolver that answers from a list and counts how often it is asked."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)
        self.asked = 0

    async def __call__(self, host: str, port: int) -> list[str]:
        self.asked += 1
        return self.addresses


def make_courier(
    webhooks: Webhooks, clock: SetClock, allowed: Sequence[str] = ("127.0.0.1",), **options: Any
) -> Courier:
    return Courier(webhooks, clock, AllowedHosts(allowed), jitter=lambda: 0.5, **options)


@contextlib.asynccontextmanager
async def delivering(courier: Courier) -> AsyncIterator[None]:
    task = asyncio.create_task(courier.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def take(receiver: Receiver) -> Received:
    return await asyncio.to_thread(receiver.take)


async def recorded(webhooks: Webhooks, until: Callable[[Delivery], bool], endpoint_id: str = "whe_1") -> Delivery:
    """Return the newest delivery once `until` holds."""
    async with asyncio.timeout(30):
        while not until((await deliveries(webhooks, endpoint_id))[0]):
            pass
    return (await deliveries(webhooks, endpoint_id))[0]


def ended(delivery: Delivery) -> bool:
    return delivery.state is not DeliveryState.PENDING


async def send(courier: Courier, url: str) -> Reply | NoReply:
    event = Event("evt_1", EventType.BATCH_COMPLETED, NOW, "batch_1")
    return await courier.send(endpoint(url=url), event, "wh_1")


class TestCourier:
    async def test_an_event_arrives_signed(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url=receiver.url + "?a=b"))
        async with delivering(courier := make_courier(webhooks, clock)):
            await end_batch(metadata)
            courier.wake()
            got = await take(receiver)
            delivery = await recorded(webhooks, ended)
        assert got.path == "/in?a=b"
        assert got.body == delivery.event.body()
        assert got.headers["content-type"] == "application/json"
        assert got.headers["user-agent"].startswith("Pronghorn/")
        assert got.headers["host"] == f"127.0.0.1:{receiver.port}"
        assert got.headers["webhook-id"] == delivery.id != delivery.event.id
        assert got.headers["webhook-timestamp"] == str(NOW)
        assert got.headers["webhook-signature"] == signature([SECRETS[0]], delivery.id, NOW, got.body)
        assert (delivery.state, delivery.attempts, delivery.last_status) == (DeliveryState.DELIVERED, 1, 200)

    async def test_a_failed_attempt_is_repeated_under_the_same_id(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url=receiver.url))
        await end_batch(metadata)
        receiver.will_answer(Answer(500), Answer(200))
        async with delivering(courier := make_courier(webhooks, clock, delays_s=(5,))):
            first = await take(receiver)
            failed = await recorded(webhooks, lambda delivery: delivery.attempts == 1)
            assert failed.next_attempt_at == NOW + 5
            assert failed.last_error == "the receiver answered 500"
            clock.time += 5
            courier.wake()
            second = await take(receiver)
            delivery = await recorded(webhooks, ended)
        assert (delivery.state, delivery.attempts) == (DeliveryState.DELIVERED, 2)
        assert first.headers["webhook-id"] == second.headers["webhook-id"]
        assert first.body == second.body
        assert second.headers["webhook-timestamp"] == str(NOW + 5)
        assert second.headers["webhook-signature"] != first.headers["webhook-signature"]

    async def test_it_is_given_up_after_the_last_retry(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url=receiver.url))
        await end_batch(metadata)
        receiver.will_answer(Answer(500))
        async with delivering(make_courier(webhooks, clock, delays_s=())):
            delivery = await recorded(webhooks, ended)
        assert (delivery.state, delivery.last_status) == (DeliveryState.FAILED, 500)

    async def test_a_redirect_is_a_failure(self, webhooks: Webhooks, clock: SetClock, receiver: Receiver) -> None:
        receiver.will_answer(Answer(307, (("location", receiver.url + "/elsewhere"),)))
        assert replied(await send(make_courier(webhooks, clock), receiver.url)) == 307
        assert receiver.take().path == "/in"
        assert receiver.waiting() == 0

    async def test_410_disables_the_endpoint_until_it_gets_a_url(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url=receiver.url, held_until=NOW + 1))
        for number in range(3):
            await end_batch(metadata, number)
        receiver.will_answer(Answer(410), Answer(410), Answer(410))
        clock.time += 1
        async with delivering(make_courier(webhooks, clock)):
            await recorded(webhooks, ended)
        assert {delivery.state for delivery in await deliveries(webhooks)} == {DeliveryState.FAILED}
        disabled = await webhooks.endpoint("whe_1", OURS)
        assert disabled is not None
        assert disabled.disabled_at == clock.time
        await end_batch(metadata, 4)
        assert len(await deliveries(webhooks)) == 3
        enabled = await webhooks.update_endpoint("whe_1", OURS, clock.time, url=receiver.url)
        assert enabled is not None
        assert enabled.disabled_at is None
        await end_batch(metadata, 5)
        assert len(await deliveries(webhooks)) == 4

    async def test_an_overloaded_endpoint_is_left_alone(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url=receiver.url))
        await end_batch(metadata)
        receiver.will_answer(Answer(429, (("Retry-After", "90"),)))
        async with delivering(make_courier(webhooks, clock)):
            delivery = await recorded(webhooks, lambda delivery: delivery.attempts == 1)
        held = await webhooks.endpoint("whe_1", OURS)
        assert held is not None
        assert held.held_until == delivery.next_attempt_at == NOW + 90

    async def test_what_a_stopped_courier_had_under_way_the_next_one_sends(
        self, webhooks: Webhooks, metadata: Metadata, clock: SetClock, receiver: Receiver
    ) -> None:
        await webhooks.add_endpoint(endpoint(url="http://hooks.example:9/"))
        await end_batch(metadata)
        asked = asyncio.Event()

        async def hang(host: str, port: int) -> list[str]:
            asked.set()
            return await asyncio.get_running_loop().create_future()

        async with delivering(make_courier(webhooks, clock, ["hooks.example"], resolve=hang)):
            await asked.wait()
        (delivery,) = await deliveries(webhooks)
        assert (delivery.state, delivery.attempts) == (DeliveryState.PENDING, 0)
        await webhooks.update_endpoint("whe_1", OURS, NOW, url=receiver.url)
        async with delivering(make_courier(webhooks, clock)):
            assert (await take(receiver)).headers["webhook-id"] == delivery.id

    @pytest.mark.parametrize("body_bytes", [-1, 1, ANSWER_BYTES_MAX, 100 * ANSWER_BYTES_MAX])
    async def test_a_body_of_any_size_does_not_matter(
        self, webhooks: Webhooks, clock: SetClock, receiver: Receiver, body_bytes: int
    ) -> None:
        receiver.will_answer(Answer(202, body_bytes=body_bytes))
        assert replied(await send(make_courier(webhooks, clock), receiver.url)) == 202

    async def test_a_body_that_stalls_does_not_spoil_the_status(self, webhooks: Webhooks, clock: SetClock) -> None:
        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx")
            await reader.read()
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            assert replied(await send(make_courier(webhooks, clock), f"http://127.0.0.1:{port}/")) == 200

    async def test_a_receiver_that_is_not_there_or_speaks_no_http(self, webhooks: Webhooks, clock: SetClock) -> None:
        async def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(b"SSH-2.0-OpenSSH_9.9\r\n")
            writer.close()

        async with await asyncio.start_server(answer, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            url = f"http://127.0.0.1:{port}/"
            assert isinstance(await send(make_courier(webhooks, clock), url), NoReply)
        assert isinstance(await send(make_courier(webhooks, clock), url), NoReply)


class TestAddresses:
    @pytest.mark.parametrize(
        "addresses",
        [
            ["127.0.0.1"],
            ["10.1.2.3"],
            ["169.254.169.254"],
            ["::1"],
            ["::ffff:127.0.0.1"],
            ["64:ff9b::7f00:1"],
            ["fe80::1%2"],
            ["8.8.8.8", "127.0.0.1"],
        ],
    )
    async def test_a_name_of_a_private_address_is_refused(
        self, webhooks: Webhooks, clock: SetClock, receiver: Receiver, addresses: list[str]
    ) -> None:
        resolver = Addresses(*addresses)
        courier = make_courier(webhooks, clock, ["elsewhere.example"], resolve=resolver)
        reply = await send(courier, f"https://hooks.example:{receiver.port}/")
        assert reply == NoReply("the URL's host has an address that is not public")
        assert resolver.asked == 1
        assert receiver.waiting() == 0

    async def test_a_url_that_was_allowed_once_is_judged_again(
        self, webhooks: Webhooks, clock: SetClock, receiver: Receiver
    ) -> None:
        reply = await send(make_courier(webhooks, clock, []), receiver.url)
        assert reply == NoReply("the URL must start with https://")
        reply = await send(make_courier(webhooks, clock, []), receiver.url.replace("http", "https"))
        assert reply == NoReply("the URL names an address that is not public")
        assert receiver.waiting() == 0

    async def test_the_address_is_pinned_and_the_name_stays_in_tls_and_host(
        self, webhooks: Webhooks, clock: SetClock
    ) -> None:
        resolver = Addresses("127.0.0.1")
        tls = ssl.create_default_context(cafile=str(CERTIFICATE))
        with Receiver(tls=True) as receiver:
            courier = make_courier(webhooks, clock, ["hooks.example"], resolve=resolver, tls=tls)
            assert replied(await send(courier, f"https://hooks.example:{receiver.port}/in")) == 200
            assert receiver.take().headers["host"] == f"hooks.example:{receiver.port}"
            assert receiver.names == ["hooks.example"]
        assert resolver.asked == 1

    async def test_a_certificate_of_another_name_is_refused(self, webhooks: Webhooks, clock: SetClock) -> None:
        tls = ssl.create_default_context(cafile=str(CERTIFICATE))
        with Receiver(tls=True) as receiver:
            courier = make_courier(webhooks, clock, ["a.example"], resolve=Addresses("127.0.0.1"), tls=tls)
            reply = await send(courier, f"https://a.example:{receiver.port}/in")
            assert isinstance(reply, NoReply)
            assert "certificate" in reply.reason
            assert receiver.waiting() == 0

    async def test_a_host_is_tried_at_each_of_its_addresses(
        self, webhooks: Webhooks, clock: SetClock, receiver: Receiver
    ) -> None:
        resolver = Addresses("::1", "127.0.0.1")
        courier = make_courier(webhooks, clock, ["hooks.example"], resolve=resolver)
        assert replied(await send(courier, f"http://hooks.example:{receiver.port}/in")) == 200

    async def test_names_are_resolved_by_the_system(self) -> None:
        assert "127.0.0.1" in await resolve("localhost", 443)
        assert await resolve("127.1", 443) == ["127.0.0.1"]
        for name in ("a" * 64 + ".example", "does-not-exist.invalid"):
            with pytest.raises(OSError, match=r"."):
                await resolve(name, 443)


class TestSignature:
    def test_the_published_vector(self) -> None:
        body = (
            b'{"id": "evt_685c059ae3a481909bdc86819b066fb6", "object": "event", "created_at": 1750861210, '
            b'"type": "response.completed", "data": {"id": "resp_123"}}'
        )
        secret = "whsec_RdvaYFYUXuIFuEbvZHwMfYFhUf7aMYjYcmM24+Aj40c="
        signed = signature([secret], "wh_685c059ae39c8190af8c71ed1022a24d", 1750861210, body)
        assert signed == "v1,gUAg4R2hWouRZqRQG4uJypNS8YK885G838+EHb4nKBY="

    def test_each_secret_signs(self) -> None:
        now = int(time.time())
        signed = signature(SECRETS[:2], "wh_1", now, b"{}")
        headers = {"webhook-id": "wh_1", "webhook-timestamp": str(now), "webhook-signature": signed}
        for secret in SECRETS[:2]:
            assert standardwebhooks.Webhook(secret).verify(b"{}", headers) == {}
        with pytest.raises(standardwebhooks.WebhookVerificationError):
            standardwebhooks.Webhook(SECRETS[2]).verify(b"{}", headers)


async def test_a_database_that_refuses_is_waited_for(
    metadata: Metadata,
    webhooks: Webhooks,
    clock: SetClock,
    receiver: Receiver,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("pronghorn.control.webhooks.POLL_S", 0.01)
    refusals = [StorageError("the database refuses: locked")] * 3
    read = webhooks.due

    async def due(*arguments: Any, **options: Any) -> list[Any]:
        if refusals:
            raise refusals.pop()
        return await read(*arguments, **options)

    monkeypatch.setattr(webhooks, "due", due)
    await webhooks.add_endpoint(endpoint(url=receiver.url))
    await end_batch(metadata)
    async with delivering(make_courier(webhooks, clock)):
        await take(receiver)
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == [
        "webhooks wait: the database refuses: locked"
    ]
