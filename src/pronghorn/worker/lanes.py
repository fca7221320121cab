"""The replicas that a worker sends lines to, and which of them a line goes to."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

from pronghorn.clock import Clock
from pronghorn.domain.model import Replica
from pronghorn.engines.base import authorization
from pronghorn.engines.client import EngineClient, Timeouts
from pronghorn.worker.lane import Lane
from pronghorn.worker.protocol import Configure
from pronghorn.worker.shard_run import Line, ShardRun

# Lines that wait to be tried again: past this no new line is sent. They are what a worker's memory holds beside the
# lines that are read ahead.
WAITING_LINES_MAX = 8192
# Of the files that a process may have open, those that may be connections to engines: the others are for segments,
# parts and inputs, without which no answer is kept.
CONNECTIONS_SHARE = 0.5
# What hope a line has in a replica; none in one that has failed it.
LIMITED, FRESH = 1, 2


class Lanes:
    """The lanes of a worker. `spawn` runs what works in the background; `changed` is called when there may be room."""

    def __init__(
        self,
        config: Configure,
        clock: Clock,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        changed: Callable[[], None],
    ) -> None:
        self._config = config
        self._clock = clock
        self._spawn = spawn
        self._changed = changed
        self._lanes: list[Lane] = []
        self._live: dict[str, int] = {}
        self._in_flight_max = int(resource.getrlimit(resource.RLIMIT_NOFILE)[0] * CONNECTIONS_SHARE)

    def __iter__(self) -> Iterator[Lane]:
        return iter(self._lanes)

    def __contains__(self, lane: object) -> bool:
        return lane in self._lanes

    def use(self, replicas: list[Replica]) -> list[Lane]:
        """Use these replicas from now on and return the lanes of others; lanes that stay keep their windows."""
        kept = {_way(lane.replica): lane for lane in self._lanes}
        self._lanes = []
        for replica in replicas:
            lane = kept.pop(_way(replica), None) or self._open(replica)
            lane.replica = replica  # its list of models may have changed
            self._lanes.append(lane)
        self.leave_room(self._live)
        return list(kept.values())

    def leave_room(self, live: dict[str, int]) -> None:
        """Leave room in the windows for so many live requests at each replica, by name."""
        self._live = live
        for lane in self._lanes:
            lane.live = live.get(lane.replica.name, 0)

    def roomiest(self, run: ShardRun, now: float, waiting: int) -> Lane | None:
        """Return the replica with most room for the run's next line, while so many lines wait to be tried again.

        While some do, an engine that fails every line gets no new ones to spoil. A line that one replica has failed
        goes to another, be it to probe it, and rather to one that has only limited it than back.
        """
        new = waiting > 0 and run.ready.next_is_new
        again = run.ready.next_put_back
        if (new and waiting >= WAITING_LINES_MAX) or sum(lane.in_flight for lane in self._lanes) > self._in_flight_max:
            return None
        best, best_room = None, (0, 0)
        elsewhere = again is not None and self.can_go_elsewhere(again)
        for lane in self._lanes:
            hope = FRESH if again is None else _hope(lane, again)
            if (
                (room := lane.room(now, run.model)) > 0
                and (hope, room) > best_room
                and lane.replica.answers(run.endpoint, run.model)
                and not (new and lane.fails_every_line)
                and not (elsewhere and hope < FRESH)
            ):
                best, best_room = lane, (hope, room)
        return best

    def emptiest(self, run: ShardRun) -> Lane | None:
        """Return the replica for the run's lines that is soonest free of others."""
        able = [lane for lane in self._lanes if lane.replica.answers(run.endpoint, run.model)]
        return min(able, key=lambda lane: (lane.breaker.reason is not None, lane.in_flight), default=None)

    def can_go_elsewhere(self, line: Line) -> bool:
        """Tell whether a replica that has neither failed nor limited the line serves lines like it."""
        run = line.run
        return any(_hope(lane, line) == FRESH and lane.serves(run.endpoint, run.model) for lane in self._lanes)

    def another_serves(self, lane: Lane, run: ShardRun) -> bool:
        """Tell whether another replica than this one serves the run's lines."""
        return any(other is not lane and other.serves(run.endpoint, run.model) for other in self._lanes)

    def another_is_away(self, lane: Lane, line: Line, now: float) -> bool:
        """Tell whether a line that this replica fails has hope left in one that is away or limits it, and in no other.

        One that has been away for longer than `model_grace_s` is not waited for.
        """
        run, limited_at = line.run, line.limited_at
        others = [
            other
            for other in self._lanes
            if other is not lane and other.replica.answers(run.endpoint, run.model) and _hope(other, line)
        ]
        if any(other.replica.name not in limited_at and other.serves(run.endpoint, run.model) for other in others):
            return False
        grace_s = self._config.model_grace_s
        return any(other.replica.name in limited_at or other.away_s(now, run.model) < grace_s for other in others)

    async def close(self) -> None:
        """Break off what is under way."""
        for lane in self._lanes:
            await lane.close()

    def _open(self, replica: Replica) -> Lane:
        headers = authorization(replica.api_key_env)
        client = EngineClient(
            replica.base_url,
            headers=headers,
            timeouts=Timeouts(total_s=self._config.line_timeout_s, first_byte_s=self._config.line_timeout_s),
            answer_bytes_max=self._config.answer_bytes_max,
        )
        lane = Lane(replica, client)
        if replica.window is None:
            lane.watching = self._spawn(lane.watch_gauges(headers, self._clock, self._changed))
        return lane


def _hope(lane: Lane, line: Line) -> int:
    """Return FRESH for a replica that may answer the line, less for one that limited it, 0 for one that failed it."""
    if lane.replica.name in line.failed_at:
        return 0
    return LIMITED if lane.replica.name in line.limited_at else FRESH


def _way(replica: Replica) -> tuple[str, int | None]:
    """What a lane's connections and window hang on."""
    return replica.name, replica.window
