"""How many lines an engine is asked at once where its own gauges tell how many it runs and how many wait.

The limit doubles until lines wait, then keeps a short queue: enough that no place stays empty between two lines.
Several workers may share the engine: what is too much is taken from each by its share, and each asks for a little
more again and again, so that their shares become equal.
"""

from __future__ import annotations

from typing import NamedTuple

# How often an engine is looked at: while the limit climbs, and then.
INTERVAL_CLIMBING_S = 0.25
INTERVAL_S = 2.0
# Looks that may be missed before the gauges are stale.
MISSED_MAX = 3
CLIMB = 2.0
GROWTH = 1.5
USED = 0.9
QUEUE_MIN = 2
QUEUE_SHARE = 0.1
# Where memory is the limit, lines that grow leave room for fewer now and for more then: the most that ran of late
# counts, and fades by this share at each look.
PEAK_FADES = 0.1
# Less is taken away only if less than this share is left: each change begins the measuring of answers anew.
WORTH_A_CHANGE = 0.98
# Gauges that see less than this share of our lines tell of another engine than the one that has them.
SEEN_SHARE_MIN = 0.5
# An engine whose running lines grew since the last look by more than this is still taking lines in.
RISING = 1.02
# Preemptions in two seconds as a share of what runs, and as a share of the lines answered meanwhile: beyond both,
# memory is used up, and lines are begun in vain.
PREEMPTED_SHARE_MAX = 0.02
PREEMPTED_PER_ANSWER_MAX = 1.0
REMEMBERED = 0.9
AFTER_PREEMPTION = 0.95
GROWTH_AFTER_EXCESS = 1.1
EXCESS_HOLD_S = 20.0
# What all workers together ask for beyond the queue, to even out their shares.
EVENING_SHARE = 0.05


class Gauges(NamedTuple):
    """What an engine says: lines it runs and lines that wait, from all its clients, and preemptions so far."""

    running: int
    waiting: int
    preemptions: int = 0


class Gauging:
    """Decides by an engine's gauges. Pure: the monotonic time is passed in."""

    def __init__(self, sharers: int) -> None:
        self._sharers = sharers
        self._last = Gauges(0, 0)
        self._looked_at: float | None = None
        self._climbing = True
        self._used = True
        self._growth = GROWTH
        self._peak = 0.0
        self._preempted = 0.0
        self._answered = 0.0
        self._hold_until = 0.0

    @property
    def interval_s(self) -> float:
        """After how many seconds to look again."""
        return INTERVAL_CLIMBING_S if self._climbing and self._used else INTERVAL_S

    def fresh_until(self, now: float) -> float:
        """Return until when a look at this time counts."""
        return now + MISSED_MAX * INTERVAL_S

    def sees(self, gauges: Gauges, in_flight: int) -> bool:
        """Tell whether the gauges are those of the engine that has our lines."""
        return gauges.running + gauges.waiting >= SEEN_SHARE_MIN * in_flight

    def looked(self, now: float, gauges: Gauges, limit: int, in_flight: int, answers: int) -> int:
        """Return the limit that follows from a look; ours are `in_flight` and, since the last look, `answers`."""
        last, self._last = self._last, gauges
        self._peak = max(float(gauges.running), self._peak + (gauges.running - self._peak) * PEAK_FADES)
        since_s = INTERVAL_S if self._looked_at is None else now - self._looked_at
        first, self._looked_at = self._looked_at is None, now
        preempted = 0 if first else max(0, gauges.preemptions - last.preemptions)
        self._preempted = self._preempted * REMEMBERED + preempted
        self._answered = self._answered * REMEMBERED + answers
        self._used = in_flight >= USED * limit
        thrashes = self._preempted > PREEMPTED_PER_ANSWER_MAX * self._answered
        if thrashes and preempted > PREEMPTED_SHARE_MAX * gauges.running * since_s / INTERVAL_S:
            return self._after_excess(now, gauges, limit, in_flight)
        if gauges.waiting == 0:
            return self._grown(limit) if self._used and now >= self._hold_until else limit
        if gauges.running > last.running * RISING:
            return limit
        self._climbing = False
        return self._with_queue(gauges, limit, in_flight)

    def _grown(self, limit: int) -> int:
        return max(limit + 1, int(limit * (CLIMB if self._climbing else self._growth)))

    def _after_excess(self, now: float, gauges: Gauges, limit: int, in_flight: int) -> int:
        """Take a little away, once in a while, and grow slowly from then on."""
        if now < self._hold_until:
            return limit
        self._climbing, self._growth = False, GROWTH_AFTER_EXCESS
        self._hold_until = now + EXCESS_HOLD_S
        return min(limit, self._ours(gauges, in_flight, AFTER_PREEMPTION * self._peak))

    def _with_queue(self, gauges: Gauges, limit: int, in_flight: int) -> int:
        enough = self._peak + max(QUEUE_MIN, QUEUE_SHARE * self._peak)
        more = 0.0
        if self._sharers > 1 and in_flight >= USED * limit:
            more = max(1.0, EVENING_SHARE * gauges.running / self._sharers)
        if gauges.running + gauges.waiting <= enough:
            return int(limit + more)
        less = (min(limit, in_flight) + self._ours(gauges, in_flight, enough)) / 2 + more
        return limit if limit * WORTH_A_CHANGE < less < limit else max(1, int(less))

    def _ours(self, gauges: Gauges, in_flight: int, total: float) -> int:
        """Return our share of so many lines with the engine, by what we have of those that it has."""
        return max(1, round(total * min(1.0, in_flight / max(1, gauges.running + gauges.waiting))))
