"""From a file's bytes to a plan: every line checked, and runs of whole lines cut into shards.

Memory does not depend on the file's size: one chunk, one unfinished line, eight bytes a line for the search for
duplicate custom_ids (which spill to disk past a bound), and the shards themselves.
"""

from __future__ import annotations

import heapq
import tempfile
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import islice, zip_longest
from typing import IO, Annotated, NamedTuple

import msgspec

from pronghorn.domain import validation
from pronghorn.domain.model import OnInvalid, Reject
from pronghorn.domain.validation import Problem, Rules
from pronghorn.limits import (
    CUSTOM_ID_CHARS_MAX,
    LINE_PROBLEMS_MAX,
    PLANNING_HASHES_IN_MEMORY_MAX,
    SHARD_BYTES_MAX,
    SHARD_BYTES_MIN,
    SHARD_LINES_MAX,
    SHARDS_PER_BATCH_AIM,
)

BOM = b"\xef\xbb\xbf"
_BUCKETS = 256


class RawLine(NamedTuple):
    """One physical line: its 1-based number, its offset, its length with the newline, its content.

    `content` is stripped of JSON's white space, so a blank line is empty; it is None when the line is too long.
    """

    number: int
    offset: int
    length: int
    content: bytes | None


class PlannedShard(NamedTuple):
    """A run of whole lines of the input file, from one that is not blank to another; `lines` counts such lines."""

    first_line: int
    lines: int
    offset: int
    bytes: int


class Plan(NamedTuple):
    """A file that can run: its shards in order, the one model its lines name, and the bad lines that are skipped."""

    shards: list[PlannedShard]
    lines: int
    model: str
    skipped: list[Problem]

    def shards_with_rejects(self) -> Iterator[tuple[PlannedShard, list[Reject]]]:
        """Yield each shard with its lines that are not to be sent, one entry a line."""
        skipped = deque(self.skipped)
        for shard, following in zip_longest(self.shards, self.shards[1:]):
            rejects: list[Reject] = []
            while skipped and (following is None or (skipped[0].line or 0) < following.first_line):
                problem = skipped.popleft()
                if not rejects or rejects[-1].line != problem.line:
                    rejects.append(Reject(problem.line or 0, problem.code, problem.message))
            yield shard, rejects


class Rejection(NamedTuple):
    """A file that cannot run: its problems in line order, and how many more there were than are listed."""

    problems: list[Problem]
    unlisted: int


class LineSplitter:
    """Cuts a byte stream into lines as it comes.

    Only a newline ends a line. A byte order mark at the file's start belongs to no line. A line of more than
    `line_bytes_max` bytes is never held: it is skipped to its newline and comes out without content. `offset` and
    `number` are those of the stream's first byte and line in their file.
    """

    def __init__(self, *, line_bytes_max: int, offset: int = 0, number: int = 1) -> None:
        self._line_bytes_max = line_bytes_max
        self._offset = offset
        self._number = number
        self._rest = b""
        self._skipped = 0
        self._at_start = offset == 0

    def feed(self, chunk: bytes) -> Iterator[RawLine]:
        """Yield the lines that end in `chunk`; consume it whole before the next."""
        if self._at_start:
            chunk = self._without_mark(chunk)
        *pieces, tail = chunk.split(b"\n")
        for piece in pieces:
            yield self._line(piece, newline=1)
        if self._skipped or len(self._rest) + len(tail) > self._line_bytes_max:
            self._skipped += len(self._rest) + len(tail)
            self._rest = b""
        else:
            self._rest = self._rest + tail if self._rest else tail

    def finish(self) -> Iterator[RawLine]:
        """Yield the last line if no newline ended it."""
        if self._rest or self._skipped:
            yield self._line(b"", newline=0)

    def _line(self, piece: bytes, newline: int) -> RawLine:
        length = self._skipped + len(self._rest) + len(piece)
        content = None
        if length <= self._line_bytes_max:
            content = (self._rest + piece if self._rest else piece).strip(b" \t\r")
        line = RawLine(self._number, self._offset, length + newline, content)
        self._offset += length + newline
        self._number += 1
        self._rest, self._skipped = b"", 0
        return line

    def _without_mark(self, chunk: bytes) -> bytes:
        start = self._rest + chunk
        self._rest = b""
        marked = start.startswith(BOM)
        self._at_start = not marked and BOM.startswith(start)
        if marked:
            self._offset = len(BOM)
            return start[len(BOM) :]
        return start


def split_lines(chunks: Iterable[bytes], *, line_bytes_max: int) -> Iterator[RawLine]:
    """Yield the lines of a whole file."""
    splitter = LineSplitter(line_bytes_max=line_bytes_max)
    for chunk in chunks:
        yield from splitter.feed(chunk)
    yield from splitter.finish()


def plan_file(
    open_chunks: Callable[[], Iterable[bytes]],
    file_bytes: int,
    rules: Rules,
    *,
    line_bytes_max: int,
    on_invalid: OnInvalid = OnInvalid.FAIL,
) -> Plan | Rejection:
    """Check every line and cut shards, or list every problem; with `skip`, bad lines fail alone.

    `open_chunks` starts a fresh read of the file; it is called again only to name the lines of duplicates.
    """
    shards = _ShardCutter(file_bytes)
    problems: list[Problem] = []
    unlisted = 0
    model: str | None = None
    with _SeenIds() as seen:
        for line in split_lines(open_chunks(), line_bytes_max=line_bytes_max):
            content = line.content
            if content == b"":
                continue
            shards.add(line)
            found: list[Problem] = []
            if content is None:
                found = [validation.too_long(line_bytes_max, line.number)]
            elif (checked := validation.check_line(content, rules)) is None:
                found = validation.explain(content, line.number, rules)
                seen.add_from(content)
            else:
                seen.add(checked.custom_id)
                if model is None:
                    model = checked.body.model
                elif checked.body.model != model:
                    found = [validation.other_model(checked.body.model, line.number)]
            if found:
                room = LINE_PROBLEMS_MAX - len(problems)
                problems += found[:room]
                unlisted += len(found[room:])
        suspects = seen.repeated()
    if suspects:
        lines = split_lines(open_chunks(), line_bytes_max=line_bytes_max)
        merged = heapq.merge(problems, _duplicates(lines, suspects), key=lambda problem: problem.line or 0)
        problems, unlisted = list(islice(merged, LINE_PROBLEMS_MAX)), unlisted + sum(1 for _ in merged)
    if not shards.lines:
        problems = [validation.empty_file()]
    if model is None or unlisted or (problems and on_invalid is OnInvalid.FAIL):
        return Rejection(problems, unlisted)
    return Plan(shards.finish(), shards.lines, model, problems)


class _ShardCutter:
    """Gathers lines that are not blank into shards of a size that suits the file's."""

    def __init__(self, file_bytes: int) -> None:
        aim = file_bytes // SHARDS_PER_BATCH_AIM
        self._bytes_max = min(max(aim, SHARD_BYTES_MIN), SHARD_BYTES_MAX)
        self._done: list[PlannedShard] = []
        self._first_line = 0
        self._offset = 0
        self._lines = 0
        self._end = 0
        self.lines = 0

    def add(self, line: RawLine) -> None:
        end = line.offset + line.length
        if self._lines and (self._lines == SHARD_LINES_MAX or end - self._offset > self._bytes_max):
            self._cut()
        if not self._lines:
            self._first_line, self._offset = line.number, line.offset
        self._lines += 1
        self._end = end
        self.lines += 1

    def finish(self) -> list[PlannedShard]:
        if self._lines:
            self._cut()
        return self._done

    def _cut(self) -> None:
        self._done.append(PlannedShard(self._first_line, self._lines, self._offset, self._end - self._offset))
        self._lines = 0


class _IdOnly(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(max_length=CUSTOM_ID_CHARS_MAX)]


_decode_id = msgspec.json.Decoder(_IdOnly).decode


def _id_of(content: bytes | None) -> str | None:
    try:
        return _decode_id(content).custom_id if content else None
    except (ValueError, RecursionError):
        return None


class _SeenIds:
    """Finds custom_ids used twice, eight bytes a line: hashes in buckets, each bucket checked at the end.

    Python's string hash is keyed and 64 bits wide: ten million lines meet by chance once in 370,000 files, and a
    meeting is only a suspicion that a second read of the file confirms.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._held = 0
        self._spilled: list[IO[bytes]] = []

    def __enter__(self) -> _SeenIds:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._spilled:
            file.close()

    def add(self, custom_id: str) -> None:
        value = hash(custom_id)
        self._buckets[value & 255].append(value)
        self._held += 1
        if self._held >= PLANNING_HASHES_IN_MEMORY_MAX:
            self._spill()

    def add_from(self, content: bytes) -> None:
        """Count the custom_id of a line that is wrong in some other way."""
        custom_id = _id_of(content)
        if custom_id is not None:
            self.add(custom_id)

    def repeated(self) -> set[int]:
        """Return the hashes that came more than once."""
        found: set[int] = set()
        for index, bucket in enumerate(self._buckets):
            hashes = self._read_back(index) if self._spilled else bucket
            hashes = hashes + bucket if self._spilled else hashes
            unique = set(hashes)
            if len(unique) != len(hashes):
                found |= _repeated(hashes)
        return found

    def _spill(self) -> None:
        if not self._spilled:
            self._spilled = [tempfile.TemporaryFile() for _ in range(_BUCKETS)]  # noqa: SIM115
        for file, bucket in zip(self._spilled, self._buckets, strict=True):
            bucket.tofile(file)
            del bucket[:]
        self._held = 0

    def _read_back(self, index: int) -> array[int]:
        file = self._spilled[index]
        file.seek(0)
        hashes = array("q")
        hashes.frombytes(file.read())
        return hashes


def _repeated(hashes: Iterable[int]) -> set[int]:
    seen: set[int] = set()
    return {value for value in hashes if value in seen or seen.add(value)}  # type: ignore[func-returns-value]


def _duplicates(lines: Iterable[RawLine], suspects: set[int]) -> Iterator[Problem]:
    seen: set[str] = set()
    for line in lines:
        custom_id = _id_of(line.content)
        if custom_id is None or hash(custom_id) not in suspects:
            continue
        if custom_id in seen:
            yield validation.duplicate(custom_id, line.number)
        seen.add(custom_id)
