"""Models of how much a server takes on at once, and the floor that runs lines through one."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Protocol

import msgspec

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from pronghorn.engines.scripted.options import ScriptedOptions


class Start(msgspec.Struct, frozen=True):
    """Serve the line now; it takes `service_s` seconds."""

    service_s: float


class Wait(msgspec.Struct, frozen=True):
    """Queue the line; the model is asked again when it is first in the queue and another line ended."""


class Refuse(msgspec.Struct, frozen=True):
    """Answer 429 now, and ask the client to come back after `retry_after_s` seconds."""

    retry_after_s: float


Decision = Start | Wait | Refuse
_WAIT = Wait()


class Load(msgspec.Struct):
    """What is on the floor: lines being served, their output tokens in all, lines queued, preemptions so far."""

    running: int = 0
    running_tokens: int = 0
    waiting: int = 0
    preemptions: int = 0


class Capacity(Protocol):
    """A model of a server."""

    def admit(self, tokens: int, load: Load, now_s: float) -> Decision:
        """Decide on a line with `tokens` output tokens, given the load without it; `now_s` is monotonic."""
        ...


class Pace(msgspec.Struct, frozen=True):
    """How long a line is served: a fixed time and a time for each output token, in seconds."""

    base_s: float
    token_s: float

    def start(self, tokens: int) -> Start:
        """Return the decision to serve a line of `tokens` output tokens at this pace."""
        return Start(self.base_s + tokens * self.token_s)


class Unlimited:
    """Serves every line at once."""

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def admit(self, tokens: int, load: Load, now_s: float) -> Decision:
        return self._pace.start(tokens)


class Slots:
    """Serves `slots` lines at once and queues the rest in order of arrival."""

    def __init__(self, pace: Pace, slots: int) -> None:
        self._pace = pace
        self._slots = slots

    def admit(self, tokens: int, load: Load, now_s: float) -> Decision:
        return self._pace.start(tokens) if load.running < self._slots else _WAIT


class RateLimit:
    """Takes `rate` lines a second, in bursts of up to one second's worth, and refuses the rest."""

    def __init__(self, pace: Pace, rate: float) -> None:
        self._pace = pace
        self._rate = rate
        self._burst = max(1.0, rate)
        self._credit = self._burst
        self._credited_at_s: float | None = None

    def admit(self, tokens: int, load: Load, now_s: float) -> Decision:
        since_s = 0.0 if self._credited_at_s is None else now_s - self._credited_at_s
        self._credit = min(self._burst, self._credit + since_s * self._rate)
        self._credited_at_s = now_s
        if self._credit < 1:
            return Refuse((1 - self._credit) / self._rate)
        self._credit -= 1
        return self._pace.start(tokens)


def capacity_of(options: ScriptedOptions) -> Capacity:
    """Return the model that the options name."""
    pace = Pace(options.latency_ms / 1000, options.token_ms / 1000)
    if options.capacity == "slots":
        return Slots(pace, options.slots)
    if options.capacity == "rate_limit":
        return RateLimit(pace, options.requests_per_s)
    return Unlimited(pace)


class Visit:
    """One line on the floor, from its arrival until it ends or leaves."""

    __slots__ = ("finished", "timer", "tokens")

    def __init__(self, tokens: int, finished: Callable[[], None]) -> None:
        self.tokens = tokens
        self.finished = finished
        self.timer: asyncio.TimerHandle | None = None


class Floor:
    """Runs lines through a capacity model on the event loop's timers."""

    def __init__(self, capacity: Capacity, loop: asyncio.AbstractEventLoop) -> None:
        self.load = Load()
        self._capacity = capacity
        self._loop = loop
        self._queue: deque[Visit] = deque()

    def arrive(self, tokens: int, finished: Callable[[], None]) -> Visit | Refuse | None:
        """Take a line on and call `finished` when it is served.

        Returns the visit while it lasts, None when it is over already (`finished` was called), or the refusal.
        """
        decision = self._capacity.admit(tokens, self.load, self._loop.time())
        if isinstance(decision, Refuse):
            return decision
        if isinstance(decision, Start) and not self._queue:
            if decision.service_s <= 0:
                finished()
                return None
            return self._start(Visit(tokens, finished), decision.service_s)
        visit = Visit(tokens, finished)
        self._queue.append(visit)
        self.load.waiting += 1
        return visit

    def leave(self, visit: Visit) -> None:
        """Take a line off the floor before it is served, because its client is gone."""
        if visit.timer is not None:
            visit.timer.cancel()
            self._free(visit)
        else:
            self._queue.remove(visit)
            self.load.waiting -= 1
        self._advance()

    def _start(self, visit: Visit, service_s: float) -> Visit:
        self.load.running += 1
        self.load.running_tokens += visit.tokens
        visit.timer = self._loop.call_later(service_s, self._end, visit)
        return visit

    def _end(self, visit: Visit) -> None:
        self._free(visit)
        visit.finished()
        self._advance()

    def _free(self, visit: Visit) -> None:
        self.load.running -= 1
        self.load.running_tokens -= visit.tokens

    def _advance(self) -> None:
        while self._queue:
            visit = self._queue[0]
            decision = self._capacity.admit(visit.tokens, self.load, self._loop.time())
            if not isinstance(decision, Start):
                return
            self._queue.popleft()
            self.load.waiting -= 1
            # Through the timer even at zero: the caller of `arrive` may not have seen its visit yet.
            self._start(visit, decision.service_s)
