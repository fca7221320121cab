"""Webhooks as values: what is told to whom, and what becomes of a delivery after each attempt."""

from __future__ import annotations

import enum
import math

import msgspec

from pronghorn.domain.model import BatchStatus
from pronghorn.domain.retry_after import retry_after

# Waits after the first, second, ... failed attempt, in seconds: the example schedule of Standard Webhooks.
RETRY_DELAYS_S = (5, 300, 1800, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600, 20 * 3600, 24 * 3600)
# No attempt is planned for later than this after the event; the wait that would go beyond it is cut.
RETRY_S_MAX = 72 * 3600
# Deliveries that failed together must not come back together.
JITTER = 0.2
# What a receiver gets that is overloaded (or whose proxy says so) and names no time of its own.
SLOW_DOWN_S = 60
# A receiver may ask for a pause, not for silence.
SLOW_DOWN_S_MAX = 24 * 3600

_OVERLOADED = frozenset({429, 502, 504})
_GONE = 410


class EventType(enum.StrEnum):
    """What an endpoint can be told: the four ends of a batch."""

    BATCH_COMPLETED = "batch.completed"
    BATCH_FAILED = "batch.failed"
    BATCH_EXPIRED = "batch.expired"
    BATCH_CANCELLED = "batch.cancelled"


_EVENT_OF = {
    BatchStatus.COMPLETED: EventType.BATCH_COMPLETED,
    BatchStatus.FAILED: EventType.BATCH_FAILED,
    BatchStatus.EXPIRED: EventType.BATCH_EXPIRED,
    BatchStatus.CANCELLED: EventType.BATCH_CANCELLED,
}


class DeliveryState(enum.StrEnum):
    """Where a delivery is: to be sent (again), acknowledged, given up. The courier moves it, only from pending."""

    PENDING = "pending"
    DELIVERED = "delivered"
    FAILED = "failed"


class WebhookEndpoint(msgspec.Struct, frozen=True):
    """Where an account's events go; times are Unix seconds.

    `old_secret` signs beside `secret` until `old_secret_until`. Nothing is sent before `held_until`, which a receiver
    asks for when it is overloaded, nor once it is disabled.
    """

    id: str
    account_id: str
    name: str
    url: str
    event_types: tuple[EventType, ...]
    secret: str
    created_at: int
    updated_at: int
    old_secret: str | None = None
    old_secret_until: int | None = None
    held_until: int | None = None
    disabled_at: int | None = None

    def secrets_at(self, now: int) -> list[str]:
        """Return the secrets that sign at `now`, the newest first."""
        old = self.old_secret if self.old_secret_until is not None and now < self.old_secret_until else None
        return [self.secret] if old is None else [self.secret, old]


class Event(msgspec.Struct, frozen=True):
    """Something that happened to a batch: one for all endpoints that are told; `created_at` is Unix seconds."""

    id: str
    type: EventType
    created_at: int
    batch_id: str

    def body(self) -> bytes:
        """Return the event as it is sent, the same bytes at every attempt."""
        event = {"id": self.id, "object": "event", "created_at": self.created_at, "type": self.type.value}
        return msgspec.json.encode(event | {"data": {"id": self.batch_id}})


class Delivery(msgspec.Struct, frozen=True):
    """One event on its way to one endpoint, and how that has gone; times are Unix seconds.

    `id` is the receiver's `webhook-id`. `attempts` counts those that have ended.
    """

    id: str
    account_id: str
    endpoint_id: str
    event: Event
    state: DeliveryState
    attempts: int
    next_attempt_at: int | None
    last_status: int | None = None
    last_error: str | None = None
    delivered_at: int | None = None


class Reply(msgspec.Struct, frozen=True):
    """What a receiver answered: of its headers Retry-After and Date, of its body nothing."""

    status: int
    retry_after: bytes | None = None
    date: bytes | None = None

    def wait_s(self, now: int) -> float | None:
        """Return how long it asks to be left alone; a date is read against its own clock, or else against `now`."""
        told = {b"retry-after": self.retry_after, b"date": self.date}
        return retry_after({name: value for name, value in told.items() if value is not None}, now)


class NoReply(msgspec.Struct, frozen=True):
    """Why there was no answer, in words for the endpoint's owner."""

    reason: str


class Verdict(msgspec.Struct, frozen=True):
    """What an attempt changes: the delivery's state, and when its endpoint is sent to again, if ever."""

    state: DeliveryState
    status: int | None = None
    error: str | None = None
    next_attempt_at: int | None = None
    held_until: int | None = None
    disable: bool = False


def event_of(status: BatchStatus) -> EventType | None:
    """Return what is told when a batch enters `status`, or None when nothing is."""
    return _EVENT_OF.get(status)


def judge(
    reply: Reply | NoReply,
    delivery: Delivery,
    now: int,
    jitter: float,
    delays_s: tuple[int, ...] = RETRY_DELAYS_S,
) -> Verdict:
    """Decide what becomes of a delivery after an attempt; `jitter` is random, from 0 to 1."""
    if isinstance(reply, NoReply):
        return _again(delivery, now, jitter, delays_s, error=reply.reason)
    if 200 <= reply.status < 300:
        return Verdict(DeliveryState.DELIVERED, reply.status)
    if reply.status == _GONE:
        error = "the receiver answered 410 Gone; the endpoint is disabled"
        return Verdict(DeliveryState.FAILED, reply.status, error, disable=True)
    error = f"the receiver answered {reply.status}"
    if 300 <= reply.status < 400:
        error += "; redirects are not followed"
    wait = reply.wait_s(now)
    if wait is None and reply.status not in _OVERLOADED:
        return _again(delivery, now, jitter, delays_s, reply.status, error)
    wait = SLOW_DOWN_S if wait is None else math.ceil(min(max(wait, 1), SLOW_DOWN_S_MAX))
    return _again(delivery, now, jitter, delays_s, reply.status, error, now + wait)


def _again(
    delivery: Delivery,
    now: int,
    jitter: float,
    delays_s: tuple[int, ...],
    status: int | None = None,
    error: str | None = None,
    held_until: int | None = None,
) -> Verdict:
    end = delivery.event.created_at + RETRY_S_MAX
    if delivery.attempts >= len(delays_s) or now >= end:
        return Verdict(DeliveryState.FAILED, status, error, held_until=held_until)
    wait = delays_s[delivery.attempts] * (1 + JITTER * (2 * jitter - 1))
    next_attempt_at = min(max(now + max(1, round(wait)), held_until or 0), end)
    return Verdict(DeliveryState.PENDING, status, error, next_attempt_at, held_until)
