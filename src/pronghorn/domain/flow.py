"""How many lines an engine is asked at once, found by its gauges, by trying, and by what it refuses."""

from __future__ import annotations

from pronghorn.domain.gauging import USED, Gauges, Gauging
from pronghorn.domain.refusals import REFUSALS_WEIGHED, Refusals
from pronghorn.domain.search import Search

WINDOW_INITIAL = 16
# Far above what one engine runs at once (vLLM's default is 256 to 1024); it bounds the worker's memory.
WINDOW_MAX = 4096
# Over less time a round measures our own machine: connections that open, other processes that run.
ROUND_S_MIN = 0.25


class Window:
    """The number of lines that may be in flight at one engine replica.

    Pure: every method takes the monotonic time. `fixed` is the window of an engine that states what it can run;
    `sharers` how many workers send lines to the engine, each with a window of its own.
    """

    def __init__(self, *, fixed: int | None = None, sharers: int = 1) -> None:
        self.fixed = fixed is not None
        self.limit: int = fixed if fixed is not None else WINDOW_INITIAL
        self.latency_s: float | None = None
        self._gauging = Gauging(sharers)
        self._gauged_until = float("-inf")
        self._seen_answers = 0
        self._search = Search(sharers)
        self._refusals = Refusals()
        self._answers = 0
        self._refused = 0
        self._away = 0
        self._away_in_a_row = 0
        self._weighed_from = 0, 0, 0
        self._changed_at = float("-inf")
        self._round_from = 0, 0
        self._round_began: float | None = None
        self._round_until = 0

    @property
    def gauge_interval_s(self) -> float:
        """After how many seconds to look at the engine's gauges again."""
        return self._gauging.interval_s

    def answered(
        self, now: float, in_flight: int, *, sent_at: float, refused: bool = False, away: bool = False
    ) -> None:
        """Count an answer to a line sent at `sent_at`; `in_flight` includes it.

        `refused` tells that it shows overload; `away`, that it would come from an engine that is not there, too.
        """
        self._answers += 1
        began = self._round_began
        if began is None:
            if sent_at < self._changed_at or self.fixed:
                return  # it says nothing about the limit that there is now
            self._weighed_from = self._answers - 1, self._refused, self._away
            began = self._begin_round(now)
        if refused:
            self._weigh(now, away=away)
            return
        if self._away_in_a_row >= REFUSALS_WEIGHED:
            self._weighed_from = self._answers - 1, self._refused, self._away  # the engine was away, and is back
        self._away_in_a_row = 0
        if self._answers >= self._round_until and sent_at >= began:
            self._end_round(now, now - began, in_flight)

    def gauged(self, now: float, gauges: Gauges, in_flight: int) -> None:
        """Take a look at the engine's gauges into account; `in_flight` is our own lines."""
        if self.fixed or not self._gauging.sees(gauges, in_flight):
            return
        self._gauged_until = self._gauging.fresh_until(now)
        self._search.hold()
        answers, self._seen_answers = self._answers - self._seen_answers, self._answers
        limit = self._gauging.looked(now, gauges, self.limit, in_flight, answers)
        self._move(now, min(limit, self.limit) if self._refusals.recovering(self.limit) else limit)

    def _move(self, now: float, limit: int) -> None:
        limit = min(max(limit, 1), WINDOW_MAX)
        if limit != self.limit:
            self.limit = limit
            self._changed_at, self._round_began = now, None

    def _begin_round(self, now: float) -> float:
        self._round_began = now
        self._round_from = self._answers, self._refused
        fast = self._refusals.recovering_fast(self.limit)
        self._round_until = self._answers + (self.limit if fast else self._search.round_lines(self.limit))
        return now

    def _weigh(self, now: float, *, away: bool) -> None:
        self._refused += 1
        self._away += away
        self._away_in_a_row = self._away_in_a_row + 1 if away else 0
        counts = self._answers, self._refused, self._away
        answers, refused, aways = (count - before for count, before in zip(counts, self._weighed_from, strict=True))
        if refused < REFUSALS_WEIGHED or aways == answers:
            return
        self._weighed_from = counts
        limit = self._refusals.weigh(self.limit, refused / answers, plain=2 * aways < refused)
        if limit != self.limit:
            self._search.hold()
            self._move(now, limit)

    def _end_round(self, now: float, took_s: float, in_flight: int) -> None:
        if took_s < ROUND_S_MIN:
            return
        answers, refused = self._answers - self._round_from[0], self._refused - self._round_from[1]
        rate = (answers - refused) / max(took_s, 1e-9)
        self.latency_s = in_flight / max(rate, 1e-9)
        self._begin_round(now)
        if in_flight < USED * self.limit:
            return
        if self._refusals.recovering(self.limit):
            self._move(now, self._refusals.recovered(self.limit, refused / answers))
        elif now > self._gauged_until:
            self._move(now, self._search.rated(self.limit, rate))
