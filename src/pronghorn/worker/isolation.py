"""Runs lines that are suspected of killing their engine apart from others, on a replica that is kept clear for them.

The most suspected goes first, and so again and again until it is found guilty or has its outcome. Many that are equally
suspected run a few at a time, and where the engine dies once more, those few run alone. A line that takes long on an
engine that lives holds up no other: after a while lines flow beside it again. An engine that dies by itself gets its
lines back: it takes more to suspect them from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from pronghorn.domain.doubt import Suspicion
from pronghorn.worker.lane import Lane
from pronghorn.worker.lanes import Lanes
from pronghorn.worker.shard_run import Line
from pronghorn.worker.triage import QUIET_S_MAX

# So many suspects run one by one; of more, the square root of their number at a time, which makes the fewest turns.
ONE_BY_ONE_MAX = 9


class Apart(NamedTuple):
    """Suspects to be sent now, with no other line, and where to; mostly one."""

    lines: list[Line]
    lane: Lane


class Isolation:
    """The suspected lines of a worker, and the replica that is kept clear for them.

    `ask` sends a replica a canary. A paused one is probed by that, because a suspect that finds its engine still away
    would go back among the others.
    """

    def __init__(self, lanes: Lanes, ask: Callable[[Lane], None]) -> None:
        self._lanes = lanes
        self._ask = ask
        self._suspects: list[Line] = []
        self._clear: Lane | None = None
        self._running: list[Line] = []
        self._until = 0.0
        self._suspicion = Suspicion()

    def __bool__(self) -> bool:
        return bool(self._suspects) or self._clear is not None

    def __contains__(self, line: Line) -> bool:
        return line in self._suspects

    def convicts(self, line: Line) -> bool:
        """Tell whether a line has been alone with so many deaths of its engine that it is found guilty."""
        if line.alone_deaths < self._suspicion.alone_deaths_max:
            return False
        self._suspicion.convict()
        return True

    def acquit(self) -> list[Line]:
        """Note that an engine has died by itself, and return the suspects that are none any more."""
        self._suspicion.acquit()
        return [line for line in self._suspects if not self.suspects(line)]

    def suspects(self, line: Line) -> bool:
        """Tell whether a line was with its engine so often when it died that it is to run apart."""
        return line.deaths >= self._suspicion.shared_deaths_max

    def add(self, line: Line) -> None:
        self._suspects.append(line)

    def remove(self, line: Line) -> None:
        self._suspects.remove(line)

    def next(self, now: float) -> Apart | None:
        """Return the suspects that are to be sent now, if any, and keep a replica clear as long as there are some."""
        if (lane := self._clear) is not None:
            if (lane.in_flight or lane.doubt is not None) and lane in self._lanes:
                return None  # it is being cleared, suspects run, or what became of the last is not known yet
            self._keep_clear(None)
        if (apart := self._most_suspected()) is None:
            return None
        lines, lane = apart
        self._keep_clear(lane)
        self._until = now + QUIET_S_MAX
        if lane.in_flight:
            return None
        if lane.breaker.reason is not None:
            if lane.admits_probe(now):
                self._ask(lane)
            return None
        for line in lines:
            self._suspects.remove(line)
        self._running = lines
        self._until = now + QUIET_S_MAX * 2 ** max(line.isolations_ended for line in lines)
        return apart

    def is_over(self, lane: Lane, now: float) -> bool:
        """Tell whether a replica that lives has been kept clear for long enough, for all that still runs there."""
        return lane is self._clear and lane.in_flight > 0 and now >= self._until

    def end(self) -> list[Line]:
        """Keep no replica clear any more, and return the suspects that have been waiting.

        The suspicion of a line that has taken too long alone starts anew, and the next time it is left alone for twice
        as long: it may take that long to kill. Of several that ran together, one may hold up those that kill.
        """
        if len(self._running) == 1:
            [slow] = self._running
            slow.deaths = 0
            slow.isolations_ended += 1
        self._keep_clear(None)
        return list(self._suspects)

    def _most_suspected(self) -> Apart | None:
        """Return the most suspected line that some replica answers, where it is soonest alone, and its company.

        A line that has been here when its engine died has none.
        """
        for line in sorted(self._suspects, key=lambda line: -line.deaths):
            if (lane := self._lanes.emptiest(line.run)) is not None:
                if line.deaths > self._suspicion.shared_deaths_max:
                    return Apart([line], lane)
                answers = lane.replica.answers
                equals = [other for other in self._suspects if answers(other.run.endpoint, other.run.model)]
                together = math.isqrt(len(equals)) if len(equals) > ONE_BY_ONE_MAX else 1
                return Apart(equals[: min(together, lane.window.limit)], lane)
        return None

    def _keep_clear(self, lane: Lane | None) -> None:
        if self._clear is not None:
            self._clear.kept_clear = False
        if lane is not None:
            lane.kept_clear = True
        self._clear, self._running = lane, []
