"""The HTTP/1.1 client that carries lines to one engine: a protocol a connection, callbacks all the way.

The way of one request, which is the hot path and reads in this order::

    EngineClient.send -> _Pool.start -> _Connection.begin          write to the socket
    _Connection.data_received -> parser -> on_message_complete     read from it
    _Connection._finish -> _Pool.release -> done(Answer | Fault)   connection back first, then the result

Everything that can go wrong on the wire is a `Fault`, a value. What a caller does wrong is raised::

    EngineClientError
    |-- EngineAddressError (ValueError)   the base URL cannot be used
    |-- EngineRequestError (ValueError)   a method, path or header cannot be sent
    `-- AnswerCutError                    a streamed answer broke off after its head
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from types import MappingProxyType, TracebackType
from typing import Protocol, Self, TypeAlias, cast
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from pronghorn import __version__
from pronghorn.domain.answers import Answer, Fault, FaultKind

ANSWER_BYTES_MAX = 64 * 1024 * 1024
"""The default for the largest answer: a long completion with log-probabilities stays below 20 MiB."""

HEAD_BYTES_MAX = 64 * 1024
"""The largest head of an answer, as in nginx and Envoy; also how much padding a body may start with."""

HEADERS_MAX = 256
"""The most header lines of an answer: engines send under 20, gateways under 60."""

WIRE_BYTES_PER_BODY_BYTE_MAX = 8
"""The worst honest framing is 6 (a chunk for each byte); above it an answer is chunk extensions or trailers."""

JOINED_BODY_BYTES_MAX = 64 * 1024
"""Bodies up to this size are copied behind their head to save a write; above it the copy costs more."""

STREAM_BUFFER_BYTES_MAX = 256 * 1024
"""How much of a streamed answer may wait for its reader before the socket is no longer read."""

IDLE_CONNECTIONS_MAX = 1024
"""As many connections as the largest window keeps busy, so that none is closed only to be opened again."""

IDLE_CONNECTION_S = 4.0
"""vLLM closes a connection that was idle for 5 s; leaving first avoids sending a line into a closed one."""

SWEEP_S_MIN = 0.02
SWEEP_S_MAX = 0.5
"""Timeouts are checked every quarter of the shortest one, within these bounds: never early, little late."""

CACHED_HEADS_MAX = 64
"""Heads are kept for this many paths; a batch uses three or four."""

_FRAMING_HEADERS = frozenset(
    {"accept-encoding", "connection", "content-length", "expect", "host", "keep-alive"}
    | {"proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"}
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})

_visible = re.compile(r"[!-~]+").fullmatch
_token = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+").fullmatch
_field_value = re.compile(r"(?:[!-~\x80-\xff](?:[\t -~\x80-\xff]*[!-~\x80-\xff])?)?").fullmatch


class EngineClientError(Exception):
    """Something was asked of the engine client that it does not do."""


class EngineAddressError(EngineClientError, ValueError):
    """The engine's base URL cannot be used."""


class EngineRequestError(EngineClientError, ValueError):
    """A method, path or header cannot be sent to an engine."""


class AnswerCutError(EngineClientError):
    """A streamed answer broke off after its head; `fault` says how."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(fault.detail)
        self.fault = fault


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


class EngineClient:
    """Sends requests to one engine over a pool of kept-alive connections; build it in a running loop.

    `base_url` is `http(s)://host[:port][/path]` and every path given later is appended to it. `headers`
    (an Authorization, say) go with every request. `ssl_context` replaces the system's certificates.
    There is no limit on concurrent requests, each has a connection of its own: the caller's window is the limit.
    Redirects are answers and are not followed, bodies are not decompressed, proxies are not used.
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
        self._address = _parse_base_url(base_url)
        self._headers = _merge_headers(
            {"Accept": "application/json", "User-Agent": f"pronghorn/{__version__}"}, headers
        )
        if self._address.tls and ssl_context is None:
            ssl_context = ssl.create_default_context()
            ssl_context.set_alpn_protocols(["http/1.1"])
        self._pool = _Pool(
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
            request = _Request(self._pool, b"%b%d\r\n\r\n%b" % (head, len(body), body), b"", done)
        else:
            request = _Request(self._pool, b"%b%d\r\n\r\n" % (head, len(body)), body, done)
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
        request = _Request(self._pool, head, body, partial(_resolve, result))
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
        sink = _Sink(self._pool.loop)
        head = self._head(method, path, body, headers)
        sink.request = request = _Request(self._pool, head, body, sink.on_end, sink)
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
        head = self._head_lines("POST", path, _merge_headers({"Content-Type": "application/json"}, self._headers))
        head += b"Content-Length: "
        if len(self._post_heads) < CACHED_HEADS_MAX:
            self._post_heads[path] = head
        return head

    def _head(self, method: str, path: str, body: bytes, headers: Mapping[str, str]) -> bytes:
        headers = _merge_headers(self._headers, headers)
        if not body and method not in ("POST", "PUT", "PATCH"):
            return self._head_lines(method, path, headers) + b"\r\n"
        headers = _merge_headers({"Content-Type": "application/json"}, headers)
        return b"%bContent-Length: %d\r\n\r\n" % (self._head_lines(method, path, headers), len(body))

    def _head_lines(self, method: str, path: str, headers: Mapping[str, str]) -> bytes:
        # An answer to HEAD or CONNECT is framed by its request, which the parser does not know.
        if not _token(method) or method in ("HEAD", "CONNECT"):
            raise EngineRequestError(f"method {method!r} cannot be sent")
        if not path.startswith("/") or not _visible(path) or "#" in path:
            raise EngineRequestError("a path starts with / and holds visible ASCII characters but no #")
        lines = [f"{method} {self._address.path}{path} HTTP/1.1", f"Host: {self._address.host_header}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        return "\r\n".join([*lines, ""]).encode("latin-1")


class AnswerStream:
    """An answer whose body is still arriving: iterate over it for the chunks, one reader at a time.

    Iterating raises AnswerCutError when the body breaks off. Use it in `async with`, or call `aclose()`: an
    answer that is not read to its end costs its connection. One that is merely dropped is closed as well.
    """

    def __init__(self, sink: _Sink) -> None:
        self.status, self.headers = sink.head or (0, {})
        self._sink = sink
        weakref.finalize(self, sink.abandon).atexit = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> bytes:
        return await self._sink.read()

    async def aclose(self) -> None:
        """Stop reading; closes the connection unless the answer had ended."""
        self._sink.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()


class _Request:
    """One request from start to its one result; `done` is None once that is on its way."""

    __slots__ = ("body", "connecting", "connection", "done", "head", "pool", "retried", "sink", "started_s")

    def __init__(self, pool: _Pool, head: bytes, body: bytes, done: Done, sink: _Sink | None = None) -> None:
        self.pool = pool
        self.head = head
        self.body = body
        self.done: Done | None = done
        self.sink = sink
        self.connection: _Connection | None = None
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


class _Pool:
    """The connections to one engine: the free ones, the busy ones, and the sweep that watches the time."""

    def __init__(
        self,
        address: _Address,
        timeouts: Timeouts,
        *,
        answer_bytes_max: int,
        idle_connections_max: int,
        idle_connection_s: float,
        ssl_context: ssl.SSLContext | None,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.timeouts = timeouts
        self.answer_bytes_max = answer_bytes_max
        self.idle_connection_s = idle_connection_s
        self.connections: set[_Connection] = set()
        self.idle: list[_Connection] = []
        self.stale_retries = 0
        self.closed = False
        self._address = address
        self._idle_connections_max = idle_connections_max
        self._ssl_context = ssl_context
        self._connecting: dict[asyncio.Task[None], _Request] = {}
        self._drained = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        shortest_s = min(idle_connection_s, timeouts.first_byte_s, timeouts.idle_s, timeouts.total_s)
        self._sweep_s = min(max(shortest_s / 4, SWEEP_S_MIN), SWEEP_S_MAX)

    def start(self, request: _Request) -> None:
        """Send the request on the connection that was freed last, or on a new one."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                connection.begin(request, request.started_s)
                return
        self.connect(request)

    def release(self, connection: _Connection) -> None:
        """Take back a connection whose answer is complete."""
        if len(self.idle) >= self._idle_connections_max or self.closed or connection.transport.is_closing():
            connection.transport.abort()
            return
        connection.since_s = self.loop.time()
        self.idle.append(connection)

    def connect(self, request: _Request) -> None:
        if self.closed:
            request.fail(FaultKind.ABORTED, "was not asked: the client is closed")
            return
        task = request.connecting = self.loop.create_task(self._connect(request))
        self._connecting[task] = request
        task.add_done_callback(partial(self._connected, request))

    def retry(self, request: _Request) -> None:
        """Send again, once, what a dead reused connection swallowed."""
        request.retried = True
        self.stale_retries += 1
        self.connect(request)

    def joined(self, connection: _Connection) -> None:
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self._sweep_s, self._sweep)

    def leave_idle(self, connection: _Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def left(self, connection: _Connection) -> None:
        self.connections.discard(connection)
        self.leave_idle(connection)
        if not self.connections:
            self._drained.set()

    def fault(self, kind: FaultKind, what: str) -> Fault:
        return Fault(kind, f"engine {self._address.origin} {what}")

    def deliver(self, done: Done, result: Answer | Fault) -> None:
        try:
            done(result)
        except Exception as error:
            message = "the callback of an engine request failed"
            self.loop.call_exception_handler({"message": message, "exception": error})

    async def close(self) -> None:
        self.closed = True
        if self._sweeper is not None:
            self._sweeper.cancel()
        for request in list(self._connecting.values()):
            request.abort()
        for connection in list(self.connections):
            connection.abort()
        if self._connecting:
            await asyncio.wait(self._connecting)
        while self.connections:
            self._drained.clear()
            await self._drained.wait()

    async def _connect(self, request: _Request) -> None:
        """Open a connection for the request, which its `connection_made` sends."""
        limit_s = self.timeouts.connect_s
        what = f"did not accept a connection within {limit_s:g} s"
        timer = self.loop.call_later(limit_s, request.fail, FaultKind.CONNECT_TIMEOUT, what)
        try:
            await self.loop.create_connection(
                partial(_Connection, self, request),
                self._address.host,
                self._address.port,
                ssl=self._ssl_context,
                server_hostname=self._address.host if self._ssl_context else None,
            )
        except Exception as error:
            # With a connection made, connection_lost has the say.
            if request.connection is None:
                request.settle(self._connect_fault(error))
        finally:
            timer.cancel()

    def _connected(self, request: _Request, task: asyncio.Task[None]) -> None:
        del self._connecting[task]
        request.connecting = None
        # Not left to _connect itself, which never begins when it is cancelled soon enough.
        if task.cancelled():
            request.abort()

    def _connect_fault(self, error: Exception) -> Fault:
        match error:
            case ssl.SSLError():
                return self.fault(FaultKind.TLS, f"failed the TLS handshake: {error}")
            case TimeoutError():
                return self.fault(FaultKind.CONNECT_TIMEOUT, "did not answer the attempt to connect")
            case ConnectionRefusedError():
                return self.fault(FaultKind.REFUSED, "refused the connection")
            case socket.gaierror() | UnicodeError():
                return self.fault(FaultKind.DNS, "could not be found: its host name does not resolve")
            case ConnectionError() if self._ssl_context:
                return self.fault(FaultKind.TLS, "closed the connection during the TLS handshake")
            case _:
                return self.fault(FaultKind.REFUSED, f"could not be reached: {error}")

    def _sweep(self) -> None:
        now_s = self.loop.time()
        for connection in list(self.connections):
            connection.check(now_s)
        again = bool(self.connections) and not self.closed
        self._sweeper = self.loop.call_later(self._sweep_s, self._sweep) if again else None


class _Connection(asyncio.Protocol):
    """One connection, at most one request on it, and the parser's callbacks."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_complete",
        "_head",
        "_headers",
        "_keep_alive",
        "_parser",
        "_paused",
        "_pool",
        "_repeats",
        "_request",
        "_reused",
        "_saw_eof",
        "_status",
        "_stop",
        "_swept_bytes",
        "_wire_bytes",
        "since_s",
        "transport",
    )

    def __init__(self, pool: _Pool, request: _Request) -> None:
        self.transport: asyncio.Transport
        self.since_s = 0.0
        self._pool = pool
        self._request: _Request | None = request
        self._parser = HttpResponseParser(self)
        self._reused = False
        self._saw_eof = False
        self._reset()

    def _reset(self) -> None:
        self._status = 0
        self._headers: dict[bytes, bytes] = {}
        self._head = self._headers
        self._repeats = 0
        self._body: bytes | bytearray = b""
        self._body_bytes = 0
        self._wire_bytes = 0
        self._swept_bytes = 0
        self._complete = False
        self._keep_alive = False
        self._paused = False
        self._stop: Fault | None = None

    def begin(self, request: _Request, now_s: float) -> None:
        self._request = request
        request.connection = self
        self.since_s = now_s
        self.transport.write(request.head)
        if request.body:
            self.transport.write(request.body)

    def drop(self) -> None:
        """Let go of the request, if any, and of the connection, whose state is unknown."""
        if self._request is not None:
            self._request.connection = None
            self._request = None
        self._pool.leave_idle(self)
        self.transport.abort()

    def abort(self) -> None:
        if self._request is None:
            self.drop()
        else:
            self._request.abort()

    def pause(self) -> None:
        if not self._paused:
            self._paused = True
            self.transport.pause_reading()

    def resume(self) -> None:
        if self._paused:
            self._paused = False
            self.transport.resume_reading()

    def check(self, now_s: float) -> None:
        """Look at the clock for this connection; bytes since the last look, or a reader's pause, restart it."""
        request, timeouts = self._request, self._pool.timeouts
        if request is None:
            if now_s - self.since_s >= self._pool.idle_connection_s:
                self.drop()
            return
        if self._paused or self._wire_bytes != self._swept_bytes:
            self._swept_bytes = self._wire_bytes
            self.since_s = now_s
        if now_s - request.started_s >= timeouts.total_s:
            request.expire(timeouts.total_s)
        elif self._status == 0 and now_s - self.since_s >= timeouts.first_byte_s:
            what = f"did not begin an answer for {timeouts.first_byte_s:g} s"
            request.fail(FaultKind.FIRST_BYTE_TIMEOUT, what)
        elif self._status != 0 and now_s - self.since_s >= timeouts.idle_s:
            request.fail(FaultKind.IDLE_TIMEOUT, f"stopped in mid-answer for {timeouts.idle_s:g} s")

    # What the event loop calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        request, self._request = self._request, None
        if request is None or request.done is None:
            self.transport.abort()
        else:
            self._pool.joined(self)
            self.begin(request, self._pool.loop.time())

    def data_received(self, data: bytes) -> None:
        request = self._request
        if request is None:
            self.drop()
            return
        self._wire_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except (HttpParserError, HttpParserUpgrade) as error:
            self._on_parser_stop(request, error)
        if self._complete:
            self._finish(request)
        elif self._wire_bytes > HEAD_BYTES_MAX + WIRE_BYTES_PER_BODY_BYTE_MAX * self._body_bytes:
            request.fail(FaultKind.TOO_LARGE, f"sent more than {HEAD_BYTES_MAX} bytes around its answer")

    def eof_received(self) -> None:
        self._saw_eof = True
        self._pool.leave_idle(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._pool.left(self)
        request, self._request = self._request, None
        if request is None:
            return
        request.connection = None
        if error is None and self._saw_eof and self._ends_at_eof():
            request.settle(self._answer())
        elif self._reused and self._wire_bytes == 0 and not request.retried:
            self._pool.retry(request)
        else:
            when = "in mid-answer" if self._wire_bytes else "before it answered"
            request.settle(self._pool.fault(FaultKind.DISCONNECTED, f"closed the connection {when}"))

    # What the parser calls. Nothing here calls out: results are handed over once the parser has returned.

    def on_message_begin(self) -> None:
        if self._complete:
            self._keep_alive = False
            raise _ParserStop

    def on_header(self, name: bytes, value: bytes) -> None:
        headers = self._headers
        name = name.lower()
        if name in headers:
            value = headers[name] + b", " + value
            self._repeats += 1
        headers[name] = value
        if len(headers) + self._repeats > HEADERS_MAX:
            self._stop_parser(FaultKind.TOO_LARGE, f"sent more than {HEADERS_MAX} headers")

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        head, self._headers = self._headers, {}  # What follows a head is a trailer, and is not used.
        if status < 200:
            if status == 101:
                self._stop_parser(FaultKind.PROTOCOL, "switched protocols without being asked to")
            return
        self._status = status
        self._head = head
        if self._wire_bytes > HEAD_BYTES_MAX and _size_bytes(head) > HEAD_BYTES_MAX:
            self._stop_parser(FaultKind.TOO_LARGE, f"sent a head of more than {HEAD_BYTES_MAX} bytes")
        request = self._request
        if request is not None and request.sink is not None:
            request.sink.on_head(status, head)

    def on_body(self, chunk: bytes) -> None:
        self._body_bytes += len(chunk)
        request = self._request
        if request is not None and request.sink is not None:
            request.sink.on_chunk(chunk)
            return
        limit = self._pool.answer_bytes_max
        if self._body_bytes > limit:
            self._stop_parser(FaultKind.TOO_LARGE, f"sent an answer of more than {limit} bytes")
        if not self._body:
            self._body = chunk
        elif isinstance(self._body, bytearray):
            self._body += chunk
        else:
            self._body = bytearray(self._body) + chunk

    def on_message_complete(self) -> None:
        if self._status != 0:
            self._complete = True
            self._keep_alive = self._parser.should_keep_alive()

    def _stop_parser(self, kind: FaultKind, what: str) -> None:
        self._stop = self._pool.fault(kind, what)
        raise _ParserStop

    def _on_parser_stop(self, request: _Request, error: Exception) -> None:
        if self._complete:
            self._keep_alive = False  # The answer is whole; what came behind it is nobody's.
        elif self._stop is not None:
            self.drop()
            request.settle(self._stop)
        else:
            request.fail(FaultKind.PROTOCOL, f"sent something other than HTTP/1: {error}")

    def _finish(self, request: _Request) -> None:
        """Hand over a complete answer, with the connection already free for what `done` sends next."""
        answer = self._answer()
        self._request = None
        request.connection = None
        self.resume()
        # An answer ahead of the end of its request comes from an engine that has stopped listening.
        if self._keep_alive and not (request.body and self.transport.get_write_buffer_size()):
            self._reused = True
            self._reset()
            self._pool.release(self)
        else:
            self.transport.abort()
        request.settle(answer)

    def _answer(self) -> Answer:
        return Answer(self._status, self._head, bytes(self._body))

    def _ends_at_eof(self) -> bool:
        coding = self._head.get(b"transfer-encoding")
        if self._status == 0:
            return False
        if coding is not None:
            return not coding.lower().rstrip().endswith(b"chunked")
        return b"content-length" not in self._head


class _ParserStop(Exception):
    """Leaves the parser from one of its callbacks."""


class _Sink:
    """What has arrived of a streamed answer and was not read yet."""

    __slots__ = ("_buffered_bytes", "_chunks", "_closed", "_loop", "_waiter", "end", "head", "request")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.request: _Request | None = None
        self.head: tuple[int, dict[bytes, bytes]] | None = None
        self.end: Answer | Fault | None = None
        self._loop = loop
        self._chunks: deque[bytes] = deque()
        self._buffered_bytes = 0
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def on_head(self, status: int, headers: dict[bytes, bytes]) -> None:
        self.head = status, headers
        self._wake()

    def on_chunk(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self._buffered_bytes += len(chunk)
        connection = self.request and self.request.connection
        if connection and self._buffered_bytes > STREAM_BUFFER_BYTES_MAX:
            connection.pause()
        self._wake()

    def on_end(self, result: Answer | Fault) -> None:
        self.end = result
        self._wake()

    async def wait_for_head(self) -> Fault | None:
        while self.head is None:
            if isinstance(self.end, Fault):
                return self.end
            await self._wait()
        return None

    async def read(self) -> bytes:
        while not self._chunks:
            if self._closed:
                raise StopAsyncIteration
            if isinstance(self.end, Fault):
                raise AnswerCutError(self.end)
            if self.end is not None:
                raise StopAsyncIteration
            await self._wait()
        chunk = self._chunks.popleft()
        self._buffered_bytes -= len(chunk)
        connection = self.request and self.request.connection
        if connection and self._buffered_bytes <= STREAM_BUFFER_BYTES_MAX // 2:
            connection.resume()
        return chunk

    def close(self) -> None:
        self._closed = True
        self._chunks.clear()
        if self.request is not None:
            self.request.abort()

    def abandon(self) -> None:
        """Close from wherever the garbage collector happened to run."""
        if self.end is None and not self._closed and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self.close)

    async def _wait(self) -> None:
        self._waiter = self._loop.create_future()
        await self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


@dataclass(frozen=True, slots=True)
class _Address:
    """A base URL taken apart: where to connect to, what to call it, and what to put before each path."""

    tls: bool
    host: str
    port: int
    path: str
    host_header: str
    origin: str


def _parse_base_url(base_url: str) -> _Address:
    # Checked first because urlsplit silently drops tabs and line ends.
    if not _visible(base_url):
        raise EngineAddressError("a base URL is written in visible ASCII characters, host names in punycode")
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise EngineAddressError("the base URL has a host or port that is not one") from error
    if parts.scheme not in _DEFAULT_PORTS:
        raise EngineAddressError("a base URL starts with http:// or https://")
    if "@" in parts.netloc:
        raise EngineAddressError("a base URL holds no user name or password: send an Authorization header")
    if not host or port == 0 or "?" in base_url or "#" in base_url:
        raise EngineAddressError("a base URL is http(s)://host[:port][/path], with no query or fragment")
    default_port = _DEFAULT_PORTS[parts.scheme]
    host_header = f"[{host}]" if ":" in host else host
    if port not in (None, default_port):
        host_header += f":{port}"
    return _Address(
        tls=parts.scheme == "https",
        host=host,
        port=port or default_port,
        path=parts.path.rstrip("/"),
        host_header=host_header,
        origin=f"{parts.scheme}://{host_header}",
    )


def _merge_headers(base: Mapping[str, str], extra: Mapping[str, str]) -> dict[str, str]:
    """Return `base` with `extra` put over it, names compared without case."""
    for name, value in extra.items():
        if not _token(name) or not _field_value(value):
            raise EngineRequestError(f"header {name!r} has a name or value that cannot be sent")
        if name.lower() in _FRAMING_HEADERS:
            raise EngineRequestError(f"header {name!r} is set by the client itself")
    replaced = {name.lower() for name in extra}
    return {name: value for name, value in base.items() if name.lower() not in replaced} | dict(extra)


def _size_bytes(headers: Mapping[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in headers.items())


def _resolve(future: asyncio.Future[Answer | Fault], result: Answer | Fault) -> None:
    if not future.done():
        future.set_result(result)
