"""An engine that has begun to fail every line: what it answers meanwhile is no sign of life unless it is an outcome."""

from __future__ import annotations

import pytest

from pronghorn.clock import SystemClock
from pronghorn.domain.answers import Answer
from pronghorn.domain.model import Replica, Usage
from pronghorn.domain.retry import Again, Failure, Success, Verdict
from pronghorn.worker.lane import FAILURES_IN_A_ROW_MAX, Lane
from pronghorn.worker.triage import Finding, Triage
from tests.unit.test_isolation import lanes_of

GRACE_S = 600.0
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
    triage = Triage(clock, 600.0, GRACE_S, lambda lane, finding: found.append((lane, finding)))
    async with lanes_of(Replica("http://127.0.0.1:9/v1")) as lanes:
        (lane,) = lanes
        lane.failures_in_a_row, lane.well_at = FAILURES_IN_A_ROW_MAX, clock.monotonic()
        triage.ask(lane)
        triage.heard(lane, answer, verdict, clock.monotonic() + 1)
    assert [finding.alive for _, finding in found] == [True] * proves_life
