"""Moves every batch through its life: one loop that takes what workers report and decides what is next.

Everything here runs in one task, one event after the other, so there is nothing to lock. All that must survive is in
the metadata; what is held in memory can be read back from there.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import msgspec

from pronghorn.clock import Clock
from pronghorn.control.crew import CrewMember, Event, Gone, Held, Reported, Route
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.open_batch import HeldBack, OpenBatch, PutAside
from pronghorn.control.planner import Planner
from pronghorn.control.validations import Validations
from pronghorn.domain.fairness import Candidate, FairShare
from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import (
    Batch,
    BatchStatus,
    Closing,
    Endpoint,
    Job,
    Parts,
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
# After how long without an outcome a batch is said to stand still.
STALLED_S = 10.0
# After showing progress the coordinator does other things for so many times as long.
SHOW_PAUSE_SHARE = 10
NO_ENGINE: Route = ()
# A shard that the disk refused is not handed out again at once, and others go before it meanwhile.
BROKEN_WAIT_S = 5.0


@dataclass(frozen=True, slots=True)
class _Unsent:
    """A shard that was claimed and then sent to no worker."""

    key: ShardKey
    epoch: int


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
        self._validations = Validations(planner, metadata, clock, self._validated)
        self._finalizer = finalizer
        self._clock = clock
        self._batch_ended = batch_ended
        self._events: asyncio.Queue[Event | _Unsent | None] = asyncio.Queue()
        self._moved: dict[CrewMember, Moved] = {}
        self._crew = [
            CrewMember(executor, configure, partial(self._share_of_replicas, index), self._take)
            for index in range(workers)
        ]
        self._open: dict[str, OpenBatch] = {}
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
            self.stop(0)
            await asyncio.gather(crew, self._validations.close(), return_exceptions=True)

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
                    batch.aside[key] = PutAside(epoch, set(missing) - done.keys())
            case Broken(key, epoch, reason):
                log.error("shard %d of %s: %s", key.position, key.batch_id, reason)
                member.held.pop(key, None)
                if batch := self._open.get(key.batch_id):
                    batch.broken = reason
                    batch.held_back[key] = HeldBack(epoch, self._clock.monotonic() + BROKEN_WAIT_S)
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

    async def _take_up_again(self, batch: OpenBatch) -> None:
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
        self._validations.forget_others({state.id for state in states})
        await self._hand_out()
        await self._show_progress()

    def _needs_a_look(self, state: OpenState) -> bool:
        """Tell whether anything is to be done about a batch; most of thousands just wait."""
        if self._is_due(state):
            return True
        if state.status is BatchStatus.VALIDATING:
            return self._validations.may_start(state.id)
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
            self._validations.start(batch)
        elif batch.status is BatchStatus.EXPIRED:
            self._validations.stop(batch.id)
            self._batch_ended()
        else:
            self._validations.stop(batch.id)
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

    def _validated(self) -> None:
        self._batch_ended()  # which is so if it failed
        self.wake()

    async def _opened(self, batch: Batch) -> OpenBatch:
        if batch.id not in self._open:
            done, unfinished = await self._metadata.shard_progress(batch.id)
            job = await self._metadata.job(batch.job_id, batch.account_id)
            blobs = await self._files.blobs(batch.input_file_id)
            weight = job or Job(batch.job_id, batch.account_id, "", 1, 0)
            pace = Pace(self._clock.monotonic(), done.lines, done.tokens)
            self._open[batch.id] = OpenBatch(batch, weight, blobs, done, unfinished, pace)
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
        waiting: dict[Route, list[OpenBatch]] = {}
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

    async def _supply(self, member: CrewMember, route: Route, batches: list[OpenBatch]) -> None:
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
        stamp = self._clock.now()
        due = [opened for opened in self._open.values() if opened.note_pace(started)]
        news = [opened.news(started, stamp, self._reason(opened, started)) for opened in due]
        if any(news):
            await self._metadata.record_progress([shown for shown in news if shown is not None])
        now = self._clock.monotonic()
        self._show_at = now + (now - started) * SHOW_PAUSE_SHARE

    def _reason(self, opened: OpenBatch, now: float) -> str | None:
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


def _candidate(batch: OpenBatch) -> Candidate:
    return Candidate(batch.batch.id, batch.job.id, batch.job.weight, batch.batch.expires_at, batch.batch.order)
