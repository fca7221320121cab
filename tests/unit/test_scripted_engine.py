"""What the scripted engine promises to demos, benchmarks and tests, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import subprocess
import sys
import time
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any, get_type_hints

import aiohttp
import httpx2
import msgspec
import openai
import pytest

from pronghorn.engines.gauges import parse_metrics
from pronghorn.engines.scripted import (
    ALL_KINDS,
    TRANSIENT_KINDS,
    FaultKind,
    ScriptedEngine,
    ScriptedOptions,
    start,
)
from pronghorn.engines.scripted.answers import echo
from pronghorn.engines.scripted.capacity import Demand, Dip, Load, Pace, RateLimit, Refuse, Slots, Start, Wait
from pronghorn.engines.scripted.connection import CRASH_EXIT_CODE
from pronghorn.engines.scripted.faults import FaultPlan, MarkerError, fault_reply, read_marker
from pronghorn.engines.scripted.ledger import Ledger
from pronghorn.engines.scripted.requests import Endpoint
from pronghorn.engines.scripted.verdict import Delivery, Judge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
    from pathlib import Path

    StartEngine = Callable[..., Awaitable[ScriptedEngine]]

CHAT = "/v1/chat/completions"

# uvloop's timers count whole milliseconds, so several in a row may end this much early.
EARLY_S = 0.01


class StillClock:
    """Wall time that stands still."""

    def now(self) -> int:
        return 1_000_000_000

    def wall(self) -> int:
        return self.now()

    def monotonic(self) -> float:
        return time.monotonic()


@pytest.fixture
async def start_engine() -> AsyncIterator[StartEngine]:
    engines = []

    async def start_one(**options: Any) -> ScriptedEngine:
        engine = await start(ScriptedOptions(**options), StillClock())
        engines.append(engine)
        return engine

    yield start_one
    for engine in engines:
        await engine.stop()


@pytest.fixture
async def engine(start_engine: StartEngine) -> ScriptedEngine:
    return await start_engine()


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as session:
        yield session


@pytest.fixture
async def client(engine: ScriptedEngine) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(api_key="unused", base_url=engine.base_url, max_retries=0) as client:
        yield client


def chat_body(text: str, **more: Any) -> bytes:
    return json.dumps({"model": "scripted", "messages": [{"role": "user", "content": text}], **more}).encode()


async def ask(http: aiohttp.ClientSession, engine: ScriptedEngine, body: bytes, path: str = CHAT) -> tuple[int, Any]:
    async with http.post(engine.origin + path, data=body) as reply:
        return reply.status, await reply.json(content_type=None)


async def statuses(http: aiohttp.ClientSession, engine: ScriptedEngine, body: bytes, times: int) -> list[int]:
    return [(await ask(http, engine, body))[0] for _ in range(times)]


def content(answer: Any) -> str:
    text: str = answer["choices"][0]["message"]["content"]
    return text


def key_of(body: bytes) -> bytes:
    return hashlib.sha256(body).digest()


# Answers


async def test_a_chat_answer_has_the_full_shape_and_names_its_prompt(engine, http):
    body = chat_body("three small words")
    status, answer = await ask(http, engine, body)
    key = hashlib.sha256(body).hexdigest()
    assert status == 200
    assert answer == {
        "id": f"chatcmpl-{key[:16]}",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "scripted",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": f"echo {key[:16]}: three small words", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 3,
            "completion_tokens": 5,
            "total_tokens": 8,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
        "service_tier": "default",
        "system_fingerprint": "fp_scripted",
    }


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (CHAT, chat_body("hi", n=2)),
        ("/v1/completions", b'{"model": "scripted", "prompt": ["a", "b"]}'),
        ("/v1/embeddings", b'{"model": "scripted", "input": [[1, 2], [3]]}'),
        ("/v1/responses", b'{"model": "scripted", "input": "hi"}'),
    ],
)
async def test_the_same_body_gets_the_same_bytes_from_any_engine(start_engine, http, path, body):
    first, second = await start_engine(), await start_engine()
    answers = []
    for engine in (first, first, second):
        async with http.post(engine.origin + path, data=body) as reply:
            answers.append(await reply.read())
    assert answers[0] == answers[1] == answers[2]


async def test_different_prompts_get_different_answers(engine, http):
    answers = {content((await ask(http, engine, chat_body(f"prompt {n}")))[1]) for n in range(20)}
    assert len(answers) == 20


async def test_every_reply_to_a_line_carries_a_request_id(engine, http):
    body = chat_body("hi")
    ids = []
    for _ in range(2):
        async with http.post(engine.origin + CHAT, data=body) as reply:
            ids.append(reply.headers["x-request-id"])
    assert ids == [f"req_{key_of(body).hex()[:16]}_{attempt}" for attempt in (0, 1)]


async def test_the_answers_text_is_padded_to_answer_bytes(start_engine, http):
    engine = await start_engine(answer_bytes=600)
    _, answer = await ask(http, engine, chat_body("ünïcode"))
    assert len(content(answer).encode()) == 600
    assert answer["usage"]["completion_tokens"] == len(content(answer).split())


async def test_text_parts_are_answered_and_other_parts_ignored(engine, http):
    parts = [{"type": "text", "text": "see "}, {"type": "image_url", "image_url": {"url": "x"}}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "not this"}]
    body = json.dumps({"model": "scripted", "messages": messages}).encode()
    _, answer = await ask(http, engine, body)
    assert content(answer) == echo(key_of(body).hex(), "see ")


# The official client


async def test_openai_chat(client):
    answer = await client.chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "hello there"}], n=2
    )
    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].message.content.endswith(": hello there")
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


async def test_openai_completions_answer_each_prompt(client):
    answer = await client.completions.create(model="scripted", prompt=["one", "two"])
    assert [choice.text.rpartition(": ")[2] for choice in answer.choices] == ["one", "two"]


async def test_openai_embeddings_decode_to_unit_vectors(client):
    answer = await client.embeddings.create(model="scripted", input=["one", "two"], dimensions=16)
    plain = await client.embeddings.create(model="scripted", input="one", dimensions=16, encoding_format="float")
    first, second = (row.embedding for row in answer.data)
    assert len(first) == 16
    assert sum(value * value for value in first) == pytest.approx(1, abs=1e-5)
    assert first != second
    assert first == pytest.approx(plain.data[0].embedding)


async def test_openai_responses(client):
    answer = await client.responses.create(model="scripted", instructions="be brief", input="hello there")
    assert answer.status == "completed"
    assert answer.output_text.endswith(": hello there")
    assert answer.usage.input_tokens == 4


async def test_openai_chat_stream_adds_up_to_the_plain_answer(client):
    stream = await client.chat.completions.create(
        model="scripted",
        messages=[{"role": "user", "content": "hello there"}],
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [chunk async for chunk in stream]
    deltas = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len([delta for delta in deltas if delta]) > 1
    assert "".join(deltas).endswith(": hello there")
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage.completion_tokens == 4


async def test_openai_completion_stream_without_usage(client):
    stream = await client.completions.create(model="scripted", prompt="hello", stream=True)
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks).endswith(": hello")
    assert all(chunk.usage is None for chunk in chunks)
    assert chunks[-1].choices[0].finish_reason == "stop"


# Other routes and refusals


async def test_health_models_and_metrics(start_engine, http):
    engine = await start_engine(models=("a", "b"))
    async with http.get(engine.origin + "/health") as reply:
        assert reply.status == 200
    async with http.get(engine.base_url + "/models") as reply:
        assert [model["id"] for model in (await reply.json())["data"]] == ["a", "b"]
    async with http.get(engine.origin + "/metrics") as reply:
        text = await reply.text()
    for name in ("num_requests_running", "num_requests_waiting", "num_preemptions_total"):
        assert f'vllm:{name}{{engine="0",model_name="a"}} 0.0\n' in text


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        ("/v1/nothing", b"{}", 404, "unknown_url", None),
        ("/health", b"{}", 405, None, None),
        (CHAT, b"{", 400, None, None),
        (CHAT, b"\xff", 400, None, None),
        (CHAT, b"[" * 100_000, 400, None, None),
        (CHAT, b'{"model": "scripted", "messages": []}', 400, None, "messages"),
        (CHAT, b'{"model": "scripted"}', 400, None, None),
        (CHAT, chat_body("hi", n=0), 400, None, "n"),
        ("/v1/completions", b'{"model": "scripted", "prompt": ["a", 1]}', 400, None, "prompt"),
        ("/v1/responses", b'{"model": "scripted", "input": "a", "stream": true}', 400, None, "stream"),
        (CHAT, b'{"model": "other", "messages": [{}]}', 404, "model_not_found", "model"),
        (CHAT, chat_body("[[scripted fault=unheard]]"), 400, "invalid_marker", None),
    ],
)
async def test_what_it_cannot_serve_gets_openais_envelope(engine, http, path, body, status, code, param):
    answered, document = await ask(http, engine, body, path)
    assert answered == status
    assert set(document["error"]) == {"message", "type", "param", "code"}
    assert (document["error"]["code"], document["error"]["param"]) == (code, param)


async def test_a_body_over_the_limit_is_refused_and_the_next_one_is_served(start_engine, http):
    engine = await start_engine(body_bytes_max=1000)
    assert (await ask(http, engine, chat_body("x" * 1000)))[0] == 413
    assert (await ask(http, engine, chat_body("x")))[0] == 200


@pytest.mark.parametrize(
    "change", [{"port": -1}, {"fault_rate": 2.0}, {"models": ()}, {"capacity": "magic"}, {"answer_bytes": 0}]
)
def test_an_option_out_of_bounds_is_named(change):
    (name,) = change
    with pytest.raises(msgspec.ValidationError, match=name):
        ScriptedOptions(**change)


def test_every_option_has_a_help_text():
    for name, hint in get_type_hints(ScriptedOptions, include_extras=True).items():
        assert hint.__metadata__[0].description, name


# Connections


async def raw_exchange(engine: ScriptedEngine, sent: bytes) -> bytes:
    """Send bytes, say that no more come, and return everything that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(engine.origin.rpartition(":")[2]))
    writer.write(sent)
    try:
        return await asyncio.wait_for(reader.read(), 5)
    finally:
        writer.close()


def raw_post(body: bytes, extra: str = "") -> bytes:
    return f"POST {CHAT} HTTP/1.1\r\nhost: x\r\n{extra}content-length: {len(body)}\r\n\r\n".encode() + body


async def test_pipelined_requests_are_answered_in_order(start_engine):
    engine = await start_engine(keep_alive_timeout_s=0.2)
    bodies = [chat_body("[[scripted delay_ms=20]] slow"), chat_body("second"), chat_body("third")]
    received = await raw_exchange(engine, b"".join(map(raw_post, bodies)))
    places = [received.index(key_of(body).hex()[:16].encode()) for body in bodies]
    assert places == sorted(places)


async def test_an_idle_connection_is_closed_after_the_keep_alive_timeout(start_engine):
    engine = await start_engine(keep_alive_timeout_s=0.05)
    began_s = time.monotonic()
    received = await raw_exchange(engine, raw_post(chat_body("hi")))
    assert received.startswith(b"HTTP/1.1 200 ")
    assert time.monotonic() - began_s >= 0.05 - EARLY_S


async def test_a_connection_with_a_line_in_progress_is_not_idle(start_engine, http):
    engine = await start_engine(keep_alive_timeout_s=0.1)
    assert (await ask(http, engine, chat_body("[[scripted delay_ms=250]]")))[0] == 200


async def test_connection_close_is_honoured(engine):
    received = await raw_exchange(engine, raw_post(chat_body("hi"), "connection: close\r\n"))
    assert b"\r\nconnection: close\r\n" in received


async def test_expect_continue_is_answered_first(engine):
    received = await raw_exchange(engine, raw_post(chat_body("hi"), "expect: 100-continue\r\nconnection: close\r\n"))
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_garbage_is_refused(engine):
    assert (await raw_exchange(engine, b"\x16\x03\x01garbage\r\n\r\n")).startswith(b"HTTP/1.1 400 ")


# Faults by marker


async def test_a_marker_gives_its_fault_so_often_and_then_the_answer(engine, http):
    body = chat_body("[[scripted fault=500 times=2]] hi")
    assert await statuses(http, engine, body, 4) == [500, 500, 200, 200]
    assert engine.ledger.totals().faults == {"server_error": 2}


async def test_a_marker_may_stand_in_metadata_and_last_for_ever(engine, http):
    body = chat_body("hi", metadata={"note": "[[scripted fault=overloaded times=always]]"})
    assert await statuses(http, engine, body, 3) == [529, 529, 529]


async def test_a_marker_delays_and_lengthens_an_answer(engine, http):
    began_s = time.monotonic()
    _, answer = await ask(http, engine, chat_body("[[scripted delay_ms=50 tokens=40]] hi"))
    assert time.monotonic() - began_s >= 0.05 - EARLY_S
    assert answer["usage"]["completion_tokens"] == 40


@pytest.mark.parametrize(
    ("fault", "status", "code"),
    [
        ("429", 429, "rate_limit_exceeded"),
        ("insufficient_quota", 429, "insufficient_quota"),
        ("503", 503, "model_loading"),
        ("529", 529, "overloaded"),
        ("500", 500, "internal_error"),
        ("400", 400, None),
        ("413", 413, "request_too_large"),
        ("422", 422, None),
        ("context_length", 400, "context_length_exceeded"),
        ("401", 401, "invalid_api_key"),
        ("403", 403, "forbidden"),
        ("404", 404, "model_not_found"),
        ("error_in_200", 200, 500),
        ("error_in_200 variant=429", 200, 429),
    ],
)
async def test_error_faults_answer_with_an_envelope(engine, http, fault, status, code):
    answered, document = await ask(http, engine, chat_body(f"[[scripted fault={fault}]]"))
    assert (answered, document["error"]["code"]) == (status, code)


@pytest.mark.parametrize(("fault", "status"), [("502", 502), ("504", 504), ("not_json", 200)])
async def test_gateway_faults_answer_with_html(engine, http, fault, status):
    async with http.post(engine.origin + CHAT, data=chat_body(f"[[scripted fault={fault}]]")) as reply:
        assert (reply.status, reply.content_type) == (status, "text/html")
        assert (await reply.text()).startswith("<html>")


@pytest.mark.parametrize(
    ("variant", "header", "value"),
    [
        ("seconds", "retry-after", "3"),
        ("ms", "retry-after-ms", "2500"),
        ("reset", "x-ratelimit-reset-requests", "2.5s"),
    ],
)
async def test_a_rate_limit_says_when_to_come_back(engine, http, variant, header, value):
    body = chat_body(f"[[scripted fault=429 variant={variant} retry_after_s=2.5]]")
    async with http.post(engine.origin + CHAT, data=body) as reply:
        assert reply.headers[header] == value


async def test_a_rate_limit_may_give_a_date_or_nothing(engine, http):
    body = chat_body("[[scripted fault=429 variant=date retry_after_s=90]]")
    async with http.post(engine.origin + CHAT, data=body) as reply:
        assert parsedate_to_datetime(reply.headers["retry-after"]).timestamp() == StillClock().now() + 90
    async with http.post(engine.origin + CHAT, data=chat_body("[[scripted fault=429 variant=none]]")) as reply:
        assert not [name for name in reply.headers if "retry" in name.lower() or "limit" in name.lower()]


@pytest.mark.parametrize(
    ("fault", "reason"), [("length", "length"), ("content_filter", "content_filter"), ("abort_finish", "abort")]
)
async def test_finish_reasons(engine, http, fault, reason):
    body = chat_body(f"[[scripted fault={fault}]]")
    _, answer = await ask(http, engine, body)
    assert answer["choices"][0]["finish_reason"] == reason
    assert engine.ledger.line(key_of(body)).answered_ok == (reason != "abort")


@pytest.mark.parametrize(
    ("path", "field", "body"),
    [
        (CHAT, "choices", {"messages": [{"role": "user", "content": ""}]}),
        ("/v1/completions", "choices", {"prompt": ""}),
        ("/v1/embeddings", "data", {"input": ""}),
        ("/v1/responses", "output", {"input": ""}),
    ],
)
async def test_null_choices_on_every_endpoint(engine, http, path, field, body):
    marked = {"model": "scripted", "user": "[[scripted fault=null_choices]]", **body}
    status, answer = await ask(http, engine, json.dumps(marked).encode(), path)
    assert (status, answer[field]) == (200, None)


@pytest.mark.parametrize("fault", ["disconnect", "disconnect variant=reset", "crash"])
async def test_a_disconnect_closes_before_any_byte(engine, http, fault):
    body = chat_body(f"[[scripted fault={fault}]]")
    with pytest.raises((aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)):
        await ask(http, engine, body)
    assert (await ask(http, engine, body))[0] == 200


async def test_a_truncated_answer_stops_in_mid_body(engine):
    received = await raw_exchange(engine, raw_post(chat_body("[[scripted fault=truncated]]")))
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.partition(b"content-length: ")[2].split(b"\r\n")[0])
    assert head.startswith(b"HTTP/1.1 200 OK")
    assert 0 < len(body) < length


async def test_a_hang_answers_nothing_until_the_client_gives_up(engine, http):
    body = chat_body("[[scripted fault=hang]]")
    asking = asyncio.create_task(ask(http, engine, body))
    await engine.when(lambda: engine.ledger.totals().in_flight == 1)
    assert engine.ledger.totals().faults == {"hang": 1}
    asking.cancel()
    await engine.when(lambda: engine.ledger.totals().in_flight == 0)
    assert engine.ledger.totals().answered == 0
    assert (await ask(http, engine, body))[0] == 200


async def test_a_trickled_answer_is_slow_and_good(start_engine, http):
    engine = await start_engine(trickle_ms=100)
    body = chat_body("[[scripted fault=trickle]] hi")
    began_s = time.monotonic()
    _, answer = await ask(http, engine, body)
    assert time.monotonic() - began_s >= 0.09 - EARLY_S
    assert content(answer) == echo(key_of(body).hex(), "[[scripted fault=trickle]] hi")
    assert engine.ledger.line(key_of(body)).answered_ok == 1


async def test_a_streamed_answer_can_be_truncated(client):
    prompt = [{"role": "user", "content": "[[scripted fault=truncated]]"}]
    stream = await client.chat.completions.create(model="scripted", messages=prompt, stream=True)
    with pytest.raises((openai.APIError, httpx2.RemoteProtocolError)):
        async for _ in stream:
            pass


@pytest.mark.parametrize(
    "fields",
    [
        "falt=500",
        "fault=teapot",
        "fault=429 variant=teapot",
        "times=often",
        "delay_ms=nan",
        "delay_ms=inf",
        "retry_after_s=-1",
        "tokens=1e12",
        "unclosed",
    ],
)
def test_a_marker_that_cannot_be_read_is_an_error(fields):
    with pytest.raises(MarkerError):
        read_marker(f"[[scripted {fields}]]".encode())


# Drawn faults


async def test_faults_are_drawn_alike_by_every_engine_with_the_same_seed(start_engine, http):
    bodies = [chat_body(f"line {n}") for n in range(60)]
    kinds = (FaultKind.SERVER_ERROR, FaultKind.OVERLOADED)
    runs = []
    for seed in (7, 7, 8):
        engine = await start_engine(seed=seed, fault_rate=0.5, fault_kinds=kinds)
        runs.append([await statuses(http, engine, body, 2) for body in bodies])
    assert runs[0] == runs[1] != runs[2]
    assert {status for pair in runs[0] for status in pair} == {200, 500, 529}


async def test_after_fault_attempts_max_faults_a_line_is_answered(start_engine, http):
    engine = await start_engine(fault_rate=1.0, fault_kinds=(FaultKind.SERVER_ERROR,), fault_attempts_max=2)
    assert await statuses(http, engine, chat_body("hi"), 4) == [500, 500, 200, 200]


async def test_a_marked_line_gets_no_drawn_fault(start_engine, http):
    engine = await start_engine(fault_rate=1.0)
    assert await statuses(http, engine, chat_body("[[scripted delay_ms=0]]"), 5) == [200] * 5


def test_the_share_of_faulty_attempts_is_the_fault_rate():
    plan = FaultPlan(seed=1, rate=0.3, kinds=TRANSIENT_KINDS, attempts_max=None, retry_after_s=1.0)
    drawn = [plan.draw(key_of(b"%d" % n), 0, 0) for n in range(5000)]
    faulty = [fault for fault in drawn if fault is not None]
    assert len(faulty) / len(drawn) == pytest.approx(0.3, abs=0.03)
    assert {fault.kind for fault in faulty} == set(TRANSIENT_KINDS)


@pytest.mark.parametrize("endpoint", list(Endpoint))
@pytest.mark.parametrize("kind", ALL_KINDS)
def test_every_fault_is_carried_out_on_every_endpoint(kind, endpoint):
    body = json.dumps(
        {"model": "scripted", "messages": [{}], "prompt": "p", "input": "p", "user": f"[[scripted fault={kind}]]"}
    ).encode()
    clean, faulty = (Judge(ScriptedOptions()).decide(endpoint, body, key_of(body), attempt, 0, 0) for attempt in (1, 0))
    assert (clean.fault, clean.ok) == (None, True)
    assert faulty.fault is kind
    seen = (faulty.delivery, faulty.reply)
    harmless = endpoint is Endpoint.EMBEDDINGS and kind in (FaultKind.LENGTH, FaultKind.CONTENT_FILTER)
    assert (seen == (clean.delivery, clean.reply)) == harmless


def test_only_kinds_that_leave_a_reply_have_one():
    silent = {FaultKind.DISCONNECT, FaultKind.HANG, FaultKind.CRASH}
    for kind in silent:
        fault = read_marker(f"[[scripted fault={kind}]]".encode())
        assert fault is not None
        assert fault.fault is not None
        assert fault_reply(fault.fault, 0) is None
    crash = Judge(ScriptedOptions(allow_crash=True)).decide(
        Endpoint.CHAT, chat_body("[[scripted fault=crash]]"), bytes(32), 0, 0, 0
    )
    assert crash.delivery is Delivery.EXIT


# The whole engine down, and its death


async def test_down_refuses_connections_and_then_comes_back_on_the_same_port(engine, http):
    leave = {"connection": "close"}
    async with http.post(engine.origin + "/scripted/down", data=b'{"for_s": 0.1}', headers=leave) as reply:
        assert await reply.json() == {"down_for_s": 0.1}
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(http, engine, chat_body("hi"))
    async with asyncio.timeout(5):
        while True:
            with contextlib.suppress(aiohttp.ClientConnectorError):
                assert (await ask(http, engine, chat_body("hi")))[0] == 200
                break


@pytest.mark.parametrize("body", [b"{}", b'{"for_s": 0}', b'{"for_s": 1e9}', b"x"])
async def test_down_needs_a_sensible_time(engine, http, body):
    assert (await ask(http, engine, body, "/scripted/down"))[0] == 400
    assert (await ask(http, engine, chat_body("hi")))[0] == 200


SERVE = """
import asyncio, sys
from pathlib import Path
from pronghorn.engines.scripted import ScriptedOptions, serve_scripted
options = ScriptedOptions(allow_crash=True, ledger_path=Path(sys.argv[1]))
asyncio.run(serve_scripted(options, lambda url: print(url, flush=True)))
"""


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    processes: list[subprocess.Popen[str]] = []

    def serve_one() -> tuple[subprocess.Popen[str], str]:
        command = [sys.executable, "-c", SERVE, str(tmp_path / "ledger.jsonl")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        return process, process.stdout.readline().strip().removesuffix("/v1")

    yield serve_one
    for process in processes:
        process.kill()
        process.communicate()


def post(origin: str, body: bytes) -> int:
    with httpx2.Client() as client:
        return int(client.post(origin + CHAT, content=body).status_code)


def test_a_crash_ends_the_process_and_a_restarted_one_counts_on(serve, tmp_path):
    body = chat_body("[[scripted fault=crash]]")
    process, origin = serve()
    assert post(origin, chat_body("before")) == 200
    with pytest.raises(httpx2.TransportError):
        post(origin, body)
    assert process.wait(5) == CRASH_EXIT_CODE
    _, origin = serve()
    assert post(origin, body) == 200
    entries = [json.loads(line) for line in (tmp_path / "ledger.jsonl").read_text().splitlines()]
    assert [(entry["fault"], entry["status"]) for entry in entries] == [(None, 200), ("crash", None), (None, 200)]
    assert [entry["attempt"] for entry in entries] == [0, 0, 1]


# Capacity


async def test_slots_report_who_is_served_and_who_waits(start_engine, http):
    engine = await start_engine(capacity="slots", slots=2, latency_ms=60_000)
    asking = [asyncio.create_task(ask(http, engine, chat_body(f"line {n}"))) for n in range(5)]
    await engine.when(lambda: engine.ledger.totals().in_flight == 5)
    async with http.get(engine.origin + "/metrics") as reply:
        text = await reply.text()
    assert 'num_requests_running{engine="0",model_name="scripted"} 2.0' in text
    assert 'num_requests_waiting{engine="0",model_name="scripted"} 3.0' in text
    for each in asking:
        each.cancel()
    await engine.when(lambda: engine.ledger.totals().in_flight == 0)
    assert engine.floor.load == Load()
    assert engine.ledger.totals().max_in_flight == 5


async def test_slots_serve_the_queue_as_they_come_free(start_engine, http):
    engine = await start_engine(capacity="slots", slots=2, latency_ms=20)
    began_s = time.monotonic()
    answers = await asyncio.gather(*(ask(http, engine, chat_body(f"line {n}")) for n in range(5)))
    assert {status for status, _ in answers} == {200}
    assert time.monotonic() - began_s >= 0.055 - EARLY_S


async def test_a_client_that_leaves_frees_its_slot(start_engine, http):
    engine = await start_engine(capacity="slots", slots=1, token_ms=1)
    slow = asyncio.create_task(ask(http, engine, chat_body("[[scripted tokens=100000]]")))
    await engine.when(lambda: engine.floor.load.running == 1)
    queued = [asyncio.create_task(ask(http, engine, chat_body(f"line {n}"))) for n in range(2)]
    await engine.when(lambda: engine.floor.load.waiting == 2)
    slow.cancel()
    queued[0].cancel()
    assert (await queued[1])[0] == 200
    await engine.when(lambda: engine.ledger.totals().in_flight == 0)
    assert engine.ledger.totals().abandoned == 2


async def test_an_output_token_takes_its_time(start_engine, http):
    engine = await start_engine(token_ms=1)
    began_s = time.monotonic()
    await ask(http, engine, chat_body("[[scripted tokens=60]]"))
    assert time.monotonic() - began_s >= 0.06 - EARLY_S


async def test_beyond_the_rate_limit_it_answers_429_with_retry_after(start_engine, http):
    engine = await start_engine(capacity="rate_limit", requests_per_s=0.5)
    assert (await ask(http, engine, chat_body("first")))[0] == 200
    async with http.post(engine.origin + CHAT, data=chat_body("second")) as reply:
        assert (reply.status, reply.headers["retry-after"]) == (429, "2")
    assert engine.ledger.totals().statuses == {"200": 1, "429": 1}


def test_the_rate_limit_refills_with_time():
    limit = RateLimit(Pace(0, 0), rate=2)
    at = [limit.admit(Demand(0, 1), Load(), now_s) for now_s in (0.0, 0.0, 0.0, 0.5, 0.5)]
    assert at == [Start(0), Start(0), Refuse(0.5), Start(0), Refuse(0.5)]


def test_slots_decide_by_what_is_running():
    slots = Slots(Pace(base_s=1, token_s=0.5), slots=2)
    assert slots.admit(Demand(0, 4), Load(running=1), 0) == Start(3)
    assert slots.admit(Demand(0, 4), Load(running=2), 0) == Wait()


def test_half_of_the_slots_are_missing_for_a_while():
    slots = Slots(Pace(1, 0), slots=4, dip=Dip(at_s=10, for_s=5))
    served = [isinstance(slots.admit(Demand(0, 1), Load(running=2), now_s), Start) for now_s in (100, 109, 110, 115)]
    assert served == [True, True, False, True]


def test_a_line_whose_tokens_do_not_fit_waits_unless_it_is_alone():
    memory = Slots(Pace(1, 0), slots=4, kv_tokens_max=100)
    assert memory.admit(Demand(60, 1), Load(running=1, kv_tokens=50), 0) == Wait()
    assert memory.admit(Demand(40, 1), Load(running=1, kv_tokens=50), 0) == Start(1)
    assert memory.admit(Demand(600, 1), Load(), 0) == Start(1)


async def test_where_memory_is_full_the_youngest_line_waits_again_and_goes_on_later(start_engine, http):
    engine = await start_engine(capacity="kv", slots=8, kv_tokens=200, token_ms=1)
    lines = [chat_body(f"line {n} [[scripted tokens=100]]") for n in range(4)]
    answers = await asyncio.gather(*(ask(http, engine, line) for line in lines))
    assert {status for status, _ in answers} == {200}
    async with http.get(engine.origin + "/metrics") as reply:
        gauges = parse_metrics(await reply.read())
    assert gauges is not None
    assert gauges.preemptions > 0
    assert engine.floor.load == Load(preemptions=gauges.preemptions)


async def test_an_engine_may_keep_its_gauges_to_itself(start_engine, http):
    engine = await start_engine(gauges=False)
    async with http.get(engine.origin + "/metrics") as reply:
        assert reply.status == 404


# The ledger


async def test_the_ledgers_totals_over_http(engine, http):
    bodies = [chat_body("a"), chat_body("a"), chat_body("a"), chat_body("[[scripted fault=500]]"), b"{"]
    for body in bodies:
        await ask(http, engine, body)
    async with http.get(engine.origin + "/scripted/ledger") as reply:
        totals = await reply.json()
    assert totals == {
        "requests": 5,
        "answered": 5,
        "answered_ok": 3,
        "abandoned": 0,
        "faults": {"server_error": 1},
        "statuses": {"200": 3, "400": 1, "500": 1},
        "in_flight": 0,
        "max_in_flight": 1,
        "keys": 3,
        "keys_answered_ok_more_than_once": 1,
        "keys_forgotten": 0,
    }


async def test_the_ledger_remembers_no_more_lines_than_it_may(start_engine, http):
    engine = await start_engine(ledger_keys_max=3)
    for n in range(5):
        await ask(http, engine, chat_body(f"line {n}"))
    assert engine.ledger.totals().keys_forgotten == 2
    assert engine.ledger.line(key_of(chat_body("line 0"))).attempts == 0
    assert engine.ledger.line(key_of(chat_body("line 4"))).attempts == 1


def test_a_torn_last_entry_is_cut_off_and_the_file_goes_on(tmp_path):
    path = tmp_path / "ledger.jsonl"
    whole = {"key": "ab" * 32, "attempt": 0, "fault": "hang", "status": None, "ok": False, "t": 1.5}
    path.write_text(json.dumps(whole) + '\n{"key": "cd')
    ledger = Ledger.open(path, keys_max=10)
    ledger.close()
    assert ledger.totals().faults == {"hang": 1}
    assert ledger.line(bytes.fromhex("ab" * 32)).attempts == 1
    assert path.read_text() == json.dumps(whole) + "\n"


async def test_stopping_closes_connections_and_keeps_the_totals(start_engine, http):
    engine = await start_engine()
    asking = asyncio.create_task(ask(http, engine, chat_body("[[scripted fault=hang]]")))
    await engine.when(lambda: engine.ledger.totals().in_flight == 1)
    await engine.stop()
    with pytest.raises(aiohttp.ClientError):
        await asking
    assert engine.ledger.totals().in_flight == 0
    with pytest.raises(aiohttp.ClientConnectorError):
        await ask(http, engine, chat_body("hi"))
