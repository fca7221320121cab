"""Finds out about an engine that loses lines: whether it is dead, hangs, or lives and the lines are at fault.

An answer to anything sent since the first loss proves that it lives. Where none comes, a canary is sent: a request of
one token of our own, because the health endpoints of engines lie both ways.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from pronghorn.clock import Clock
from pronghorn.domain import retry
from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.domain.doubt import CANARIES_LOST_MAX, Doubt, canary
from pronghorn.worker.lane import Lane
from pronghorn.worker.shard_run import Line

# A busy engine answers another line meanwhile, and no canary is needed.
CANARY_AFTER_S = 0.5
# One token behind everything that a busy engine has queued.
CANARY_S_MAX = 30.0
# An engine that has lines and answers none for so long is asked whether it hangs.
QUIET_S_MAX = 60.0

HANGS = "the engine takes requests and answers none, not even one of a single token"
FAILS_CANARY = "the engine fails every line, and a request of one token as well"


class Finding(NamedTuple):
    """What has been found out about an engine; `pause` is why it is left alone: it is away, or lives and refuses."""

    doubt: Doubt[Line]
    alive: bool
    pause: retry.Pause | None = None
    silent: bool = False


class Triage:
    """Holds the doubts about every lane, and tells `found` what has become of each."""

    def __init__(
        self, clock: Clock, line_timeout_s: float, grace_s: float, found: Callable[[Lane, Finding], None]
    ) -> None:
        self._clock = clock
        self._grace_s = grace_s
        self._canary_s_max = min(CANARY_S_MAX, line_timeout_s)
        self._found = found

    def lost(self, lane: Lane, line: Line, lost: retry.Lost, sent_at: float) -> None:
        """Take a lost line on until more is known."""
        doubt = lane.doubt
        if doubt is None:
            doubt = lane.doubt = Doubt(self._clock.monotonic(), lane.in_flight + 1)
            wait_s = CANARY_AFTER_S if lane.in_flight else 0.0
            asyncio.get_running_loop().call_later(wait_s, self._ask, lane, doubt)
        doubt.add(line, lost, sent_at)

    def heard(self, lane: Lane, answer: Answer | Fault, verdict: retry.Verdict, sent_at: float) -> None:
        """Weigh what came back for a line while there is doubt about its engine."""
        doubt = lane.doubt
        if doubt is None:
            return
        pause = verdict if isinstance(verdict, retry.Pause) and not verdict.model_only else None
        if pause is not None and retry.shows_absence(answer):
            self._settle(lane, Finding(doubt, alive=False, pause=pause))
        elif (
            isinstance(answer, Answer) and not self._fails_as_all_do(lane, answer, verdict) and doubt.answered(sent_at)
        ):
            self._settle(lane, Finding(doubt, alive=True, pause=pause))

    def watch(self, lane: Lane) -> None:
        """Doubt an engine that has lines and has been quiet for long."""
        now = self._clock.monotonic()
        if lane.in_flight and lane.doubt is None and now - lane.quiet_since > QUIET_S_MAX:
            self.ask(lane)

    def ask(self, lane: Lane) -> None:
        """Send a canary now, unless there is one under way."""
        if lane.doubt is None:
            lane.doubt = Doubt(self._clock.monotonic(), lane.in_flight)
        self._ask(lane, lane.doubt)

    def give_up(self, lane: Lane) -> None:
        """Let go of the lines held in doubt about a replica that is not used any more."""
        if lane.doubt is not None:
            self._settle(lane, Finding(lane.doubt, alive=False))

    def _ask(self, lane: Lane, doubt: Doubt[Line]) -> None:
        if lane.doubt is not doubt or lane.canary is not None or lane.asked is None:
            return
        endpoint, model = lane.asked
        call = lane.client.send(endpoint.path, canary(endpoint, model), partial(self._answered, lane, doubt))
        lane.canary = call
        asyncio.get_running_loop().call_later(self._canary_s_max, call.abort)

    def _answered(self, lane: Lane, doubt: Doubt[Line], answer: Answer | Fault) -> None:
        lane.canary = None
        if lane.doubt is not doubt or lane.asked is None:
            if lane.doubt is not None:  # it arose while this canary was being given up
                self._ask(lane, lane.doubt)
            return
        effort = retry.Effort(pauses=lane.breaker.trips)
        verdict = retry.judge(answer, lane.asked[0], effort, self._clock.wall())
        if isinstance(answer, Fault) and answer.kind is FaultKind.ABORTED:
            verdict = retry.Lost(retry.Failure(), hung=True)
        match verdict:
            case retry.Lost(hung=True) if doubt.survivors == 0:
                pause = retry.Pause(*retry.engine_wait(lane.breaker.trips), HANGS)
                self._settle(lane, Finding(doubt, alive=False, pause=pause, silent=True))
            case retry.Pause(model_only=False):
                self._settle(lane, Finding(doubt, alive=not retry.shows_absence(answer), pause=verdict))
            case retry.Again(ours=True):
                asyncio.get_running_loop().call_later(CANARY_AFTER_S, self._ask, lane, doubt)
            case retry.Lost(hung=False):
                self._canary_lost(lane, doubt)
            case retry.Again() if self._fails_as_all_do(lane, answer, verdict):
                self._settle(lane, self._fails_all(lane, doubt))
            case _:
                self._settle(lane, Finding(doubt, alive=True))

    def _canary_lost(self, lane: Lane, doubt: Doubt[Line]) -> None:
        """Ask again after a while, by when an engine that was just ending is gone or replaced."""
        doubt.canaries_lost += 1
        if doubt.canaries_lost < CANARIES_LOST_MAX:
            asyncio.get_running_loop().call_later(CANARY_AFTER_S, self._ask, lane, doubt)
        elif lane.has_begun_to_fail(self._clock.monotonic(), self._grace_s):
            self._settle(lane, self._fails_all(lane, doubt))
        else:
            self._settle(lane, Finding(doubt, alive=True))

    def _fails_as_all_do(self, lane: Lane, answer: Answer | Fault, verdict: retry.Verdict) -> bool:
        """Tell whether an answer is one more failure of an engine that has begun to fail every line."""
        failed = retry.has_failed(answer, verdict)
        return failed and lane.has_begun_to_fail(self._clock.monotonic(), self._grace_s)

    def _fails_all(self, lane: Lane, doubt: Doubt[Line]) -> Finding:
        pause = retry.Pause(*retry.engine_wait(lane.breaker.trips), FAILS_CANARY)
        return Finding(doubt, alive=False, pause=pause, silent=True)

    def _settle(self, lane: Lane, finding: Finding) -> None:
        lane.doubt = None
        if lane.canary is not None:
            lane.canary.abort()
        self._found(lane, finding)
