"""However a file is cut into chunks, its lines and its plan are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from pronghorn.domain import planning
from pronghorn.domain.model import Endpoint
from pronghorn.domain.planning import Plan, plan_file, split_lines
from pronghorn.domain.validation import Rules

RULES = Rules(Endpoint.EMBEDDINGS, lambda _: True)
BOM = b"\xef\xbb\xbf"

pieces = st.sampled_from(
    [b"\n", b"\r", b"\r\n", b" ", b"x", b'{"a":1}', BOM, BOM[:1], BOM[1:], "\u2028".encode(), b"y" * 9]
)
contents = st.lists(pieces, max_size=12).map(b"".join)


@st.composite
def cut(draw: st.DrawFn, content: bytes) -> list[bytes]:
    """The content in chunks, some of them empty."""
    places = sorted(draw(st.lists(st.integers(0, len(content)), max_size=8)))
    return [content[start:end] for start, end in zip([0, *places], [*places, len(content)], strict=True)]


@given(contents.flatmap(lambda content: st.tuples(st.just(content), cut(content))), st.integers(4, 20))
def test_chunks_do_not_show(content_and_chunks: tuple[bytes, list[bytes]], line_bytes_max: int) -> None:
    content, chunks = content_and_chunks
    lines = list(split_lines(chunks, line_bytes_max=line_bytes_max))
    assert lines == list(split_lines([content], line_bytes_max=line_bytes_max))

    start = len(BOM) if content.startswith(BOM) else 0
    physical = content[start:].split(b"\n")
    assert [line.number for line in lines] == list(range(1, len(lines) + 1))
    assert len(lines) == len(physical) - (physical[-1] == b"")
    for line, text in zip(lines, physical, strict=False):
        assert content[line.offset : line.offset + line.length].removesuffix(b"\n") == text
        assert line.content == (text.strip(b" \t\r") if len(text) <= line_bytes_max else None)


@st.composite
def good_files(draw: st.DrawFn) -> bytes:
    """A file of good lines of many lengths, with blank lines, either newline and perhaps a mark and a last newline."""
    parts = [draw(st.sampled_from([b"", BOM]))]
    for number in range(draw(st.integers(1, 30))):
        parts += draw(st.lists(st.sampled_from([b"\n", b" \r\n"]), max_size=2))
        body = {"model": "m", "input": "x" * draw(st.integers(0, 200))}
        line = {"custom_id": str(number), "method": "POST", "url": "/v1/embeddings", "body": body}
        parts += [json.dumps(line).encode(), draw(st.sampled_from([b"\n", b"\r\n"]))]
    if draw(st.booleans()):
        parts.pop()
    return b"".join(parts)


@given(good_files(), st.data())
def test_shards_cover_every_line_once_in_order_and_keep_their_bounds(content: bytes, data: st.DataObject) -> None:
    chunks = data.draw(cut(content))

    def open_chunks() -> Iterator[bytes]:
        return iter(chunks)

    limits = {"SHARD_BYTES_MIN": 600, "SHARD_BYTES_MAX": 600, "SHARD_LINES_MAX": 4}
    with patch.multiple(planning, **limits):
        planned = plan_file(open_chunks, len(content), RULES, line_bytes_max=1000)
    assert isinstance(planned, Plan)

    expected = [line.number for line in split_lines([content], line_bytes_max=1000) if line.content]
    covered: list[int] = []
    end = 0
    for shard in planned.shards:
        assert content[end : shard.offset].replace(BOM, b"").strip() == b""
        end = shard.offset + shard.bytes
        splitter = planning.LineSplitter(line_bytes_max=1000, offset=shard.offset, number=shard.first_line)
        lines = [*splitter.feed(content[shard.offset : end]), *splitter.finish()]
        numbers = [line.number for line in lines if line.content]
        assert len(numbers) == shard.lines <= 4
        assert numbers[0] == shard.first_line
        assert shard.lines == 1 or shard.bytes <= 600
        covered += numbers
    assert content[end:].replace(BOM, b"").strip() == b""
    assert covered == expected
    assert planned.lines == len(expected)
