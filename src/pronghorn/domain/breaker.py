"""When an engine is left alone and when it is tried again."""

from __future__ import annotations


class Breaker:
    """A circuit breaker: closed, lines flow; tripped, none do for a while; then half open, one probe at a time.

    Only an answer to what was sent after it tripped closes it, because lines that were under way before say little
    about an engine that now refuses; after silence any answer does. Pure: methods take the monotonic time.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self.trips = 0
        self.silent = False
        self._since = self._tripped_at = 0.0
        self._until = 0.0

    def trip(self, now: float, wait_s: float, reason: str, *, silent: bool = False) -> bool:
        """Let nothing through for `wait_s`; False, and nothing changes, while an earlier wait lasts."""
        if self.reason is not None and now < self._until:
            return False
        if self.reason is None:
            self._since = now
        self.trips += 1
        self.reason, self.silent = reason, silent
        self._tripped_at, self._until = now, now + wait_s
        return True

    def half_open(self) -> None:
        """End the wait; timers may come a little early, so the clock is not asked."""
        self._until = 0.0

    def admits_probe(self, now: float) -> bool:
        """Tell whether the wait is over, so that one line may try the way."""
        return now >= self._until

    def open_s(self, now: float) -> float:
        """Return for how long it has not been closed."""
        return 0.0 if self.reason is None else now - self._since

    def answered(self, sent_at: float) -> None:
        """Close, if an answer to what was sent at that time proves the engine well."""
        if self.reason is not None and (self.silent or sent_at >= self._tripped_at):
            self.reason, self.trips, self.silent = None, 0, False
