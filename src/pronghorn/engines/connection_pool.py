"""The connections to one engine: opened, kept for the next request, and swept for what took too long."""

from __future__ import annotations

import asyncio
import socket
import ssl
from functools import partial

from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.engines.connection import Connection
from pronghorn.engines.large_answers import LargeAnswers
from pronghorn.engines.request import Done, Request, Timeouts
from pronghorn.engines.request_head import Address
from pronghorn.errors import is_out_of_files

SWEEP_S_MIN = 0.02
SWEEP_S_MAX = 0.5
"""Timeouts are checked every quarter of the shortest one, within these bounds: never early, little late."""


class ConnectionPool:
    """The connections to one engine: the free ones, the busy ones, and the sweep that watches the time."""

    def __init__(
        self,
        address: Address,
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
        self.connections: set[Connection] = set()
        self.idle: list[Connection] = []
        self.large_answers = LargeAnswers()
        self.stale_retries = 0
        self.doubts_repeats = True
        self.closed = False
        self._keeps = True
        self._address = address
        self._idle_connections_max = idle_connections_max
        self._ssl_context = ssl_context
        self._connecting: dict[asyncio.Task[None], Request] = {}
        self._drained = asyncio.Event()
        self._sweeper: asyncio.TimerHandle | None = None
        shortest_s = min(idle_connection_s, timeouts.first_byte_s, timeouts.idle_s, timeouts.total_s)
        self._sweep_s = min(max(shortest_s / 4, SWEEP_S_MIN), SWEEP_S_MAX)

    def start(self, request: Request) -> None:
        """Send the request on the connection that was freed last, or on a new one."""
        while self.idle:
            connection = self.idle.pop()
            if not connection.transport.is_closing():
                connection.begin(request, request.started_s)
                return
        self.connect(request)

    def release(self, connection: Connection) -> None:
        """Take back a connection whose answer is complete."""
        full = len(self.idle) >= self._idle_connections_max
        if full or not self._keeps or self.closed or connection.transport.is_closing():
            connection.transport.abort()
            return
        connection.since_s = self.loop.time()
        self.idle.append(connection)

    def connect(self, request: Request) -> None:
        if self.closed:
            request.fail(FaultKind.ABORTED, "was not asked: the client is closed")
            return
        task = request.connecting = self.loop.create_task(self._connect(request))
        self._connecting[task] = request
        task.add_done_callback(partial(self._connected, request))

    def retry(self, request: Request) -> None:
        """Send again, once, what a dead reused connection swallowed."""
        request.retried = True
        self.stale_retries += 1
        self.connect(request)

    def distrust(self) -> None:
        """Use each connection once from now on: what this engine sends is not always the answer to what it was sent."""
        self._keeps = False
        for connection in list(self.idle):
            connection.drop()

    def joined(self, connection: Connection) -> None:
        self.connections.add(connection)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(self._sweep_s, self._sweep)

    def leave_idle(self, connection: Connection) -> None:
        if connection in self.idle:
            self.idle.remove(connection)

    def left(self, connection: Connection) -> None:
        self.connections.discard(connection)
        self.leave_idle(connection)
        self.large_answers.ended(connection)
        if not self.connections:
            self._drained.set()

    def fault(self, kind: FaultKind, what: str) -> Fault:
        return Fault(kind, f"engine {self._address.origin} {what}")

    def gone(self) -> Fault:
        """Return the fault of a request that was sent before: the engine may have ended while it had it."""
        return self.fault(FaultKind.DISCONNECTED, "closed the connection before it answered, and takes nothing more")

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

    async def _connect(self, request: Request) -> None:
        """Open a connection for the request, which its `connection_made` sends."""
        limit_s = self.timeouts.connect_s
        what = f"did not accept a connection within {limit_s:g} s"
        timer = self.loop.call_later(limit_s, request.fail, FaultKind.CONNECT_TIMEOUT, what)
        try:
            await self._open(request)
        except Exception as error:
            # With a connection made, connection_lost has the say.
            if request.connection is None:
                request.settle(self.gone() if request.retried else self._connect_fault(error))
        finally:
            timer.cancel()

    async def _open(self, request: Request) -> None:
        """Open a connection to the first of the host's addresses that takes one."""
        # A look-up by uvloop's create_connection that fails after it was given up is logged as an error.
        found = await self.loop.getaddrinfo(self._address.host, self._address.port, type=socket.SOCK_STREAM)
        if not found:
            raise OSError("its host name has no address")
        for number, (*_, address) in enumerate(found, start=1):
            try:
                await self.loop.create_connection(
                    partial(Connection, self, request),
                    str(address[0]),
                    self._address.port,
                    ssl=self._ssl_context,
                    server_hostname=self._address.host if self._ssl_context else None,
                )
                return
            except OSError as error:
                if number == len(found) or isinstance(error, ssl.SSLError):
                    raise

    def _connected(self, request: Request, task: asyncio.Task[None]) -> None:
        del self._connecting[task]
        request.connecting = None
        # Not left to _connect itself, which never begins when it is cancelled soon enough.
        if task.cancelled():
            request.abort()

    def _connect_fault(self, error: Exception) -> Fault:
        match error:
            case OSError() if is_out_of_files(error):
                return self.fault(FaultKind.OUT_OF_FILES, f"could not be asked: {error.strerror}")
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
