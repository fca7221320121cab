"""Engines that misbehave in ways of their own, on raw sockets: every line still ends as docs/RELIABILITY.md says."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.faults.test_kill import batch_input, check_output
from tests.processes import Server, configured

from pronghorn.domain.retry import SERVER_ERROR_ATTEMPTS_MAX
from pronghorn.engines.upstream import LIST_BYTES_MAX

LINES = 300
AWAY_AFTER = 50
# In so long most lines would use up their five attempts.
AWAY_S = 10.0


class Wire:
    """The engine's end of a connection, and the prompt that it has just been asked."""

    def __init__(self, writer: asyncio.StreamWriter, prompt: str) -> None:
        self._writer = writer
        self.prompt = prompt

    async def send(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def answer(self, status: int = 200, body: bytes | None = None, *headers: str) -> None:
        body = self.fair_body if body is None else body
        head = "\r\n".join([f"HTTP/1.1 {status} X", *headers, f"Content-Length: {len(body)}"])
        await self.send(head.encode("latin-1") + b"\r\n\r\n" + body)

    def close(self) -> None:
        self._writer.close()

    @property
    def fair_body(self) -> bytes:
        message = {"role": "assistant", "content": self.prompt}
        choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
        return json.dumps({"choices": choices, "usage": {"prompt_tokens": 1, "completion_tokens": 1}}).encode()


Behaviour = Callable[[Wire], Awaitable[None]]


async def fair(wire: Wire) -> None:
    await wire.answer()


async def unhurried(wire: Wire) -> None:
    await asyncio.sleep(0.05)
    await wire.answer()


class OddEngine:
    """An HTTP server by hand that answers every request as `behave` does, `/v1/models` excepted."""

    def __init__(self, behave: Behaviour) -> None:
        self.behave = behave
        self.listing = b'{"data": [{"id": "scripted"}]}'
        self.asked: Counter[str] = Counter()
        self.base_url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                body = await reader.readexactly(int(length[1]) if length else 0)
                if head.startswith(b"get /v1/models"):
                    await Wire(writer, "").answer(200, self.listing)
                    continue
                prompt = json.loads(body)["messages"][0]["content"]
                self.asked[prompt] += 1
                await self.behave(Wire(writer, prompt))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass  # the client has gone
        finally:
            writer.close()


@contextmanager
def running(*behaviours: Behaviour) -> Iterator[list[OddEngine]]:
    """Run engines in an event loop of their own."""
    loop, engines = asyncio.new_event_loop(), [OddEngine(behave) for behave in behaviours]
    servers: list[asyncio.Server] = []

    async def start() -> None:
        for engine in engines:
            server = await asyncio.start_server(engine.serve, "127.0.0.1", 0)
            servers.append(server)
            engine.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"

    async def stop() -> None:
        for server in servers:
            server.close()
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.sleep(0)  # for the connections to be closed

    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    asyncio.run_coroutine_threadsafe(start(), loop).result()
    try:
        yield engines
    finally:
        asyncio.run_coroutine_threadsafe(stop(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@contextmanager
def serving(
    tmp_path: Path, engines: list[OddEngine], *, window: int | None = None, **settings: float
) -> Iterator[Server]:
    """Run a server over these engines, each with this window; a traceback in its log fails the test."""
    arguments = configured(tmp_path, *(engine.base_url for engine in engines), window=window, **settings)
    with Server(tmp_path / "data", *arguments) as server:
        yield server
    assert "Traceback" not in server.log()


async def fails(wire: Wire) -> None:
    await wire.answer(500, b'{"error": {"message": "no"}}')


async def limits(wire: Wire) -> None:
    await wire.answer(429, b'{"error": {"message": "slow down"}}', "Retry-After: 60")


async def knows_no_model(wire: Wire) -> None:
    await wire.answer(404, b'{"error": {"message": "The model does not exist", "code": "model_not_found"}}')


@pytest.mark.parametrize("bad", [fails, limits, knows_no_model])
def test_one_bad_replica_of_two_spoils_no_line(tmp_path: Path, bad: Behaviour) -> None:
    with (
        running(bad, unhurried) as engines,
        serving(tmp_path, engines, model_grace_s=0.1) as server,
    ):
        batch = server.run_batch(batch_input(LINES), timeout_s=50)
        check_output(server, batch, LINES)
        assert engines[0].asked.total() < LINES, "the bad one is left alone while the other answers"


class Crowded:
    """Answers a few lines at a time, and gets rid of any others as `refuse` does."""

    def __init__(self, refuse: Behaviour) -> None:
        self._refuse = refuse
        self._running = 0

    async def __call__(self, wire: Wire) -> None:
        if self._running >= 4:
            await self._refuse(wire)
            return
        self._running += 1
        try:
            await unhurried(wire)
        finally:
            self._running -= 1


async def is_a_gateway_to_none(wire: Wire) -> None:
    await wire.answer(502, b"<html>")


async def hangs_up(wire: Wire) -> None:
    wire.close()


def test_an_engine_that_fails_what_is_too_much_for_it_gets_less(tmp_path: Path) -> None:
    with running(Crowded(fails)) as engines, serving(tmp_path, engines) as server:
        batch = server.run_batch(batch_input(LINES))
        assert batch["request_counts"]["failed"] < LINES / 10, "a third of them, did it go on getting as many"


class Away:
    """Answers so many requests with a status, then is well."""

    def __init__(self, status: int, times: int) -> None:
        self._status = status
        self._left = times

    async def __call__(self, wire: Wire) -> None:
        self._left -= 1
        if self._left < 0:
            await wire.answer()
        else:
            await wire.answer(self._status, b'{"error": {"message": "not now"}}', "Retry-After: 1")


class GatewayTo:
    """A gateway to an engine that is away for `away_s` once it has answered AWAY_AFTER lines: `refuse` is what it does
    then. The engine never runs `bad` lines, and says so."""

    def __init__(self, away_s: float, refuse: Behaviour, bad: range = range(0)) -> None:
        self._away_s = away_s
        self._refuse = refuse
        self._bad = {f"number {number} " for number in bad}
        self._answered = 0
        self._back_at = float("inf")
        self.failed: Counter[str] = Counter()

    async def __call__(self, wire: Wire) -> None:
        now = asyncio.get_running_loop().time()
        if self._answered == AWAY_AFTER:
            self._back_at = now + self._away_s
        self._answered += 1
        if self._answered > AWAY_AFTER and now < self._back_at:
            await self._refuse(wire)
        elif any(number in wire.prompt for number in self._bad):
            self.failed[wire.prompt] += 1
            await fails(wire)
        else:
            await unhurried(wire)


@pytest.mark.parametrize("refuse", [is_a_gateway_to_none, hangs_up])
def test_an_engine_that_is_away_behind_its_gateway_costs_no_line_an_attempt(tmp_path: Path, refuse: Behaviour) -> None:
    with running(GatewayTo(AWAY_S, refuse)) as engines, serving(tmp_path, engines, window=64) as server:
        batch_id = server.create_batch(server.upload(batch_input(300)))["id"]
        server.await_batch(batch_id, lambda batch: "a request of one token" in str(batch["progress"]))
        check_output(server, server.await_batch(batch_id, timeout_s=90), 300)


def test_a_gateway_to_an_engine_that_stays_away_is_waited_for_no_longer_than_is_set(tmp_path: Path) -> None:
    away = GatewayTo(float("inf"), fails)
    with running(away) as engines, serving(tmp_path, engines, window=64, model_grace_s=0.5) as server:
        batch = server.run_batch(batch_input(AWAY_AFTER + 100), timeout_s=90)
        assert batch["request_counts"] == {"total": AWAY_AFTER + 100, "completed": AWAY_AFTER, "failed": 100}


def test_many_bad_lines_in_a_row_fail_as_one_does(tmp_path: Path) -> None:
    bad = range(AWAY_AFTER, AWAY_AFTER + 100)
    engine = GatewayTo(0, fails, bad)
    with running(engine) as engines, serving(tmp_path, engines, window=64) as server:
        batch = server.run_batch(batch_input(AWAY_AFTER + 100), timeout_s=60)
        assert batch["request_counts"] == {"total": AWAY_AFTER + 100, "completed": AWAY_AFTER, "failed": 100}
        assert set(engine.failed.values()) == {SERVER_ERROR_ATTEMPTS_MAX}


async def cuts_short(wire: Wire) -> None:
    await wire.answer(200, wire.fair_body[:-10])


@pytest.mark.parametrize("bad", [fails, cuts_short])
@pytest.mark.parametrize(("status", "times"), [(503, 5), (429, 20)])
def test_one_bad_replica_of_two_spoils_no_line_while_the_other_answers_none(
    tmp_path: Path, bad: Behaviour, status: int, times: int
) -> None:
    with running(bad, Away(status, times)) as engines, serving(tmp_path, engines) as server:
        batch = server.run_batch(batch_input(10), timeout_s=90)
        check_output(server, batch, 10)


def test_a_replica_that_stays_away_is_waited_for_no_longer_than_is_set(tmp_path: Path) -> None:
    with running(fails, Away(503, 10**9)) as engines, serving(tmp_path, engines, model_grace_s=0.5) as server:
        batch = server.run_batch(batch_input(10), timeout_s=90)
        assert batch["request_counts"]["failed"] == 10


async def limits_shortly(wire: Wire) -> None:
    await wire.answer(429, b'{"error": {"message": "slow down"}}', "Retry-After: 1")


def test_a_batch_says_that_its_engine_limits_it_for_ever_and_goes_on_when_it_does_not(tmp_path: Path) -> None:
    def says_why(batch: dict[str, Any]) -> bool:
        return "limits the rate (429)" in str((batch["progress"] or {}).get("reason"))

    with running(limits_shortly) as engines, serving(tmp_path, engines) as server:
        batch_id = server.create_batch(server.upload(batch_input(20)))["id"]
        server.await_batch(batch_id, says_why)
        engines[0].behave = fair
        check_output(server, server.await_batch(batch_id), 20)


async def refuses_one(wire: Wire) -> None:
    if " number 0 " in wire.prompt:
        await wire.answer(403, b'{"error": {"message": "flagged"}}')
    else:
        await wire.answer()


def test_a_line_that_is_always_refused_holds_up_no_other(tmp_path: Path) -> None:
    with running(refuses_one) as engines, serving(tmp_path, engines, refused_pause_s=0.1) as server:
        batch_id = server.create_batch(server.upload(batch_input(LINES)))["id"]
        server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] == LINES - 1)


async def refuses_some(wire: Wire) -> None:
    if int(wire.prompt.split(" number ")[1].split()[0]) % 20 == 0:
        await wire.answer(403, b'{"error": {"message": "flagged"}}')
    else:
        await wire.answer()


def test_a_refused_line_holds_up_others_for_a_second_and_not_for_as_long_as_a_refused_key(tmp_path: Path) -> None:
    lines = 100
    with running(refuses_some) as engines, serving(tmp_path, engines, refused_pause_s=300) as server:
        batch_id = server.create_batch(server.upload(batch_input(lines)))["id"]
        server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] == lines * 19 // 20)


def test_shards_with_more_refused_lines_than_the_window_holds_hold_up_no_other(tmp_path: Path) -> None:
    lines = 2000
    with (
        running(refuses_some) as engines,
        serving(tmp_path, engines, window=2, refused_pause_s=0.01) as server,
    ):
        batch_id = server.create_batch(server.upload(batch_input(lines)))["id"]
        server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] == lines * 19 // 20)


@pytest.mark.parametrize(
    "listing",
    [b'{"data": []}', b"<html>", b'{"data": [{"id": "' + b"x" * LIST_BYTES_MAX + b'"}]}'],
    ids=["empty", "page", "huge"],
)
def test_a_list_of_models_that_tells_nothing_keeps_no_batch_from_running(tmp_path: Path, listing: bytes) -> None:
    with running(fair) as engines:
        engines[0].listing = listing
        with serving(tmp_path, engines) as server:
            check_output(server, server.run_batch(batch_input(20)), 20)
