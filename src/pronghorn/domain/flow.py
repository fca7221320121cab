"""How many lines an engine is asked at once: found by trying, for an engine that says nothing about itself.

Minimum-latency methods fail on language models, because the length of an answer, not queueing, sets its latency.
Throughput is what counts: the window doubles while that pays, holds a little above the knee, tries a little more
now and then, and shrinks only on evidence of overload (429, 503, timeouts), never on a dip in throughput. Where
shrinking does not make such answers rarer, they have another cause, and the window is given back.
"""

from __future__ import annotations

from typing import NamedTuple

WINDOW_INITIAL = 16
# Far above what one engine runs at once (vLLM's default is 256 to 1024); it bounds the worker's memory.
WINDOW_MAX = 4096
ROUND_LINES_MIN = 30
GAIN_THAT_PAYS = 1.15
FLAT_ROUNDS_MAX = 2
HEADROOM = 1.25
ROUNDS_BETWEEN_TRIALS = 4
DECREASE = 0.7
# So many refusals are weighed at once: fewer say too little about how frequent they are.
REFUSALS_WEIGHED = 8
# From this share of all answers on, refusals are overload, whatever shrinking has done so far.
REFUSED_SHARE_MAX = 0.5
# Below what was not refused before, refusals that came from the window's size all but vanish; the rest is chance.
REMAINING_SHARE = 0.3
ABOVE_USUAL = 2.0


class _Shrunk(NamedTuple):
    """What was so before the window began to shrink: its limit, whether it was doubling, the share of refusals."""

    limit: int
    doubling: bool
    share: float

    def came_anyway(self, limit: int, share: float) -> bool:
        """Tell from the share that is left at a smaller limit that refusals have another cause than the window."""
        low_enough = limit <= self.limit * (1 - self.share)
        return low_enough and self.share * REMAINING_SHARE < share <= REFUSED_SHARE_MAX


class Window:
    """The number of lines that may be in flight at one engine replica.

    Pure: every method takes the monotonic time. `fixed` is the window of an engine that states what it can run.
    """

    def __init__(self, *, fixed: int | None = None) -> None:
        self._fixed = fixed is not None
        self.limit: int = fixed if fixed is not None else WINDOW_INITIAL
        self._doubling = True
        self._flat_rounds = 0
        self._held_rounds = 0
        self._before_trial: int | None = None
        self._best_rate = 0.0
        self._knee = self.limit
        self._shrunk: _Shrunk | None = None
        self._shrunk_at = float("-inf")
        self._weighed = 0
        self._refused = 0
        self._usual_share = 0.0
        self._answers = 0
        self._saturated = 0
        self._round_started: float | None = None

    def answered(self, now: float, in_flight: int, *, sent_at: float = 0.0, refused: bool = False) -> None:
        """Count an answer; `in_flight` includes it, and `refused` tells that it shows overload."""
        if self._fixed:
            return
        if sent_at >= self._shrunk_at:  # lines sent before know nothing of the smaller window
            self._weigh(now, refused)
        if self._round_started is None:
            self._start_round(now)
            return
        self._answers += 1
        self._saturated = max(self._saturated, in_flight)
        if self._answers >= max(ROUND_LINES_MIN, self.limit):
            self._end_round(now)

    def _weigh(self, now: float, refused: bool) -> None:
        self._weighed += 1
        self._refused += refused
        if self._refused < REFUSALS_WEIGHED:
            return
        share = self._refused / self._weighed
        self._weighed = self._refused = 0
        if share <= min(REFUSED_SHARE_MAX, self._usual_share * ABOVE_USUAL):
            self._usual_share += (share - self._usual_share) / 4
            self._shrunk = None
        elif self._shrunk is not None and self._shrunk.came_anyway(self.limit, share):
            self._usual_share = max(self._usual_share, share)
            self._set_back(now, self._shrunk.limit, doubling=self._shrunk.doubling)
            self._shrunk = None
        else:
            if self._shrunk is None or share <= self._shrunk.share * REMAINING_SHARE:
                self._shrunk = _Shrunk(self.limit, self._doubling, share)
            self._shrunk_at = now
            self._set_back(now, max(1, int(self.limit * DECREASE)), doubling=False)

    def _set_back(self, now: float, limit: int, *, doubling: bool) -> None:
        self._knee = self.limit = limit
        self._doubling = doubling
        self._before_trial = None
        self._best_rate = 0.0
        self._start_round(now)

    def _start_round(self, now: float) -> None:
        self._round_started = now
        self._answers = 0
        self._saturated = 0

    def _end_round(self, now: float) -> None:
        started = now if self._round_started is None else self._round_started
        rate = self._answers / max(now - started, 1e-9)
        used = self._saturated >= 0.9 * self.limit
        self._start_round(now)
        if used:
            self._learn(rate)

    def _learn(self, rate: float) -> None:
        pays = rate > self._best_rate * GAIN_THAT_PAYS
        if pays:
            self._best_rate, self._knee, self._flat_rounds = rate, self.limit, 0
        if self._doubling:
            self._double_or_hold(pays)
        elif self._before_trial is not None:
            if not pays:
                self.limit = self._before_trial
            self._before_trial = None
        else:
            self._hold_or_try()

    def _double_or_hold(self, pays: bool) -> None:
        self._flat_rounds += not pays
        if self._flat_rounds >= FLAT_ROUNDS_MAX:
            self._doubling = False
            self.limit = min(WINDOW_MAX, max(1, round(self._knee * HEADROOM)))
        else:
            self.limit = min(WINDOW_MAX, self.limit * 2)

    def _hold_or_try(self) -> None:
        self._held_rounds += 1
        if self._held_rounds >= ROUNDS_BETWEEN_TRIALS and self.limit < WINDOW_MAX:
            self._held_rounds = 0
            self._before_trial = self.limit
            self.limit = min(WINDOW_MAX, max(self.limit + 1, round(self.limit * HEADROOM)))
