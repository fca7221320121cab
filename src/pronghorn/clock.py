"""Time as a value that is passed in: wall time for people, monotonic time for waiting."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Where the program reads the time."""

    def now(self) -> int:
        """Return wall time in whole Unix seconds, for stamps that people and clients read."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never run backwards, for timeouts and rates."""
        ...


class SystemClock:
    """The machine's own clocks."""

    def now(self) -> int:
        return int(time.time())

    def monotonic(self) -> float:
        return time.monotonic()
