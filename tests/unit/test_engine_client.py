"""The engine client against real sockets: the test plays the engine byte by byte, on both event loops."""

from __future__ import annotations

import asyncio
import functools
import gc
import inspect
import os
import resource
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import uvloop

from pronghorn import __version__
from pronghorn.domain.answers import Answer, Fault, FaultKind
from pronghorn.engines import large_answers
from pronghorn.engines.child import free_port
from pronghorn.engines.client import (
    AnswerCutError,
    AnswerStream,
    Call,
    EngineAddressError,
    EngineClient,
    EngineRequestError,
    Timeouts,
)
from pronghorn.engines.connection import Connection
from pronghorn.limits import KIB, MIB

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Type: application/json\r\n\r\n{}"
LOADING = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 2\r\n\r\n{}"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n4;x=y\r\n  []\r\n0\r\nStatus: 500\r\n\r\n"
STREAM_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"

Test = Callable[..., Awaitable[None]]


def on_both_loops(test: Test) -> Callable[..., None]:
    """Run a test on asyncio's loop and on uvloop's; whatever a loop would log fails it."""

    @functools.wraps(test)
    def run(new_loop: Callable[[], asyncio.AbstractEventLoop], **fixtures: Any) -> None:
        problems: list[dict[str, Any]] = []

        async def watched() -> None:
            asyncio.get_running_loop().set_exception_handler(lambda _, context: problems.append(context))
            await asyncio.wait_for(test(**fixtures), 30)
            gc.collect()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(watched())
        gc.collect()
        assert problems == []

    signature = inspect.signature(test)
    loop = inspect.Parameter("new_loop", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), loop])  # type: ignore[attr-defined]
    loops = [asyncio.new_event_loop, uvloop.new_event_loop]
    return pytest.mark.parametrize("new_loop", loops, ids=["asyncio", "uvloop"])(run)


class Peer:
    """The engine's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def request(self) -> tuple[bytes, bytes]:
        """Read one request and return its head and its body."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lengths = [line[15:] for line in head.split(b"\r\n") if line.startswith(b"Content-Length:")]
        return head, await self.reader.readexactly(int(lengths[0]) if lengths else 0)

    async def answer(self, data: bytes = OK) -> None:
        await self.request()
        self.writer.write(data)

    async def gone(self) -> None:
        """Return when the client has closed its end."""
        with suppress(ConnectionError):
            while await self.reader.read(65536):
                pass

    def close(self) -> None:
        self.writer.close()

    def reset(self) -> None:
        self.writer.transport.abort()


class Engine:
    """A listening socket whose connections the test takes one by one."""

    def __init__(self) -> None:
        self.peers: asyncio.Queue[Peer] = asyncio.Queue()
        self.clients: list[EngineClient] = []
        self.all_peers: list[Peer] = []
        self.port = 0
        self.stop_listening: Callable[[], None] = lambda: None

    def accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.all_peers.append(Peer(reader, writer))
        self.peers.put_nowait(self.all_peers[-1])

    async def accept(self) -> Peer:
        return await self.peers.get()

    def client(self, scheme: str = "http", **options: Any) -> EngineClient:
        self.clients.append(EngineClient(f"{scheme}://127.0.0.1:{self.port}/v1", **options))
        return self.clients[-1]


@asynccontextmanager
async def engine(tls: ssl.SSLContext | None = None) -> AsyncIterator[Engine]:
    served = Engine()
    server = await asyncio.start_server(served.accepted, "127.0.0.1", 0, ssl=tls)
    served.port = server.sockets[0].getsockname()[1]
    served.stop_listening = server.close
    try:
        yield served
    finally:
        for client in served.clients:
            await client.close()
            assert client.open_connections == 0
        server.close()
        for peer in served.all_peers:
            peer.reset()
            with suppress(OSError):
                await peer.writer.wait_closed()


class Sent(asyncio.Future[Answer | Fault]):
    """The result of one send(), which must come exactly once."""

    call: Call

    def done_once(self, result: Answer | Fault) -> None:
        self.set_result(result)


def send(client: EngineClient, body: bytes = b"{}", path: str = "/chat/completions") -> Sent:
    sent = Sent()
    sent.call = client.send(path, body, sent.done_once)
    assert not sent.done()
    return sent


async def answer_of(sent: Awaitable[Answer | Fault]) -> Answer:
    result = await sent
    assert isinstance(result, Answer), result
    return result


async def fault_of(sent: Awaitable[Answer | Fault]) -> FaultKind:
    result = await sent
    assert isinstance(result, Fault), result
    assert result.detail.startswith("engine http")
    assert "{}" not in result.detail
    assert "completions" not in result.detail
    return result.kind


async def answered_with(data: bytes, *, then_close: bool = False, **options: Any) -> tuple[Answer | Fault, int]:
    """Play one answer; return what the client made of it and how many connections it kept."""
    async with engine() as served:
        client = served.client(**options)
        sent = send(client)
        peer = await served.accept()
        await peer.answer(data)
        if then_close:
            peer.close()
        return await sent, client.idle_connections


class Signal:
    """Counts the calls of a method and lets a test wait for them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
        self.count = 0
        self.event = asyncio.Event()
        original = getattr(Connection, method)

        def called(connection: Any, *args: Any) -> None:
            original(connection, *args)
            self.count += 1
            self.event.set()

        monkeypatch.setattr(Connection, method, called)

    async def next(self) -> None:
        await self.event.wait()
        self.event.clear()


# What is sent.


@on_both_loops
async def test_the_request_on_the_wire() -> None:
    async with engine() as served:
        client = served.client(headers={"Authorization": "Bearer key", "user-agent": "other"})
        sent = send(client, b'{"a":1}')
        peer = await served.accept()
        head, body = await peer.request()
        peer.writer.write(OK)
        assert (await answer_of(sent)).body == b"{}"
        assert body == b'{"a":1}'
        first, *lines = head.decode().removesuffix("\r\n\r\n").split("\r\n")
        assert first == "POST /v1/chat/completions HTTP/1.1"
        assert sorted(lines) == [
            "Accept: application/json",
            "Authorization: Bearer key",
            "Content-Length: 7",
            "Content-Type: application/json",
            f"Host: 127.0.0.1:{served.port}",
            "user-agent: other",
        ]


@on_both_loops
async def test_a_get_has_no_body_headers_and_can_add_its_own() -> None:
    async with engine() as served:
        pending = asyncio.ensure_future(served.client(headers={"A": "1"}).request("GET", "/models", headers={"a": "2"}))
        peer = await served.accept()
        head, _ = await peer.request()
        peer.writer.write(OK)
        assert (await answer_of(pending)).status == 200
        assert head.startswith(b"GET /v1/models HTTP/1.1\r\n")
        assert b"Content-" not in head
        assert b"\r\na: 2\r\n" in head
        assert b"A: 1" not in head
        assert f"User-Agent: pronghorn/{__version__}".encode() in head


@on_both_loops
async def test_a_big_body_arrives_whole() -> None:
    async with engine() as served:
        body = bytes(range(256)) * 40_000
        sent = send(served.client(), body)
        peer = await served.accept()
        assert (await peer.request())[1] == body
        peer.writer.write(OK)
        assert (await answer_of(sent)).status == 200


@on_both_loops
async def test_small_packets_leave_at_once() -> None:
    async with engine() as served:
        client = served.client()
        sent = send(client)
        await (await served.accept()).answer()
        await sent
        (connection,) = client._pool.connections
        connected = connection.transport.get_extra_info("socket")
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) != 0


@pytest.mark.parametrize(
    ("base_url", "host", "port", "path", "host_header"),
    [
        ("http://h/v1", "h", 80, "/v1", "h"),
        ("http://h:80", "h", 80, "", "h"),
        ("https://api.example.com/v1/", "api.example.com", 443, "/v1", "api.example.com"),
        ("https://h:8443/v1", "h", 8443, "/v1", "h:8443"),
        ("http://[::1]:8000/v1", "::1", 8000, "/v1", "[::1]:8000"),
        ("https://[2001:db8::1]", "2001:db8::1", 443, "", "[2001:db8::1]"),
    ],
)
async def test_base_urls(base_url: str, host: str, port: int, path: str, host_header: str) -> None:
    client = EngineClient(base_url)
    address = client._address
    assert (address.host, address.port, address.path) == (host, port, path)
    assert address.host_header == host_header
    assert client.origin.endswith(f"://{host_header}")


@pytest.mark.parametrize(
    "base_url",
    [
        *("http://user:pass@h/v1", "http://user@h", "http://@h", "ftp://h", "h:8000", "http://", "http:///v1"),
        *("http://h:0/", "http://h:99999/", "http://h:x", "http://h/v1?a=b", "http://h/#f", "http://[::1"),
        *("http://h\r\nX: y/", "http://h/ v1", "http://h\x00", "http://hé", ""),
    ],
)
async def test_a_base_url_that_cannot_be_used(base_url: str) -> None:
    with pytest.raises(EngineAddressError) as caught:
        EngineClient(base_url)
    assert isinstance(caught.value, ValueError)
    assert "pass" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("A\r\nB", "x"), ("A", "x\r\nB: y"), ("A", "x\n"), ("A b", "x"), ("", "x"), ("A", "x\x00"), ("A", " x")),
        *(("A", "日"), ("Content-Length", "5"), ("transfer-encoding", "chunked"), ("Host", "h"), ("TE", "gzip")),
    ],
)
async def test_a_header_that_cannot_be_sent(name: str, value: str) -> None:
    with pytest.raises(EngineRequestError):
        EngineClient("http://h", headers={name: value})
    with pytest.raises(EngineRequestError):
        await EngineClient("http://h").request("GET", "/", headers={name: value})


@pytest.mark.parametrize(
    ("method", "path"),
    [
        *(("HEAD", "/"), ("CONNECT", "/"), ("G T", "/"), ("GET\r\n", "/"), ("", "/"), ("GET", "models")),
        *(("GET", "/a b"), ("GET", "/a\r\nB: c"), ("GET", "/é"), ("GET", "/#a"), ("GET", "")),
    ],
)
async def test_a_method_or_path_that_cannot_be_sent(method: str, path: str) -> None:
    with pytest.raises(EngineRequestError):
        await EngineClient("http://h").request(method, path)


@pytest.mark.parametrize("name", ["connect_s", "first_byte_s", "idle_s", "total_s"])
def test_a_timeout_is_above_zero(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Timeouts(**{name: 0.0})


def test_nothing_printed_holds_a_body() -> None:
    assert repr(Answer(200, {b"x-key": b"secret"}, b"secret")) == "<Answer 200, 6 bytes>"


# What is understood.


@pytest.mark.parametrize(
    ("data", "status", "body", "kept"),
    [
        (OK, 200, b"{}", 1),
        (CHUNKED, 200, b"{}  []", 1),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", 1),
        (b"HTTP/1.1 429 \r\nRetry-After: 3\r\nContent-Length: 0\r\n\r\n", 429, b"", 1),
        (b"HTTP/1.1 307 Moved\r\nLocation: /x\r\nContent-Length: 0\r\n\r\n", 307, b"", 1),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Hints\r\nLink: x\r\n\r\n" + OK, 200, b"{}", 1),
        (OK.replace(b"OK\r\n", b"OK\r\nConnection: close\r\n"), 200, b"{}", 0),
        (OK.replace(b"/1.1", b"/1.0"), 200, b"{}", 0),
        (OK.replace(b"/1.1 200 OK", b"/1.0 200 OK\r\nConnection: keep-alive"), 200, b"{}", 1),
        (OK + b"\r\n", 200, b"{}", 1),
        (OK + OK, 200, b"{}", 0),
        (OK + b"HTTP/1.1 200", 200, b"{}", 0),
        (OK + b"garbage", 200, b"{}", 0),
        (CHUNKED + b"\x00", 200, b"{}  []", 0),
    ],
)
@on_both_loops
async def test_answers(data: bytes, status: int, body: bytes, kept: int) -> None:
    answer, idle = await answered_with(data)
    assert isinstance(answer, Answer), answer
    assert (answer.status, answer.body) == (status, body)
    assert type(answer.body) is bytes
    assert b"link" not in answer.headers
    assert b"status" not in answer.headers
    assert idle == kept


@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.0 200 OK\r\nTransfer-Encoding: gzip\r\n\r\n"])
@on_both_loops
async def test_an_answer_without_a_length_ends_with_its_connection(head: bytes) -> None:
    answer, idle = await answered_with(head + b"all of it", then_close=True)
    assert isinstance(answer, Answer), answer
    assert (answer.body, idle) == (b"all of it", 0)


@on_both_loops
async def test_a_reset_does_not_end_an_answer_without_a_length(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        received = Signal(monkeypatch, "data_received")
        sent = send(served.client())
        peer = await served.accept()
        await peer.answer(b"HTTP/1.1 200 OK\r\n\r\npart of it")
        await received.next()
        linger = b"\x01\x00\x00\x00\x00\x00\x00\x00"
        peer.writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        peer.reset()
        assert await fault_of(sent) is FaultKind.DISCONNECTED


@on_both_loops
async def test_header_names_are_lower_case_and_repeats_are_joined() -> None:
    answer, _ = await answered_with(OK.replace(b"OK\r\n", b"OK\r\nX-A: 1\r\nx-a: 2\r\nX-B:\r\n"))
    assert isinstance(answer, Answer)
    assert answer.headers[b"x-a"] == b"1, 2"
    assert answer.headers[b"x-b"] == b""


@pytest.mark.parametrize("data", [b"HTTP/1.1 100 Continue\r\n\r\n" + OK, CHUNKED], ids=["length", "chunked"])
@on_both_loops
async def test_an_answer_may_be_split_anywhere(data: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        received = Signal(monkeypatch, "data_received")
        client = served.client()
        sent = send(client)
        peer = await served.accept()
        for cut in range(1, len(data)):
            await peer.request()
            for part in (data[:cut], data[cut:]):
                peer.writer.write(part)
                await received.next()
            assert (await answer_of(sent)).body in (b"{}", b"{}  []")
            sent = send(client)
        await peer.request()
        for at in range(len(data)):
            peer.writer.write(data[at : at + 1])
            await received.next()
        assert (await answer_of(sent)).status == 200
        assert received.count == 2 * (len(data) - 1) + len(data)
        assert served.peers.empty()


# What goes wrong on the way there.


@on_both_loops
async def test_refused() -> None:
    client = EngineClient(f"http://127.0.0.1:{free_port()}")
    assert await fault_of(send(client)) is FaultKind.REFUSED
    await client.close()


@on_both_loops
async def test_a_lack_of_files_of_our_own_is_told_apart() -> None:
    async with engine() as served:
        client = served.client()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        free = os.dup(0)
        os.close(free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (free, hard))
        try:
            assert await fault_of(send(client)) is FaultKind.OUT_OF_FILES
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("host", ["nowhere.invalid", "a" * 64 + ".invalid"])
@on_both_loops
async def test_a_name_that_does_not_resolve(host: str) -> None:
    client = EngineClient(f"http://{host}")
    assert await fault_of(send(client)) is FaultKind.DNS
    await client.close()


@on_both_loops
async def test_a_look_up_that_fails_after_it_was_given_up_is_no_problem() -> None:
    client = EngineClient("http://nowhere.invalid")
    given_up = [send(client) for _ in range(20)]
    for _ in range(3):
        await asyncio.sleep(0)  # the look-ups have begun
    await client.close()
    assert {await fault_of(sent) for sent in given_up} <= {FaultKind.ABORTED, FaultKind.DNS}
    with suppress(socket.gaierror):  # it is answered after all but a few of the others, which wait for the same threads
        await asyncio.get_running_loop().getaddrinfo("nowhere.invalid", 80)


@on_both_loops
async def test_of_the_addresses_of_a_host_one_that_takes_connections_is_enough() -> None:
    async with engine() as served:  # on 127.0.0.1, and localhost is often ::1 first
        client = EngineClient(f"http://localhost:{served.port}/v1")
        sent = send(client)
        await (await served.accept()).answer()
        assert (await answer_of(sent)).status == 200
        await client.close()


@on_both_loops
async def test_connect_timeout_covers_the_handshake() -> None:
    async with engine() as served:
        client = served.client("https", timeouts=Timeouts(connect_s=0.05))
        sent = send(client)
        peer = await served.accept()
        assert await fault_of(sent) is FaultKind.CONNECT_TIMEOUT
        await peer.gone()


@on_both_loops
async def test_no_tls_spoken_there() -> None:
    async with engine() as served:
        sent = send(served.client("https"))
        peer = await served.accept()
        peer.writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        assert await fault_of(sent) is FaultKind.TLS


@on_both_loops
async def test_closed_during_the_handshake() -> None:
    async with engine() as served:
        sent = send(served.client("https"))
        peer = await served.accept()
        await peer.reader.read(1)
        peer.reset()
        assert await fault_of(sent) is FaultKind.TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    make = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=engine"
    extension = ["-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        command = [*make.split(), *extension, "-keyout", str(key), "-out", str(cert)]
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no openssl command here")
    return cert, key


def server_tls(certificate: tuple[Path, Path]) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    return context


@on_both_loops
async def test_tls(certificate: tuple[Path, Path]) -> None:
    async with engine(server_tls(certificate)) as served:
        client = served.client("https", ssl_context=ssl.create_default_context(cafile=certificate[0]))
        sent = send(client, b"x" * 300_000)
        peer = await served.accept()
        assert (await peer.request())[1] == b"x" * 300_000
        peer.writer.write(OK)
        assert (await answer_of(sent)).body == b"{}"
        sent = send(client)
        await peer.answer(b"HTTP/1.1 200 OK\r\n\r\nto the end")
        peer.close()
        assert (await answer_of(sent)).body == b"to the end"
        idle, busy = send(client), send(client)
        for peer in (await served.accept(), await served.accept()):
            if peer is served.all_peers[1]:
                await peer.answer()
        done, _ = await asyncio.wait([idle, busy], return_when=asyncio.FIRST_COMPLETED)
        assert (len(done), client.idle_connections, client.open_connections) == (1, 1, 2)
        await client.close()
        kinds = [result.kind for result in (idle.result(), busy.result()) if isinstance(result, Fault)]
        assert kinds == [FaultKind.ABORTED]


@on_both_loops
async def test_an_unknown_certificate(certificate: tuple[Path, Path]) -> None:
    async with engine(server_tls(certificate)) as served:
        assert await fault_of(send(served.client("https"))) is FaultKind.TLS


# What goes wrong with an answer.


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"", FaultKind.DISCONNECTED),
        (b"HTTP/1.1 200 OK\r\nContent-", FaultKind.DISCONNECTED),
        (b"HTTP/1.1 100 Continue\r\n\r\n", FaultKind.DISCONNECTED),
        (OK[:-1], FaultKind.DISCONNECTED),
        (CHUNKED[:-2], FaultKind.DISCONNECTED),
        (b"SSH-2.0-OpenSSH_9.6\r\n", FaultKind.PROTOCOL),
        (b"\x15\x03\x01\x00\x02\x02\x46", FaultKind.PROTOCOL),
        (b"HTTP/1.1 000 None\r\nContent-Length: 2\r\n\r\n{}", FaultKind.PROTOCOL),
        (b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n", FaultKind.PROTOCOL),
        (OK.replace(b"Length: 2", b"Length: 2\r\nContent-Length: 3"), FaultKind.PROTOCOL),
        (OK.replace(b"Length: 2", b"Length: 2\r\nTransfer-Encoding: chunked"), FaultKind.PROTOCOL),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", FaultKind.PROTOCOL),
    ],
)
@on_both_loops
async def test_answers_that_are_none(data: bytes, kind: FaultKind) -> None:
    fault, idle = await answered_with(data, then_close=True)
    assert isinstance(fault, Fault), fault
    assert (fault.kind, idle) == (kind, 0)


@pytest.mark.parametrize(
    "data",
    [
        OK.replace(b"Length: 2", b"Length: 1001") + b" " * 999,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\n12345\r\n" * 201,
        b"HTTP/1.1 200 OK\r\n\r\n" + b" " * 1001,
        b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 257 + b"\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA" + b"b" * 70_000,
        b"HTTP/1.1 100 Continue\r\n\r\n" * 3000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1;" + b"x" * 70_000,
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nA: " + b"b" * 70_000,
    ],
    ids=["length", "chunked", "eof", "headers", "value", "name", "1xx", "extension", "trailer"],
)
@on_both_loops
async def test_too_large(data: bytes) -> None:
    fault, idle = await answered_with(data, answer_bytes_max=1000)
    assert isinstance(fault, Fault), fault
    assert (fault.kind, idle) == (FaultKind.TOO_LARGE, 0)


@on_both_loops
async def test_many_large_answers_together_stay_within_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    answers, size = 8, MIB
    monkeypatch.setattr(large_answers, "LARGE_ANSWERS_BYTES_MAX", 3 * size)
    most = 0
    grew = large_answers.LargeAnswers.grew

    def watched(held: large_answers.LargeAnswers, connection: large_answers.Pausable, size: int) -> None:
        nonlocal most
        grew(held, connection, size)
        most = max(most, held.bytes)

    monkeypatch.setattr(large_answers.LargeAnswers, "grew", watched)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()
    async with engine() as served:
        client = served.client()
        asked = [asyncio.create_task(client.request("POST", "/chat/completions", b"{}")) for _ in range(answers)]
        peers = [await served.accept() for _ in asked]
        for peer in peers:
            await peer.answer(head + b"x" * (size // 2))
        for peer in peers:
            peer.writer.write(b"x" * (size // 2))
        results = await asyncio.gather(*asked)
    assert [isinstance(result, Answer) and len(result.body) for result in results] == [size] * answers
    # Beyond the bound each connection has read once, up to 256 KiB.
    assert 2 * size < most <= 3 * size + answers * 256 * KIB + size


@on_both_loops
async def test_an_answer_at_its_limit_fits() -> None:
    data = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 100_000 + b"0\r\n\r\n"
    answer, idle = await answered_with(data, answer_bytes_max=100_000)
    assert isinstance(answer, Answer), answer
    assert (answer.body, idle) == (b"x" * 100_000, 1)


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (b"", "first_byte_s", FaultKind.FIRST_BYTE_TIMEOUT),
        (b"HTTP/1.1 102 Processing\r\n\r\n", "first_byte_s", FaultKind.FIRST_BYTE_TIMEOUT),
        (OK[:-1], "idle_s", FaultKind.IDLE_TIMEOUT),
        (b"", "total_s", FaultKind.TOTAL_TIMEOUT),
        (OK[:-1], "total_s", FaultKind.TOTAL_TIMEOUT),
    ],
)
@on_both_loops
async def test_timeouts(data: bytes, name: str, kind: FaultKind) -> None:
    async with engine() as served:
        client = served.client(timeouts=Timeouts(**{name: 0.1}))
        begin_s = asyncio.get_running_loop().time()
        sent = send(client)
        peer = await served.accept()
        await peer.answer(data)
        assert await fault_of(sent) is kind
        assert 0.09 <= asyncio.get_running_loop().time() - begin_s < 5
        await peer.gone()


@on_both_loops
async def test_the_time_limit_of_one_request() -> None:
    async with engine() as served:
        client = served.client()
        assert await fault_of(client.request("GET", "/health", timeout_s=0.05)) is FaultKind.TOTAL_TIMEOUT
        await (await served.accept()).gone()


@on_both_loops
async def test_bytes_keep_an_answer_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        checked = Signal(monkeypatch, "check")
        sent = send(served.client(timeouts=Timeouts(idle_s=0.08, first_byte_s=0.08)))
        peer = await served.accept()
        await peer.request()
        begin_s = asyncio.get_running_loop().time()
        for at in range(len(OK) - 1):
            peer.writer.write(OK[at : at + 1])
            await checked.next()
        assert asyncio.get_running_loop().time() - begin_s > 0.3
        peer.writer.write(OK[-1:])
        assert (await answer_of(sent)).status == 200


# Connections.


@on_both_loops
async def test_a_connection_is_free_again_before_done_is_called() -> None:
    async with engine() as served:
        client = served.client()
        finished = asyncio.get_running_loop().create_future()
        left = 5

        def done(result: Answer | Fault) -> None:
            nonlocal left
            left -= 1
            assert isinstance(result, Answer)
            assert client.idle_connections == 1
            if left:
                client.send("/x", b"{}", done)
            else:
                finished.set_result(None)

        client.send("/x", b"{}", done)
        peer = await served.accept()
        for _ in range(5):
            await peer.answer()
        await finished
        assert (client.open_connections, client.stale_retries) == (1, 0)
        assert served.peers.empty()


@on_both_loops
async def test_the_connection_freed_last_is_used_first_and_extras_are_closed() -> None:
    async with engine() as served:
        client = served.client(idle_connections_max=2)
        sent = [send(client) for _ in range(3)]
        peers = [await served.accept() for _ in range(3)]
        heads = [await peer.request() for peer in peers]
        assert len(heads) == 3
        for peer in peers:
            peer.writer.write(OK)
        await asyncio.gather(*sent)
        assert client.idle_connections == 2
        last = client._pool.idle[-1]
        again = send(client)
        assert last not in client._pool.idle
        again.call.abort()
        await again


@on_both_loops
async def test_a_peer_that_closes_leaves_the_pool_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        lost = Signal(monkeypatch, "connection_lost")
        client = served.client()
        sent = send(client)
        peer = await served.accept()
        await peer.answer()
        await sent
        peer.close()
        await lost.next()
        assert (client.idle_connections, client.open_connections) == (0, 0)
        sent = send(client)
        await (await served.accept()).answer()
        assert (await answer_of(sent)).status == 200
        assert client.stale_retries == 0


@on_both_loops
async def test_bytes_that_nobody_asked_for_close_an_idle_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        received = Signal(monkeypatch, "data_received")
        client = served.client()
        sent = send(client)
        peer = await served.accept()
        await peer.answer()
        await sent
        await received.next()
        peer.writer.write(OK)
        await received.next()
        assert client.idle_connections == 0
        await peer.gone()


@on_both_loops
async def test_an_idle_connection_is_closed_in_time() -> None:
    async with engine() as served:
        client = served.client(idle_connection_s=0.05)
        sent = send(client)
        peer = await served.accept()
        await peer.answer()
        await sent
        assert client.idle_connections == 1
        await peer.gone()
        assert client.idle_connections == 0


async def used_connection(served: Engine, client: EngineClient) -> Peer:
    sent = send(client)
    peer = await served.accept()
    await peer.answer()
    await answer_of(sent)
    return peer


@pytest.mark.parametrize("reset", [False, True])
@on_both_loops
async def test_a_stale_connection_costs_one_retry(reset: bool) -> None:
    async with engine() as served:
        client = served.client()
        stale = await used_connection(served, client)
        sent = send(client, b"[1]")
        await stale.request()
        stale.reset() if reset else stale.close()
        fresh = await served.accept()
        assert (await fresh.request())[1] == b"[1]"
        fresh.writer.write(OK)
        assert (await answer_of(sent)).status == 200
        assert client.stale_retries == 1


@on_both_loops
async def test_the_second_death_counts() -> None:
    async with engine() as served:
        client = served.client()
        stale = await used_connection(served, client)
        sent = send(client)
        await stale.request()
        stale.close()
        fresh = await served.accept()
        await fresh.request()
        fresh.close()
        assert await fault_of(sent) is FaultKind.DISCONNECTED
        assert client.stale_retries == 1


@on_both_loops
async def test_an_engine_that_is_gone_after_it_had_the_request_has_lost_it() -> None:
    async with engine() as served:
        client = served.client()
        last = await used_connection(served, client)
        sent = send(client)
        await last.request()
        served.stop_listening()
        last.close()
        assert await fault_of(sent) is FaultKind.DISCONNECTED
        assert await fault_of(send(client)) is FaultKind.REFUSED


@on_both_loops
async def test_an_engine_that_is_loading_after_it_had_the_request_has_lost_it() -> None:
    async with engine() as served:
        client = served.client()
        last = await used_connection(served, client)
        sent = send(client)
        await last.request()
        last.close()
        loading = await served.accept()
        await loading.request()
        loading.writer.write(LOADING)
        assert await fault_of(sent) is FaultKind.DISCONNECTED
        again = send(client)
        await loading.request()
        loading.writer.write(LOADING)
        assert (await answer_of(again)).status == 503


@on_both_loops
async def test_no_retry_once_the_answer_began_or_the_engine_is_gone() -> None:
    async with engine() as served:
        client = served.client()
        peer = await used_connection(served, client)
        sent = send(client)
        await peer.answer(b"H")
        peer.close()
        assert await fault_of(sent) is FaultKind.DISCONNECTED
        assert client.stale_retries == 0


@on_both_loops
async def test_an_answer_before_the_end_of_a_big_request_costs_the_connection() -> None:
    async with engine() as served:
        client = served.client()
        sent = send(client, b"x" * 20_000_000)
        peer = await served.accept()
        await peer.reader.readuntil(b"\r\n\r\n")
        peer.writer.write(OK.replace(b"200 OK", b"413 Too Large"))
        assert (await answer_of(sent)).status == 413
        assert client.idle_connections == 0


# Giving up.


@on_both_loops
async def test_abort_while_waiting() -> None:
    async with engine() as served:
        client = served.client()
        sent = send(client)
        peer = await served.accept()
        await peer.request()
        sent.call.abort()
        sent.call.abort()
        assert not sent.done()
        assert await fault_of(sent) is FaultKind.ABORTED
        await peer.gone()


@on_both_loops
async def test_abort_before_and_while_connecting() -> None:
    async with engine() as served:
        client = served.client("https")
        at_once = send(client)
        at_once.call.abort()
        assert await fault_of(at_once) is FaultKind.ABORTED
        sent = send(client)
        peer = await served.accept()
        sent.call.abort()
        assert await fault_of(sent) is FaultKind.ABORTED
        await peer.gone()


@on_both_loops
async def test_abort_after_the_answer_does_nothing() -> None:
    async with engine() as served:
        client = served.client()
        sent = send(client)
        await (await served.accept()).answer()
        await answer_of(sent)
        sent.call.abort()
        assert client.idle_connections == 1


@on_both_loops
async def test_a_cancelled_request_closes_its_connection() -> None:
    async with engine() as served:
        pending = asyncio.ensure_future(served.client().request("POST", "/x", b"{}"))
        peer = await served.accept()
        await peer.request()
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        await peer.gone()


@on_both_loops
async def test_close_ends_every_kind_of_connection_and_request() -> None:
    async with engine() as served:
        client = served.client()
        await used_connection(served, client)
        waiting = send(client), send(client)
        await served.accept()
        unstarted = send(client)
        await asyncio.gather(client.close(), client.close())
        assert client.open_connections == 0
        for sent in (*waiting, unstarted):
            assert sent.done()
            assert await fault_of(sent) is FaultKind.ABORTED
        assert await fault_of(send(client)) is FaultKind.ABORTED


@on_both_loops
async def test_close_while_connecting() -> None:
    async with engine() as served:
        client = served.client("https")
        sent = send(client)
        peer = await served.accept()
        await client.close()
        assert sent.done()
        assert await fault_of(sent) is FaultKind.ABORTED
        await peer.gone()


@on_both_loops
async def test_what_done_raises_goes_to_the_loop() -> None:
    problems: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    async with engine() as served:
        client = served.client()

        def done(result: Answer | Fault) -> None:
            raise KeyError("ours")

        raised = asyncio.Event()
        loop.set_exception_handler(lambda _, context: (problems.append(context), raised.set()))
        client.send("/x", b"{}", done)
        peer = await served.accept()
        await peer.answer()
        await raised.wait()
        sent = send(client)
        await peer.answer()
        assert (await answer_of(sent)).status == 200
        assert [type(context["exception"]) for context in problems] == [KeyError]


# Streaming.


async def open_stream(served: Engine, head: bytes = STREAM_HEAD) -> tuple[AnswerStream, Peer]:
    client = served.clients[-1] if served.clients else served.client()
    pending = asyncio.ensure_future(client.stream("POST", "/chat/completions", b"{}"))
    peer = await served.accept()
    await peer.answer(head)
    stream = await pending
    assert isinstance(stream, AnswerStream), stream
    return stream, peer


@on_both_loops
async def test_a_stream_gives_the_head_and_then_each_chunk_as_it_comes() -> None:
    async with engine() as served:
        stream, peer = await open_stream(served)
        assert stream.status == 200
        assert stream.headers[b"content-type"] == b"text/event-stream"
        for event in (b"data: 1\n\n", b"data: [DONE]\n\n"):
            peer.writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            assert await anext(stream) == event
        peer.writer.write(b"0\r\n\r\n")
        assert [chunk async for chunk in stream] == []
        assert served.clients[0].idle_connections == 1
        await stream.aclose()
        assert served.clients[0].idle_connections == 1


@on_both_loops
async def test_a_stream_that_never_begins_is_a_fault() -> None:
    async with engine() as served:
        pending = asyncio.ensure_future(served.client().stream("GET", "/x"))
        peer = await served.accept()
        await peer.request()
        peer.close()
        result = await pending
        assert isinstance(result, Fault)
        assert result.kind is FaultKind.DISCONNECTED


@on_both_loops
async def test_a_stream_that_breaks_off_raises_after_what_came() -> None:
    async with engine() as served:
        stream, peer = await open_stream(served, STREAM_HEAD + b"1\r\nx\r\n")
        peer.close()
        assert await anext(stream) == b"x"
        with pytest.raises(AnswerCutError) as caught:
            await anext(stream)
        assert caught.value.fault.kind is FaultKind.DISCONNECTED


@on_both_loops
async def test_a_slow_reader_holds_the_engine_back(monkeypatch: pytest.MonkeyPatch) -> None:
    async with engine() as served:
        paused, received = Signal(monkeypatch, "pause"), Signal(monkeypatch, "data_received")
        checked = Signal(monkeypatch, "check")
        total_bytes = 32 * 1024 * 1024
        served.client(timeouts=Timeouts(idle_s=0.08))
        head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % total_bytes
        stream, peer = await open_stream(served, head)
        peer.writer.write(b"x" * total_bytes)
        await paused.next()
        before = received.count
        for _ in range(10):
            await checked.next()
        assert received.count == before
        assert stream._sink._buffered_bytes < 1024 * 1024
        assert sum([len(chunk) async for chunk in stream]) == total_bytes
        assert served.clients[0].idle_connections == 1


@on_both_loops
async def test_an_abandoned_stream_closes_its_connection() -> None:
    async with engine() as served:
        stream, peer = await open_stream(served)
        async with stream:
            pass
        await peer.gone()
        with pytest.raises(StopAsyncIteration):
            await anext(stream)
        stream, peer = await open_stream(served)
        del stream
        await peer.gone()


@on_both_loops
async def test_a_cancelled_stream_closes_its_connection() -> None:
    async with engine() as served:
        pending = asyncio.ensure_future(served.client().stream("POST", "/x", b"{}"))
        peer = await served.accept()
        await peer.request()
        pending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pending
        await peer.gone()
