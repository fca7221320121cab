"""What places workers: anything that can start one, carry messages to and from it, and tell when it is gone."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

from pronghorn.worker.protocol import Order, Report


class WorkerLink(Protocol):
    """A running worker, as its coordinator sees it."""

    def send(self, order: Order) -> None:
        """Queue an order; a worker that is gone ignores it."""
        ...

    def reports(self) -> AsyncIterator[Report]:
        """Yield what the worker reports until it is gone."""
        ...

    def hang_up(self) -> None:
        """Break the connection, on which a worker ends at once."""
        ...

    def kill(self) -> None:
        """End the worker at once, whatever it is doing."""
        ...

    async def end(self) -> int | None:
        """Make sure that the worker is gone, and return its exit status if that is known."""
        ...


class Executor(Protocol):
    """Places workers."""

    async def start(self) -> WorkerLink:
        """Start one worker.

        Raises OSError when it cannot be started.
        """
        ...
