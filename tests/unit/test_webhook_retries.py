"""What becomes of a delivery after each attempt, as a table."""

from __future__ import annotations

import json

import pytest

from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import BatchStatus
from pronghorn.domain.webhooks import (
    RETRY_DELAYS_S,
    RETRY_S_MAX,
    SLOW_DOWN_S_MAX,
    Delivery,
    DeliveryState,
    Event,
    EventType,
    NoReply,
    Reply,
    Verdict,
    event_of,
    judge,
)

EVENT_AT = 1_750_000_000
EVENT = Event("evt_1", EventType.BATCH_COMPLETED, EVENT_AT, "batch_1")
PENDING, DELIVERED, FAILED = DeliveryState.PENDING, DeliveryState.DELIVERED, DeliveryState.FAILED


def judged(reply: Reply | NoReply, attempts: int = 0, after_s: int = 0, jitter: float = 0.5) -> Verdict:
    delivery = Delivery("wh_1", "org", "whe_1", EVENT, PENDING, attempts, EVENT_AT)
    return judge(reply, delivery, EVENT_AT + after_s, jitter)


def test_every_end_of_a_batch_and_nothing_else_is_told() -> None:
    assert {status for status in BatchStatus if event_of(status)} == TERMINAL
    assert {event_of(status) for status in TERMINAL} == set(EventType)
    assert all(event_of(status) == f"batch.{status}" for status in TERMINAL)


def test_an_event_is_thin() -> None:
    assert json.loads(EVENT.body()) == {
        "id": "evt_1",
        "object": "event",
        "created_at": EVENT_AT,
        "type": "batch.completed",
        "data": {"id": "batch_1"},
    }


@pytest.mark.parametrize("status", [200, 201, 202, 204, 299])
def test_any_2xx_acknowledges(status: int) -> None:
    assert judged(Reply(status)) == Verdict(DELIVERED, status)


@pytest.mark.parametrize("status", [199, 301, 302, 307, 308, 400, 401, 404, 500, 503, 599])
def test_any_other_status_is_tried_again(status: int) -> None:
    verdict = judged(Reply(status))
    assert (verdict.state, verdict.status, verdict.next_attempt_at) == (PENDING, status, EVENT_AT + 5)
    assert verdict.held_until is None
    assert verdict.error is not None
    assert ("redirects are not followed" in verdict.error) is (300 <= status < 400)


def test_no_answer_is_tried_again() -> None:
    assert judged(NoReply("refused")) == Verdict(PENDING, None, "refused", EVENT_AT + 5)


def test_410_ends_the_delivery_and_the_endpoint() -> None:
    verdict = judged(Reply(410))
    assert (verdict.state, verdict.disable, verdict.next_attempt_at) == (FAILED, True, None)


@pytest.mark.parametrize(
    ("reply", "wait_s"),
    [
        (Reply(429), 60),
        (Reply(502), 60),
        (Reply(504), 60),
        (Reply(429, b"7"), 7),
        (Reply(503, b"7"), 7),
        (Reply(500, b"120"), 120),
        (Reply(429, b"0"), 1),
        (Reply(429, b"0.2"), 1),
        (Reply(429, b"nonsense"), 60),
        (Reply(429, b"-5"), 60),
        (Reply(429, b"99999999999"), SLOW_DOWN_S_MAX),
        (Reply(503, b"Sun, 15 Jun 2025 15:07:40 GMT"), 60),
    ],
)
def test_an_endpoint_is_left_alone_for_as_long_as_it_asks(reply: Reply, wait_s: int) -> None:
    verdict = judged(reply)
    assert verdict.held_until == EVENT_AT + wait_s
    assert verdict.next_attempt_at == EVENT_AT + max(wait_s, 5)


def test_the_schedule_reaches_72_hours_and_no_further() -> None:
    after_s, waits = 0, []
    for attempts in range(len(RETRY_DELAYS_S) + 1):
        verdict = judged(NoReply("refused"), attempts, after_s)
        if verdict.next_attempt_at is None:
            break
        waits.append(verdict.next_attempt_at - EVENT_AT - after_s)
        after_s = verdict.next_attempt_at - EVENT_AT
    assert verdict.state is FAILED
    assert waits[:-1] == list(RETRY_DELAYS_S[:-1])
    assert after_s == RETRY_S_MAX


def test_a_delivery_that_a_stopped_server_kept_for_too_long_gets_one_attempt() -> None:
    assert judged(NoReply("refused"), attempts=1, after_s=RETRY_S_MAX + 9).state is FAILED
    assert judged(Reply(200), attempts=1, after_s=RETRY_S_MAX + 9).state is DELIVERED


def test_jitter_spreads_retries() -> None:
    times = [judged(NoReply("refused"), attempts=1, jitter=jitter).next_attempt_at for jitter in (0.0, 0.5, 1.0)]
    assert times == [EVENT_AT + 240, EVENT_AT + 300, EVENT_AT + 360]
