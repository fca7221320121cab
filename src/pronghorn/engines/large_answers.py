"""Large answers that are being received: together they stay within a bound, however many an engine sends at once."""

from __future__ import annotations

from typing import Protocol

from pronghorn.limits import KIB, MIB

# Smaller answers are not counted: a window of 1,000 holds 64 MiB of them at most.
LARGE_BYTES = 64 * KIB
# The one that began first is always read on, so beyond this there is at most one more answer of the largest size, and
# what each other connection reads at once, 256 KiB.
LARGE_ANSWERS_BYTES_MAX = 128 * MIB


class Pausable(Protocol):
    """A connection that can be read no further for a while."""

    def pause(self) -> None: ...
    def resume(self) -> None: ...


class LargeAnswers:
    """Counts the bytes of an engine's large answers, and lets the first one go on while there are too many."""

    def __init__(self) -> None:
        self.bytes = 0
        self._sizes: dict[Pausable, int] = {}

    def grew(self, connection: Pausable, size: int) -> None:
        """Note how much of an answer has come; at the bound its connection waits for those before it."""
        self.bytes += size - self._sizes.get(connection, 0)
        self._sizes[connection] = size
        if self.bytes > LARGE_ANSWERS_BYTES_MAX and connection is not next(iter(self._sizes)):
            connection.pause()

    def ended(self, connection: Pausable) -> None:
        """Note that an answer has been handed over, or will not come; others may go on."""
        if (size := self._sizes.pop(connection, None)) is None:
            return
        self.bytes -= size
        for index, waiting in enumerate(list(self._sizes)):
            if index == 0 or self.bytes <= LARGE_ANSWERS_BYTES_MAX:
                waiting.resume()
