"""A bare asyncio client with httptools, the least that Python can do: `python -m bench.bare URL CONNECTIONS REQUESTS`.

It sends one body over and over and reads the answers' status and length; prints requests/s and CPU microseconds each.
"""

from __future__ import annotations

import asyncio
import sys
import time
from typing import cast
from urllib.parse import urlsplit

import httptools
import uvloop


class Burst:
    """The requests that are still to be sent and answered, over all connections."""

    def __init__(self, requests: int) -> None:
        self.unsent = self.unanswered = requests
        self.over = asyncio.get_running_loop().create_future()


class Connection(asyncio.Protocol):
    """Sends the next request when an answer is whole."""

    def __init__(self, burst: Burst, request: bytes) -> None:
        self._burst = burst
        self._request = request

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._parser = httptools.HttpResponseParser(self)

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_complete(self) -> None:
        assert self._parser.get_status_code() == 200
        self._burst.unanswered -= 1
        if self._burst.unsent:
            self.send()
        elif not self._burst.unanswered:
            self._burst.over.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        if not self._burst.over.done():
            self._burst.over.set_exception(error or ConnectionError("the server ended a connection"))

    def send(self) -> None:
        self._burst.unsent -= 1
        self._transport.write(self._request)


async def main(url: str, connections: int, requests: int, body: bytes) -> None:
    place = urlsplit(url)
    assert place.hostname
    assert place.port
    host, port = place.hostname, place.port
    head = f"POST {place.path} HTTP/1.1\r\nHost: {place.netloc}\r\nContent-Type: application/json\r\n"
    request = head.encode() + b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
    burst = Burst(requests)
    loop = asyncio.get_running_loop()
    links = [await loop.create_connection(lambda: Connection(burst, request), host, port) for _ in range(connections)]
    start, cpu_start = time.perf_counter(), time.process_time()
    for _, connection in links:
        connection.send()
    await burst.over
    print(requests / (time.perf_counter() - start), (time.process_time() - cpu_start) / requests * 1e6)


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.stdin.buffer.read()))
