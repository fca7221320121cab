"""How fast a batch moves and when it will end, from what has been measured."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

# Rates over these spans, in seconds: the short one follows a change, the long one smooths. An ETA's range is what the
# spans disagree about.
SPANS_S = (10.0, 60.0, 600.0)
SAMPLE_INTERVAL_S = 1.0


class Speed(NamedTuple):
    """Lines and tokens a second, and the seconds left at the fastest and slowest of the measured rates."""

    lines_per_s: float
    tokens_per_s: float
    eta_s_min: float | None
    eta_s_max: float | None


class _Sample(NamedTuple):
    at: float
    lines: int
    tokens: int


class Pace:
    """Remembers how far a batch was, and when it last moved; every method takes the monotonic time."""

    def __init__(self, now: float, lines: int, tokens: int) -> None:
        self._samples = deque([_Sample(now, lines, tokens)])
        self._latest = self._samples[0]
        self.moved_at = now

    def note(self, now: float, lines: int, tokens: int) -> None:
        """Record how far the batch is."""
        if lines != self._latest.lines:
            self.moved_at = now
        self._latest = _Sample(now, lines, tokens)
        if now - self._samples[-1].at >= SAMPLE_INTERVAL_S:
            self._samples.append(self._latest)
        while len(self._samples) > 1 and now - self._samples[1].at >= SPANS_S[-1]:
            self._samples.popleft()

    def speed(self, lines_left: int) -> Speed | None:
        """Return what has been measured, or None before a second has."""
        rates = [rate for span in SPANS_S if (rate := self._rate(span)) is not None]
        if not rates:
            return None
        moving = [lines for lines, _ in rates if lines > 0]
        lines_per_s, tokens_per_s = rates[min(1, len(rates) - 1)]
        eta = (lines_left / max(moving), lines_left / min(moving)) if moving else (None, None)
        return Speed(lines_per_s, tokens_per_s, *eta)

    def _rate(self, span_s: float) -> tuple[float, float] | None:
        """Return lines and tokens a second over the last `span_s`, or over all there is if that is less."""
        latest = self._latest
        start = next(
            sample for sample in self._samples if latest.at - sample.at <= span_s or sample is self._samples[-1]
        )
        elapsed = latest.at - start.at
        if elapsed < SAMPLE_INTERVAL_S:
            return None
        return (latest.lines - start.lines) / elapsed, (latest.tokens - start.tokens) / elapsed
