"""Moves every batch through its life: one loop that takes what workers report and decides what is next.

Everything here runs in one task, one event after the other, so there is nothing to lock. All that must survive is in
the metadata; what is held in memory can be read back from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import msgspec

from pronghorn.clock import Clock
from pronghorn.control.crew import CrewMember, Event, Gone, Held, Reported, Route
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.planner import Planner
from pronghorn.domain.fairness import Candidate, FairShare
from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import (
    Batch,
    BatchStatus,
    BlobRef,
    Closing,
    Endpoint,
    Job,
    Parts,
    Progress,
    Replica,
    Shard,
    ShardKey,
    Tally,
)
from pronghorn.domain.progress import Pace
from pronghorn.engines.base import EnginePool
from pronghorn.errors import Fenced, StorageError
from pronghorn.executors.base import Executor
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata, OpenState
from pronghorn.storage.segments import Segments
from pronghorn.worker.protocol import Aside, Assign, Broken, Close, Configure, Done, Moved, Paused, Ready, Report, Sent

log = logging.getLogger("pronghorn.coordinator")

# How stale the status of a batch may be, and how late a deadline is noticed.
TICK_S = 0.5
# Shards with unsent lines that a worker holds for one set of replicas: one being sent, one ready behind it.
UNSENT_SHARDS_MAX = 2
# How often a batch's counts are written while it runs, and after how long without one it is said to stand still.
SHOW_INTERVAL_S = 0.5
# After showing progress the coordinator does other things for so many times as long.
SHOW_PAUSE_SHARE = 10
STALLED_S = 10.0
NO_ENGINE: Route = ()
# A shard that the disk refused is not handed out again at once, and others go before it meanwhile.
BROKEN_WAIT_S = 5.0
# An input that cannot be read is read from its beginning each time, and others are validated meanwhile.
VALIDATION_WAIT_S_MAX = 300.0


class _Postponed(NamedTuple):
    """A validation that failed for reasons that are not the input's: how often in a row, and until when it waits."""

    times: int
    until: float


@dataclass(frozen=True, slots=True)
class _Unsent:
    """A shard that was claimed and then sent to no worker."""

    key: ShardKey
    epoch: int


@dataclass(slots=True)
class _Aside:
    """A shard that lacks nothing but copies of lines in shards that are not done: it belongs to no worker meanwhile."""

    epoch: int
    missing: set[int]


@dataclass(slots=True)
class _HeldBack:
    """A shard that could not be read, until when no worker gets it again."""

    epoch: int
    until: float


@dataclass(slots=True)
class _Open:
    """A planned batch that has not ended: what is done, what is under way."""

    batch: Batch
    job: Job
    blobs: list[BlobRef]
    done: Tally
    unfinished: int
    pace: Pace
    live: dict[ShardKey, Tally] = field(default_factory=dict)
    waiting: bool = True
    aside: dict[ShardKey, _Aside] = field(default_factory=dict)
    held_back: dict[ShardKey, _HeldBack] = field(default_factory=dict)
    broken: str | None = None
    shown: tuple[Tally, Progress | None] = (Tally(), None)
    shown_at: float = float("-inf")

    @property
    def tally(self) -> Tally:
        return sum(self.live.values(), self.done)


class Coordinator:
    """The one active coordinator of a server."""

    def __init__(
        self,
        *,
        metadata: Metadata,
        files: Files,
        segments: Segments,
        engines: EnginePool,
        executor: Executor,
        planner: Planner,
        finalizer: Finalizer,
        clock: Clock,
        configure: Configure,
        workers: int,
        batch_ended: Callable[[], None] = lambda: None,
    ) -> None:
        self._metadata = metadata
        self._files = files
        self._segments = segments
        self._engines = engines
        self._planner = planner
        self._finalizer = finalizer
        self._clock = clock
        self._batch_ended = batch_ended
        self._events: asyncio.Queue[Event | _Unsent | None] = asyncio.Queue()
        self._moved: dict[CrewMember, Moved] = {}
        self._crew = [
            CrewMember(executor, configure, partial(self._share_of_replicas, index), self._take)
            for index in range(workers)
        ]
        self._open: dict[str, _Open] = {}
        self._planning: dict[str, asyncio.Task[None]] = {}
        self._postponed: dict[str, _Postponed] = {}
        self._paused: dict[CrewMember, list[Paused]] = {}
        self._putting_off: dict[CrewMember, list[Paused]] = {}
        self._shares: dict[Route, FairShare] = {}
        self._show_at = 0.0
        self._stopping = False

    def wake(self) -> None:
        """Look for new work now rather than at the next tick."""
        if self._events.empty():  # whatever else is there has the same effect
            self._events.put_nowait(None)

    def leave_room(self, live: Mapping[str, int]) -> None:
        """Make the workers leave room for so many live requests at each replica, by name."""
        for member in self._crew:
            member.leave_room(live)

    @property
    def backlog(self) -> int:
        """How many events wait to be handled."""
        return self._events.qsize()

    def stop(self, drain_s: float) -> None:
        """Send no further line, let those in flight finish for up to `drain_s`, and make `run` return."""
        if self._stopping:
            return
        self._stopping = True
        for member in self._crew:
            member.stop(drain_s)
        self.wake()

    async def run(self) -> None:
        """Work until stopped."""
        await self._metadata.release_shards()
        self._engines.on_change(self._use_replicas)
        crew = asyncio.gather(*(member.run() for member in self._crew))
        crew.add_done_callback(lambda _: self.wake())
        try:
            while not crew.done():
                await self._take_events()
                if not self._stopping:
                    await self._look_again()
            await self._take_events()
            crew.result()
        finally:
            for task in self._planning.values():
                task.cancel()
            self.stop(0)
            await asyncio.gather(crew, *self._planning.values(), return_exceptions=True)

    # Events

    def _take(self, event: Event) -> None:
        """Queue what a worker says; of what has moved there is one report a worker, however long the queue waits."""
        match event:
            case Reported(member, Moved() as moved):
                waiting = self._moved.get(member)
                self._moved[member] = moved if waiting is None else moved.after(waiting)
                if waiting is not None:
                    return
        self._events.put_nowait(event)

    async def _take_events(self) -> None:
        """Handle everything that has been reported, after waiting up to a tick for something to be."""
        try:
            async with asyncio.timeout(TICK_S):
                event = await self._events.get()
        except TimeoutError:
            return
        await self._insist(event)
        while not self._events.empty():
            await self._insist(self._events.get_nowait())

    async def _insist(self, event: Event | _Unsent | None) -> None:
        """Handle an event, again and again while the database refuses: nothing that was reported is dropped."""
        while True:
            try:
                await self._handle(event)
            except StorageError as error:
                log.error("%s; trying again in %.0f s", error, BROKEN_WAIT_S)
                if self._stopping:
                    return  # the next start finds the shard unfinished, and its outcomes in its segment
                await asyncio.sleep(BROKEN_WAIT_S)
            else:
                return

    async def _handle(self, event: Event | _Unsent | None) -> None:
        match event:
            case Reported(member, report):
                await self._handle_report(member, report)
            case Gone(member, held):
                self._paused.pop(member, None)
                self._putting_off.pop(member, None)
                for key in list(held):
                    await self._release(key, held[key].epoch)
                    del held[key]  # not before: while the database refuses, this is tried again
            case _Unsent(key, epoch):
                await self._release(key, epoch)

    async def _handle_report(self, member: CrewMember, report: Report) -> None:
        match report:
            case Ready():
                pass
            case Sent(key, epoch):
                if (held := member.held.get(key)) and held.epoch == epoch:
                    held.sent = True
            case Moved():
                shards, paused, putting_off = msgspec.structs.astuple(self._moved.pop(member))
                self._paused[member], self._putting_off[member] = paused, putting_off
                for shard in shards:
                    held = member.held.get(shard.key)
                    if held and held.epoch == shard.epoch and (batch := self._open.get(shard.key.batch_id)):
                        if batch.live.get(shard.key, Tally()) != shard.tally:
                            batch.broken = None
                        batch.live[shard.key] = shard.tally
            case Done(key, epoch):
                await self._commit(member, report)
            case Aside(key, epoch, missing):
                done = await self._metadata.parts_of(key.batch_id, missing)
                member.held.pop(key, None)
                if batch := self._open.get(key.batch_id):
                    batch.aside[key] = _Aside(epoch, set(missing) - done.keys())
            case Broken(key, epoch, reason):
                log.error("shard %d of %s: %s", key.position, key.batch_id, reason)
                member.held.pop(key, None)
                if batch := self._open.get(key.batch_id):
                    batch.broken = reason
                    batch.held_back[key] = _HeldBack(epoch, self._clock.monotonic() + BROKEN_WAIT_S)
                else:
                    await self._release(key, epoch)

    async def _commit(self, member: CrewMember, done: Done) -> None:
        member.held.pop(done.key, None)
        try:
            await self._metadata.commit_shard(done.key, done.epoch, done.result)
        except Fenced as fenced:
            log.warning("a late result is refused: %s", fenced)
            return
        await asyncio.to_thread(self._segments.discard, done.key)
        if batch := self._open.get(done.key.batch_id):
            batch.live.pop(done.key, None)
            batch.done += done.result.tally
            batch.unfinished -= 1
            batch.broken = None
            for aside in batch.aside.values():
                aside.missing.discard(done.key.position)

    async def _take_up_again(self, batch: _Open) -> None:
        """Give the shards that lack nothing any more, or have been held back, to whichever worker is next."""
        now = self._clock.monotonic()
        for key, aside in list(batch.aside.items()):
            if not aside.missing:
                await self._release(key, aside.epoch)
                del batch.aside[key]
        for key, held in list(batch.held_back.items()):
            if held.until <= now:
                await self._release(key, held.epoch)
                del batch.held_back[key]

    async def _release(self, key: ShardKey, epoch: int) -> None:
        await self._metadata.release_shard(key, epoch)
        if batch := self._open.get(key.batch_id):
            batch.waiting = True

    # Decisions

    async def _look_again(self) -> None:
        """Look at every batch; while the database refuses, wait."""
        try:
            await self._look()
        except StorageError as error:
            log.error("%s; looking again in %.0f s", error, BROKEN_WAIT_S)
            await asyncio.sleep(BROKEN_WAIT_S)

    async def _look(self) -> None:
        """Bring every open batch on by whatever it is ready for."""
        states = await self._metadata.open_states()
        for state in states:
            if not self._needs_a_look(state):
                continue
            batch = await self._metadata.batch(state.id, state.account_id)
            if batch is None or batch.status in TERMINAL:
                continue
            try:
                await self._look_at(batch)
            except Fenced as fenced:
                log.info("changed meanwhile, looked at again soon: %s", fenced)
        for batch_id in self._open.keys() - {state.id for state in states}:
            del self._open[batch_id]
        for batch_id in self._postponed.keys() - {state.id for state in states}:
            del self._postponed[batch_id]
        await self._hand_out()
        await self._show_progress()

    def _needs_a_look(self, state: OpenState) -> bool:
        """Tell whether anything is to be done about a batch; most of thousands just wait."""
        if self._is_due(state):
            return True
        if state.status is BatchStatus.VALIDATING:
            return self._may_plan(state.id)
        opened = self._open.get(state.id)
        if opened is None or opened.unfinished == 0 or opened.aside or opened.held_back:
            return True
        return (opened.batch.status, opened.batch.closing) != (state.status, state.closing)

    def _is_due(self, batch: Batch | OpenState) -> bool:
        """Tell whether a batch's window has ended and nothing has closed it before."""
        over = batch.expires_at is not None and self._clock.now() >= batch.expires_at
        return over and batch.closing is None and batch.status is not BatchStatus.FINALIZING

    async def _look_at(self, batch: Batch) -> None:
        batch = await self._expire_if_due(batch)
        if batch.status is BatchStatus.VALIDATING:
            self._start_planning(batch)
        elif batch.status is BatchStatus.EXPIRED:
            self._stop_planning(batch)
            self._batch_ended()
        else:
            self._stop_planning(batch)
            opened = await self._opened(batch)
            if batch.closing is not None and opened.batch.closing is None:
                self._close(batch, batch.closing)
            opened.batch = batch
            await self._take_up_again(opened)
            if opened.unfinished == 0:
                await self._finalizer.finish(batch)
                self._batch_ended()
                del self._open[batch.id]

    async def _expire_if_due(self, batch: Batch) -> Batch:
        if not self._is_due(batch):
            return batch
        validating = batch.status is BatchStatus.VALIDATING
        status = BatchStatus.EXPIRED if validating else BatchStatus.FINALIZING
        return await self._metadata.advance(batch, status, self._clock.now(), closing=Closing.EXPIRED)

    def _may_plan(self, batch_id: str) -> bool:
        """Validate one batch at a time: it takes a core, and the order of creation is kept but for those that wait."""
        postponed = self._postponed.get(batch_id)
        return not self._planning and (postponed is None or self._clock.monotonic() >= postponed.until)

    def _start_planning(self, batch: Batch) -> None:
        if self._may_plan(batch.id):
            task = asyncio.create_task(self._plan(batch))
            self._planning[batch.id] = task
            task.add_done_callback(lambda _: self._planned(batch.id))

    async def _plan(self, batch: Batch) -> None:
        """Validate a batch; one that cannot be validated now waits, and says why, while others go on."""
        try:
            await self._planner.validate(batch)
        except StorageError as error:
            log.error("%s cannot be validated now: %s", batch.id, error)
            await self._postpone(batch, str(error))
        except Exception:
            log.exception("%s cannot be validated now", batch.id)
            await self._postpone(batch, "an error of the server itself, which its log describes")
        else:
            self._postponed.pop(batch.id, None)

    async def _postpone(self, batch: Batch, reason: str) -> None:
        times = self._postponed.get(batch.id, _Postponed(0, 0.0)).times + 1
        wait_s = min(VALIDATION_WAIT_S_MAX, BROKEN_WAIT_S * 2 ** min(times - 1, 10))
        self._postponed[batch.id] = _Postponed(times, self._clock.monotonic() + wait_s)
        since = (batch.progress and batch.progress.stalled_since) or self._clock.now()
        shown = Progress(reason=f"the input cannot be validated now: {reason}", stalled_since=since)
        try:
            await self._metadata.record_progress([(batch.id, Tally(), shown)])
        except StorageError as error:
            log.error("why %s waits cannot be shown: %s", batch.id, error)

    def _planned(self, batch_id: str) -> None:
        del self._planning[batch_id]
        self._batch_ended()  # which is so if it failed
        self.wake()

    def _stop_planning(self, batch: Batch) -> None:
        if batch.id in self._planning:
            self._planning[batch.id].cancel()

    async def _opened(self, batch: Batch) -> _Open:
        if batch.id not in self._open:
            done, unfinished = await self._metadata.shard_progress(batch.id)
            job = await self._metadata.job(batch.job_id, batch.account_id)
            blobs = await self._files.blobs(batch.input_file_id)
            weight = job or Job(batch.job_id, batch.account_id, "", 1, 0)
            pace = Pace(self._clock.monotonic(), done.lines, _tokens(done))
            self._open[batch.id] = _Open(batch, weight, blobs, done, unfinished, pace)
        return self._open[batch.id]

    def _close(self, batch: Batch, closing: Closing) -> None:
        for member in self._crew:
            member.send(Close(batch.id, closing))

    def _share_of_replicas(self, index: int) -> list[Replica]:
        """Return the replicas as one worker may use them: a stated window is for all workers together."""
        shares = (replica.share(index, len(self._crew)) for replica in self._engines.replicas())
        return [share for share in shares if share is not None]

    def _reaches(self, index: int, route: Route) -> bool:
        """Tell whether a worker has a share of a replica in the route, or needs none."""
        return route == NO_ENGINE or any(replica.name in route for replica in self._share_of_replicas(index))

    def _use_replicas(self) -> None:
        for member in self._crew:
            member.use_replicas()
        self.wake()

    # Shards to workers

    async def _hand_out(self) -> None:
        """Keep every worker supplied, for each set of replicas that batches wait for."""
        waiting: dict[Route, list[_Open]] = {}
        routes: dict[tuple[Endpoint, str | None], Route] = {}
        for batch in self._open.values():
            if not batch.waiting:
                continue
            # Lines that are not sent any more need no engine, and wait for no batch that does.
            closing, asked = batch.batch.closing is not None, (batch.batch.endpoint, batch.batch.model)
            if not closing and asked not in routes:
                routes[asked] = self._route(batch.batch)
            route = NO_ENGINE if closing else routes[asked]
            if route or closing:
                waiting.setdefault(route, []).append(batch)
        for route, batches in waiting.items():
            for member in self._members_with_room(route):
                await self._supply(member, route, batches)

    def _members_with_room(self, route: Route) -> Sequence[CrewMember]:
        """Return one entry for each shard that a worker has room for, the emptiest workers first."""
        unsent = {
            member: sum(not held.sent and held.route == route for held in member.held.values())
            for index, member in enumerate(self._crew)
            if member.ready and self._reaches(index, route)
        }
        slots = [
            (level, index) for index, member in enumerate(unsent) for level in range(unsent[member], UNSENT_SHARDS_MAX)
        ]
        members = list(unsent)
        return [members[index] for _, index in sorted(slots)]

    async def _supply(self, member: CrewMember, route: Route, batches: list[_Open]) -> None:
        """Give a worker the next shard in fair order, if one still waits."""
        share = self._shares.setdefault(route, FairShare())
        while candidate := share.pick([_candidate(batch) for batch in batches if batch.waiting]):
            batch = self._open[candidate.batch_id]
            shard = await self._metadata.claim_shard(candidate.batch_id)
            if shard is None:
                batch.waiting = False
                continue
            share.charge(candidate, shard.lines)
            try:
                originals = await self._originals(shard)
            except StorageError:
                self._events.put_nowait(_Unsent(shard.key, shard.epoch))
                raise
            if member.ready:
                member.held[shard.key] = Held(shard.epoch, route)
                model = batch.batch.model or ""
                member.send(Assign(shard, batch.blobs, batch.batch.endpoint, model, batch.batch.closing, originals))
            else:  # it has gone meanwhile
                self._events.put_nowait(_Unsent(shard.key, shard.epoch))
            return

    async def _originals(self, shard: Shard) -> dict[int, Parts]:
        positions = {copy.position for copy in shard.copies} - {shard.key.position}
        return await self._metadata.parts_of(shard.key.batch_id, positions) if positions else {}

    def _route(self, batch: Batch) -> Route:
        replicas = self._engines.replicas()
        return tuple(r.name for r in replicas if r.answers(batch.endpoint, batch.model or ""))

    # What people see

    async def _show_progress(self) -> None:
        """Write what has changed for people; thousands of batches get a bounded share of the time."""
        started = self._clock.monotonic()
        if started < self._show_at:
            return
        news = [shown for opened in self._open.values() if (shown := self._news(opened, started)) is not None]
        if news:
            await self._metadata.record_progress(news)
        now = self._clock.monotonic()
        self._show_at = now + (now - started) * SHOW_PAUSE_SHARE

    def _news(self, opened: _Open, now: float) -> tuple[str, Tally, Progress] | None:
        if now - opened.shown_at < SHOW_INTERVAL_S:
            return None
        batch, tally = opened.batch, opened.tally.at_least(opened.batch.tally)
        opened.pace.note(now, tally.lines, _tokens(tally))
        progress = self._progress(opened, now, tally)
        if (tally, progress) == opened.shown:
            return None
        opened.shown, opened.shown_at = (tally, progress), now
        return batch.id, tally, progress

    def _progress(self, opened: _Open, now: float, tally: Tally) -> Progress:
        speed = opened.pace.speed(opened.batch.total - tally.lines)
        reason = self._reason(opened, now)
        since = int(self._clock.now() - (now - opened.pace.moved_at)) if reason else None
        if speed is None:
            return Progress(reason=reason, stalled_since=since)
        return Progress(
            lines_per_second=round(speed.lines_per_s, 2),
            tokens_per_second=round(speed.tokens_per_s, 1),
            eta_seconds_min=None if speed.eta_s_min is None else round(speed.eta_s_min),
            eta_seconds_max=None if speed.eta_s_max is None else round(speed.eta_s_max),
            reason=reason,
            stalled_since=since,
        )

    def _reason(self, opened: _Open, now: float) -> str | None:
        """Say why a batch does not move, or None while it does."""
        if opened.broken is not None:
            return opened.broken
        batch, route = opened.batch, self._route(opened.batch)
        if not route:
            return f"no engine answers model '{batch.model}' at present"
        paused = [pause for pauses in self._paused.values() for pause in pauses]
        reasons = {pause.replica: pause.reason for pause in paused if pause.model in (None, batch.model)}
        if all(name in reasons for name in route):
            return "; ".join(dict.fromkeys(reasons[name] for name in route))
        if now - opened.pace.moved_at < STALLED_S:
            return None
        held = {key.batch_id: held.route for member in self._crew for key, held in member.held.items()}
        if batch.id not in held:
            ahead = Counter(self._open[other].job.id for other in held if held[other] == route and other in self._open)
            names = ", ".join(f"{count} batches of {job_id}" for job_id, count in ahead.items())
            return f"waiting behind {names}" if names else "waiting for a worker"
        delays = [delay for delays in self._putting_off.values() for delay in delays if delay.replica in route]
        if delays:
            return "; ".join(dict.fromkeys(delay.reason for delay in delays))
        return f"lines are with the engine ({', '.join(route)}), which has not answered one for {STALLED_S:.0f} s"


def _tokens(tally: Tally) -> int:
    return tally.usage.input_tokens + tally.usage.output_tokens


def _candidate(batch: _Open) -> Candidate:
    return Candidate(batch.batch.id, batch.job.id, batch.job.weight, batch.batch.expires_at, batch.batch.order)
