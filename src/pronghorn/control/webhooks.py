"""Brings events to their receivers: takes what is due, sends it signed, and records how that went.

What must survive is in the database; a server that is killed sends again whatever it had not recorded as delivered, and
a receiver tells a repetition by its `webhook-id`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from datetime import UTC, datetime

import httpcore2
import standardwebhooks

import pronghorn
from pronghorn.clock import Clock
from pronghorn.domain.addresses import AllowedHosts, Receiver, Refused, is_public, judge_url
from pronghorn.domain.webhooks import (
    RETRY_DELAYS_S,
    Delivery,
    Event,
    NoReply,
    Reply,
    WebhookEndpoint,
    judge,
)
from pronghorn.errors import StorageError
from pronghorn.storage.webhooks import Due, Webhooks

log = logging.getLogger("pronghorn.webhooks")

# How late a retry may be; the end of a batch does not wait for it.
POLL_S = 2.0
# A receiver has this long in all, as Standard Webhooks advises.
ATTEMPT_S = 20.0
# A host of several addresses must get to the second one within the attempt.
CONNECT_S = 5.0
# Deliveries under way: in all, and to one endpoint, so that one that hangs holds up no other.
DELIVERIES_MAX = 64
DELIVERIES_PER_ENDPOINT_MAX = 4
# So much of an answer's body is read and dropped, for receivers that cannot bear to be cut off.
ANSWER_BYTES_MAX = 64 * 1024
ANSWER_S = 1.0
# A delivery whose end cannot be recorded is not repeated at once.
UNRECORDED_WAIT_S = 60.0

# TimeoutError is an OSError.
_BROKEN = (httpcore2.NetworkError, httpcore2.TimeoutException, httpcore2.ProtocolError, OSError)
_USER_AGENT = f"Pronghorn/{pronghorn.__version__}"
_NOT_PUBLIC = "the URL's host has an address that is not public"

Resolve = Callable[[str, int], Awaitable[list[str]]]


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host, in the order in which to try them; raises OSError when it has none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError as error:
        raise OSError(f"{host} is not a host name") from error
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


def signature(secrets: list[str], webhook_id: str, now: int, body: bytes) -> str:
    """Return the `webhook-signature` of an attempt at `now`: one entry a secret."""
    sent_at = datetime.fromtimestamp(now, UTC)
    return " ".join(standardwebhooks.Webhook(secret).sign(webhook_id, sent_at, body.decode()) for secret in secrets)


class Courier:
    """Delivers events until cancelled; `delays_s` are the waits after the first, second, ... failed attempt."""

    def __init__(
        self,
        webhooks: Webhooks,
        clock: Clock,
        allowed: AllowedHosts,
        *,
        delays_s: tuple[int, ...] = RETRY_DELAYS_S,
        jitter: Callable[[], float] = random.random,
        resolve: Resolve = resolve,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._webhooks = webhooks
        self._clock = clock
        self._allowed = allowed
        self._delays_s = delays_s
        self._jitter = jitter
        # One connection a delivery: receivers are many and far between.
        self._pool = httpcore2.AsyncConnectionPool(
            ssl_context=tls or httpcore2.default_ssl_context(),
            max_connections=None,
            max_keepalive_connections=0,
            network_backend=_PublicNetwork(allowed, resolve),
        )
        self._under_way: dict[str, asyncio.Task[None]] = {}
        self._woken = asyncio.Event()

    def wake(self) -> None:
        """Look for events now rather than at the next poll."""
        self._woken.set()

    async def run(self) -> None:
        """Deliver until cancelled; what is then under way counts as not sent. While the database refuses, wait."""
        refused = False
        try:
            while True:
                self._woken.clear()
                try:
                    await self._start_due()
                    refused = False
                except StorageError as error:
                    if not refused:
                        log.error("webhooks wait: %s", error)
                    refused = True
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(POLL_S):
                        await self._woken.wait()
        finally:
            tasks = list(self._under_way.values())
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._pool.aclose()

    async def send(self, endpoint: WebhookEndpoint, event: Event, webhook_id: str) -> Reply | NoReply:
        """Make one attempt to bring an event to an endpoint, and change nothing by it."""
        receiver = judge_url(endpoint.url, self._allowed)
        if isinstance(receiver, Refused):
            return NoReply(f"the URL {receiver.reason}")
        body = event.body()
        secrets = endpoint.secrets_at(self._clock.now())
        headers = _headers(receiver, secrets, webhook_id, self._clock.wall(), body)
        try:
            async with asyncio.timeout(ATTEMPT_S):
                return await self._post(receiver, headers, body)
        except TimeoutError:
            return NoReply(f"no answer within {ATTEMPT_S:g} s")
        except _BROKEN as error:
            return NoReply(_in_words(error))

    async def _start_due(self) -> None:
        due = await self._webhooks.due(
            self._clock.now(), per_endpoint=DELIVERIES_PER_ENDPOINT_MAX, limit=2 * DELIVERIES_MAX
        )
        for delivery, endpoint in due:
            if delivery.id not in self._under_way and len(self._under_way) < DELIVERIES_MAX:
                task = asyncio.create_task(self._deliver(Due(delivery, endpoint)))
                self._under_way[delivery.id] = task
                task.add_done_callback(functools.partial(self._ended, delivery.id))

    def _ended(self, delivery_id: str, _: asyncio.Task[None]) -> None:
        del self._under_way[delivery_id]
        self.wake()

    async def _deliver(self, due: Due) -> None:
        delivery, endpoint = due
        try:
            reply = await self.send(endpoint, delivery.event, delivery.id)
            await self._record(delivery, reply)
        except Exception:
            log.exception("the delivery %s to %s is tried again", delivery.id, endpoint.id)
            await asyncio.sleep(UNRECORDED_WAIT_S)

    async def _record(self, delivery: Delivery, reply: Reply | NoReply) -> None:
        now = self._clock.now()
        verdict = judge(reply, delivery, now, self._jitter(), self._delays_s)
        recorded = await self._webhooks.record(delivery, verdict, now)
        if recorded and verdict.error is not None:
            log.info("%s to %s: %s; now %s", delivery.id, delivery.endpoint_id, verdict.error, verdict.state)

    async def _post(self, receiver: Receiver, headers: list[tuple[str, str]], body: bytes) -> Reply:
        url = httpcore2.URL(scheme=receiver.scheme, host=receiver.host, port=receiver.port, target=receiver.path)
        async with self._pool.stream("POST", url, headers=headers, content=body) as answer:
            await _drain(answer)
            told = {name.lower(): value for name, value in answer.headers}
            return Reply(answer.status, told.get(b"retry-after"), told.get(b"date"))


class _PublicNetwork(httpcore2.AsyncNetworkBackend):
    """Connects to public addresses only: a name is resolved once, and what was judged is what is connected to.

    TLS and the Host header come later and from the URL, so they keep the name.
    """

    def __init__(self, allowed: AllowedHosts, resolve: Resolve) -> None:
        self._allowed = allowed
        self._resolve = resolve
        self._network = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        addresses = await self._resolve(host, port)
        if (host, port) not in self._allowed and not all(map(is_public, addresses)):
            log.warning("nothing is sent to %s, which is %s", host, ", ".join(addresses))
            raise httpcore2.ConnectError(_NOT_PUBLIC)
        failure: Exception = httpcore2.ConnectError("the URL's host has no address")
        for address in addresses:
            try:
                return await self._network.connect_tcp(address, port, CONNECT_S)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure

    async def connect_unix_socket(
        self,
        path: str,
        timeout: float | None = None,  # noqa: ASYNC109 - the library's signature
        socket_options: Iterable[httpcore2.SOCKET_OPTION] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("webhooks go over TCP")

    async def sleep(self, seconds: float) -> None:
        await self._network.sleep(seconds)


def _headers(receiver: Receiver, secrets: list[str], webhook_id: str, now: int, body: bytes) -> list[tuple[str, str]]:
    return [
        ("host", receiver.authority),
        ("content-type", "application/json"),
        ("content-length", str(len(body))),
        ("user-agent", _USER_AGENT),
        ("webhook-id", webhook_id),
        ("webhook-timestamp", str(now)),
        ("webhook-signature", signature(secrets, webhook_id, now, body)),
    ]


async def _drain(answer: httpcore2.Response) -> None:
    """Read an answer's body up to the limits; one that breaks off or never ends does not spoil the status before it."""
    read = 0
    with contextlib.suppress(*_BROKEN):
        async with asyncio.timeout(ANSWER_S), contextlib.aclosing(answer.aiter_stream()) as body:
            async for chunk in body:
                read += len(chunk)
                if read > ANSWER_BYTES_MAX:
                    return


def _in_words(error: Exception) -> str:
    text = str(error)
    if isinstance(error, httpcore2.ConnectTimeout):
        text = f"no connection within {CONNECT_S:g} s"
    return text[:300] or type(error).__name__
