"""Models of how much a server takes on at once, and the floor that runs lines through one."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, Protocol

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
    """What is on the floor: lines being served, the tokens that they hold in memory, lines queued, preemptions."""

    running: int = 0
    kv_tokens: float = 0.0
    waiting: int = 0
    preemptions: int = 0


class Demand(NamedTuple):
    """What a line needs: tokens that it holds from the start, and tokens that it adds one after the other."""

    held_tokens: int
    tokens: int


class Capacity(Protocol):
    """A model of a server; `kv_tokens_max` is what its memory holds."""

    kv_tokens_max: float

    def admit(self, demand: Demand, load: Load, now_s: float) -> Decision:
        """Decide on a line, given the load without it; `now_s` is monotonic."""
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

    kv_tokens_max = math.inf

    def __init__(self, pace: Pace) -> None:
        self._pace = pace

    def admit(self, demand: Demand, load: Load, now_s: float) -> Decision:
        return self._pace.start(demand.tokens)


class Dip(msgspec.Struct, frozen=True):
    """When half of the slots are missing, in seconds since the first line."""

    at_s: float
    for_s: float


class Slots:
    """Serves `slots` lines at once, as far as their tokens fit in memory, and queues the rest in order of arrival."""

    def __init__(self, pace: Pace, slots: int, *, kv_tokens_max: float = math.inf, dip: Dip | None = None) -> None:
        self.kv_tokens_max = kv_tokens_max
        self._pace = pace
        self._slots = slots
        self._dip = dip
        self._began_s: float | None = None

    def admit(self, demand: Demand, load: Load, now_s: float) -> Decision:
        if load.running >= self._slots_at(now_s):
            return _WAIT
        if load.running and load.kv_tokens + demand.held_tokens > self.kv_tokens_max:
            return _WAIT  # alone it may have more than all, as it would else never run
        return self._pace.start(demand.tokens)

    def _slots_at(self, now_s: float) -> int:
        if self._dip is None:
            return self._slots
        if self._began_s is None:
            self._began_s = now_s
        in_dip = self._dip.at_s <= now_s - self._began_s < self._dip.at_s + self._dip.for_s
        return max(1, self._slots // 2) if in_dip else self._slots


class RateLimit:
    """Takes `rate` lines a second, in bursts of up to one second's worth, and refuses the rest."""

    kv_tokens_max = math.inf

    def __init__(self, pace: Pace, rate: float) -> None:
        self._pace = pace
        self._rate = rate
        self._burst = max(1.0, rate)
        self._credit = self._burst
        self._credited_at_s: float | None = None

    def admit(self, demand: Demand, load: Load, now_s: float) -> Decision:
        since_s = 0.0 if self._credited_at_s is None else now_s - self._credited_at_s
        self._credit = min(self._burst, self._credit + since_s * self._rate)
        self._credited_at_s = now_s
        if self._credit < 1:
            return Refuse((1 - self._credit) / self._rate)
        self._credit -= 1
        return self._pace.start(demand.tokens)


def capacity_of(options: ScriptedOptions) -> Capacity:
    """Return the model that the options name."""
    pace = Pace(options.latency_ms / 1000, options.token_ms / 1000)
    dip = None if options.dip_at_s is None else Dip(options.dip_at_s, options.dip_s)
    if options.capacity == "slots":
        return Slots(pace, options.slots, dip=dip)
    if options.capacity == "kv":
        return Slots(pace, options.slots, kv_tokens_max=options.kv_tokens, dip=dip)
    if options.capacity == "rate_limit":
        return RateLimit(pace, options.requests_per_s)
    return Unlimited(pace)


class Visit:
    """One line on the floor, from its arrival until it ends or leaves."""

    __slots__ = ("demand", "finished", "started_s", "timer")

    def __init__(self, demand: Demand, finished: Callable[[], None]) -> None:
        self.demand = demand
        self.finished = finished
        self.started_s = 0.0
        self.timer: asyncio.TimerHandle | None = None


class Floor:
    """Runs lines through a capacity model on the event loop's timers; `token_s` is what a token takes to be added.

    When memory is full, the line that started last waits again, first in the queue, and later goes on where it was.
    """

    def __init__(self, capacity: Capacity, loop: asyncio.AbstractEventLoop, token_s: float = 0.0) -> None:
        self.load = Load()
        self._capacity = capacity
        self._loop = loop
        self._token_s = token_s
        self._bounded = capacity.kv_tokens_max < math.inf and token_s > 0
        self._queue: deque[Visit] = deque()
        self._running: dict[Visit, None] = {}
        self._counted_s = 0.0
        self._overflow: asyncio.TimerHandle | None = None

    def arrive(self, demand: Demand, finished: Callable[[], None]) -> Visit | Refuse | None:
        """Take a line on and call `finished` when it is served.

        Returns the visit while it lasts, None when it is over already (`finished` was called), or the refusal.
        """
        self._count()
        decision = self._capacity.admit(demand, self.load, self._loop.time())
        if isinstance(decision, Refuse):
            return decision
        if isinstance(decision, Start) and not self._queue:
            if decision.service_s <= 0:
                finished()
                return None
            visit = self._start(Visit(demand, finished), decision.service_s)
            self._foresee()
            return visit
        visit = Visit(demand, finished)
        self._queue.append(visit)
        self.load.waiting += 1
        return visit

    def leave(self, visit: Visit) -> None:
        """Take a line off the floor before it is served, because its client is gone."""
        if visit.timer is not None:
            self._stop(visit)
        else:
            self._queue.remove(visit)
            self.load.waiting -= 1
        self._advance()

    def _start(self, visit: Visit, service_s: float) -> Visit:
        self.load.running += 1
        self.load.kv_tokens += visit.demand.held_tokens
        self._running[visit] = None
        visit.started_s = self._loop.time()
        visit.timer = self._loop.call_later(service_s, self._end, visit)
        return visit

    def _end(self, visit: Visit) -> None:
        self._stop(visit)
        visit.finished()
        self._advance()

    def _stop(self, visit: Visit) -> int:
        """Take a line out of service and return how many tokens it has added."""
        self._count()
        if visit.timer is not None:
            visit.timer.cancel()
            visit.timer = None
        added = (self._loop.time() - visit.started_s) / self._token_s if self._bounded else 0.0
        del self._running[visit]
        self.load.running -= 1
        self.load.kv_tokens -= visit.demand.held_tokens + added
        return min(int(added), visit.demand.tokens - 1)

    def _advance(self) -> None:
        self._count()
        while self._queue:
            visit = self._queue[0]
            decision = self._capacity.admit(visit.demand, self.load, self._loop.time())
            if not isinstance(decision, Start):
                break
            self._queue.popleft()
            self.load.waiting -= 1
            # Through the timer even at zero: the caller of `arrive` may not have seen its visit yet.
            self._start(visit, decision.service_s)
        if not self._running:
            self.load.kv_tokens = 0.0  # what rounding has left
        self._foresee()

    def _count(self) -> None:
        """Bring the tokens in memory up to now: each running line adds them at the same pace."""
        if self._bounded:
            now_s = self._loop.time()
            self.load.kv_tokens += self.load.running * (now_s - self._counted_s) / self._token_s
            self._counted_s = now_s

    def _foresee(self) -> None:
        """Set the timer for the moment at which memory is full if nothing else happens before."""
        if self._overflow is not None:
            self._overflow.cancel()
            self._overflow = None
        if self._bounded and self.load.running > 1:
            left = max(0.0, self._capacity.kv_tokens_max - self.load.kv_tokens)
            self._overflow = self._loop.call_later(left * self._token_s / self.load.running, self._preempt)

    def _preempt(self) -> None:
        self._count()
        if self.load.kv_tokens >= self._capacity.kv_tokens_max - 1 and self.load.running > 1:
            visit = next(reversed(self._running))
            added = max(0, self._stop(visit))
            visit.demand = Demand(visit.demand.held_tokens + added, visit.demand.tokens - added)
            self._queue.appendleft(visit)
            self.load.waiting += 1
            self.load.preemptions += 1
        self._foresee()
