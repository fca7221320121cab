"""Runs lines that are suspected of killing their engine one by one, each alone on a replica that is kept clear for it.

The most suspected goes first, and so again and again until it is found guilty or has its outcome. A line that takes
long on an engine that lives holds up no other: after a while lines flow beside it again.
"""

from __future__ import annotations

from typing import NamedTuple

from pronghorn.worker.lane import Lane
from pronghorn.worker.lanes import Lanes
from pronghorn.worker.shard_run import Line
from pronghorn.worker.triage import QUIET_S_MAX


class Alone(NamedTuple):
    """A line to be sent now, with no other, and where to."""

    line: Line
    lane: Lane


class Isolation:
    """The suspected lines of a worker, and the replica that is kept clear for them."""

    def __init__(self, lanes: Lanes) -> None:
        self._lanes = lanes
        self._suspects: list[Line] = []
        self._clear: Lane | None = None
        self._running: Line | None = None
        self._until = 0.0

    def __bool__(self) -> bool:
        return bool(self._suspects) or self._clear is not None

    def __contains__(self, line: Line) -> bool:
        return line in self._suspects

    def add(self, line: Line) -> None:
        self._suspects.append(line)

    def remove(self, line: Line) -> None:
        self._suspects.remove(line)

    def next(self, now: float) -> Alone | None:
        """Return the suspect that is to be sent now, if any, and keep a replica clear as long as there are some."""
        if (lane := self._clear) is not None:
            if (lane.in_flight or lane.doubt is not None) and lane in self._lanes:
                return None  # it is being cleared, a suspect runs, or what became of the last one is not known yet
            self._keep_clear(None)
        if (way := self._most_suspected()) is None:
            return None
        line, lane = way
        self._keep_clear(lane)
        self._until = now + QUIET_S_MAX
        if lane.in_flight or not (lane.breaker.reason is None or lane.admits_probe(now)):
            return None
        self._suspects.remove(line)
        self._running, self._until = line, now + QUIET_S_MAX * 2**line.isolations_ended
        return way

    def is_over(self, lane: Lane, now: float) -> bool:
        """Tell whether a replica that lives has been kept clear for long enough, for all that still runs there."""
        return lane is self._clear and lane.in_flight > 0 and now >= self._until

    def end(self) -> list[Line]:
        """Keep no replica clear any more, and return the suspects that have been waiting.

        The suspicion of the line that has taken too long starts anew, and the next time it is left alone for twice as
        long: it may take that long to kill.
        """
        if (slow := self._running) is not None:
            slow.deaths = 0
            slow.isolations_ended += 1
        self._keep_clear(None)
        return list(self._suspects)

    def _most_suspected(self) -> Alone | None:
        """Return the most suspected line of those that some replica answers, and where it is soonest alone."""
        for line in sorted(self._suspects, key=lambda line: -line.deaths):
            if (lane := self._lanes.emptiest(line.run)) is not None:
                return Alone(line, lane)
        return None

    def _keep_clear(self, lane: Lane | None) -> None:
        if self._clear is not None:
            self._clear.kept_clear = False
        if lane is not None:
            lane.kept_clear = True
        self._clear, self._running = lane, None
