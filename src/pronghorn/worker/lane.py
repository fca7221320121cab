"""The way to one replica: its connections, its window, whether it is paused, and what is to be found out about it."""

from __future__ import annotations

from dataclasses import dataclass, field

from pronghorn.domain.breaker import Breaker
from pronghorn.domain.doubt import Doubt
from pronghorn.domain.flow import Window
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.client import Call, EngineClient
from pronghorn.worker.protocol import Paused
from pronghorn.worker.shard_run import Line

# Lines that fail one after the other, with no success between: from then on the engine is taken to fail every line.
FAILURES_IN_A_ROW_MAX = 32


@dataclass(slots=True)
class Absence:
    """A model that the replica does not know, since a monotonic time."""

    since: float
    breaker: Breaker = field(default_factory=Breaker)


class Lane:
    """One replica as a worker uses it."""

    def __init__(self, replica: Replica, client: EngineClient) -> None:
        self.replica = replica
        self.client = client
        self.window = Window(fixed=replica.window)
        self.breaker = Breaker()
        self.absent: dict[str, Absence] = {}
        self.in_flight = 0
        self.live = 0
        self.probe: Line | None = None
        self.kept_clear = False
        self.failures_in_a_row = 0
        self.doubt: Doubt[Line] | None = None
        self.canary: Call | None = None
        self.asked: tuple[Endpoint, str] | None = None
        self.quiet_since = 0.0

    @property
    def fails_every_line(self) -> bool:
        return self.failures_in_a_row >= FAILURES_IN_A_ROW_MAX

    def room(self, now: float, model: str) -> int:
        """Return how many more lines may be sent now; while a breaker is half open, one probes the way."""
        if self.kept_clear:
            return 0
        if self.breaker.reason is None and model not in self.absent:
            return (self._limit_beside_live() if self.live else self.window.limit) - self.in_flight
        return self._room_beyond_breakers(now, model)

    def admits_probe(self, now: float) -> bool:
        """Tell whether a tripped replica may be tried with a line; a silent one is asked by a canary first."""
        return self.probe is None and not self.breaker.silent and self.breaker.admits_probe(now)

    def absent_s(self, now: float, model: str) -> float:
        """Return for how long the replica has not known a model."""
        absence = self.absent.get(model)
        return 0.0 if absence is None else now - absence.since

    def paused(self) -> list[Paused]:
        """Return what is paused here and why."""
        url = self.replica.base_url
        found = [(None, self.breaker), *((model, absence.breaker) for model, absence in self.absent.items())]
        return [Paused(url, model, breaker.reason) for model, breaker in found if breaker.reason is not None]

    def _room_beyond_breakers(self, now: float, model: str) -> int:
        absence = self.absent.get(model)
        breakers = [self.breaker] if absence is None else [self.breaker, absence.breaker]
        if all(breaker.reason is None for breaker in breakers):
            return self.window.limit - self.in_flight
        return int(self.admits_probe(now) and all(breaker.admits_probe(now) for breaker in breakers))

    def _limit_beside_live(self) -> int:
        """Return the window beside live requests: no line of it queues ahead of them, yet one always runs."""
        return max(1, min(self.window.limit, self.replica.slots or self.window.limit) - self.live)
