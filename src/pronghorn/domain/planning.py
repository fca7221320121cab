"""From a file's bytes to a plan: every line checked, and runs of whole lines cut into shards.

Memory does not depend on the file's size: one chunk, one unfinished line, eight bytes a line for the search for
duplicate custom_ids (which spill to disk past a bound), and the shards themselves.
"""

from __future__ import annotations

import heapq
import tempfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from itertools import islice, zip_longest
from typing import IO, Annotated, NamedTuple

import msgspec

from pronghorn.domain import duplicates, validation
from pronghorn.domain.duplicates import Bodies, Originals
from pronghorn.domain.model import Copy, OnInvalid, Reject
from pronghorn.domain.validation import CheckedLine, Problem, Rules
from pronghorn.limits import (
    CUSTOM_ID_CHARS_MAX,
    LINE_PROBLEMS_MAX,
    PLANNING_HASHES_IN_MEMORY_MAX,
    PROBLEMS_LISTED_MAX,
    SHARD_BYTES_MAX,
    SHARD_BYTES_MIN,
    SHARD_LINES_MAX,
    SHARDS_PER_BATCH_AIM,
)

BOM = b"\xef\xbb\xbf"
_WHITE = b" \t\r"
# Models that a census names; an engine that takes any name could be sent a different one on every line.
CENSUS_MODELS_MAX = 1000
OTHER_MODELS = "(others)"
_BUCKETS = 256


class RawLine(msgspec.Struct, frozen=True, gc=False):
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
    """A file that can run: its shards in order, the one model its lines name, and which lines are not to be sent.

    `skipped` are the problems of bad ones, `originals` says which are copies of others.
    """

    shards: list[PlannedShard]
    lines: int
    model: str
    skipped: Sequence[Problem] = ()
    originals: Originals = duplicates.NONE

    def shards_with_unsent(self) -> Iterator[tuple[PlannedShard, list[Reject], list[Copy]]]:
        """Yield each shard with its lines that are not to be sent: bad ones, and copies of others."""
        starts = [shard.first_line for shard in self.shards]
        for (shard, rejects), end in zip(self._shards_with_rejects(), [*starts[1:], None], strict=True):
            yield shard, rejects, self.originals.between(shard.first_line, end, starts)

    def _shards_with_rejects(self) -> Iterator[tuple[PlannedShard, list[Reject]]]:
        skipped = deque(self.skipped)
        for shard, following in zip_longest(self.shards, self.shards[1:]):
            rejects: list[Reject] = []
            while skipped and (following is None or (skipped[0].line or 0) < following.first_line):
                problem = skipped.popleft()
                if not rejects or rejects[-1].line != problem.line:
                    rejects.append(Reject(problem.line or 0, problem.code, problem.message))
            yield shard, rejects


class Rejection(NamedTuple):
    """A file that cannot run: its problems in line order, how many more there were than are listed, its lines."""

    problems: list[Problem]
    unlisted: int
    lines: int = 0

    def listed(self) -> list[Problem]:
        """Return the first problems, and one more that counts those that are not listed, if any."""
        return listed(self.problems, self.unlisted)


def listed(problems: Sequence[Problem], unlisted: int = 0) -> list[Problem]:
    """Return the first problems, and one more that counts the rest of them and the unlisted, if any."""
    first = list(problems[:PROBLEMS_LISTED_MAX])
    unlisted += len(problems) - len(first)
    if not unlisted:
        return first
    return [*first, Problem("too_many_problems", f"{unlisted} further problems are not listed.", None, None)]


class LineSplitter:
    """Cuts a byte stream into lines as it comes.

    Only a newline ends a line. A byte order mark at the file's start belongs to no line. A line of more than
    `line_bytes_max` bytes is never held, nor is one whose number is in `too_long`: it is skipped to its newline and
    comes out without content. `offset` and `number` are those of the stream's first byte and line in their file.
    """

    def __init__(self, *, line_bytes_max: int, too_long: Container[int] = (), offset: int = 0, number: int = 1) -> None:
        self._line_bytes_max = line_bytes_max
        self._too_long = too_long
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
        if pieces and (self._rest or self._skipped):
            yield self._whole(pieces.pop(0), newline=1)
        number, offset, line_bytes_max, too_long = self._number, self._offset, self._line_bytes_max, self._too_long
        for piece in pieces:
            length = len(piece)
            held = length <= line_bytes_max and number not in too_long
            yield RawLine(number, offset, length + 1, piece.strip(_WHITE) if held else None)
            number += 1
            offset += length + 1
        self._number, self._offset = number, offset
        if self._skipped or len(self._rest) + len(tail) > line_bytes_max or number in too_long:
            self._skipped += len(self._rest) + len(tail)
            self._rest = b""
        else:
            self._rest = self._rest + tail if self._rest else tail

    def finish(self) -> Iterator[RawLine]:
        """Yield the last line if no newline ended it."""
        if self._rest or self._skipped:
            yield self._whole(b"", newline=0)

    def _whole(self, end: bytes, newline: int) -> RawLine:
        """Return the line whose beginning came in earlier chunks."""
        length = self._skipped + len(self._rest) + len(end)
        held = length <= self._line_bytes_max and self._number not in self._too_long
        content = (self._rest + end).strip(_WHITE) if held else None
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


class _Body(msgspec.Struct):
    body: msgspec.Raw


class _Prompts(msgspec.Struct):
    messages: msgspec.Raw = msgspec.Raw()
    prompt: msgspec.Raw = msgspec.Raw()
    input: msgspec.Raw = msgspec.Raw()


_decode_body = msgspec.json.Decoder(_Body).decode
_decode_prompts = msgspec.json.Decoder(_Prompts).decode


class Census:
    """What a file has to run, counted while it is planned: models, bodies that come again, tokens of prompts."""

    def __init__(self) -> None:
        self.models: Counter[str] = Counter()
        self.duplicate_bodies = 0
        self._prompt_bytes = 0
        self._bodies = _Repeats()

    @property
    def estimated_prompt_tokens(self) -> int:
        """A token is about four bytes of English; only the model's own tokenizer knows better."""
        return self._prompt_bytes // 4

    def count(self, line: CheckedLine, content: bytes) -> None:
        """Add a line that can run."""
        name = line.model
        self.models[name if name in self.models or len(self.models) < CENSUS_MODELS_MAX else OTHER_MODELS] += 1
        body = bytes(_decode_body(content).body)
        prompts = _decode_prompts(body)
        for prompt in (prompts.messages, prompts.prompt, prompts.input):
            self._prompt_bytes += len(memoryview(prompt))
        self._bodies.add(hash(body))

    def conclude(self) -> None:
        self.duplicate_bodies = self._bodies.surplus()

    def close(self) -> None:
        self._bodies.close()


def plan_file(
    open_chunks: Callable[[], Iterable[bytes]],
    file_bytes: int,
    rules: Rules,
    *,
    line_bytes_max: int,
    on_invalid: OnInvalid = OnInvalid.FAIL,
    deduplicate: bool = False,
    census: Census | None = None,
) -> Plan | Rejection:
    """Check every line and cut shards, or list every problem; with `skip`, bad lines fail alone.

    With `deduplicate`, the plan says which lines are copies of others.
    `open_chunks` starts a fresh read of the file; it is called again only to name the lines of duplicates.
    """
    reading = _Reading(file_bytes, rules, line_bytes_max, census, Bodies() if deduplicate else None)
    try:
        reading.take(split_lines(open_chunks(), line_bytes_max=line_bytes_max))
        if suspects := reading.custom_ids.repeated():
            reading.blame(_duplicates(split_lines(open_chunks(), line_bytes_max=line_bytes_max), suspects))
        reading.custom_ids.close()
        return reading.conclude(on_invalid)
    finally:
        reading.close()


class _Reading:
    """One pass over a file: its lines checked, its shards cut, its problems gathered."""

    def __init__(
        self, file_bytes: int, rules: Rules, line_bytes_max: int, census: Census | None, bodies: Bodies | None
    ) -> None:
        self.custom_ids = _Repeats()
        self._shards = _ShardCutter(file_bytes)
        self._rules = rules
        self._line_bytes_max = line_bytes_max
        self._census = census
        self._bodies = bodies
        self._model: str | None = None
        self._problems: list[Problem] = []
        self._unlisted = 0

    def take(self, lines: Iterable[RawLine]) -> None:
        """Check every line that is not blank."""
        rules, add_line, add_id = self._rules, self._shards.add, self.custom_ids.add
        looks_closer = self._census is not None or self._bodies is not None
        for line in lines:
            content = line.content
            if content == b"":
                continue
            add_line(line)
            if content is None or (checked := validation.check_line(content, rules)) is None:
                self._take_bad(line)
                continue
            add_id(hash(checked.custom_id))
            if checked.model != self._model:
                self._take_model(checked.model, line.number)
            if looks_closer:
                self._look_closer(line.number, checked, content)

    def blame(self, duplicates: Iterable[Problem]) -> None:
        """Add the problems of a second pass, in their lines' places."""
        merged = heapq.merge(self._problems, duplicates, key=lambda problem: problem.line or 0)
        self._problems = list(islice(merged, LINE_PROBLEMS_MAX))
        self._unlisted += sum(1 for _ in merged)

    def conclude(self, on_invalid: OnInvalid) -> Plan | Rejection:
        """Return what the file comes to."""
        if self._census is not None:
            self._census.conclude()
        if not self._shards.lines:
            return Rejection([validation.empty_file()], 0)
        if self._model is None or self._unlisted or (self._problems and on_invalid is OnInvalid.FAIL):
            return Rejection(self._problems, self._unlisted, self._shards.lines)
        return Plan(self._shards.finish(), self._shards.lines, self._model, self._problems, self._originals())

    def close(self) -> None:
        """Give back the disk space that a very large file has taken."""
        self.custom_ids.close()
        if self._census is not None:
            self._census.close()
        if self._bodies is not None:
            self._bodies.close()

    def _originals(self) -> Originals:
        if self._bodies is None:
            return duplicates.NONE
        return self._bodies.originals({problem.line for problem in self._problems if problem.line is not None})

    def _take_bad(self, line: RawLine) -> None:
        if line.content is None:
            self._note([validation.too_long(self._line_bytes_max, line.number)])
            return
        self._note(validation.explain(line.content, line.number, self._rules))
        if (custom_id := _id_of(line.content)) is not None:
            self.custom_ids.add(hash(custom_id))

    def _take_model(self, model: str, number: int) -> None:
        if self._model is None:
            self._model = model
        else:
            self._note([validation.other_model(model, number)])

    def _look_closer(self, number: int, checked: CheckedLine, content: bytes) -> None:
        if self._census is not None:
            self._census.count(checked, content)
        if self._bodies is not None:
            self._bodies.add(number, bytes(_decode_body(content).body))

    def _note(self, found: list[Problem]) -> None:
        room = LINE_PROBLEMS_MAX - len(self._problems)
        self._problems += found[:room]
        self._unlisted += len(found[room:])


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
        self._end_max = -1
        self._lines_done = 0

    def add(self, line: RawLine) -> None:
        end = line.offset + line.length
        if end > self._end_max or self._lines == SHARD_LINES_MAX:
            self._start_another(line)
        self._lines += 1
        self._end = end

    def finish(self) -> list[PlannedShard]:
        self._cut()
        return self._done

    @property
    def lines(self) -> int:
        return self._lines_done + self._lines

    def _start_another(self, line: RawLine) -> None:
        self._cut()
        self._first_line, self._offset = line.number, line.offset
        self._end_max = line.offset + self._bytes_max

    def _cut(self) -> None:
        if self._lines:
            self._done.append(PlannedShard(self._first_line, self._lines, self._offset, self._end - self._offset))
        self._lines_done += self._lines
        self._lines = 0


class _IdOnly(msgspec.Struct):
    custom_id: Annotated[str, msgspec.Meta(max_length=CUSTOM_ID_CHARS_MAX)]


_decode_id = msgspec.json.Decoder(_IdOnly).decode


def _id_of(content: bytes | None) -> str | None:
    try:
        return _decode_id(content).custom_id if content else None
    except (ValueError, RecursionError):
        return None


class _Repeats:
    """Finds values that come again, eight bytes each: hashes in buckets, each bucket looked through at the end.

    Python's hash of text and bytes is keyed and 64 bits wide: ten million values meet by chance once in 370,000 files,
    and for custom_ids a meeting is only a suspicion that a second read of the file confirms.
    """

    def __init__(self) -> None:
        self._buckets = [array("q") for _ in range(_BUCKETS)]
        self._held = 0
        self._spilled: list[IO[bytes]] = []

    def close(self) -> None:
        """Give back memory and disk space."""
        self._buckets.clear()
        for file in self._spilled:
            file.close()

    def add(self, value: int) -> None:
        self._buckets[value & 255].append(value)
        self._held += 1
        if self._held >= PLANNING_HASHES_IN_MEMORY_MAX:
            self._spill()

    def repeated(self) -> set[int]:
        """Return the hashes that came more than once."""
        found: set[int] = set()
        for hashes in self._all():
            if len(set(hashes)) != len(hashes):
                found |= _repeated(hashes)
        return found

    def surplus(self) -> int:
        """Return how many values came after an equal one."""
        return sum(len(hashes) - len(set(hashes)) for hashes in self._all())

    def _all(self) -> Iterator[array[int]]:
        for index, bucket in enumerate(self._buckets):
            yield self._read_back(index) + bucket if self._spilled else bucket

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
