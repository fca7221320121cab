"""One connection: what is written to the socket, what its parser makes of what is read, and whether it may be kept."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from httptools import HttpParserError, HttpParserUpgrade, HttpResponseParser

from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.engines.content_coding import TooMuchError, unpacked, without_bom
from pronghorn.engines.large_answers import LARGE_BYTES
from pronghorn.engines.request import Request

if TYPE_CHECKING:
    from pronghorn.engines.connection_pool import ConnectionPool

HEAD_BYTES_MAX = 64 * 1024
"""The largest head of an answer, as in nginx and Envoy; also how much padding a body may start with."""

HEADERS_MAX = 256
"""The most header lines of an answer: engines send under 20, gateways under 60."""

WIRE_BYTES_PER_BODY_BYTE_MAX = 8
"""The worst honest framing is 6 (a chunk for each byte); above it an answer is chunk extensions or trailers."""

REPEAT_BYTES_MIN = 64
"""No answer to a line is shorter; empty objects may well come twice."""

REPEAT_BYTES_HELD_MAX = 64 * 1024
"""Up to this size an answer is kept to be compared with the next one, of a larger one its hash."""

REPEAT_WAIT_S_MIN = 0.05
REPEAT_WAIT_TIMES = 3
"""How long an answer that is the one before waits for the true one: this, and so many times as that one took."""


class Connection(asyncio.Protocol):
    """One connection, at most one request on it, and the parser's callbacks."""

    __slots__ = (
        "_body",
        "_body_bytes",
        "_complete",
        "_head",
        "_headers",
        "_held",
        "_keep_alive",
        "_mark",
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
        "_took_s",
        "_wire_bytes",
        "since_s",
        "transport",
    )

    def __init__(self, pool: ConnectionPool, request: Request) -> None:
        self.transport: asyncio.Transport
        self.since_s = 0.0
        self._pool = pool
        self._request: Request | None = request
        self._parser = HttpResponseParser(self)
        self._reused = False
        self._saw_eof = False
        self._mark: bytes | int = b""
        self._took_s = 0.0
        self._held: tuple[Answer, asyncio.TimerHandle] | None = None
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

    def begin(self, request: Request, now_s: float) -> None:
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
        self._let_go()
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
            if data.strip(b"\r\n") and not data.startswith(_GOODBYES):
                self._pool.distrust()
            return
        if self._held is not None:  # so the answer that is held was sent twice, and this is the true one
            self._pool.distrust()
            self._send_elsewhere(request)
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
        if (held := self._let_go()) is not None:
            request.settle(held)
        elif error is None and self._saw_eof and self._ends_at_eof():
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
            if status < 100:
                self._stop_parser(FaultKind.PROTOCOL, f"answered with status {status}, which is none")
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
        if self._body_bytes > LARGE_BYTES:
            self._pool.large_answers.grew(self, self._body_bytes)
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

    def _on_parser_stop(self, request: Request, error: Exception) -> None:
        if self._complete:
            self._keep_alive = False  # The answer is whole; what came behind it is nobody's.
            self._pool.distrust()
        elif self._stop is not None:
            self.drop()
            request.settle(self._stop)
        elif self._reused and self._status == 0 and not request.retried:
            self._pool.distrust()  # This is the end of an answer before.
            self._send_elsewhere(request)
        else:
            request.fail(FaultKind.PROTOCOL, f"sent something other than HTTP/1: {error}")

    def _finish(self, request: Request) -> None:
        """Take a complete answer, unless it may be the one before, sent twice: then what comes next decides."""
        answer = self._answer()
        if request.retried and request.sink is None and self._status == 503:
            answer = self._pool.gone()
        if isinstance(answer, Answer) and request.sink is None and self._is_suspect(request, answer):
            wait_s = REPEAT_WAIT_S_MIN + REPEAT_WAIT_TIMES * self._took_s
            self._held = answer, self._pool.loop.call_later(wait_s, self._believe)
        else:
            self._hand_over(request, answer)

    def _hand_over(self, request: Request, answer: Answer | Fault) -> None:
        """Settle a request, with the connection already free for what `done` sends next."""
        self._request = None
        request.connection = None
        self._pool.large_answers.ended(self)
        self.resume()
        # An answer ahead of the end of its request comes from an engine that has stopped listening.
        if self._keep_alive and not (request.body and self.transport.get_write_buffer_size()):
            self._reused = True
            self._reset()
            self._pool.release(self)
        else:
            self.transport.abort()
        request.settle(answer)

    def _is_suspect(self, request: Request, answer: Answer) -> bool:
        """Tell whether an answer is the one before on this connection to the last byte."""
        body = answer.body
        if not self._pool.doubts_repeats or len(body) < REPEAT_BYTES_MIN or not 200 <= answer.status < 300:
            return False
        mark: bytes | int = body if len(body) <= REPEAT_BYTES_HELD_MAX else hash(body)
        if mark == self._mark and _USAGE in body:
            return True
        self._mark, self._took_s = mark, self._pool.loop.time() - request.started_s
        return False

    def _believe(self) -> None:
        """Hand over an answer that no other has followed: this engine says the same to different lines."""
        answer, request = self._let_go(), self._request
        self._pool.doubts_repeats = False
        if answer is not None and request is not None:
            self._hand_over(request, answer)

    def _let_go(self) -> Answer | None:
        """Return the answer that was held, if any, and hold it no longer."""
        if self._held is None:
            return None
        (answer, timer), self._held = self._held, None
        timer.cancel()
        return answer

    def _send_elsewhere(self, request: Request) -> None:
        """Ask again on a new connection, for this one's answers are not those to its requests."""
        self.drop()
        self._pool.retry(request)

    def _answer(self) -> Answer | Fault:
        head, body = self._head, bytes(self._body)
        if b"content-encoding" in head:
            return self._unpacked_answer(head, body)
        return Answer(self._status, head, without_bom(body))

    def _unpacked_answer(self, head: dict[bytes, bytes], body: bytes) -> Answer | Fault:
        limit = self._pool.answer_bytes_max
        try:
            content = unpacked(body, head[b"content-encoding"], limit)
        except TooMuchError:
            return self._pool.fault(FaultKind.TOO_LARGE, f"sent an answer that unpacks to more than {limit} bytes")
        if content is not None:
            head = {name: value for name, value in head.items() if name != b"content-encoding"}
        return Answer(self._status, head, without_bom(body if content is None else content))

    def _ends_at_eof(self) -> bool:
        coding = self._head.get(b"transfer-encoding")
        if self._status == 0:
            return False
        if coding is not None:
            return not coding.lower().rstrip().endswith(b"chunked")
        return b"content-length" not in self._head


# Every answer to a line has it, and no error that comes as a success: those are the same for many lines.
_USAGE = b'"usage"'
# A gateway says so before it closes a connection that was idle for long, and no answer has gone astray.
_GOODBYES = (b"HTTP/1.1 408", b"HTTP/1.0 408")


class _ParserStop(Exception):
    """Leaves the parser from one of its callbacks."""


def _size_bytes(headers: Mapping[bytes, bytes]) -> int:
    return sum(len(name) + len(value) for name, value in headers.items())
