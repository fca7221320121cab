"""Answers in every dress that HTTP knows and in some that it does not: each line gets its own, or ends as it must."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NamedTuple

from tests.faults.test_odd_upstreams import Wire, running, serving

ROUNDS = 3
# An answer that is unpacked is held to this, too.
ANSWER_BYTES_MAX = 1 << 20


class Odd(NamedTuple):
    """How an answer is dressed, and how its line ends: "completed", a status, or an error's code."""

    behave: Callable[[Wire], Awaitable[None]]
    ending: str | int


ODD: dict[str, Odd] = {}
LOST = "upstream_disconnected"


def ends(ending: str | int) -> Callable[[Callable[[Wire], Awaitable[None]]], None]:
    def note(behave: Callable[[Wire], Awaitable[None]]) -> None:
        ODD[behave.__name__] = Odd(behave, ending)

    return note


def head(length: int | None, *headers: str, version: str = "1.1") -> bytes:
    said = [] if length is None else [f"Content-Length: {length}"]
    return "\r\n".join([f"HTTP/{version} 200 OK", *headers, *said, "", ""]).encode()


@ends("completed")
async def gzipped(wire: Wire) -> None:
    await wire.answer(200, gzip.compress(wire.fair_body), "Content-Encoding: gzip")


@ends("completed")
async def deflated(wire: Wire) -> None:
    await wire.answer(200, zlib.compress(wire.fair_body), "Content-Encoding: deflate")


@ends("completed")
async def said_to_be_gzipped(wire: Wire) -> None:
    await wire.answer(200, wire.fair_body, "Content-Encoding: gzip")


@ends("upstream_answer_too_large")
async def unpacks_to_too_much(wire: Wire) -> None:
    await wire.answer(200, gzip.compress(b" " * (ANSWER_BYTES_MAX + 1)), "Content-Encoding: gzip")


@ends(LOST)
async def in_an_unknown_coding(wire: Wire) -> None:
    await wire.answer(200, b"\x0b\x02\x80{}\x03", "Content-Encoding: br")


@ends("completed")
async def after_a_byte_order_mark(wire: Wire) -> None:
    await wire.answer(200, b"\xef\xbb\xbf" + wire.fair_body)


@ends("completed")
async def with_trailers(wire: Wire) -> None:
    body = wire.fair_body
    chunked = b"%x\r\n%b\r\n0\r\nX-Status: 500\r\n\r\n" % (len(body), body)
    await wire.send(head(None, "Transfer-Encoding: chunked", "Trailer: X-Status") + chunked)


@ends("completed")
async def after_interim_answers(wire: Wire) -> None:
    for status in (100, 102, 103):
        await wire.send(b"HTTP/1.1 %d X\r\nLink: a\r\n\r\n" % status)
    await wire.answer()


@ends("completed")
async def byte_by_byte(wire: Wire) -> None:
    body = wire.fair_body
    for byte in head(len(body)) + body:
        await wire.send(bytes([byte]))
        await asyncio.sleep(0)


@ends("completed")
async def in_http_1_0(wire: Wire) -> None:
    await wire.send(head(None, version="1.0") + wire.fair_body)
    wire.close()


@ends("completed")
async def on_connections_that_close(wire: Wire) -> None:
    await wire.answer(200, None, "Connection: close")
    wire.close()


@ends("completed")
async def not_in_utf_8(wire: Wire) -> None:
    await wire.answer(200, wire.fair_body.replace(b"assistant", b"ass\xff\xfetant"))


@ends(LOST)
async def cut_by_their_length(wire: Wire) -> None:
    body = wire.fair_body
    await wire.send(head(len(body) - 5) + body[:-5])
    await asyncio.sleep(0.005)
    await wire.send(body[-5:])


@ends(LOST)
async def shorter_than_their_length(wire: Wire) -> None:
    await wire.send(head(len(wire.fair_body) + 1) + wire.fair_body)
    wire.close()


@ends(LOST)
async def of_two_lengths(wire: Wire) -> None:
    await wire.send(head(5, "Content-Length: 6") + wire.fair_body)


@ends(LOST)
async def without_content(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 204 No Content\r\n\r\n")


@ends(LOST)
async def of_no_depth_that_anyone_reads(wire: Wire) -> None:
    await wire.answer(200, wire.fair_body[:-1] + b', "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")


@ends(301)
async def that_redirect_for_ever(wire: Wire) -> None:
    await wire.answer(301, b"<html>", "Location: /v1/chat/completions")


@ends(304)
async def not_modified(wire: Wire) -> None:
    await wire.send(b"HTTP/1.1 304 Not Modified\r\n\r\n")


@ends("upstream_answer_too_large")
async def larger_than_memory(wire: Wire) -> None:
    await wire.send(head(1 << 40))
    while True:
        await wire.send(b"a" * (1 << 16))


@ends("completed")
async def sent_twice_in_one(wire: Wire) -> None:
    body = wire.fair_body
    await wire.send((head(len(body)) + body) * 2)


async def behave_as_asked(wire: Wire) -> None:
    odd = ODD.get(wire.prompt.partition(" number ")[0])
    if odd is None:
        await wire.answer()
    else:
        await odd.behave(wire)


def batch_of(kinds: list[str]) -> bytes:
    """Return a batch's input whose lines say how they are to be answered; the answer's text is to be the prompt."""
    lines = []
    for number, kind in enumerate(kinds):
        body = {"model": "scripted", "messages": [{"role": "user", "content": f"{kind} number {number}"}]}
        line = {"custom_id": f"{kind}/{number}", "method": "POST", "url": "/v1/chat/completions", "body": body}
        lines.append(json.dumps(line).encode())
    return b"\n".join(lines)


def ending_of(result: dict[str, Any]) -> str | int:
    if result["error"] is not None:
        return str(result["error"]["code"])
    if result["response"]["status_code"] != 200:
        return int(result["response"]["status_code"])
    kind, _, number = result["custom_id"].rpartition("/")
    said = result["response"]["body"]["choices"][0]["message"]["content"]
    return "completed" if said == f"{kind} number {number}" else "another line's answer"


def endings(server: Any, batch: dict[str, Any]) -> Counter[tuple[str, str | int]]:
    """Return how often lines of each kind have ended how."""
    lines = server.content(batch["output_file_id"]) + server.content(batch["error_file_id"])
    results = [json.loads(line) for line in lines.decode().split("\n")[:-1]]
    return Counter((result["custom_id"].rpartition("/")[0], ending_of(result)) for result in results)


def test_whatever_an_answer_is_dressed_in_each_line_gets_its_own(tmp_path: Path) -> None:
    kinds = [kind for _ in range(ROUNDS) for odd in ODD for kind in (odd, "fair")]
    with (
        running(behave_as_asked) as engines,
        serving(tmp_path, engines, answer_bytes_max=ANSWER_BYTES_MAX) as server,
    ):
        batch = server.run_batch(batch_of(kinds), timeout_s=200)
        found = endings(server, batch)
    expected = {(kind, odd.ending): ROUNDS for kind, odd in ODD.items()}
    assert found == {**expected, ("fair", "completed"): ROUNDS * len(ODD)}


async def twice(wire: Wire) -> None:
    await wire.answer()
    await asyncio.sleep(0.005)
    await wire.answer()


def test_an_answer_that_is_sent_twice_is_never_another_lines(tmp_path: Path) -> None:
    kinds = ["fair"] * 200
    with running(twice) as engines, serving(tmp_path, engines) as server:
        batch = server.run_batch(batch_of(kinds))
        assert endings(server, batch) == {("fair", "completed"): len(kinds)}
        assert engines[0].asked.total() < 1.5 * len(kinds), "once that is known no connection is used again"


async def the_same_to_everybody(wire: Wire) -> None:
    await wire.answer(200, b'{"id":"x","choices":[{"message":{"content":"yes"}}],"usage":{"prompt_tokens":1}}')


def test_an_engine_that_says_the_same_to_every_line_is_asked_once_for_each(tmp_path: Path) -> None:
    with running(the_same_to_everybody) as engines, serving(tmp_path, engines) as server:
        batch = server.run_batch(batch_of(["fair"] * 200))
        assert batch["request_counts"]["completed"] == engines[0].asked.total() == 200
