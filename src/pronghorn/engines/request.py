"""One request: how long it may take, how it is given up, and its one result."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Protocol, TypeAlias

from pronghorn.domain.answers import Answer, Fault, FaultKind

if TYPE_CHECKING:
    from pronghorn.engines.answer_stream import AnswerSink
    from pronghorn.engines.connection import Connection
    from pronghorn.engines.connection_pool import ConnectionPool

Done: TypeAlias = Callable[[Answer | Fault], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """How long to wait for what, in seconds, all above zero; each ends the request with its own `FaultKind`."""

    connect_s: float = 10.0
    """A busy engine accepts late, yet three lost SYN packets (1 + 2 + 4 s) still fit."""
    first_byte_s: float = 600.0
    """Engines send nothing while a line is queued, loaded or generated: the official client waits as long."""
    idle_s: float = 120.0
    """Once an answer has begun its bytes follow at once; a stream may pause for a long prompt or a tool."""
    total_s: float = 3600.0
    """From `send()`: above the slowest line that a saturated engine still answers."""

    def __post_init__(self) -> None:
        for field in fields(self):
            if not getattr(self, field.name) > 0:
                raise ValueError(f"{field.name} must be above 0")


class Call(Protocol):
    """A request under way."""

    def abort(self) -> None:
        """Give it up: `done` soon gets an ABORTED fault; nothing happens when it already has its result."""
        ...


class Request:
    """One request from start to its one result; `done` is None once that is on its way."""

    __slots__ = ("body", "connecting", "connection", "done", "head", "pool", "retried", "sink", "started_s")

    def __init__(
        self, pool: ConnectionPool, head: bytes, body: bytes, done: Done, sink: AnswerSink | None = None
    ) -> None:
        self.pool = pool
        self.head = head
        self.body = body
        self.done: Done | None = done
        self.sink = sink
        self.connection: Connection | None = None
        self.connecting: asyncio.Task[None] | None = None
        self.retried = False
        self.started_s = pool.loop.time()

    def settle(self, result: Answer | Fault) -> None:
        done, self.done = self.done, None
        if done is not None:
            self.pool.deliver(done, result)

    def fail(self, kind: FaultKind, what: str) -> None:
        """Stop the request wherever it is; `done` hears of it on the loop's next turn."""
        done, self.done = self.done, None
        if done is None:
            return
        # uvloop forgets to call connection_lost when create_connection is cancelled after connection_made.
        if self.connection is not None:
            self.connection.drop()
        elif self.connecting is not None:
            self.connecting.cancel()
        self.pool.loop.call_soon(self.pool.deliver, done, self.pool.fault(kind, what))

    def abort(self) -> None:
        self.fail(FaultKind.ABORTED, "was not waited for: the request was given up")

    def expire(self, limit_s: float) -> None:
        self.fail(FaultKind.TOTAL_TIMEOUT, f"did not finish its answer within {limit_s:g} s")
