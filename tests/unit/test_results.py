"""A line of a result file holds what the engine said, as it said it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain.answers import Answer
from pronghorn.domain.model import Closing, Shard, ShardKey, Tally, Usage
from pronghorn.ids import line_id
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Fate, Outcome, Segments
from pronghorn.worker.results import answered, not_run, unanswered, write_parts

BATCH = "batch_0123456789abcdef0123456789abcdef"


def result(answer: Answer, custom_id: bytes = b'"r-1"') -> bytes:
    line = answered(BATCH, 3, custom_id, answer)
    assert line.endswith(b"\n")
    assert line.count(b"\n") == 1
    assert b"\r" not in line
    return line


def body_of(line: bytes) -> bytes:
    """The bytes of the body inside a result line."""
    return line.split(b'"body":', 1)[1].removesuffix(b'},"error":null}\n')


def test_an_answer_fills_the_response_and_leaves_the_error_null() -> None:
    line = result(Answer(200, {b"x-request-id": b'req"1'}, b'{"a":1}'))
    assert json.loads(line) == {
        "id": line_id(BATCH, 3),
        "custom_id": "r-1",
        "response": {"status_code": 200, "request_id": 'req"1', "body": {"a": 1}},
        "error": None,
    }


def test_a_line_s_id_is_its_own_and_stands_in_for_a_request_id() -> None:
    decoded = json.loads(result(Answer(200, {}, b"{}")))
    assert decoded["id"] == decoded["response"]["request_id"] == "batch_req_0123456789abcdef0123000000000003"
    assert len({line_id(BATCH, number) for number in (1, 2, 16, 10**9)}) == 4


@pytest.mark.parametrize(
    "body",
    [
        b'{"z": 1.0, "a": 1e3, "m": -0, "b": 1E+5, "big": 123456789012345678901234567890.10}',
        b'{"same": 1, "same": 2}',
        rb'{"text": "\u00e9\/\ud83d\ude00 \u2028"}',
        '{"text": "é\u2028\u0085"}'.encode(),
        b'{"spaced" : [ 1 ,2 ] }',
    ],
)
@pytest.mark.parametrize("status", [200, 400])
def test_a_body_keeps_its_numbers_its_escapes_and_its_order(body: bytes, status: int) -> None:
    kept = body_of(result(Answer(status, {}, b"\n " + body + b"\r\n")))
    if status == 200:
        assert kept == body
    pairs: list[Any] = [json.loads(text, object_pairs_hook=list, parse_float=str) for text in (kept, body)]
    assert pairs[0] == pairs[1]
    assert all(token in kept for token in (b"1.0", b"1e3", b"-0", b"1E+5") if token in body)
    assert all(escape in kept for escape in (rb"\u00e9", rb"\/", rb"\ud83d") if escape in body)


@pytest.mark.parametrize("status", [200, 500])
def test_a_body_on_many_lines_comes_on_one(status: int) -> None:
    body = b'{\r\n  "a": 1.0,\n  "text": "x\\ny",\n  "b": [\n1e3\n]\n}\n'
    assert body_of(result(Answer(status, {}, body))) == b'{"a":1.0,"text":"x\\ny","b":[1e3]}'


@pytest.mark.parametrize("body", [b"", b"<html>\n502</html>", b'{"a": NaN}', b'{"a":', b"\xff\x00\n", b"[" * 100_000])
def test_a_body_that_is_no_json_is_wrapped_in_an_envelope(body: bytes) -> None:
    decoded = json.loads(result(Answer(502, {}, body)))
    assert decoded["response"]["status_code"] == 502
    assert decoded["response"]["body"] == {
        "error": {
            "message": body.decode(errors="replace"),
            "type": "upstream_error",
            "param": None,
            "code": None,
        }
    }


@pytest.mark.parametrize("status", [200, 400])
def test_bytes_that_are_no_utf8_do_not_spoil_the_file(status: int) -> None:
    line = result(Answer(status, {}, b'{"a": "x\xffy\xc3", "b": "\xed\xa0\x80"}'))
    assert json.loads(line)["response"]["body"] == {"a": "x\ufffdy\ufffd", "b": "\ufffd\ufffd\ufffd"}


@pytest.mark.parametrize("custom_id", ['"é😀"'.encode(), rb'"\u00e9\ud83d\ude00\"\\\/"', b'""', b'"</script>"'])
def test_a_custom_id_comes_back_byte_for_byte(custom_id: bytes) -> None:
    for line in (
        result(Answer(200, {}, b"{}"), custom_id),
        unanswered(BATCH, 3, custom_id, "x", "y"),
        not_run(BATCH, 3, custom_id, Closing.EXPIRED),
    ):
        assert b'"custom_id":' + custom_id + b',"response":' in line
        assert json.loads(line)["custom_id"] == json.loads(custom_id)


def test_a_line_without_an_answer_says_why() -> None:
    assert json.loads(unanswered(BATCH, 3, b'"r"', "request_timeout", 'Too "slow"\n')) == {
        "id": line_id(BATCH, 3),
        "custom_id": "r",
        "response": None,
        "error": {"code": "request_timeout", "message": 'Too "slow"\n'},
    }


@pytest.mark.parametrize(
    ("closing", "code", "message"),
    [
        (
            Closing.EXPIRED,
            "batch_expired",
            "This request could not be executed before the completion window expired.",
        ),
        (
            Closing.CANCELLED,
            "batch_cancelled",
            "This request was not executed because the batch was cancelled.",
        ),
    ],
)
def test_a_line_that_was_never_sent_says_why(closing: Closing, code: str, message: str) -> None:
    assert json.loads(not_run(BATCH, 3, b'"r"', closing))["error"] == {"code": code, "message": message}


@given(st.binary(max_size=40), st.sampled_from([400, 429, 500]), st.binary(max_size=10))
def test_whatever_comes_the_result_is_one_line_of_json(body: bytes, status: int, request_id: bytes) -> None:
    json.loads(result(Answer(status, {b"x-request-id": request_id}, body)))


# Parts


def test_a_shard_s_parts_hold_its_outcomes_in_input_order(tmp_path: Path) -> None:
    key = ShardKey("batch_1", 4)
    segments, blobs = Segments(tmp_path / "segments"), Blobs(tmp_path / "blobs")
    result = {line: unanswered(BATCH, line, b'"r"', "x", "why") for line in (1, 2, 7, 8, 9)}
    for epoch, outcomes in (
        (1, [(9, Fate.COMPLETED), (2, Fate.FAILED)]),
        (2, [(7, Fate.UNRUN), (1, Fate.COMPLETED), (8, Fate.COMPLETED)]),
    ):
        writer = segments.create(key, epoch)
        for line, fate in outcomes:
            writer.append(Outcome(line, fate, Usage(line), result[line]))
        writer.write()
        writer.close()
    shard = Shard(key, first_line=1, lines=5, offset=0, bytes=0, epoch=2)

    parts = asyncio.run(write_parts(shard, segments.recover(key), blobs))

    assert parts.output is not None
    assert parts.errors is not None
    output = blobs.read_blocking([parts.output], 0, parts.output.bytes)
    errors = blobs.read_blocking([parts.errors], 0, parts.errors.bytes)
    assert b"".join(output) == result[1] + result[8] + result[9]
    assert b"".join(errors) == result[2] + result[7]
    assert parts.tally == Tally(3, 1, 1, Usage(27))


def test_a_shard_without_failures_leaves_no_empty_part(tmp_path: Path) -> None:
    key = ShardKey("batch_1", 0)
    segments, blobs = Segments(tmp_path / "segments"), Blobs(tmp_path / "blobs")
    writer = segments.create(key, 1)
    place = writer.append(Outcome(1, Fate.COMPLETED, Usage(), b"x\n"))
    writer.write()
    writer.close()
    parts = asyncio.run(write_parts(Shard(key, 1, 1, 0, 0, epoch=1), {1: place}, blobs))
    assert parts.output is not None
    assert parts.errors is None
