"""Measure the client's CPU per request against a server in another process: `python -m bench.client`."""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import cast

import aiohttp
import httptools
import uvloop

from pronghorn.domain.answers import Answer, Fault
from pronghorn.engines.client import EngineClient

CONNECTIONS = (64, 512)
REQUESTS = 60_000
REQUEST_BODY = b'{"model":"m","messages":[{"role":"user","content":"' + b"x" * 340 + b'"}]}'
ANSWER_BODY = b'{"choices":[{"message":{"content":"' + b"y" * 560 + b'"}}]}'
ANSWER = (
    b"HTTP/1.1 200 OK\r\ndate: Thu, 01 Jan 2026 00:00:00 GMT\r\nserver: uvicorn\r\n"
    b"content-length: %d\r\ncontent-type: application/json\r\n\r\n%b" % (len(ANSWER_BODY), ANSWER_BODY)
)
PATH = "/chat/completions"

Measure = Callable[[str, int, int], Awaitable[float]]


class FixedAnswer(asyncio.Protocol):
    """Gives every request the same answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.parser = httptools.HttpRequestParser(self)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_complete(self) -> None:
        self.transport.write(ANSWER)


async def serve() -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(FixedAnswer, "127.0.0.1", 0, backlog=1024)
    print(server.sockets[0].getsockname()[1], flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


async def measure_pronghorn(base_url: str, connections: int, requests: int) -> float:
    client = EngineClient(base_url, headers={"Authorization": "Bearer k"})
    await burst(client, connections, connections)
    begin_s = time.process_time()
    await burst(client, connections, requests)
    used_s = time.process_time() - begin_s
    await client.close()
    return used_s / requests * 1e6


async def burst(client: EngineClient, connections: int, requests: int) -> None:
    """Answer `requests`, `connections` at a time; the first burst opens them."""
    finished = asyncio.get_running_loop().create_future()
    unsent, unanswered = requests - connections, requests

    def done(result: Answer | Fault) -> None:
        nonlocal unsent, unanswered
        assert isinstance(result, Answer), result
        assert result.status == 200
        unanswered -= 1
        if unsent:
            unsent -= 1
            client.send(PATH, REQUEST_BODY, done)
        elif not unanswered:
            finished.set_result(None)

    for _ in range(connections):
        client.send(PATH, REQUEST_BODY, done)
    await finished


async def measure_aiohttp(base_url: str, connections: int, requests: int) -> float:
    connector = aiohttp.TCPConnector(limit=connections)
    headers = {"Authorization": "Bearer k", "Content-Type": "application/json"}
    async with aiohttp.ClientSession(connector=connector, headers=headers) as session:

        async def work(count: int) -> None:
            for _ in range(count):
                async with session.post(base_url + PATH, data=REQUEST_BODY) as answer:
                    assert len(await answer.read()) == len(ANSWER_BODY)

        await asyncio.gather(*(work(1) for _ in range(connections)))
        begin_s = time.process_time()
        await asyncio.gather(*(work(requests // connections) for _ in range(connections)))
        return (time.process_time() - begin_s) / (requests // connections * connections) * 1e6


async def best_of(measure: Measure, base_url: str, connections: int, requests: int, rounds: int) -> float:
    return min([await measure(base_url, connections, requests) for _ in range(rounds)])


async def compare(base_url: str, requests: int, rounds: int) -> None:
    print("| client | " + " | ".join(f"{n} connections" for n in CONNECTIONS) + " |")
    print("|---|" + "---:|" * len(CONNECTIONS))
    for name, measure, share in (("pronghorn", measure_pronghorn, 1), ("aiohttp", measure_aiohttp, 6)):
        used_us = [await best_of(measure, base_url, n, requests // share, rounds) for n in CONNECTIONS]
        print(f"| {name} | " + " | ".join(f"{us:.1f} us" for us in used_us) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--rounds", type=int, default=3, help="the best one is printed")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve())
        return
    command = [sys.executable, "-m", "bench.client", "--serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        port = int(server.stdout.readline())
        uvloop.run(compare(f"http://127.0.0.1:{port}/v1", options.requests, options.rounds))
        server.stdin.close()


if __name__ == "__main__":
    main()
