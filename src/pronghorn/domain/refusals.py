"""What refusals (429, 5xx, lost connections, timeouts) say about the number of lines in flight.

Those that its size causes all but vanish when it shrinks. Those that come anyway do not, and then the lines in flight
are given back; from then on such a share of refusals is taken as usual.
"""

from __future__ import annotations

from typing import NamedTuple

# So many refusals are weighed at once: fewer say too little about how frequent they are.
REFUSALS_WEIGHED = 8
# The most that is taken away at once.
DECREASE = 0.7
# Up to this share of all answers, refusals show that a limit is used up, which is as it should be.
REFUSED_SHARE_FINE = 0.05
# From this share on, plain refusals are overload, whatever shrinking has done so far.
REFUSED_SHARE_MAX = 0.5
# What is given back in a round with few refusals.
RECOVERY = 0.05
# What shrinking leaves of the share of refusals that the size caused; the rest is chance.
REMAINING_SHARE = 0.3
ABOVE_USUAL = 2.0


class _Shrunk(NamedTuple):
    """The limit before it began to shrink, and the share of refusals then."""

    limit: int
    share: float

    def came_anyway(self, limit: int, share: float, share_max: float) -> bool:
        """Tell from the share that is left at a smaller limit that refusals have another cause than the size."""
        low_enough = limit <= max(1, self.limit * (1 - self.share))
        return low_enough and self.share * REMAINING_SHARE < share <= share_max


class Refusals:
    """Weighs refusals against all answers, a few at a time."""

    def __init__(self) -> None:
        self._shrunk: _Shrunk | None = None
        self._usual_share = 0.0
        self._shown_share = 0.0
        self._share_max = REFUSED_SHARE_MAX
        self._ceiling = 0
        self._fast_below = 0

    def recovering(self, limit: int) -> bool:
        """Tell whether the limit has been taken below what it was, and not given back yet."""
        return limit < self._ceiling

    def recovering_fast(self, limit: int) -> bool:
        """Tell whether the limit is far below where the engine last took some lines and refused others."""
        return self.recovering(limit) and 2 * limit <= self._fast_below

    def recovered(self, limit: int, share: float) -> int:
        """Return the limit that follows from a round's share of refusals while recovering."""
        if share > self._fine():
            return limit
        step = limit if self.recovering_fast(limit) else max(1, round(limit * RECOVERY))
        return min(self._ceiling, limit + step)

    def weigh(self, limit: int, share: float, *, plain: bool = True) -> int:
        """Return the limit that follows from the share of refusals under the present one.

        They are `plain` where they can be nothing else: those that may be failures of the lines have no share that is
        overload in any case.
        """
        self._share_max = REFUSED_SHARE_MAX if plain else 1.0
        if share <= self._fine():
            usual = self._usual_share + (share - self._usual_share) / 4
            # Where no share is too much, it must not creep up beyond what shrinking has shown to come anyway.
            self._usual_share = usual if plain else min(usual, self._shown_share)
            self._shrunk = None
            return limit
        if self._shrunk is not None and self._shrunk.came_anyway(limit, share, self._share_max):
            before, self._shrunk = self._shrunk.limit, None
            self._ceiling = 0
            self._usual_share = self._shown_share = max(self._usual_share, share)
            return before
        if self._shrunk is None or share <= self._shrunk.share * REMAINING_SHARE:
            self._shrunk = _Shrunk(limit, share)
        self._ceiling = max(self._ceiling, limit)
        shrunk = max(1, int(limit * max(DECREASE, 1 - share + REFUSED_SHARE_FINE)))
        # Where all are refused, no size is to blame.
        self._fast_below = shrunk if share < 1 else max(self._fast_below, limit)
        return shrunk

    def _fine(self) -> float:
        return max(REFUSED_SHARE_FINE, min(self._share_max, self._usual_share * ABOVE_USUAL))
