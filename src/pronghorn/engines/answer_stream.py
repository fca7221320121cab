"""An answer that is read while it arrives, and that holds its engine back when its reader is slow."""

from __future__ import annotations

import asyncio
import weakref
from collections import deque
from types import TracebackType
from typing import Self

from pronghorn.domain.answers import Answer, Fault
from pronghorn.engines.client_errors import AnswerCutError
from pronghorn.engines.request import Request

STREAM_BUFFER_BYTES_MAX = 256 * 1024
"""How much of a streamed answer may wait for its reader before the socket is no longer read."""


class AnswerStream:
    """An answer whose body is still arriving: iterate over it for the chunks, one reader at a time.

    Iterating raises AnswerCutError when the body breaks off. Use it in `async with`, or call `aclose()`: an
    answer that is not read to its end costs its connection. One that is merely dropped is closed as well.
    """

    def __init__(self, sink: AnswerSink) -> None:
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


class AnswerSink:
    """What has arrived of a streamed answer and was not read yet."""

    __slots__ = ("_buffered_bytes", "_chunks", "_closed", "_loop", "_waiter", "end", "head", "request")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.request: Request | None = None
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
