"""How many lines an engine is asked at once where it says nothing about itself: found by trying.

Minimum-latency methods fail on language models, because the length of an answer, not queueing, sets its latency.
Throughput is what counts: the limit climbs while that pays and then holds a little above the knee. Now and then a
round is run with more, in case the engine has more room than it had, or with less, in case it does as well with it.
It never shrinks because throughput fell: an engine that has become slower needs no fewer lines.
"""

from __future__ import annotations

import math
from typing import NamedTuple

CLIMB = 4
CLIMB_AGAIN = 2
# A climb goes on while it raises throughput by this much. A worker that climbs beside others gains by taking from them;
# only what it gains beyond that is the engine's.
GAIN_THAT_PAYS = 1.3
GAIN_AMONG_OTHERS = 2.8
HEADROOM = 1.25
# Answers that a round has at least: enough to see a climb, and more to see a difference of a quarter.
CLIMB_LINES_MIN = 16
ROUND_LINES_MIN = 100
# Rounds between two trials; they become rarer while none changes anything.
ROUNDS_BETWEEN_TRIALS = 4
ROUNDS_BETWEEN_TRIALS_MAX = 32
# Throughput of a trial against that of the rounds before it: with more lines, and with less.
MORE_PAYS = 1.12
LESS_SUFFICES = 0.93


class _Level(NamedTuple):
    """A limit and the answers a second that it gave."""

    limit: int
    rate: float


class _Trial(NamedTuple):
    """A round with another limit: what it is to be compared with, and the limit if it is as good as that."""

    before: _Level
    bar: float
    settles_at: int


class Search:
    """Climbs, holds and tries by the throughput of rounds. Pure: told of each round, it returns the next limit."""

    def __init__(self, sharers: int) -> None:
        self._bar = GAIN_THAT_PAYS if sharers == 1 else GAIN_AMONG_OTHERS
        self._alone = sharers == 1
        self._climb: int = CLIMB
        self._level: _Level | None = None
        self._doubted = False
        self._trial: _Trial | None = None
        self._held: list[float] = []
        self._wait_rounds = ROUNDS_BETWEEN_TRIALS
        self._up_next = True

    def round_lines(self, limit: int) -> int:
        """Return how many answers make a round."""
        if self._climb and not self._doubted:
            return max(CLIMB_LINES_MIN, limit // 2)
        return max(ROUND_LINES_MIN, limit)

    def hold(self) -> None:
        """Stay at a limit that something else has found."""
        self._climb, self._level, self._trial = 0, None, None
        self._doubted = False
        self._held = []
        self._wait_rounds, self._up_next = ROUNDS_BETWEEN_TRIALS, True

    def rated(self, limit: int, rate: float) -> int:
        """Take the throughput of a round that used its limit; return the limit of the next."""
        if self._climb:
            return self._climbed(_Level(limit, rate))
        if self._trial is not None:
            return self._tried(self._trial, _Level(limit, rate))
        return self._hold_or_try(_Level(limit, rate))

    def _climbed(self, level: _Level) -> int:
        below = self._level
        if below is None or level.rate >= below.rate * self._bar_above(below.limit):
            self._level, self._doubted = level, False
            return level.limit * self._climb
        if not self._doubted:
            self._doubted = True
            return level.limit
        self.hold()
        return self._try_less(level, _with_headroom(below.limit * max(1.0, level.rate / below.rate)))

    def _bar_above(self, limit: int) -> float:
        """Return what the next level has to gain: more than chance, which is large where a round has few answers."""
        return max(self._bar, 1 + 2 / math.sqrt(max(CLIMB_LINES_MIN, limit // 2)))

    def _hold_or_try(self, level: _Level) -> int:
        self._held.append(level.rate)
        if len(self._held) < self._wait_rounds or not self._alone:
            return level.limit
        before = _Level(level.limit, sum(self._held) / len(self._held))
        self._held = []
        up, self._up_next = self._up_next, not self._up_next
        if up:
            self._trial = _Trial(before, MORE_PAYS, 0)
            return _with_headroom(before.limit)
        self._trial = _Trial(before, LESS_SUFFICES, int(before.limit / HEADROOM))
        return max(1, int(before.limit / HEADROOM**2))

    def _try_less(self, before: _Level, limit: int) -> int:
        if limit >= before.limit / HEADROOM:
            return before.limit
        self._trial = _Trial(before, LESS_SUFFICES, limit)
        return limit

    def _tried(self, trial: _Trial, level: _Level) -> int:
        self._trial = None
        if level.rate < trial.before.rate * trial.bar:
            if trial.settles_at == level.limit:
                return self._try_less(trial.before, round((level.limit * trial.before.limit) ** 0.5))
            self._wait_rounds = min(ROUNDS_BETWEEN_TRIALS_MAX, self._wait_rounds * 2)
            return trial.before.limit
        self._wait_rounds = ROUNDS_BETWEEN_TRIALS
        if trial.settles_at:
            self._up_next = False
            return trial.settles_at
        self._climb, self._level = CLIMB_AGAIN, level
        return level.limit * CLIMB_AGAIN


def _with_headroom(limit: float) -> int:
    return max(round(limit * HEADROOM), int(limit) + 1)
