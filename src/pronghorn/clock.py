"""Time as a value that is passed in: for stamps and deadlines, for others to compare with theirs, for waiting."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

# Goes on while the machine sleeps, where the system has such a clock; macOS's monotonic clock does so anyway.
_STEADY = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Where the program reads the time."""

    def now(self) -> int:
        """Return whole Unix seconds that pass as time does, for stamps and deadlines."""
        ...

    def wall(self) -> int:
        """Return what the machine's clock shows, in whole Unix seconds, for those who compare it with their own."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never run backwards, for timeouts and rates."""
        ...


class SystemClock:
    """The machine's own clocks; `now` is the wall clock as it stood at first, moved on by one that nobody sets.

    So a jump of the wall clock brings no deadline nearer and takes none away. The next start reads the wall clock anew.
    """

    def __init__(
        self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = lambda: time.clock_gettime(_STEADY)
    ) -> None:
        self._wall = wall
        self._steady = steady
        self._begin = wall() - steady()

    def now(self) -> int:
        return int(self._begin + self._steady())

    def wall(self) -> int:
        return int(self._wall())

    def monotonic(self) -> float:
        return time.monotonic()
