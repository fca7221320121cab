"""Doubts about an engine: what settles them, and that each is settled."""

from __future__ import annotations

import asyncio

import pytest

from pronghorn.clock import SystemClock
from pronghorn.domain.answers import Answer
from pronghorn.domain.model import Endpoint, Replica, Usage
from pronghorn.domain.retry import Again, Failure, Success, Verdict
from pronghorn.worker.lane import FAILURES_IN_A_ROW_MAX, Lane
from pronghorn.worker.triage import Finding, Triage
from tests.faults.test_odd_upstreams import Wire, running
from tests.unit.test_isolation import lanes_of

GRACE_S = 600.0
LINE_TIMEOUT_S = 600.0
BAD_GATEWAY = Answer(502, {}, b"<html>")
LOGIN_PAGE = Answer(200, {}, b"<html>")


@pytest.mark.parametrize(
    ("answer", "verdict", "proves_life"),
    [
        (BAD_GATEWAY, Again(0.0, 1.0, costs_attempt=True, or_else=Failure()), False),
        (BAD_GATEWAY, Failure(), False),
        (LOGIN_PAGE, Failure("upstream_disconnected", "not JSON"), False),
        (Answer(400, {}, b"{}"), Failure(), True),
        (Answer(429, {}, b"{}"), Again(0.0, 1.0, costs_attempt=False), True),
        (Answer(200, {}, b"{}"), Success(Usage()), True),
    ],
)
async def test_a_failure_like_all_others_is_no_sign_of_life(
    answer: Answer, verdict: Verdict, proves_life: bool
) -> None:
    found: list[tuple[Lane, Finding]] = []
    clock = SystemClock()
    triage = Triage(clock, LINE_TIMEOUT_S, GRACE_S, lambda lane, finding: found.append((lane, finding)))
    async with lanes_of(Replica("http://127.0.0.1:9/v1")) as lanes:
        (lane,) = lanes
        lane.failures_in_a_row, lane.well_at = FAILURES_IN_A_ROW_MAX, clock.monotonic()
        triage.ask(lane)
        triage.heard(lane, answer, verdict, clock.monotonic() + 1)
    assert [finding.alive for _, finding in found] == [True] * proves_life


async def test_a_doubt_that_arises_while_the_canary_of_another_is_given_up_has_a_canary_of_its_own() -> None:
    asked, clock = asyncio.Queue[str](), SystemClock()
    loop = asyncio.get_running_loop()

    async def hangs(wire: Wire) -> None:
        loop.call_soon_threadsafe(asked.put_nowait, wire.prompt)
        await asyncio.Event().wait()

    triage = Triage(clock, LINE_TIMEOUT_S, GRACE_S, lambda lane, _: triage.ask(lane))
    with running(hangs) as (engine,):
        async with asyncio.timeout(30), lanes_of(Replica(engine.base_url)) as lanes:
            (lane,) = lanes
            lane.asked = Endpoint.CHAT_COMPLETIONS, "scripted"
            triage.ask(lane)
            assert await asked.get() == "ping"
            triage.heard(lane, Answer(200, {}, b"{}"), Success(Usage()), clock.monotonic() + 1)
            assert await asked.get() == "ping"
