"""The lines of an ended batch that are run again are those whose results are in its error file."""

from __future__ import annotations

from pronghorn.domain.planning import RawLine
from pronghorn.domain.selection import Selection, select
from pronghorn.ids import line_id

BATCH = "batch_0123456789abcdef0123"
LINES = [RawLine(number, 0, 0, b'{"custom_id":"%d"}' % number) for number in (1, 2, 10)]


def failed(number: int, body: bytes = b"{}") -> RawLine:
    response = b'{"status_code":400,"request_id":"r","body":%b}' % body
    content = b'{"id":"%b","custom_id":"c","response":%b,"error":null}' % (line_id(BATCH, number).encode(), response)
    return RawLine(number, 0, 0, content)


def test_a_line_is_named_by_its_result() -> None:
    taken = select(LINES, [failed(2), failed(10)], Selection())
    assert list(taken) == [b'{"custom_id":"2"}\n', b'{"custom_id":"10"}\n']


def test_a_line_whose_answer_is_nested_to_any_depth_is_run_again() -> None:
    deep = b"[" * 100_000 + b"]" * 100_000
    assert list(select(LINES, [failed(2, deep)], Selection())) == [b'{"custom_id":"2"}\n']
