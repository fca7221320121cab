"""The HTTP/1.1 client that carries lines to one engine: a protocol a connection, callbacks all the way.

The way of one request, which is the hot path::

    client.py           EngineClient.send
    connection_pool.py  ConnectionPool.start                            on the connection freed last, or a new one
    connection.py       Connection.begin                                write to the socket
                        Connection.data_received -> parser -> _finish   read from it
    connection_pool.py  ConnectionPool.release                          connection back first,
    request.py          Request.settle -> done(Answer | Fault)          then the result

Everything that can go wrong on the wire is a `Fault`, a value; what is raised is drawn in `client_errors.py`.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType

from pronghorn import __version__
from pronghorn.domain.answers import Answer, Fault
from pronghorn.engines.answer_stream import AnswerSink, AnswerStream
from pronghorn.engines.client_errors import AnswerCutError, EngineAddressError, EngineClientError, EngineRequestError
from pronghorn.engines.connection_pool import ConnectionPool
from pronghorn.engines.request import Call, Done, Request, Timeouts
from pronghorn.engines.request_head import head_lines, merge_headers, parse_base_url

__all__ = [
    "AnswerCutError",
    "AnswerStream",
    "Call",
    "Done",
    "EngineAddressError",
    "EngineClient",
    "EngineClientError",
    "EngineRequestError",
    "Timeouts",
]

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""The default for the largest answer: a long completion with log-probabilities stays below 20 MiB."""

JOINED_BODY_BYTES_MAX = 64 * 1024
"""Bodies up to this size are copied behind their head to save a write; above it the copy costs more."""

IDLE_CONNECTIONS_MAX = 1024
"""As many connections as the largest window keeps busy, so that none is closed only to be opened again."""

IDLE_CONNECTION_S = 4.0
"""vLLM closes a connection that was idle for 5 s; leaving first avoids sending a line into a closed one."""

CACHED_HEADS_MAX = 64
"""Heads are kept for this many paths; a batch uses three or four."""

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


class EngineClient:
    """Sends requests to one engine over a pool of kept-alive connections; build it in a running loop.

    `base_url` is `http(s)://host[:port][/path]` and every path given later is appended to it. `headers`
    (an Authorization, say) go with every request. `ssl_context` replaces the system's certificates.
    There is no limit on concurrent requests, each has a connection of its own: the caller's window is the limit.
    Redirects are answers and are not followed, proxies are not used. Bodies are not asked for compressed, and unpacked
    where they are, streams excepted.
    Raises EngineAddressError and EngineRequestError for a base URL or header that cannot be used.
    """

    def __init__(
        self,
        base_url: str,
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        timeouts: Timeouts | None = None,
        answer_bytes_max: int = ANSWER_BYTES_MAX,
        idle_connections_max: int = IDLE_CONNECTIONS_MAX,
        idle_connection_s: float = IDLE_CONNECTION_S,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._address = parse_base_url(base_url)
        self._headers = merge_headers({"Accept": "application/json", "User-Agent": f"pronghorn/{__version__}"}, headers)
        if self._address.tls and ssl_context is None:
            ssl_context = ssl.create_default_context()
            ssl_context.set_alpn_protocols(["http/1.1"])
        self._pool = ConnectionPool(
            self._address,
            timeouts or Timeouts(),
            answer_bytes_max=answer_bytes_max,
            idle_connections_max=idle_connections_max,
            idle_connection_s=idle_connection_s,
            ssl_context=ssl_context if self._address.tls else None,
        )
        self._post_heads: dict[str, bytes] = {}

    @property
    def origin(self) -> str:
        """The engine as people know it, `http://host:port`."""
        return self._address.origin

    @property
    def open_connections(self) -> int:
        """How many connections are up, busy and idle."""
        return len(self._pool.connections)

    @property
    def idle_connections(self) -> int:
        """How many connections wait for a request."""
        return len(self._pool.idle)

    @property
    def stale_retries(self) -> int:
        """How many requests were sent again because a reused connection turned out to be dead."""
        return self._pool.stale_retries

    def send(self, path: str, body: bytes, done: Done) -> Call:
        """POST a JSON body and call `done` with the answer or the fault.

        `done` is called exactly once, from the event loop, never from inside `send()` or `abort()`. The
        connection is free again by then, so a request that `done` sends reuses it. What `done` raises goes to
        the loop's exception handler. Raises EngineRequestError for a path that cannot be sent.
        """
        head = self._post_heads.get(path) or self._post_head(path)
        if len(body) <= JOINED_BODY_BYTES_MAX:
            request = Request(self._pool, b"%b%d\r\n\r\n%b" % (head, len(body), body), b"", done)
        else:
            request = Request(self._pool, b"%b%d\r\n\r\n" % (head, len(body)), body, done)
        self._pool.start(request)
        return request

    async def request(
        self,
        method: str,
        path: str,
        body: bytes = b"",
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        timeout_s: float | None = None,
    ) -> Answer | Fault:
        """Send one request and return its answer or fault; cancelling it closes its connection.

        `headers` are added to, and replace, the client's. `timeout_s` is on top of the client's timeouts.
        Raises EngineRequestError for a method, path or header that cannot be sent; HEAD is one of them.
        """
        loop = self._pool.loop
        result: asyncio.Future[Answer | Fault] = loop.create_future()
        head = self._head(method, path, body, headers)
        request = Request(self._pool, head, body, partial(_resolve, result))
        self._pool.start(request)
        timer = None if timeout_s is None else loop.call_later(timeout_s, request.expire, timeout_s)
        try:
            return await result
        finally:
            request.abort()
            if timer is not None:
                timer.cancel()

    async def stream(
        self, method: str, path: str, body: bytes = b"", *, headers: Mapping[str, str] = _NO_HEADERS
    ) -> AnswerStream | Fault:
        """Send one request and return as soon as the head of its answer is here, or the fault if none comes.

        The body is then read from the stream, which holds the engine back when its reader is slow; it has no
        size limit. Raises what `request` raises.
        """
        sink = AnswerSink(self._pool.loop)
        head = self._head(method, path, body, headers)
        sink.request = request = Request(self._pool, head, body, sink.on_end, sink)
        self._pool.start(request)
        try:
            early = await sink.wait_for_head()
        except asyncio.CancelledError:
            request.abort()
            raise
        return early or AnswerStream(sink)

    async def close(self) -> None:
        """Abort what is under way and return when every connection is gone; later requests are ABORTED."""
        await self._pool.close()

    def _post_head(self, path: str) -> bytes:
        headers = merge_headers({"Content-Type": "application/json"}, self._headers)
        head = head_lines("POST", self._address, path, headers) + b"Content-Length: "
        if len(self._post_heads) < CACHED_HEADS_MAX:
            self._post_heads[path] = head
        return head

    def _head(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        headers = merge_headers(self._headers, headers)
        if not body and method not in ("POST", "PUT", "PATCH"):
            return head_lines(method, self._address, path, headers) + b"\r\n"
        headers = merge_headers({"Content-Type": "application/json"}, headers)
        return b"%bContent-Length: %d\r\n\r\n" % (head_lines(method, self._address, path, headers), len(body))


def _resolve(future: asyncio.Future[Answer | Fault], result: Answer | Fault) -> None:
    if not future.done():
        future.set_result(result)
