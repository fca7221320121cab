"""One client's connection, and one exchange for each line in progress on it."""

from __future__ import annotations

import asyncio
import hashlib
import math
import os
from collections import deque
from typing import TYPE_CHECKING, NamedTuple, cast

import httptools
import msgspec

from pronghorn.engines.scripted.capacity import Demand, Refuse, Visit
from pronghorn.engines.scripted.ledger import Entry
from pronghorn.engines.scripted.replies import Reply, encode_head, envelope, invalid_request
from pronghorn.engines.scripted.requests import Endpoint
from pronghorn.engines.scripted.verdict import Delivery, Verdict

if TYPE_CHECKING:
    from pronghorn.engines.scripted.ledger import LineCounts
    from pronghorn.engines.scripted.server import ScriptedEngine

CRASH_EXIT_CODE = 70
"""What a crash fault ends the process with: EX_SOFTWARE of sysexits.h."""

PIPELINE_MAX = 64
"""Requests that may queue on one connection behind the one in progress; a client that sends more is cut off."""

TRICKLE_PIECES = 16

PROMPT_BYTES_PER_TOKEN = 4
"""A token is about four bytes of English."""

LINE_PATHS = {endpoint.value: endpoint for endpoint in Endpoint}


class Request(NamedTuple):
    """One HTTP request as it came in."""

    method: str
    path: str
    body: bytes
    keep_alive: bool
    too_large: bool


class Connection(asyncio.Protocol):
    """One client's connection; its requests are served one after another."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self._engine = engine
        self._parser = httptools.HttpRequestParser(self)
        self._transport: asyncio.Transport = cast("asyncio.Transport", None)
        self._url = b""
        self._parts: list[bytes] = []
        self._body_bytes = 0
        self._expects_continue = False
        self._exchange: Exchange | None = None
        self._pipeline: deque[Request] = deque()
        self._idle_since_s = 0.0
        self._idle_timer: asyncio.TimerHandle | None = None

    # What asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._engine.opened(self)
        self._idle_since_s = self._engine.loop.time()
        timeout_s = self._engine.options.keep_alive_timeout_s
        if timeout_s is not None:
            self._idle_timer = self._engine.loop.call_later(timeout_s, self._check_idle, timeout_s)

    def data_received(self, data: bytes) -> None:
        self._idle_since_s = self._engine.loop.time()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade:
            # The request that offered an upgrade was answered as it stands, which declines the offer.
            return
        except httptools.HttpParserCallbackError:
            raise
        except httptools.HttpParserError:
            self._refuse_garbage()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._idle_timer is not None:
            self._idle_timer.cancel()
        self._pipeline.clear()
        self._engine.closed(self)
        if self._exchange is not None:
            self._exchange.abandon()

    # What the parser calls

    def on_message_begin(self) -> None:
        self._url = b""
        self._parts = []
        self._body_bytes = 0
        self._expects_continue = False

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(name) == 6 and name.lower() == b"expect":
            self._expects_continue = True

    def on_headers_complete(self) -> None:
        if self._expects_continue:
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, part: bytes) -> None:
        self._body_bytes += len(part)
        if self._body_bytes <= self._engine.options.body_bytes_max:
            self._parts.append(part)
        else:
            self._parts.clear()

    def on_message_complete(self) -> None:
        parts = self._parts
        request = Request(
            self._parser.get_method().decode("latin-1"),
            self._url.partition(b"?")[0].decode("latin-1"),
            parts[0] if len(parts) == 1 else b"".join(parts),
            self._parser.should_keep_alive(),
            self._body_bytes > self._engine.options.body_bytes_max,
        )
        if self._exchange is None and not self._pipeline:
            self._handle(request)
        elif len(self._pipeline) < PIPELINE_MAX:
            self._pipeline.append(request)
        else:
            self.reset()

    # What an exchange calls

    @property
    def is_open(self) -> bool:
        """Whether the client can still be answered."""
        return not self._transport.is_closing()

    def answer(self, reply: Reply, request_id: str, *, keep_alive: bool) -> None:
        """Send a whole reply."""
        self.send(encode_head(reply, request_id, keep_alive=keep_alive) + reply.body)
        self.done(keep_alive=keep_alive)

    def send(self, data: bytes) -> None:
        """Send some bytes of a reply."""
        self._transport.write(data)

    def done(self, *, keep_alive: bool) -> None:
        """Go on to the next request, or close after what was sent."""
        self._exchange = None
        if not keep_alive:
            self.end()
        self._idle_since_s = self._engine.loop.time()
        if self._pipeline:
            # In a later pass of the loop: a long pipeline must not become a deep stack.
            self._engine.loop.call_soon(self._next)

    def end(self) -> None:
        """Close once what was sent is out."""
        self._transport.close()

    def reset(self) -> None:
        """Close at once."""
        self._transport.abort()

    def _next(self) -> None:
        if self._pipeline and self._exchange is None and self.is_open:
            self._handle(self._pipeline.popleft())

    def _handle(self, request: Request) -> None:
        if request.too_large:
            refusal = invalid_request("The body is too large.", status=413, code="request_too_large")
            self.answer(refusal, "req_none", keep_alive=False)
        elif request.method == "POST" and request.path in LINE_PATHS:
            self._exchange = Exchange(self._engine, self, request)
            self._exchange.begin()
        else:
            self.answer(self._engine.page(request), "req_none", keep_alive=request.keep_alive)

    def _refuse_garbage(self) -> None:
        if self._exchange is not None:
            self.end()
        elif self.is_open:
            self.answer(invalid_request("This is not an HTTP request."), "req_none", keep_alive=False)

    def _check_idle(self, timeout_s: float) -> None:
        """Close if idle long enough; the one timer a connection has moves on by itself, at no cost to a request."""
        loop = self._engine.loop
        left_s = timeout_s if self._exchange else self._idle_since_s + timeout_s - loop.time()
        if left_s > 0:
            self._idle_timer = loop.call_later(left_s, self._check_idle, timeout_s)
        else:
            self.end()


class Exchange:
    """One attempt at a line, from its arrival to the end of its answer.

    While its connection is closing it does nothing: once that is closed, `abandon` ends the exchange.
    """

    __slots__ = ("_attempt", "_connection", "_counts", "_engine", "_key", "_request", "_timer", "_verdict", "_visit")

    def __init__(self, engine: ScriptedEngine, connection: Connection, request: Request) -> None:
        self._engine = engine
        self._connection = connection
        self._request = request
        self._key = hashlib.sha256(request.body).digest()
        self._counts: LineCounts = engine.ledger.asked(self._key)
        self._attempt = self._counts.attempts - 1
        self._timer: asyncio.TimerHandle | None = None
        self._visit: Visit | None = None
        self._verdict: Verdict = engine.judge.decide(
            LINE_PATHS[request.path],
            request.body,
            self._key,
            self._attempt,
            self._counts.faults,
            engine.clock.now(),
        )

    def begin(self) -> None:
        """Answer the line, now or later, or do to it what its fault says."""
        verdict = self._verdict
        if verdict.fault is not None:
            self._engine.ledger.faulted(self._counts, verdict.fault)
        if verdict.delay_s > 0:
            self._timer = self._engine.loop.call_later(verdict.delay_s, self._serve)
        else:
            self._serve()
        self._engine.changed()

    def abandon(self) -> None:
        """End without an answer, because the client is gone."""
        if self._timer is not None:
            self._timer.cancel()
        if self._visit is not None:
            self._engine.floor.leave(self._visit)
        self._settle(None, ok=False)

    def _serve(self) -> None:
        self._timer = None
        if not self._connection.is_open:
            return
        if self._verdict.tokens is None:
            self._deliver()
            return
        demand = Demand(len(self._request.body) // PROMPT_BYTES_PER_TOKEN, self._verdict.tokens)
        taken = self._engine.floor.arrive(demand, self._deliver)
        if isinstance(taken, Refuse):
            reply = _too_many_requests(taken.retry_after_s)
            self._settle(reply.status, ok=False)
            self._answer(reply)
        else:
            self._visit = taken

    def _deliver(self) -> None:
        self._visit = None
        verdict = self._verdict
        if not self._connection.is_open:
            return
        if verdict.delivery is Delivery.WHOLE:
            self._settle(verdict.status, ok=verdict.ok)
            self._answer(verdict.reply)
        elif verdict.delivery is Delivery.TRICKLE:
            self._trickle(self._encoded(), 0)
        else:
            self._break()

    def _break(self) -> None:
        """Carry out a fault that leaves the client without a complete reply."""
        delivery = self._verdict.delivery
        if delivery is Delivery.NEVER:
            return
        if delivery is Delivery.EXIT:
            self._settle(None, ok=False)
            os._exit(CRASH_EXIT_CODE)
        if delivery is Delivery.TRUNCATE:
            data = self._encoded()
            self._connection.send(data[: len(data) - len(self._verdict.reply.body) // 2])
        if delivery is Delivery.RESET:
            self._connection.reset()
        else:
            self._connection.end()

    def _trickle(self, data: bytes, piece: int) -> None:
        self._timer = None
        if not self._connection.is_open:
            return
        size = -(-len(data) // TRICKLE_PIECES)
        if (piece + 1) * size >= len(data):
            self._settle(self._verdict.status, ok=self._verdict.ok)
            self._connection.send(data[piece * size :])
            self._connection.done(keep_alive=self._request.keep_alive)
            return
        self._connection.send(data[piece * size : (piece + 1) * size])
        pause_s = self._engine.options.trickle_ms / 1000 / TRICKLE_PIECES
        self._timer = self._engine.loop.call_later(pause_s, self._trickle, data, piece + 1)

    def _answer(self, reply: Reply) -> None:
        self._connection.answer(reply, self._request_id(), keep_alive=self._request.keep_alive)

    def _encoded(self) -> bytes:
        head = encode_head(self._verdict.reply, self._request_id(), keep_alive=self._request.keep_alive)
        return head + self._verdict.reply.body

    def _request_id(self) -> str:
        return f"req_{self._key[:8].hex()}_{self._attempt}"

    def _settle(self, status: int | None, *, ok: bool) -> None:
        entry = Entry(self._key.hex(), self._attempt, self._verdict.fault, status, ok, self._engine.clock.monotonic())
        self._engine.ledger.settled(entry, self._counts)
        self._engine.changed()


def _too_many_requests(retry_after_s: float) -> Reply:
    document = envelope("Rate limit reached.", "requests", "rate_limit_exceeded")
    seconds = str(max(1, math.ceil(retry_after_s)))
    return Reply(429, msgspec.json.encode(document), headers=(("retry-after", seconds),))
