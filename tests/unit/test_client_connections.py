"""Clients that stall or trickle do not keep a connection, and those that are slow for a reason keep theirs."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest
import uvicorn
from fastapi import FastAPI, Request

from pronghorn import app as server_app
from pronghorn.api import faults
from pronghorn.cli import serve
from pronghorn.cli.serve import ClientConnection
from pronghorn.limits import REQUEST_HEAD_BYTES_MAX, UPLOAD_STEP_BYTES

SHORT_S = 0.2


def head(path: str, length: int) -> bytes:
    said = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"
    return said.encode()


ASKED = head("/echo", 2) + b"{}"


class Listening(uvicorn.Server):
    """Says when it listens."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    listens: asyncio.Event


def small_app() -> FastAPI:
    app = FastAPI()
    faults.install(app)

    @app.post("/echo")
    async def echo(body: dict[str, int]) -> dict[str, int]:
        return body

    @app.post("/headers")
    async def headers(request: Request) -> list[str]:
        await request.body()
        return list(request.headers)

    @app.get("/slow")
    async def slow() -> str:
        await asyncio.sleep(2 * SHORT_S)
        return "late"

    app.add_middleware(server_app._BodyLimit)
    return app


@asynccontextmanager
async def connected() -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    config = uvicorn.Config(small_app(), http=ClientConnection, lifespan="off", log_config=None, ws="none")
    server = Listening(config)
    server.listens = asyncio.Event()
    listener = socket.create_server(("127.0.0.1", 0))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    await server.listens.wait()
    reader, writer = await asyncio.open_connection(*listener.getsockname()[:2])
    try:
        yield reader, writer
    finally:
        writer.close()
        server.should_exit = True
        await serving


async def sent_until_closed(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, begun: bytes, more: bytes
) -> bytes:
    """Send what is given, then `more` again and again, and return what is answered until the connection is closed."""

    async def trickle() -> None:
        while more:
            writer.write(more)
            await asyncio.sleep(SHORT_S / 10)

    answered = b""
    writer.write(begun)
    trickling = asyncio.create_task(trickle())
    async with asyncio.timeout(20):
        with suppress(ConnectionError):  # what trickles into a connection that is closed resets it
            while chunk := await reader.read(65536):
                answered += chunk
    trickling.cancel()
    return answered


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REQUEST_HEAD_S_MAX", SHORT_S)
    monkeypatch.setattr(server_app, "JSON_BODY_S_MAX", SHORT_S)


@pytest.mark.parametrize(
    ("begun", "more"),
    [
        (b"", b""),
        (b"", b"\r\n"),
        (b"POST /echo HTTP/1.1\r\nHost: x", b""),
        (b"POST /echo HTTP/1.1\r\nHost: x", b"x"),
        (ASKED, b"\r\n"),
        (ASKED + b"POST /ec", b"x"),
    ],
)
async def test_a_head_that_does_not_come_ends_the_connection(begun: bytes, more: bytes) -> None:
    async with connected() as connection:
        answered = await sent_until_closed(*connection, begun, more)
    assert answered.count(b"HTTP/1.1 ") == begun.count(b"\r\n\r\n")


@pytest.mark.parametrize("piece", [b"a" * 60_000, b"a: " + b"b" * 60_000 + b"\r\n"], ids=["one header", "many"])
async def test_a_head_that_has_no_end_ends_the_connection(piece: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve, "REQUEST_HEAD_S_MAX", 60)

    async def send_until_closed(writer: asyncio.StreamWriter) -> None:
        while True:
            writer.write(piece)
            await writer.drain()

    async with connected() as (_, writer):
        writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n")
        with pytest.raises(ConnectionError):
            await asyncio.wait_for(send_until_closed(writer), 20)


async def test_many_heads_in_one_piece_are_no_long_one() -> None:
    asked = ASKED.replace(b"Host: x", b"Host: x\r\nA: " + b"a" * 8000)
    times = 2 * REQUEST_HEAD_BYTES_MAX // len(asked)
    async with connected() as (reader, writer):
        writer.write(times * asked)
        for _ in range(times):
            await reader.readuntil(b"{}")


@pytest.mark.parametrize("more", [b"", b" "], ids=["stalls", "trickles"])
async def test_a_body_that_does_not_come_is_answered_with_408(more: bytes) -> None:
    async with connected() as connection:
        answered = await sent_until_closed(*connection, head("/echo", 1000) + b"{", more)
    assert answered.startswith(b"HTTP/1.1 408 ")
    assert json.loads(answered.partition(b"\r\n\r\n")[2])["error"]["message"] == (
        f"The request's body did not arrive within {SHORT_S:g} s."
    )


async def test_what_is_left_of_a_request_that_is_answered_already_does_not_trickle_in_for_ever() -> None:
    async with connected() as connection:
        answered = await sent_until_closed(*connection, head("/nowhere", 1000) + b"{", b" ")
    assert answered.startswith(b"HTTP/1.1 404 ")


async def test_what_is_left_of_an_upload_that_is_refused_may_take_its_time() -> None:
    steps = 6
    async with connected() as (reader, writer):
        writer.write(head("/nowhere", steps * UPLOAD_STEP_BYTES))
        for _ in range(steps):
            writer.write(b" " * UPLOAD_STEP_BYTES)
            await asyncio.sleep(SHORT_S / 2)
        writer.write(ASKED)
        assert b"404" in await reader.readuntil(b"}}")
        assert b"200" in await reader.readuntil(b"{}")


async def test_an_answer_takes_as_long_as_it_takes_and_so_does_the_pause_before_the_next_request() -> None:
    async with connected() as (reader, writer):
        for _ in range(2):
            writer.write(b"GET /slow HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b'"late"' in await reader.readuntil(b'"late"')
            await asyncio.sleep(2 * SHORT_S)
        writer.write(ASKED)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 ")


async def test_what_comes_behind_a_body_in_the_form_of_headers_is_not_kept() -> None:
    async with connected() as (reader, writer):
        writer.write(b"POST /headers HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        writer.write(b"2\r\n{}\r\n0\r\nTrailer-1: x\r\nTrailer-2: x\r\n\r\n")
        answer = await reader.readuntil(b"]")
    assert answer.endswith(b'["host","transfer-encoding"]')
