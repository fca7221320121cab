"""From a file's bytes to its lines, its shards, or everything that is wrong with it."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator

import pytest

from pronghorn.domain import planning
from pronghorn.domain.model import Endpoint
from pronghorn.domain.planning import LineSplitter, Plan, PlannedShard, RawLine, Rejection, plan_file, split_lines
from pronghorn.domain.validation import Problem, Rules
from pronghorn.limits import SHARD_BYTES_MIN, SHARD_LINES_MAX

BOM = b"\xef\xbb\xbf"
RULES = Rules(Endpoint.CHAT_COMPLETIONS, lambda model: model != "unheard")
LINE_BYTES_MAX = 1 << 20


def line(custom_id: str, model: str = "m", **body: object) -> bytes:
    request = {"model": model, "messages": [], **body}
    return json.dumps(
        {"custom_id": custom_id, "method": "POST", "url": "/v1/chat/completions", "body": request}
    ).encode()


def split(*chunks: bytes, line_bytes_max: int = LINE_BYTES_MAX) -> list[RawLine]:
    return list(split_lines(chunks, line_bytes_max=line_bytes_max))


def plan(content: bytes, *, chunk_bytes: int = 4096, line_bytes_max: int = LINE_BYTES_MAX) -> Plan | Rejection:
    def chunks() -> Iterator[bytes]:
        return (content[start : start + chunk_bytes] for start in range(0, len(content), chunk_bytes))

    return plan_file(chunks, len(content), RULES, line_bytes_max=line_bytes_max)


def codes(rejected: Plan | Rejection) -> list[tuple[str, int | None]]:
    assert isinstance(rejected, Rejection)
    return [(problem.code, problem.line) for problem in rejected.problems]


# Lines


def test_a_line_knows_its_number_its_place_and_its_content() -> None:
    assert split(b"one\ntwo\n") == [RawLine(1, 0, 4, b"one"), RawLine(2, 4, 4, b"two")]


def test_the_last_line_needs_no_newline() -> None:
    assert split(b"one\ntwo") == [RawLine(1, 0, 4, b"one"), RawLine(2, 4, 3, b"two")]


def test_blank_lines_keep_their_numbers() -> None:
    numbered = [(each.number, each.content) for each in split(b"\none\n \t\r\n\ntwo\n\n")]
    assert numbered == [(1, b""), (2, b"one"), (3, b""), (4, b""), (5, b"two"), (6, b"")]


def test_only_a_newline_ends_a_line() -> None:
    content = "a\u2028b\u2029c\u0085d\x0be\x0cf\x1cg\rh".encode()
    assert split(content + b"\nx") == [RawLine(1, 0, len(content) + 1, content), RawLine(2, len(content) + 1, 1, b"x")]


def test_a_carriage_return_before_the_newline_is_white_space() -> None:
    assert split(b"one\r\ntwo\r\n") == [RawLine(1, 0, 5, b"one"), RawLine(2, 5, 5, b"two")]


def test_a_byte_order_mark_at_the_file_s_start_belongs_to_no_line() -> None:
    assert split(BOM + b"one\n") == [RawLine(1, 3, 4, b"one")]
    assert split(*(bytes([byte]) for byte in BOM + b"one\n")) == [RawLine(1, 3, 4, b"one")]


@pytest.mark.parametrize("content", [b"\n" + BOM + b"x", b"x" + BOM, BOM + BOM])
def test_a_byte_order_mark_anywhere_else_is_content(content: bytes) -> None:
    whole = split(content)
    assert split(*(bytes([byte]) for byte in content)) == whole
    assert BOM in (whole[-1].content or b"")


@pytest.mark.parametrize("start", [b"\xef", b"\xef\xbb", b"ab"])
def test_a_file_shorter_than_a_byte_order_mark_is_a_line(start: bytes) -> None:
    assert split(start) == [RawLine(1, 0, len(start), start)]


def test_nothing_holds_no_line() -> None:
    assert split() == split(b"") == split(BOM) == []


def test_a_splitter_can_start_in_the_middle_of_a_file() -> None:
    splitter = LineSplitter(line_bytes_max=LINE_BYTES_MAX, offset=40, number=9)
    assert [*splitter.feed(BOM + b"x\ny"), *splitter.finish()] == [
        RawLine(9, 40, 5, BOM + b"x"),
        RawLine(10, 45, 1, b"y"),
    ]


def test_a_line_above_the_limit_comes_without_content_and_the_next_ones_are_unharmed() -> None:
    content = b"12345\n123456\n1\n1234567"
    expected = [RawLine(1, 0, 6, b"12345"), RawLine(2, 6, 7, None), RawLine(3, 13, 2, b"1"), RawLine(4, 15, 7, None)]
    assert split(content, line_bytes_max=5) == expected
    assert split(*(bytes([byte]) for byte in content), line_bytes_max=5) == expected


def test_a_line_that_was_found_too_long_comes_without_content_whatever_the_limit_is() -> None:
    whole = [(1, b"one"), (2, None), (3, b"three"), (4, None)]
    for chunks in ([b"one\ntwo\nthree\nfour"], [b"on", b"e\nt", b"wo", b"\nthr", b"ee\nfo", b"ur"]):
        splitter = LineSplitter(line_bytes_max=1024, too_long={2, 4})
        lines = [*(line for chunk in chunks for line in splitter.feed(chunk)), *splitter.finish()]
        assert [(line.number, line.content) for line in lines] == whole
        assert [line.length for line in lines] == [4, 4, 6, 4]


def test_a_line_above_the_limit_is_never_held() -> None:
    chunk = b"x" * 65_536
    tracemalloc.start()
    try:
        lines = list(split_lines((chunk for _ in range(1000)), line_bytes_max=100_000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert lines == [RawLine(1, 0, 65_536_000, None)]
    assert peak < 1_000_000


# Plans


def test_a_good_file_becomes_shards_of_whole_lines() -> None:
    content = BOM + line("a") + b"\n\n" + line("b") + b"\r\n" + line("c")
    shard = PlannedShard(first_line=1, lines=3, offset=3, bytes=len(content) - 3)
    assert plan(content) == Plan([shard], 3, "m", [])


def test_a_shard_starts_at_a_line_that_is_not_blank() -> None:
    content = b"\n \n" + line("a") + b"\n"
    assert plan(content) == Plan([PlannedShard(3, 1, 3, len(content) - 3)], 1, "m", [])


def test_blank_lines_do_not_stretch_a_shard_past_its_bound() -> None:
    first, gap = line("a") + b"\n", b"\n" * SHARD_BYTES_MIN
    planned = plan(first + gap + line("b") + gap)
    second = PlannedShard(2 + len(gap), 1, len(first + gap), len(line("b")) + 1)
    assert planned == Plan([PlannedShard(1, 1, 0, len(first)), second], 2, "m", [])


def test_a_shard_ends_where_the_next_line_would_make_it_too_large() -> None:
    text = line("0000", filler="x" * 1000) + b"\n"
    count = 2 * SHARD_BYTES_MIN // len(text)
    planned = plan(b"".join(text.replace(b"0000", b"%04d" % number) for number in range(count)))
    assert isinstance(planned, Plan)
    fitting = SHARD_BYTES_MIN // len(text)
    assert planned.shards[0] == PlannedShard(1, fitting, 0, fitting * len(text))
    assert planned.shards[1].first_line == fitting + 1


def test_a_line_larger_than_a_shard_has_a_shard_of_its_own() -> None:
    big = line("big", filler="x" * 2 * SHARD_BYTES_MIN)
    planned = plan(b"\n".join([line("a"), big, line("b")]))
    assert isinstance(planned, Plan)
    assert [shard.lines for shard in planned.shards] == [1, 1, 1]


def test_a_shard_has_a_bounded_number_of_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "SHARD_LINES_MAX", 2)
    planned = plan(b"\n".join(line(str(number)) for number in range(5)))
    assert isinstance(planned, Plan)
    assert [shard.lines for shard in planned.shards] == [2, 2, 1]
    assert SHARD_LINES_MAX > 2


@pytest.mark.parametrize("content", [b"", b"\n", b" \t\r\n\n  ", BOM, BOM + b"\n"])
def test_a_file_without_a_line_is_empty(content: bytes) -> None:
    assert codes(plan(content)) == [("empty_file", None)]


def test_every_bad_line_is_listed_in_line_order() -> None:
    content = b"\n".join([b"{", line("a"), line("b", model="unheard"), b"", line("a"), b"[]"])
    assert codes(plan(content)) == [
        ("invalid_json_line", 1),
        ("model_not_found", 3),
        ("duplicate_custom_id", 5),
        ("invalid_json_line", 6),
    ]


def test_a_line_above_the_limit_is_reported_with_its_number() -> None:
    long = line("b", filler="x" * 5000)
    rejected = plan(line("a") + b"\n" + long + b"\n", line_bytes_max=4096)
    message = "This line is longer than the 4096 bytes that a line may have."
    assert isinstance(rejected, Rejection)
    assert rejected.problems == [Problem("line_too_long", message, None, 2)]


def test_every_line_names_the_model_of_the_first() -> None:
    content = b"\n".join([line("a", "m"), line("b", "other"), line("c", "m"), line("d", "third")])
    assert codes(plan(content)) == [("mismatched_model", 2), ("mismatched_model", 4)]


def test_every_use_of_a_custom_id_after_the_first_is_a_duplicate() -> None:
    content = b"\n".join([line("a"), line("b"), line("a"), line("a")])
    assert codes(plan(content)) == [("duplicate_custom_id", 3), ("duplicate_custom_id", 4)]


def test_a_custom_id_is_the_same_however_it_is_escaped() -> None:
    assert codes(plan(line("é") + b"\n" + line("é").replace(b"\\u00e9", "é".encode()))) == [("duplicate_custom_id", 2)]


def test_a_line_that_is_wrong_in_another_way_still_uses_its_custom_id() -> None:
    content = line("a", model="unheard") + b"\n" + line("a")
    assert codes(plan(content)) == [("model_not_found", 1), ("duplicate_custom_id", 2)]


def test_duplicates_are_found_across_shards_and_after_hashes_were_spilled_to_disk(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(planning, "PLANNING_HASHES_IN_MEMORY_MAX", 7)
    monkeypatch.setattr(planning, "SHARD_LINES_MAX", 3)
    ids = [*map(str, range(40)), "3", *map(str, range(40, 60)), "39", "59"]
    content = b"\n".join(map(line, ids))
    assert codes(plan(content)) == [("duplicate_custom_id", number) for number in (41, 62, 63)]
    assert isinstance(plan(b"\n".join(map(line, dict.fromkeys(ids)))), Plan)


def test_problems_past_the_limit_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LINE_PROBLEMS_MAX", 3)
    rejected = plan(b"\n".join([b"{}", b"{}"]))
    assert codes(rejected) == [("missing_required_parameter", 1)] * 3
    assert rejected.unlisted == 5  # type: ignore[union-attr]


def test_duplicates_take_their_place_among_the_listed_problems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LINE_PROBLEMS_MAX", 3)
    rejected = plan(b"\n".join([line("a"), line("a"), b"1", b"2", line("a"), b"3", b"4"]))
    assert codes(rejected) == [("duplicate_custom_id", 2), ("invalid_json_line", 3), ("invalid_json_line", 4)]
    assert rejected.unlisted == 3  # type: ignore[union-attr]


def test_memory_does_not_grow_with_the_number_of_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "LINE_PROBLEMS_MAX", 10)
    content = b"\n".join([line("a" * 500)] * 5000)
    tracemalloc.start()
    try:
        rejected = plan(content)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert rejected.unlisted == 4989  # type: ignore[union-attr]
    assert peak < 1_000_000


def test_of_many_problems_the_first_are_listed_and_the_rest_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "PROBLEMS_LISTED_MAX", 2)
    monkeypatch.setattr(planning, "LINE_PROBLEMS_MAX", 3)
    rejected = plan(b"\n".join([b"{}", b"{}"]))
    assert isinstance(rejected, planning.Rejection)
    *first, last = rejected.listed()
    assert [problem.line for problem in first] == [1, 1]
    assert (last.code, last.message) == ("too_many_problems", "6 further problems are not listed.")
