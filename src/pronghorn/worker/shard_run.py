"""A line on its way, and one attempt at a shard, which reads its lines and holds their outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator

import msgspec

from pronghorn.domain.answers import Answer
from pronghorn.domain.model import BlobRef, Closing, Copy, Endpoint, Parts, Shard, ShardKey, Tally, Usage
from pronghorn.domain.order import PromptQueue, prompt_offset
from pronghorn.domain.planning import LineSplitter, RawLine
from pronghorn.domain.retry import Failure
from pronghorn.domain.validation import TOO_LONG
from pronghorn.engines.client import Call
from pronghorn.errors import Damaged, unreachable
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Counter, Fate, Outcome, Place, Segments, SegmentWriter
from pronghorn.worker import results
from pronghorn.worker.protocol import Assign

# Lines of a shard held ready to be sent: more than any window would take at once between two reads.
READ_AHEAD_LINES = 4096


class _Decoded(msgspec.Struct):
    custom_id: msgspec.Raw
    body: msgspec.Raw


decode_line = msgspec.json.Decoder(_Decoded).decode


class Line:
    """A line on its way to its outcome.

    `tries` counts how often it was sent, `charged` those that use up its attempts, `deaths` the engine's ends that it
    was part of, `alone_deaths` those of them at which the engine had no other line; `alone` tells that it has none now.
    `isolations_ended` counts how often it ran alone for so long that others joined it. `failed_at` holds the names of
    the replicas that have failed it, `limited_at` of those that have put it off without, until it has waited.
    `or_else` is its outcome if time runs out, with the answer that it would show. `prompt` is its body from where the
    prompt begins, which decides on its place among others.
    """

    __slots__ = (
        "alone",
        "alone_deaths",
        "before_prompt",
        "call",
        "charged",
        "custom_id",
        "deaths",
        "failed_at",
        "isolations_ended",
        "limited_at",
        "number",
        "or_else",
        "prompt",
        "run",
        "timer",
        "tries",
    )

    def __init__(
        self, run: ShardRun, number: int, custom_id: bytes, before_prompt: bytes = b"", prompt: bytes = b""
    ) -> None:
        self.run = run
        self.number = number
        self.custom_id = custom_id
        self.before_prompt = before_prompt
        self.prompt = prompt
        self.tries = 0
        self.charged = 0
        self.deaths = 0
        self.alone_deaths = 0
        self.alone = False
        self.isolations_ended = 0
        self.failed_at: frozenset[str] = frozenset()
        self.limited_at: frozenset[str] = frozenset()
        self.call: Call | None = None
        self.timer: asyncio.TimerHandle | None = None
        self.or_else: tuple[Failure, Answer | None] | None = None

    @property
    def body(self) -> bytes:
        return self.before_prompt + self.prompt

    @property
    def identity(self) -> tuple[str, int, bytes]:
        return self.run.key.batch_id, self.number, self.custom_id


class ShardRun:
    """One attempt at a shard: lines are `ready` to be sent, `pending` until their outcome, recorded at `places`.

    `copies` are the lines that get another's outcome, by number, with their custom_ids. `broken` is why the rest cannot
    be read: then nothing more is sent, and the attempt ends once no line is pending.
    """

    def __init__(self, order: Assign, segments: Segments, on_change: Callable[[], None], *, prompt_order: bool) -> None:
        self.shard: Shard = order.shard
        self.blobs: list[BlobRef] = order.blobs
        self.endpoint: Endpoint = order.endpoint
        self.model: str = order.model
        self.closing: Closing | None = order.closing
        self.originals: dict[int, Parts] = order.originals
        self.rejects = {reject.line: reject for reject in order.shard.rejects}
        self.copies: dict[int, tuple[Copy, bytes]] = {}
        self.ready: PromptQueue[Line] = PromptQueue()
        self.pending: set[Line] = set()
        self.places: dict[int, Place] = {}
        self.counter = Counter()
        self.all_read = False
        self.broken: str | None = None
        self.durable = Tally()
        self.moved = True
        self.sent = False
        self.passed_over = 0
        self.segment: SegmentWriter | None = None
        self._lines_read = 0
        self._segments = segments
        self._on_change = on_change
        self._prompt_order = prompt_order
        self._copy_at = {copy.line: copy for copy in order.shard.copies}
        self._room = asyncio.Event()

    @property
    def key(self) -> ShardKey:
        return self.shard.key

    @property
    def ended(self) -> bool:
        """Tell whether every line has its outcome but for `copies`, which get theirs without being sent."""
        return len(self.places) + len(self.copies) == self.shard.lines

    @property
    def over(self) -> bool:
        """Tell whether this attempt has nothing more to record but `copies`."""
        return not self.pending if self.broken is not None else self.ended

    @property
    def sends_last(self) -> bool:
        """Tell whether nothing is ready but lines that go behind those of all shards."""
        return bool(self.ready) and not self.ready.has_first

    @property
    def sends_no_more(self) -> bool:
        return self.closing is not None or self.broken is not None

    async def open(self) -> None:
        """Recover what earlier attempts recorded and start a segment of this epoch."""
        self.places = await asyncio.to_thread(self._segments.recover, self.key)
        for place in self.places.values():
            self.counter.add(place.fate, place.usage)
        self.durable = self.counter.tally()
        self.segment = await asyncio.to_thread(self._segments.create, self.key, self.shard.epoch)

    async def read(self, blobs: Blobs) -> None:
        """Make the shard's unrecorded lines ready, a bounded number ahead of what is sent.

        Which lines are too long was found when they were validated, whatever the limit is now.
        """
        shard = self.shard
        too_long = {reject.line for reject in shard.rejects if reject.code == TOO_LONG}
        splitter = LineSplitter(
            line_bytes_max=shard.bytes, too_long=too_long, offset=shard.offset, number=shard.first_line
        )
        async for chunk in blobs.read(self.blobs, shard.offset, shard.offset + shard.bytes):
            self._add(splitter.feed(chunk))
            await self._wait_for_room()
        self._add(splitter.finish())
        if self._lines_read != shard.lines:
            raise Damaged(f"the input file has {self._lines_read} lines where {shard.lines} were validated")
        self.all_read = True
        self._on_change()

    def record(self, outcome: Outcome) -> None:
        """Append a line's one outcome."""
        if self.segment is None or outcome.line in self.places:
            unreachable("a line is sent once its segment is open, and recorded once")
        self.places[outcome.line] = self.segment.append(outcome)
        self.counter.add(outcome.fate, outcome.usage)

    def record_copy(self, outcome: Outcome) -> None:
        """Append the outcome of a line that is a copy."""
        self.record(outcome)
        del self.copies[outcome.line]

    def took(self, line: Line) -> Line:
        """Note that a ready line has been taken: it is pending from now on."""
        self.pending.add(line)
        if len(self.ready) < READ_AHEAD_LINES:
            self._room.set()
        return line

    def give_up(self, reason: str) -> None:
        """Let go of the lines that are ready: another attempt reads them again."""
        self.broken, self.ready = reason, PromptQueue()

    def put_back(self, line: Line, *, last: bool = False) -> None:
        """Make a pending line the next ready one, or the last of those that have been read."""
        self.pending.discard(line)
        if self.broken is not None:
            return
        if last:
            self.ready.put_last(line)
        else:
            self.ready.put_back(line)

    def _add(self, lines: Iterable[RawLine]) -> None:
        self.ready.add(self._unrecorded(lines))

    def _unrecorded(self, lines: Iterable[RawLine]) -> Iterator[Line]:
        for raw in lines:
            if raw.content == b"":
                continue
            self._lines_read += 1
            if raw.number in self.places:
                continue
            if reject := self.rejects.get(raw.number):
                result = results.rejected(self.key.batch_id, reject, raw.content)
                self.record(Outcome(raw.number, Fate.FAILED, Usage(), result))
                continue
            try:
                line = decode_line(raw.content or b"")
            except (msgspec.DecodeError, RecursionError) as error:
                raise Damaged(f"line {raw.number} of the input file is not the line that was validated") from error
            if copy := self._copy_at.get(raw.number):
                self.copies[raw.number] = copy, bytes(line.custom_id)
                continue
            body = bytes(line.body)
            prompt_at = prompt_offset(body, self.endpoint) if self._prompt_order else len(body)
            yield Line(self, raw.number, bytes(line.custom_id), body[:prompt_at], body[prompt_at:])

    async def _wait_for_room(self) -> None:
        self._on_change()
        while len(self.ready) >= READ_AHEAD_LINES:
            self._room.clear()
            await self._room.wait()
