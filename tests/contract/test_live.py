"""What passing on a live request promises, against engines over real sockets."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from pronghorn.api import faults, live
from pronghorn.app import _BodyLimit, _RequestId
from pronghorn.domain.model import Endpoint, Replica
from pronghorn.engines.base import EnginePool, ModelInfo
from pronghorn.engines.live import Relay
from pronghorn.engines.scripted import ScriptedEngine, ScriptedOptions, start
from pronghorn.errors import EngineFailed, EngineTimedOut, EngineUnreachable, NotFound, TooManyRequests
from pronghorn.limits import LIVE_BODY_BYTES_MAX

StartEngine = Callable[..., Awaitable[ScriptedEngine]]
CHAT = Endpoint.CHAT_COMPLETIONS


def body(text: str = "hello", **fields: Any) -> bytes:
    return json.dumps({"model": "scripted", "messages": [{"role": "user", "content": text}]} | fields).encode()


def marked(marker: str) -> bytes:
    return body(f"hello [[scripted {marker}]]")


class FixedEngine:
    """An engine that is nothing but its replicas."""

    def __init__(self, *replicas: Replica) -> None:
        self.found = list(replicas)
        self.changed: Callable[[], None] = lambda: None

    async def start(self, changed: Callable[[], None]) -> None:
        self.changed = changed

    async def stop(self) -> None:
        pass

    def replicas(self) -> list[Replica]:
        return self.found

    def models(self) -> list[ModelInfo]:
        return []

    async def survey(self) -> list[ModelInfo]:
        return []


class Room:
    """What workers are told about live requests."""

    def __init__(self) -> None:
        self.told: list[dict[str, int]] = []
        self._changed = asyncio.Event()

    def __call__(self, live: Mapping[str, int]) -> None:
        self.told.append(dict(live))
        self._changed.set()

    async def until(self, told: dict[str, int]) -> None:
        while self.told[-1:] != [told]:
            self._changed.clear()
            await self._changed.wait()


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    engines = []

    async def start_one(**options: Any) -> ScriptedEngine:
        engines.append(await start(ScriptedOptions(**options)))
        return engines[-1]

    yield start_one
    for engine in engines:
        await engine.stop()


@asynccontextmanager
async def relaying(*replicas: Replica, room: Room | None = None, **options: Any) -> AsyncIterator[Relay]:
    pool = EnginePool([FixedEngine(*replicas)])
    await pool.start()
    bounds: dict[str, Any] = {"answer_s_max": 10.0, "answer_bytes_max": 1 << 20, "linger_s": 0.05}
    relay = Relay(pool, leave_room=room or Room(), **bounds | options)
    try:
        yield relay
    finally:
        await relay.close()


def replica_of(engine: ScriptedEngine, **fields: Any) -> Replica:
    return Replica(engine.base_url, models=engine.options.models, **fields)


def refusing() -> Replica:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return Replica(f"http://127.0.0.1:{probe.getsockname()[1]}/v1")


async def ask(relay: Relay, content: bytes, endpoint: Endpoint = CHAT, model: str = "scripted") -> tuple[int, Any]:
    async with relay.ask(endpoint, model, content) as answer:
        return answer.status, json.loads(await answer.read())


# The relay


async def test_the_body_goes_out_unchanged(start_engine: StartEngine) -> None:
    engine = await start_engine()
    content = b' {"model" : "scripted",\n"messages":[{"role":"user","content":"\\u0061 b"}], "n": 1 } '
    async with relaying(replica_of(engine)) as relay:
        status, _ = await ask(relay, content)
    assert status == 200
    assert engine.ledger.line(hashlib.sha256(content).digest()).attempts == 1


async def test_requests_are_spread_over_the_replicas(start_engine: StartEngine) -> None:
    engines = [await start_engine(latency_ms=50) for _ in range(3)]
    async with relaying(*map(replica_of, engines)) as relay:
        await asyncio.gather(*(ask(relay, body(str(n))) for n in range(9)))
        assert [engine.ledger.totals().max_in_flight for engine in engines] == [3, 3, 3]
        for n in range(3):
            await ask(relay, body(f"alone {n}"))
    assert [engine.ledger.totals().requests for engine in engines] == [4, 4, 4], "equal ones take turns"


async def test_a_busy_replica_is_passed_over(start_engine: StartEngine) -> None:
    busy, free = await start_engine(), await start_engine()
    async with relaying(replica_of(busy), replica_of(free)) as relay:
        hanging = asyncio.create_task(ask(relay, marked("delay_ms=60000")))
        await busy.when(lambda: busy.ledger.totals().in_flight == 1)
        for n in range(3):
            await ask(relay, body(str(n)))
        hanging.cancel()
        await asyncio.wait({hanging})
        await busy.when(lambda: busy.ledger.totals().abandoned == 1)
    assert (busy.ledger.totals().requests, free.ledger.totals().requests) == (1, 3)


async def test_a_refused_connection_goes_to_another_replica(start_engine: StartEngine) -> None:
    engine = await start_engine()
    async with relaying(refusing(), replica_of(engine), refusing()) as relay:
        for n in range(4):
            assert (await ask(relay, body(str(n))))[0] == 200
    assert engine.ledger.totals().requests == 4


async def test_only_replicas_that_have_the_model_are_asked(start_engine: StartEngine) -> None:
    one, other = await start_engine(models=("one",)), await start_engine(models=("other",))
    embeds = Replica(one.base_url, models=("one",), endpoints=(Endpoint.EMBEDDINGS,))
    async with relaying(embeds, replica_of(other)) as relay:
        assert (await ask(relay, body(model="other"), model="other"))[0] == 200
        with pytest.raises(NotFound, match="The model 'one' does not exist") as caught:
            await ask(relay, body(model="one"), model="one")
        assert (caught.value.param, caught.value.code) == ("model", "model_not_found")
    assert one.ledger.totals().requests == 0


async def test_no_replica_can_be_reached() -> None:
    async with relaying(refusing(), refusing()) as relay:
        with pytest.raises(EngineUnreachable):
            await ask(relay, body())


async def test_a_request_that_arrived_is_not_sent_again(start_engine: StartEngine) -> None:
    engines = [await start_engine(), await start_engine()]
    async with relaying(*map(replica_of, engines)) as relay:
        for marker in ("fault=disconnect", "fault=disconnect variant=reset", "fault=truncated"):
            with pytest.raises(EngineFailed):
                await ask(relay, marked(marker))
    assert sum(engine.ledger.totals().requests for engine in engines) == 3


async def test_a_silent_engine_times_out(start_engine: StartEngine) -> None:
    async with relaying(replica_of(await start_engine()), answer_s_max=0.1) as relay:
        with pytest.raises(EngineTimedOut):
            await ask(relay, marked("fault=hang times=always"))


async def test_an_answer_above_the_limit_is_refused(start_engine: StartEngine) -> None:
    async with relaying(replica_of(await start_engine(answer_bytes=10_000)), answer_bytes_max=5_000) as relay:
        with pytest.raises(EngineFailed, match="larger than the limit"):
            await ask(relay, body())


async def test_places_are_bounded_and_given_back() -> None:
    async with relaying(in_flight_max=2) as relay:
        with relay.place(), relay.place(), pytest.raises(TooManyRequests), relay.place():
            pass
        with relay.place(), relay.place():
            pass


async def test_the_way_to_a_replica_that_is_gone_is_closed(start_engine: StartEngine) -> None:
    engine = await start_engine()
    source = FixedEngine(replica_of(engine))
    pool = EnginePool([source])
    await pool.start()
    room = Room()
    relay = Relay(pool, leave_room=room, answer_s_max=10.0, answer_bytes_max=1 << 20)
    hanging = asyncio.create_task(ask(relay, marked("fault=hang times=always")))
    await engine.when(lambda: engine.ledger.totals().in_flight == 1)
    source.found = []
    source.changed()
    with pytest.raises(EngineFailed):
        await hanging
    assert room.told == [{engine.base_url: 1}, {}]
    with pytest.raises(NotFound):
        await ask(relay, body())
    await relay.close()


async def test_the_replicas_key_is_sent_and_nothing_of_the_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine-secret")
    heads: list[str] = []

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append((await reader.readuntil(b"\r\n\r\n")).decode().lower())
        writer.write(b"HTTP/1.1 200 OK\r\nset-cookie: a=b\r\nserver: x\r\nx-ratelimit-limit-requests: 5\r\n")
        writer.write(b"connection: close\r\ncontent-length: 2\r\n\r\n{}")
        writer.close()

    engine = await asyncio.start_server(answer, "127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}/v1"
    async with serving(Replica(base_url, api_key_env="ENGINE_KEY")) as client:
        answered = await client.post(
            CHAT.value, content=body(), headers={"Authorization": "Bearer mine", "Cookie": "c"}
        )
    engine.close()
    await engine.wait_closed()
    assert "authorization: bearer engine-secret\r\n" in heads[0]
    assert "mine" not in heads[0]
    assert "cookie" not in heads[0]
    assert set(answered.headers) == {"x-ratelimit-limit-requests", "content-length", "x-request-id"}


async def test_room_is_asked_for_and_given_back_a_moment_later(start_engine: StartEngine) -> None:
    engine, room = await start_engine(), Room()
    async with relaying(replica_of(engine), room=room) as relay:
        hanging = [asyncio.create_task(ask(relay, marked(f"fault=hang times=always delay_ms={n}"))) for n in range(2)]
        await room.until({engine.base_url: 2})
        hanging[0].cancel()
        await room.until({engine.base_url: 1})
        hanging[1].cancel()
        await room.until({})
        await asyncio.wait(hanging)
        assert room.told == [{engine.base_url: n} for n in (1, 2, 1)] + [{}]


async def test_room_is_kept_between_requests_that_follow_each_other(start_engine: StartEngine) -> None:
    engine, room = await start_engine(), Room()
    async with relaying(replica_of(engine), room=room, linger_s=30.0) as relay:
        for n in range(5):
            await ask(relay, body(str(n)))
        assert room.told == [{engine.base_url: 1}]


# The routes


def app_of(relay: Relay) -> FastAPI:
    app = FastAPI()
    faults.install(app)
    app.include_router(live.LiveApi(relay).routes())
    app.add_middleware(_BodyLimit)
    app.add_middleware(_RequestId)
    return app


def client_of(relay: Relay) -> httpx2.AsyncClient:
    return httpx2.AsyncClient(transport=httpx2.ASGITransport(app_of(relay)), base_url="http://pronghorn")


@asynccontextmanager
async def serving(*replicas: Replica, **options: Any) -> AsyncIterator[httpx2.AsyncClient]:
    async with relaying(*replicas, **options) as relay, client_of(relay) as client:
        yield client


@pytest.mark.parametrize(
    ("marker", "status", "code"),
    [
        ("fault=400", 400, None),
        ("fault=context_length", 400, "context_length_exceeded"),
        ("fault=401", 401, "invalid_api_key"),
        ("fault=429 retry_after_s=7", 429, "rate_limit_exceeded"),
        ("fault=500", 500, "internal_error"),
        ("fault=503", 503, "model_loading"),
    ],
)
async def test_what_an_engine_refuses_is_passed_on(
    start_engine: StartEngine, marker: str, status: int, code: str | None
) -> None:
    engine = await start_engine()
    async with httpx2.AsyncClient() as direct:
        told = await direct.post(f"{engine.base_url}/chat/completions", content=marked(marker))
    async with serving(replica_of(engine)) as client:
        answer = await client.post(CHAT.value, content=marked(f"{marker} times=2"))
        assert answer.status_code == status == told.status_code
        assert answer.content == told.content
        assert answer.json()["error"]["code"] == code
        assert answer.headers["content-type"] == told.headers["content-type"]
        assert answer.headers.get("retry-after") == told.headers.get("retry-after")
        assert answer.headers.get_list("x-request-id")[0].startswith("req_")
        assert len(answer.headers.get_list("x-request-id")) == 1
    assert engine.ledger.totals().requests == 2, "an answer is an answer: nothing is tried again"


async def test_a_gateways_page_is_passed_on(start_engine: StartEngine) -> None:
    async with serving(replica_of(await start_engine())) as client:
        answer = await client.post(CHAT.value, content=marked("fault=502"))
    assert (answer.status_code, answer.headers["content-type"].partition(";")[0]) == (502, "text/html")
    assert b"502 Bad Gateway" in answer.content


async def test_the_engines_request_id_is_the_answers(start_engine: StartEngine) -> None:
    engine = await start_engine()
    async with serving(replica_of(engine)) as client:
        first, second = [await client.post(CHAT.value, content=body()) for _ in range(2)]
    assert first.headers.get_list("x-request-id") != second.headers.get_list("x-request-id")
    assert first.headers["x-request-id"].removesuffix("_0") == second.headers["x-request-id"].removesuffix("_1")


@pytest.mark.parametrize("endpoint", list(Endpoint))
async def test_every_endpoint_answers(start_engine: StartEngine, endpoint: Endpoint) -> None:
    content = {"model": "scripted", "messages": [{"role": "user", "content": "x"}], "prompt": "x", "input": "x"}
    async with serving(replica_of(await start_engine())) as client:
        answer = await client.post(endpoint.value, json=content)
    assert answer.status_code == 200
    assert answer.json()["model"] == "scripted"


@pytest.mark.parametrize(
    ("content", "param", "code"),
    [
        (b"", None, None),
        (b"{", None, None),
        (b'{"model": 3, "x": }', None, None),
        (b"[" * 5000, None, None),
        (b'{"model": "\xff"}', None, None),
        (b"[1]", None, "invalid_type"),
        (b"null", None, "invalid_type"),
        (b"{}", "model", "missing_required_parameter"),
        (b'{"model": 3}', "model", "invalid_type"),
        (b'{"model": null}', "model", "invalid_type"),
        (b'{"model": "another"}', "model", "model_not_found"),
    ],
)
async def test_a_body_without_a_model_is_refused(
    start_engine: StartEngine, content: bytes, param: str | None, code: str | None
) -> None:
    engine = await start_engine()
    async with serving(replica_of(engine)) as client:
        answer = await client.post(CHAT.value, content=content)
    assert answer.status_code == (404 if code == "model_not_found" else 400)
    error = answer.json()["error"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", param, code)
    assert engine.ledger.totals().requests == 0


async def test_bodies_are_bounded_at_the_size_of_a_line(start_engine: StartEngine) -> None:
    engine = await start_engine()
    async with serving(replica_of(engine)) as client:
        fits = body("x" * (LIVE_BODY_BYTES_MAX - len(body(""))))
        assert len(fits) == LIVE_BODY_BYTES_MAX
        assert (await client.post(CHAT.value, content=fits)).status_code == 200
        refused = await client.post(CHAT.value, content=fits + b" ")
    assert refused.status_code == 413
    assert str(LIVE_BODY_BYTES_MAX) in refused.json()["error"]["message"]
    assert engine.ledger.totals().requests == 1


async def test_beyond_the_bound_requests_are_asked_to_come_back(start_engine: StartEngine) -> None:
    engine = await start_engine()
    async with serving(replica_of(engine), in_flight_max=1) as client:
        hanging = asyncio.create_task(client.post(CHAT.value, content=marked("fault=hang times=always")))
        await engine.when(lambda: engine.ledger.totals().in_flight == 1)
        refused = await client.post(CHAT.value, content=body())
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        hanging.cancel()
        await asyncio.wait({hanging})
        assert (await client.post(CHAT.value, content=body())).status_code == 200


async def test_an_engine_that_is_away_is_a_503(start_engine: StartEngine) -> None:
    async with serving(refusing()) as client:
        answer = await client.post(CHAT.value, content=body())
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    assert answer.json()["error"]["type"] == "server_error"


async def test_a_stream_is_passed_on_as_it_is(start_engine: StartEngine) -> None:
    engine = await start_engine()
    content = body(stream=True, stream_options={"include_usage": True})
    async with httpx2.AsyncClient() as direct:
        told = await direct.post(f"{engine.base_url}/chat/completions", content=content)
    async with serving(replica_of(engine)) as client:
        answer = await client.post(CHAT.value, content=content)
    assert answer.content == told.content
    assert answer.content.endswith(b"data: [DONE]\n\n")
    assert answer.headers["content-type"] == told.headers["content-type"]
    assert "content-length" not in answer.headers


# The routes behind a real server: what only sockets show


class _Listening(uvicorn.Server):
    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.listens.set()

    listens: asyncio.Event


@asynccontextmanager
async def listening(*replicas: Replica) -> AsyncIterator[tuple[str, int]]:
    async with relaying(*replicas) as relay:
        config = uvicorn.Config(app_of(relay), http="httptools", lifespan="off", log_config=None)
        server = _Listening(config)
        server.listens = asyncio.Event()
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await server.listens.wait()
        yield listener.getsockname()[:2]
        server.should_exit = True
        await serving


async def connect(address: tuple[str, int], content: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(*address)
    head = f"POST {CHAT.value} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n\r\n"
    writer.write(head.encode() + content)
    return reader, writer


async def test_a_client_that_leaves_before_the_answer_is_not_answered(start_engine: StartEngine) -> None:
    engine = await start_engine()
    async with listening(replica_of(engine)) as address:
        _, writer = await connect(address, marked("delay_ms=60000"))
        await engine.when(lambda: engine.ledger.totals().in_flight == 1)
        writer.close()
        await engine.when(lambda: engine.ledger.totals().in_flight == 0)
    assert engine.ledger.totals().abandoned == 1


async def test_a_client_that_leaves_in_mid_stream_closes_the_engines_connection(start_engine: StartEngine) -> None:
    engine = await start_engine(trickle_ms=600_000, answer_bytes=50_000)
    async with listening(replica_of(engine)) as address:
        content = body("hello [[scripted fault=trickle times=always]]", stream=True)
        reader, writer = await connect(address, content)
        assert b"200" in await reader.readline()
        writer.close()
        await engine.when(lambda: engine.ledger.totals().in_flight == 0)
    assert engine.ledger.totals().answered == 0


async def test_a_stream_that_the_engine_cuts_is_cut_for_the_client(start_engine: StartEngine) -> None:
    engine = await start_engine(answer_bytes=5000)
    async with listening(replica_of(engine)) as address:
        content = body("hello [[scripted fault=truncated times=always]]", stream=True)
        reader, writer = await connect(address, content)
        received = await reader.read(-1)
        writer.close()
    assert b"200 OK" in received
    assert not received.endswith(b"0\r\n\r\n"), "the end of a chunked body would look like a whole answer"


async def test_a_client_that_leaves_in_mid_body_leaves_no_trace(
    start_engine: StartEngine, caplog: pytest.LogCaptureFixture
) -> None:
    engine = await start_engine()
    async with listening(replica_of(engine)) as address:
        _, writer = await asyncio.open_connection(*address)
        writer.write(f"POST {CHAT.value} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
        await writer.drain()
        writer.close()
        reader, writer = await connect(address, body())
        assert b"200" in await reader.readline()
        writer.close()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_a_body_that_does_not_arrive_loses_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LIVE_BODY_S_MAX", 0.05)
    async with listening(refusing()) as address:
        reader, writer = await asyncio.open_connection(*address)
        writer.write(f"POST {CHAT.value} HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{{".encode())
        assert b"408" in await reader.readline()
        writer.close()


async def test_a_slow_reader_holds_the_engine_back() -> None:
    sent, chunk, chunks = 0, b"10000\r\n" + b"x" * 65536 + b"\r\n", 2000

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
        with suppress(ConnectionError):
            while sent < chunks:
                writer.write(chunk)
                sent += 1
                await writer.drain()
        writer.close()

    engine = await asyncio.start_server(pour, "127.0.0.1", 0)
    base_url = f"http://127.0.0.1:{engine.sockets[0].getsockname()[1]}/v1"
    async with listening(Replica(base_url)) as address:
        reader, writer = await connect(address, body(stream=True))
        await reader.readuntil(b"\r\n\r\n")
        before = -1
        while before != sent:
            before = sent
            await asyncio.sleep(0.3)
        assert sent < chunks / 2, "what nobody reads is not fetched"
        writer.transport.abort()
    engine.close()
    await engine.wait_closed()
