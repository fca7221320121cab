"""The hot path: lines -> engine -> outcomes.

A line is read from its shard (`_ShardRun.read`), sent when a replica's window has room (`Dispatcher.fill`), judged
when its answer comes (`_answered`) and appended to the shard's segment (`_record`). The window belongs to the
replica, not to the shard: when one shard has nothing left to send, lines of the next go out. Groups of records are
made durable together (`_commit_loop`), and a shard whose every line is recorded is sorted back into input order.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections import deque
from collections.abc import Callable, Coroutine, Iterable
from functools import partial
from typing import Any

import msgspec

from pronghorn.clock import Clock
from pronghorn.domain import retry
from pronghorn.domain.answers import Answer, Fault
from pronghorn.domain.flow import Window
from pronghorn.domain.model import BlobRef, Closing, Endpoint, Replica, Shard, ShardKey, Tally, Usage
from pronghorn.domain.planning import LineSplitter, RawLine
from pronghorn.engines.client import Call, EngineClient, Timeouts
from pronghorn.errors import Damaged, StorageError, unreachable
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.segments import Counter, Fate, Outcome, Place, Segments, SegmentWriter
from pronghorn.worker import results
from pronghorn.worker.protocol import (
    Assign,
    Broken,
    Configure,
    Done,
    Moved,
    Report,
    Sent,
    ShardProgress,
)

# Lines of a shard held ready to be sent: more than any window would take at once between two reads.
READ_AHEAD_LINES = 4096
# Outcomes that wait for the disk: past this no further line is sent until it has caught up.
UNDURABLE_BYTES_MAX = 32 * MIB
PROGRESS_INTERVAL_S = 0.25
# OpenAI's bound for cancelling: lines in flight may finish, but an engine that hangs does not hold a batch for ever.
CLOSING_S_MAX = 600.0


class _RawLine(msgspec.Struct):
    custom_id: msgspec.Raw
    body: msgspec.Raw


_decode_line = msgspec.json.Decoder(_RawLine).decode


class _Line:
    """A line on its way to its outcome."""

    __slots__ = ("body", "call", "charged", "custom_id", "number", "run", "tries")

    def __init__(self, run: _ShardRun, number: int, custom_id: bytes, body: bytes) -> None:
        self.run = run
        self.number = number
        self.custom_id = custom_id
        self.body = body
        self.tries = 0
        self.charged = 0
        self.call: Call | None = None

    @property
    def identity(self) -> tuple[str, int, bytes]:
        return self.run.key.batch_id, self.number, self.custom_id


class _ShardRun:
    """One attempt at a shard: the lines that wait, and where the recorded outcomes lie."""

    def __init__(self, order: Assign, segments: Segments, on_change: Callable[[], None]) -> None:
        self.shard: Shard = order.shard
        self.blobs: list[BlobRef] = order.blobs
        self.endpoint: Endpoint = order.endpoint
        self.model: str = order.model
        self.closing: Closing | None = order.closing
        self.rejects = {reject.line: reject for reject in order.shard.rejects}
        self.ready: deque[_Line] = deque()
        self.in_flight: set[_Line] = set()
        self.places: dict[int, Place] = {}
        self.counter = Counter()
        self.all_read = False
        self.durable = Tally()
        self.moved = True
        self.sent = False
        self.finished = False
        self.segment: SegmentWriter | None = None
        self._lines_read = 0
        self._segments = segments
        self._on_change = on_change
        self._room = asyncio.Event()

    @property
    def key(self) -> ShardKey:
        return self.shard.key

    @property
    def complete(self) -> bool:
        return len(self.places) == self.shard.lines

    async def open(self) -> None:
        """Recover what earlier attempts recorded and start a segment of this epoch."""
        self.places = await asyncio.to_thread(self._segments.recover, self.key)
        for place in self.places.values():
            self.counter.add(place.fate, place.usage)
        self.durable = self.counter.tally()
        self.segment = await asyncio.to_thread(self._segments.create, self.key, self.shard.epoch)

    async def read(self, blobs: Blobs, line_bytes_max: int) -> None:
        """Make the shard's unrecorded lines ready, a bounded number ahead of what is sent."""
        shard = self.shard
        splitter = LineSplitter(line_bytes_max=line_bytes_max, offset=shard.offset, number=shard.first_line)
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

    def take(self) -> _Line:
        line = self.ready.popleft()
        if len(self.ready) < READ_AHEAD_LINES:
            self._room.set()
        return line

    def _add(self, lines: Iterable[RawLine]) -> None:
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
                line = _decode_line(raw.content or b"")
            except (msgspec.DecodeError, RecursionError) as error:
                raise Damaged(f"line {raw.number} of the input file is not the line that was validated") from error
            self.ready.append(_Line(self, raw.number, bytes(line.custom_id), bytes(line.body)))

    async def _wait_for_room(self) -> None:
        self._on_change()
        while len(self.ready) >= READ_AHEAD_LINES:
            self._room.clear()
            await self._room.wait()


class _Lane:
    """The way to one replica: its connections, its window, and whether it is paused."""

    def __init__(self, replica: Replica, client: EngineClient) -> None:
        self.replica = replica
        self.client = client
        self.window = Window(fixed=replica.window)
        self.in_flight = 0
        self.live = 0
        self.pauses = 0
        self.paused_until = 0.0
        self.reason: str | None = None

    def room(self, now: float) -> int:
        """Return how many more lines may be sent now; after a pause one line probes the way."""
        if self.reason is None:
            return (self._limit_beside_live() if self.live else self.window.limit) - self.in_flight
        return 1 - self.in_flight if now >= self.paused_until else 0

    def _limit_beside_live(self) -> int:
        """Return the window beside live requests: no line of it queues ahead of them, yet one always runs."""
        return max(1, min(self.window.limit, self.replica.slots or self.window.limit) - self.live)


def _success(line: _Line, answer: Answer | Fault) -> bytes:
    if isinstance(answer, Fault):
        unreachable("a fault is no success")
    return results.answered(*line.identity, answer)


def _failure(line: _Line, answer: Answer | Fault, failure: retry.Failure) -> bytes:
    if isinstance(answer, Fault) or failure.code is not None:
        return results.unanswered(*line.identity, failure.code or "upstream_error", failure.message)
    if failure.status is not None:
        answer = Answer(failure.status, answer.headers, answer.body)
    return results.answered(*line.identity, answer)


def _way(replica: Replica) -> tuple[str, str | None, int | None]:
    """What a lane's connections and window hang on."""
    return replica.base_url, replica.api_key_env, replica.window


def _refusal(error: OSError) -> str:
    return f"the disk refuses to store outcomes: {error.strerror}"


class Dispatcher:
    """Runs shards against engine replicas and reports what becomes of them."""

    def __init__(
        self,
        config: Configure,
        *,
        blobs: Blobs,
        segments: Segments,
        clock: Clock,
        rng: random.Random,
        report: Callable[[Report], None],
    ) -> None:
        self._rng = rng
        self._config = config
        self._blobs = blobs
        self._segments = segments
        self._clock = clock
        self._report = report
        self._lanes: list[_Lane] = []
        self._live: dict[str, int] = {}
        self._runs: dict[ShardKey, _ShardRun] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._timers: dict[_Line, asyncio.TimerHandle] = {}
        self._dirty = asyncio.Event()
        self._committing = asyncio.Lock()
        self._undurable_bytes = 0
        self._writing = False
        self._disk_error: OSError | None = None
        self._stopping = False
        self._drained = asyncio.Event()

    # Orders

    def use_replicas(self, replicas: list[Replica]) -> None:
        """Send lines to these replicas from now on; lanes that stay keep their windows."""
        kept = {_way(lane.replica): lane for lane in self._lanes}
        self._lanes = []
        for replica in replicas:
            lane = kept.pop(_way(replica), None)
            if lane is None:
                lane = self._open_lane(replica)
            lane.replica = replica  # its list of models may have changed
            self._lanes.append(lane)
        for lane in kept.values():
            self._spawn(lane.client.close())
        self.leave_room(self._live)

    def leave_room(self, live: dict[str, int]) -> None:
        """Leave room in the windows for so many live requests at each base URL."""
        self._live = live
        for lane in self._lanes:
            lane.live = live.get(lane.replica.base_url, 0)
        self.fill()

    def assign(self, order: Assign) -> None:
        """Start a shard; its end is reported as Done or Broken."""
        run = _ShardRun(order, self._segments, partial(self._shard_moved, order.shard.key))
        self._runs[run.key] = run
        self._spawn(self._start(run))

    def close_batch(self, batch_id: str, closing: Closing) -> None:
        """Record every unsent line of a batch as not run; lines in flight get CLOSING_S_MAX to finish."""
        for run in [run for run in self._runs.values() if run.key.batch_id == batch_id]:
            if run.closing is None:
                asyncio.get_running_loop().call_later(CLOSING_S_MAX, self._break_off, run)
            run.closing = closing
            for line in [line for line in self._timers if line.run is run]:
                self._timers.pop(line).cancel()
                run.ready.append(line)
            self._shard_moved(run.key)

    def _break_off(self, run: _ShardRun) -> None:
        for line in list(run.in_flight):
            if line.call is not None:
                line.call.abort()

    async def stop(self, drain_s: float) -> None:
        """Send nothing more; record the answers that come within `drain_s`, then end."""
        self._stopping = True
        self._check_drained()
        try:
            async with asyncio.timeout(drain_s):
                await self._drained.wait()
        except TimeoutError:
            pass
        for task in self._background:
            task.cancel()
        await self._commit()
        for lane in self._lanes:
            await lane.client.close()

    async def run(self) -> None:
        """Commit and report until cancelled; an error of the disk ends it, and with it the process."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._commit_loop())
            tasks.create_task(self._progress_loop())

    # Sending

    def fill(self) -> None:
        """Send ready lines, oldest shard first, while a replica that answers them has room."""
        if self._stopping or self._undurable_bytes > UNDURABLE_BYTES_MAX:
            return
        now = self._clock.monotonic()
        for run in list(self._runs.values()):
            while run.ready and (lane := self._roomiest(run, now)) is not None:
                self._send(run.take(), lane, now)
            self._note_sent(run)

    def _roomiest(self, run: _ShardRun, now: float) -> _Lane | None:
        best, best_room = None, 0
        for lane in self._lanes:
            if (room := lane.room(now)) > best_room and lane.replica.answers(run.endpoint, run.model):
                best, best_room = lane, room
        return best

    def _send(self, line: _Line, lane: _Lane, now: float) -> None:
        lane.in_flight += 1
        line.tries += 1
        line.charged += 1
        line.run.in_flight.add(line)
        line.call = lane.client.send(line.run.endpoint.path, line.body, partial(self._answered, line, lane, now))

    def _answered(self, line: _Line, lane: _Lane, sent_at: float, answer: Answer | Fault) -> None:
        now = self._clock.monotonic()
        effort = retry.Effort(line.tries, line.charged, lane.pauses)
        verdict = retry.judge(answer, line.run.endpoint, effort, self._clock.now())
        lane.window.answered(now, lane.in_flight + lane.live)
        lane.in_flight -= 1
        line.run.in_flight.discard(line)
        match verdict:
            case retry.Success(usage):
                self._resume(lane)
                self._record(line, Fate.COMPLETED, usage, _success(line, answer))
            case retry.Failure() as failure:
                self._resume(lane)
                self._record(line, Fate.FAILED, Usage(), _failure(line, answer, failure))
            case retry.Again(low, high, costs):
                lane.window.congested(now, now - sent_at)
                line.charged -= not costs
                self._send_later(line, self._rng.uniform(low, high))
            case retry.Pause(low, high, reason):
                lane.window.congested(now, now - sent_at)
                line.charged -= 1
                self._requeue(line)
                self._pause(lane, self._rng.uniform(low, high), reason)
        if self._stopping:
            self._check_drained()
        self.fill()

    def _record(self, line: _Line, fate: Fate, usage: Usage, result: bytes) -> None:
        line.run.record(Outcome(line.number, fate, usage, result))
        self._undurable_bytes += len(result)
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write)

    def _send_later(self, line: _Line, wait_s: float) -> None:
        def again() -> None:
            self._timers.pop(line, None)
            self._requeue(line)
            self.fill()

        self._timers[line] = asyncio.get_running_loop().call_later(wait_s, again)
        if line.run.closing is not None:
            self.close_batch(line.run.key.batch_id, line.run.closing)

    def _requeue(self, line: _Line) -> None:
        line.run.ready.appendleft(line)
        self._give_up_if_closing(line.run)

    def _pause(self, lane: _Lane, wait_s: float, reason: str) -> None:
        now = self._clock.monotonic()
        if lane.reason is not None and now < lane.paused_until:
            return
        lane.pauses += 1
        lane.paused_until = now + wait_s
        lane.reason = reason
        asyncio.get_running_loop().call_later(wait_s, self._probe, lane)

    def _probe(self, lane: _Lane) -> None:
        """Let one line try a paused replica; timers may come a little early, so the clock is not asked."""
        lane.paused_until = 0.0
        self.fill()

    def _resume(self, lane: _Lane) -> None:
        lane.reason = None
        lane.pauses = 0

    # Shards

    async def _start(self, run: _ShardRun) -> None:
        try:
            await run.open()
            self._dirty.set()
            await run.read(self._blobs, self._config.line_bytes_max)
        except (StorageError, OSError) as error:
            if run.closing is not None and run.segment is not None:
                self._give_up_unread(run)
            else:
                self._drop(run, str(error))

    def _shard_moved(self, key: ShardKey) -> None:
        """Look at a shard that has new lines, or whose batch is closing."""
        if key in self._runs:
            self._dirty.set()
            self._give_up_if_closing(self._runs[key])
            self.fill()

    def _give_up_if_closing(self, run: _ShardRun) -> None:
        while run.closing is not None and run.ready:
            line = run.take()
            self._record(line, Fate.UNRUN, Usage(), results.not_run(*line.identity, run.closing))

    def _give_up_unread(self, run: _ShardRun) -> None:
        """Record the lines of a closing shard whose input cannot be read: they are not run, and have no name."""
        closing = run.closing or unreachable("only a closing shard is given up unread")
        pending = len(run.ready) + len(run.in_flight) + sum(line.run is run for line in self._timers)
        missing = run.shard.lines - len(run.places) - pending
        known = {line.number for line in [*run.ready, *run.in_flight]}
        numbers = (n for n in itertools.count(run.shard.first_line) if n not in run.places and n not in known)
        for number in list(itertools.islice(numbers, missing)):
            line = _Line(run, number, b"null", b"")
            self._record(line, Fate.UNRUN, Usage(), results.not_run(*line.identity, closing))
        run.all_read = True
        self._shard_moved(run.key)

    def _note_sent(self, run: _ShardRun) -> None:
        if run.all_read and not run.ready and not run.sent:
            run.sent = True
            self._report(Sent(run.key, run.shard.epoch))

    def _drop(self, run: _ShardRun, reason: str) -> None:
        if self._runs.pop(run.key, None) is not None and run.segment is not None:
            run.segment.close()
        self._report(Broken(run.key, run.shard.epoch, reason))

    async def _finish(self, run: _ShardRun, segment: SegmentWriter) -> None:
        segment.close()
        result = await asyncio.to_thread(results.write_parts, run.shard, run.places, self._blobs)
        del self._runs[run.key]
        self._report(Done(run.key, run.shard.epoch, result))

    # Durability

    async def _commit_loop(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self._commit()

    def _write(self) -> None:
        """Hand what was recorded in this turn of the loop to the operating system: it survives our death now."""
        self._writing = False
        for run in list(self._runs.values()):
            if run.segment is not None:
                try:
                    run.segment.write()
                except OSError as error:
                    self._disk_error = self._disk_error or error
                    self._drop(run, _refusal(error))
        self._dirty.set()

    async def _commit(self) -> None:
        """Wait for the disk once for all that is written, then finish the shards that are complete."""
        async with self._committing:
            self._write()
            self._dirty.clear()
            if self._disk_error is not None:
                raise self._disk_error
            self._undurable_bytes = 0
            groups = [(run, run.segment, run.counter.tally(), run.complete) for run in self._runs.values()]
            for run, segment, tally, complete in groups:
                if (
                    self._runs.get(run.key) is not run
                    or segment is None
                    or run.finished
                    or (tally == run.durable and not complete)
                ):
                    continue
                try:
                    await asyncio.to_thread(segment.sync)
                    run.durable, run.moved, run.finished = tally, True, complete
                    if complete:
                        await self._finish(run, segment)
                except OSError as error:
                    self._drop(run, _refusal(error))
                    raise
        self.fill()

    async def _progress_loop(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            self._report_progress()

    def _report_progress(self) -> None:
        moved = [run for run in self._runs.values() if run.moved]
        for run in moved:
            run.moved = False
        shards = [ShardProgress(run.key, run.shard.epoch, run.durable) for run in moved]
        paused = {lane.replica.base_url: lane.reason for lane in self._lanes if lane.reason is not None}
        self._report(Moved(shards, paused))

    # Plumbing

    def _open_lane(self, replica: Replica) -> _Lane:
        key = os.environ.get(replica.api_key_env) if replica.api_key_env else None
        client = EngineClient(
            replica.base_url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeouts=Timeouts(total_s=self._config.line_timeout_s, first_byte_s=self._config.line_timeout_s),
            answer_bytes_max=self._config.answer_bytes_max,
        )
        return _Lane(replica, client)

    def _check_drained(self) -> None:
        if not any(lane.in_flight for lane in self._lanes):
            self._drained.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background.discard)
