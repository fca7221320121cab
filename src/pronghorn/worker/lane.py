"""The way to one replica: its connections, its window, whether it is paused, and what is to be found out about it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from pronghorn.clock import Clock
from pronghorn.domain.breaker import Breaker
from pronghorn.domain.doubt import Doubt
from pronghorn.domain.flow import Window
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.client import Call, EngineClient
from pronghorn.engines.gauges import GaugeReader
from pronghorn.worker.protocol import Paused
from pronghorn.worker.shard_run import Line

# An engine without gauges is asked for them ever more rarely: it may be replaced by one that has some.
NO_GAUGES_WAIT_S = 60.0
NO_GAUGES_MISSES_MAX = 16
# How long an answer takes, as long as none has come.
LATENCY_UNKNOWN_S = 1.0
# Lines that fail one after the other, with no success between: from then on the engine is taken to fail every line.
FAILURES_IN_A_ROW_MAX = 32


@dataclass(slots=True)
class Absence:
    """A model that the replica does not know, since a monotonic time."""

    since: float
    breaker: Breaker = field(default_factory=Breaker)


class Lane:
    """One replica as a worker uses it.

    `in_flight` counts the lines that it has, `held` the places kept for lines that it refused, `live` the live requests
    to leave room for. `probe` is the line that tries it while it is paused or lacks the line's model, `alone` the line
    that is known to be its only one; `kept_clear` tells that it is for suspects. It has `last_prompt` in its one cache,
    or one of `freed_prompts` in each slot that is free. `failures_in_a_row` counts failures with no success between,
    the last of which was at `well_at`, `put_off_in_a_row` those and rate limits; `complaint` is why a line was put off
    last. `doubt` is whether its engine lives, and `canary` what asks it; `asked` is what it was sent a line for last.
    It has answered none of its lines since `quiet_since`. `absent` are the models that it does not know.
    """

    def __init__(self, replica: Replica, client: EngineClient) -> None:
        self.replica = replica
        self.client = client
        self.window = Window(fixed=replica.window, sharers=replica.sharers)
        self.breaker = Breaker()
        self.absent: dict[str, Absence] = {}
        self.in_flight = 0
        self.held = 0
        self.live = 0
        self.last_prompt: bytes | None = None
        self.freed_prompts: deque[bytes] = deque(maxlen=replica.slots)
        self.probe: Line | None = None
        self.alone: Line | None = None
        self.kept_clear = False
        self.failures_in_a_row = 0
        self.well_at = float("-inf")
        self.put_off_in_a_row = 0
        self.complaint = ""
        self.doubt: Doubt[Line] | None = None
        self.canary: Call | None = None
        self.asked: tuple[Endpoint, str] | None = None
        self.quiet_since = 0.0
        self.watching: asyncio.Task[None] | None = None

    async def close(self) -> None:
        """Break off what is under way."""
        if self.watching is not None:
            self.watching.cancel()
        await self.client.close()

    @property
    def fails_every_line(self) -> bool:
        return self.failures_in_a_row >= FAILURES_IN_A_ROW_MAX

    def has_begun_to_fail(self, now: float, grace_s: float) -> bool:
        """Tell whether an engine that fails every line had not done so until lately."""
        return self.fails_every_line and now - self.well_at < grace_s

    @property
    def puts_every_line_off(self) -> bool:
        """Tell whether the engine answers, and no line has had its outcome for long, rate limits included."""
        return self.put_off_in_a_row >= FAILURES_IN_A_ROW_MAX

    def serves(self, endpoint: Endpoint, model: str) -> bool:
        """Tell whether lines like this have their outcomes here, as far as is known."""
        return (
            self.breaker.reason is None
            and model not in self.absent
            and not self.puts_every_line_off
            and self.replica.answers(endpoint, model)
        )

    def room(self, now: float, model: str) -> int:
        """Return how many more lines may be sent now; while a breaker is half open, one probes the way."""
        if self.kept_clear:
            return 0
        if self.breaker.reason is None and model not in self.absent:
            limit = self._limit_beside_live() if self.live else self.window.limit
            return limit - self.in_flight - self.held
        return self._room_beyond_breakers(now, model)

    def admits_probe(self, now: float) -> bool:
        """Tell whether a tripped replica may be tried with a line; a silent one is asked by a canary first."""
        return self.probe is None and not self.breaker.silent and self.breaker.admits_probe(now)

    def absent_s(self, now: float, model: str) -> float:
        """Return for how long the replica has not known a model."""
        absence = self.absent.get(model)
        return 0.0 if absence is None else now - absence.since

    def trips(self, model: str) -> int:
        """Return how often in a row lines like this have found the engine paused, or without their model."""
        absence = self.absent.get(model)
        return self.breaker.trips if absence is None else max(self.breaker.trips, absence.breaker.trips)

    def away_s(self, now: float, model: str) -> float:
        """Return for how long lines like this have not had their outcomes here because of the engine."""
        return max(self.breaker.open_s(now), self.absent_s(now, model))

    def hold_place(self, wait_s: float) -> None:
        """Keep the place of a refused line for as long as an answer takes, or as the line waits if that is less.

        Were it free at once, quick refusals would crowd out the lines that the engine has room for.
        """
        self.held += 1
        asyncio.get_running_loop().call_later(min(wait_s, self.window.latency_s or LATENCY_UNKNOWN_S), self._free_place)

    def _free_place(self) -> None:
        self.held -= 1

    async def watch_gauges(self, headers: Mapping[str, str], clock: Clock, changed: Callable[[], None]) -> None:
        """Look at the engine's gauges while it has lines, until cancelled; `changed` is called after each look."""
        reader = GaugeReader(self.replica.base_url, headers)
        misses = 0
        try:
            while True:
                await asyncio.sleep(min(NO_GAUGES_WAIT_S, self.window.gauge_interval_s * 2**misses))
                if not self.in_flight:
                    continue
                gauges = await reader.read(self.in_flight)
                if gauges is None:
                    misses = min(misses + 1, NO_GAUGES_MISSES_MAX)
                else:
                    misses = 0
                    self.window.gauged(clock.monotonic(), gauges, self.in_flight)
                    changed()
        finally:
            await reader.close()

    def paused(self) -> list[Paused]:
        """Return what is paused here and why."""
        name = self.replica.name
        found = [(None, self.breaker), *((model, absence.breaker) for model, absence in self.absent.items())]
        return [Paused(name, model, breaker.reason) for model, breaker in found if breaker.reason is not None]

    def putting_off(self) -> list[Paused]:
        """Return why lines have to be tried again, if that is what came last."""
        return [Paused(self.replica.name, None, self.complaint)] if self.put_off_in_a_row else []

    def _room_beyond_breakers(self, now: float, model: str) -> int:
        absence = self.absent.get(model)
        breakers = [self.breaker] if absence is None else [self.breaker, absence.breaker]
        if all(breaker.reason is None for breaker in breakers):
            return self.window.limit - self.in_flight - self.held
        return int(self.admits_probe(now) and all(breaker.admits_probe(now) for breaker in breakers))

    def _limit_beside_live(self) -> int:
        """Return the window beside live requests: no line of it queues ahead of them, yet one always runs."""
        return max(1, min(self.window.limit, self.replica.slots or self.window.limit) - self.live)
