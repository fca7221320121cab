"""The hot path: lines -> engine -> outcomes.

A line is read from its shard (`ShardRun.read`), sent when a replica's window has room (`Dispatcher.fill`), judged
when its answer comes (`_answered`) and appended to the shard's segment (`_record`), which the recorder makes durable.
The window belongs to the replica, not to the shard: when one shard has nothing left to send, lines of the next go out.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import random
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from pronghorn.clock import Clock
from pronghorn.domain import retry
from pronghorn.domain.answers import Answer, Fault
from pronghorn.domain.breaker import Breaker
from pronghorn.domain.doubt import Casualty
from pronghorn.domain.model import Closing, Replica, ShardKey, Usage
from pronghorn.errors import StorageError, unreachable
from pronghorn.limits import KIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Fate, Outcome, Segments
from pronghorn.worker import results
from pronghorn.worker.isolation import Isolation
from pronghorn.worker.lane import FAILURES_IN_A_ROW_MAX, Absence, Lane
from pronghorn.worker.lanes import Lanes
from pronghorn.worker.neighbours import next_line
from pronghorn.worker.protocol import (
    Assign,
    Configure,
    Moved,
    Paused,
    Report,
    Sent,
)
from pronghorn.worker.recorder import Recorder
from pronghorn.worker.shard_run import Line, ShardRun
from pronghorn.worker.triage import Finding, Triage

log = logging.getLogger("pronghorn.worker")

# What an engine said last is kept for the case that time runs out; an error is short, and thousands may wait.
LAST_ANSWER_BYTES_MAX = 64 * KIB
PROGRESS_INTERVAL_S = 0.25
# OpenAI's bound for cancelling: lines in flight may finish, but an engine that hangs does not hold a batch for ever.
CANCELLING_S_MAX = 600.0
# A deadline is a deadline; an answer that is almost there is still worth a moment.
EXPIRING_S_MAX = 10.0

FAILS_ALL = "the engine fails every line, and another does not"


def _success(line: Line, answer: Answer | Fault) -> bytes:
    if isinstance(answer, Fault):
        unreachable("a fault is no success")
    return results.answered(*line.identity, answer)


def _failure(line: Line, answer: Answer | Fault | None, failure: retry.Failure) -> bytes:
    if not isinstance(answer, Answer) or failure.code is not None:
        return results.unanswered(*line.identity, failure.code or "upstream_error", failure.message)
    if failure.status is not None:
        answer = Answer(failure.status, answer.headers, answer.body)
    return results.answered(*line.identity, answer)


def _crashes(line: Line) -> retry.Failure:
    message = f"The engine died {line.alone_deaths} times while it ran this line and no other."
    return retry.Failure("upstream_crash_suspected", message)


def _remember(line: Line, or_else: retry.Failure | None, answer: Answer | Fault | None) -> None:
    """Keep what a line's outcome is if time runs out before it is tried again."""
    if or_else is None or (isinstance(answer, Answer) and len(answer.body) > LAST_ANSWER_BYTES_MAX):
        return
    line.or_else = or_else, answer if isinstance(answer, Answer) else None


def _is_404(answer: Answer | Fault) -> bool:
    return isinstance(answer, Answer) and answer.status == 404


class Dispatcher:
    """Runs shards against engine replicas and reports what becomes of them."""

    def __init__(
        self,
        config: Configure,
        *,
        blobs: Blobs,
        segments: Segments,
        room: Room,
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
        self._lanes = Lanes(config, clock, self._spawn, self.fill)
        self._runs: dict[ShardKey, ShardRun] = {}
        self._recorder = Recorder(self._runs, blobs, room, report, self._report_progress, self.fill)
        self._background: set[asyncio.Task[None]] = set()
        self._waiting = 0
        self._triage = Triage(clock, config.line_timeout_s, config.model_grace_s, self._found)
        self._isolation = Isolation(self._lanes, self._triage.ask)
        self._patience = retry.Patience(config.refused_pause_s, config.model_grace_s)
        self._short = False
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = False
        self._drained = asyncio.Event()

    # Orders

    def use_replicas(self, replicas: list[Replica]) -> None:
        """Send lines to these replicas from now on."""
        for lane in self._lanes.use(replicas):
            self._triage.give_up(lane)
            self._spawn(lane.close())
        self.fill()

    def leave_room(self, live: dict[str, int]) -> None:
        """Leave room in the windows for so many live requests at each replica, by name."""
        self._lanes.leave_room(live)
        self.fill()

    def assign(self, order: Assign) -> None:
        """Start a shard; its end is reported as Done, Aside or Broken."""
        moved = partial(self._shard_moved, order.shard.key)
        run = ShardRun(order, self._segments, moved, prompt_order=self._config.prompt_order)
        self._runs[run.key] = run
        self._spawn(self._start(run))

    def close_batch(self, batch_id: str, closing: Closing) -> None:
        """Record every unsent line of a batch as not run; lines in flight get a while to finish."""
        for run in [run for run in self._runs.values() if run.key.batch_id == batch_id]:
            if run.closing is None:
                wait_s = EXPIRING_S_MAX if closing is Closing.EXPIRED else CANCELLING_S_MAX
                asyncio.get_running_loop().call_later(wait_s, self._break_off, run)
            run.closing = closing
            for line in [line for line in run.pending if line.timer is not None or line in self._isolation]:
                self._requeue(line)
            self._shard_moved(run.key)

    def _break_off(self, run: ShardRun) -> None:
        for line in list(run.pending):
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
        await self._recorder.commit()
        await self._lanes.close()

    async def run(self) -> None:
        """Commit and report until cancelled; a failure of the disk, or of ours, ends it, and with it the process."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._recorder.run())
            tasks.create_task(self._progress_loop())
            tasks.create_task(self._await_failure())

    def fail(self, error: BaseException) -> None:
        """Make `run` raise what went wrong where nobody awaited it."""
        if not self._failed.done():
            self._failed.set_exception(error)

    async def _await_failure(self) -> None:
        await self._failed

    # Sending

    def fill(self) -> None:
        """Send ready lines, oldest shard first and refused ones last, while a replica that answers them has room.

        What answers of this turn of the loop have recorded is written first: a kill between the two wastes no call.
        """
        if self._stopping or self._recorder.behind:
            return
        now = self._clock.monotonic()
        if self._isolation and (apart := self._isolation.next(now)) is not None:
            for line in apart.lines:
                self._send(line, apart.lane, now)
        runs = list(self._runs.values())
        for run in runs:
            while run.ready.has_first and (lane := self._lanes.roomiest(run, now, self._waiting)) is not None:
                self._send(next_line(lane, run, self._runs.values()), lane, now)
            self._note_sent(run)
        for run in runs:
            while run.sends_last and (lane := self._lanes.roomiest(run, now, self._waiting)) is not None:
                self._send(next_line(lane, run, self._runs.values()), lane, now)

    def _send(self, line: Line, lane: Lane, now: float) -> None:
        run = line.run
        if lane.in_flight == 0:
            lane.quiet_since = now
        if lane.breaker.reason is not None or run.model in lane.absent:
            lane.probe = line
        if lane.alone is not None:
            lane.alone.alone = False  # it has company now
        line.alone = lane.in_flight == 0 and (lane.kept_clear or lane.probe is line)
        lane.alone = line if line.alone else None
        lane.in_flight += 1
        lane.asked = run.endpoint, run.model
        line.tries += 1
        line.charged += 1
        line.call = lane.client.send(run.endpoint.path, line.body, partial(self._answered, line, lane, now))

    def _answered(self, line: Line, lane: Lane, sent_at: float, answer: Answer | Fault) -> None:
        run, now = line.run, self._clock.monotonic()
        # What another replica answers is no line's fault, however long this one has not known the model.
        absent_s = lane.absent_s(now, run.model) if lane.absent and not self._lanes.another_serves(lane, run) else 0.0
        effort = retry.Effort(line.tries, line.charged, lane.trips(run.model), absent_s)
        verdict = retry.judge(answer, run.endpoint, effort, self._clock.wall(), self._patience)
        if not isinstance(verdict, retry.Success) and self._lanes.another_is_away(lane, line, now):
            spared = effort._replace(spared=True)
            verdict = retry.judge(answer, run.endpoint, spared, self._clock.wall(), self._patience)
        refused = retry.shows_overload(answer)
        known = lane.in_flight + lane.live + lane.held
        lane.window.answered(now, known, sent_at=sent_at, refused=refused, away=refused and retry.may_be_away(answer))
        lane.in_flight -= 1
        lane.quiet_since = now
        if lane.replica.slots is not None:
            lane.freed_prompts.append(line.prompt)
        line.call = None
        if lane.probe is line:
            lane.probe = None
        if lane.alone is line:
            lane.alone = None
        if not isinstance(verdict, retry.Lost):
            self._triage.heard(lane, answer, verdict, sent_at)
        if line.alone_deaths and line.alone and isinstance(verdict, retry.Success):
            for innocent in self._isolation.acquit():
                self._requeue(innocent)
        match verdict:
            case retry.Success(usage):
                lane.failures_in_a_row = lane.put_off_in_a_row = 0
                lane.well_at = now
                self._is_well(lane, run.model, sent_at)
                self._record(line, Fate.COMPLETED, usage, _success(line, answer))
            case retry.Failure() as failure:
                failed = retry.has_failed(answer, failure)
                lane.failures_in_a_row = lane.failures_in_a_row + 1 if failed else 0
                lane.put_off_in_a_row = lane.failures_in_a_row
                if failed:
                    self._doubt_if_all_fail(lane)
                if not (failed and lane.breaker.silent):
                    self._is_well(lane, run.model, sent_at, knows_model=not _is_404(answer))
                self._record(line, Fate.FAILED, Usage(), _failure(line, answer, failure))
            case retry.Again() as again:
                if refused:
                    lane.hold_place(again.wait_s_min)
                if again.ours:
                    self._note_shortage(answer)
                    self._try_again(line, again, answer)
                else:
                    self._put_off(line, lane, again, answer)
            case retry.Pause() as pause:
                line.charged -= 1
                _remember(line, pause.or_else, answer)
                self._pause(lane, pause, run.model)
                self._send_others_first(line)
            case retry.Lost() as lost:
                _remember(line, lost.failure, answer)
                self._triage.lost(lane, line, lost, sent_at)
        if self._stopping:
            self._check_drained()
        self.fill()

    def _record(self, line: Line, fate: Fate, usage: Usage, result: bytes) -> None:
        line.run.pending.discard(line)
        self._recorder.record(line.run, Outcome(line.number, fate, usage, result))

    def _put_off(self, line: Line, lane: Lane, again: retry.Again, answer: Answer | Fault | None) -> None:
        """Try a line again later, or at once where only this replica's rate limit kept it.

        An engine that puts every line off gets no more than probes while another does not.
        """
        if again.or_else is None:
            line.limited_at |= {lane.replica.name}
        else:
            line.failed_at |= {lane.replica.name}
            lane.failures_in_a_row += 1
            self._doubt_if_all_fail(lane)
        lane.put_off_in_a_row += 1
        lane.complaint = retry.complaint(answer, again)
        if lane.puts_every_line_off and self._lanes.another_serves(lane, line.run):
            self._pause(lane, retry.Pause(*retry.engine_wait(lane.breaker.trips), FAILS_ALL), line.run.model)
        if again.or_else is None and self._lanes.can_go_elsewhere(line):
            again = again._replace(wait_s_min=0.0, wait_s_max=0.0)
        self._try_again(line, again, answer)

    def _doubt_if_all_fail(self, lane: Lane) -> None:
        """Ask an engine that has begun to fail every line: behind a gateway it may be away."""
        begun = lane.has_begun_to_fail(self._clock.monotonic(), self._config.model_grace_s)
        if begun and lane.breaker.reason is None and lane.failures_in_a_row % FAILURES_IN_A_ROW_MAX == 0:
            self._triage.ask(lane)

    def _note_shortage(self, answer: Answer | Fault) -> None:
        if not self._short and isinstance(answer, Fault):
            self._short = True
            log.warning("%s; lines are tried again, raise the limit of open files (ulimit -n)", answer.detail)

    def _try_again(self, line: Line, again: retry.Again, answer: Answer | Fault | None) -> None:
        line.charged -= not again.costs_attempt
        _remember(line, again.or_else, answer)
        wait_s = self._rng.uniform(again.wait_s_min, again.wait_s_max)
        line.timer = asyncio.get_running_loop().call_later(wait_s, self._wait_is_over, line)
        self._waiting += 1
        if line.run.sends_no_more:
            self._requeue(line)

    def _wait_is_over(self, line: Line) -> None:
        if not self._lanes.can_go_elsewhere(line):
            line.limited_at = frozenset()  # as long as it was asked to, the line has waited
        self._requeue(line)
        self.fill()

    def _requeue(self, line: Line) -> None:
        """Make a line ready again, whatever it was waiting for."""
        if line.timer is not None:
            line.timer.cancel()
            line.timer = None
            self._waiting -= 1
        elif line in self._isolation:
            self._isolation.remove(line)
        line.run.put_back(line)
        self._give_up_if_closing(line.run)

    def _send_others_first(self, line: Line) -> None:
        """Make a line that was refused ready again behind all others: where it is at fault, another probes the way."""
        run = line.run
        run.put_back(line, last=True)
        if run.key in self._runs and not run.ready.has_first:
            self._runs[run.key] = self._runs.pop(run.key)
        self._give_up_if_closing(run)

    # Engines that are not well

    def _is_well(self, lane: Lane, model: str, sent_at: float, *, knows_model: bool = True) -> None:
        lane.breaker.answered(sent_at)
        if absence := lane.absent.get(model):
            absence.breaker.answered(sent_at)
            if knows_model:
                del lane.absent[model]

    def _pause(self, lane: Lane, pause: retry.Pause, model: str, *, silent: bool = False) -> None:
        now, breaker = self._clock.monotonic(), lane.breaker
        if pause.model_only:
            breaker = lane.absent.setdefault(model, Absence(now)).breaker
        wait_s = self._rng.uniform(pause.wait_s_min, pause.wait_s_max)
        if breaker.trip(now, wait_s, pause.reason, silent=silent):
            asyncio.get_running_loop().call_later(wait_s, self._probe, lane, breaker)

    def _probe(self, lane: Lane, breaker: Breaker) -> None:
        breaker.half_open()
        if breaker.silent:
            self._triage.ask(lane)
        self.fill()

    def _found(self, lane: Lane, finding: Finding) -> None:
        """Act on what has been found out about an engine that lost lines, or was silent."""
        if finding.pause is not None:
            self._pause(lane, finding.pause, "", silent=finding.silent)
        elif finding.alive:
            lane.quiet_since = self._clock.monotonic()
            # What proves it was sent after the doubt began: a probe that hangs must not hold up what is answered.
            lane.breaker.answered(finding.doubt.since)
            if self._isolation.is_over(lane, lane.quiet_since):
                for line in self._isolation.end():
                    self._requeue(line)
        died = finding.doubt.died() or not finding.alive
        for casualty in reversed(finding.doubt.casualties):
            self._treat(lane, casualty, alive=finding.alive, died=died)
        self.fill()

    def _treat(self, lane: Lane, casualty: Casualty[Line], *, alive: bool, died: bool) -> None:
        line, lost, _ = casualty
        if lost.hung and not alive:
            line.charged -= 1
            self._requeue(line)
        elif not lost.hung and died:
            line.charged -= 1
            line.deaths += 1
            line.alone_deaths += line.alone
            self._suspect(line)
        else:
            spared = self._lanes.another_is_away(lane, line, self._clock.monotonic())
            match retry.charge(lost, retry.Effort(line.tries, line.charged, spared=spared)):
                case retry.Failure() as failure:
                    self._record(line, Fate.FAILED, Usage(), _failure(line, None, failure))
                case retry.Again() as again:
                    self._put_off(line, lane, again, None)

    def _suspect(self, line: Line) -> None:
        """Deal with a line that was with an engine when it died; where it happens again, the line runs alone."""
        if self._isolation.convicts(line):
            self._record(line, Fate.FAILED, Usage(), _failure(line, None, _crashes(line)))
        elif self._isolation.suspects(line) and not line.run.sends_no_more:
            self._isolation.add(line)
        else:
            self._requeue(line)

    # Shards

    async def _start(self, run: ShardRun) -> None:
        try:
            await run.open()
            self._recorder.wake()
            await run.read(self._blobs)
        except (StorageError, OSError) as error:
            if run.closing is not None and run.segment is not None:
                self._give_up_unread(run)
            else:
                self._give_up_broken(run, str(error))

    def _shard_moved(self, key: ShardKey) -> None:
        """Look at a shard that has new lines, or whose batch is closing."""
        if key in self._runs:
            self._recorder.wake()
            self._give_up_if_closing(self._runs[key])
            self.fill()

    def _give_up_if_closing(self, run: ShardRun) -> None:
        while run.closing is not None and run.ready:
            line = run.took(run.ready.take())
            if run.closing is Closing.EXPIRED and line.or_else is not None:
                failure, answer = line.or_else
                self._record(line, Fate.FAILED, Usage(), _failure(line, answer, failure))
            else:
                self._record(line, Fate.UNRUN, Usage(), results.not_run(*line.identity, run.closing))

    def _give_up_unread(self, run: ShardRun) -> None:
        """Record the lines of a closing shard whose input cannot be read: they are not run, and have no name."""
        closing = run.closing or unreachable("only a closing shard is given up unread")
        known = {line.number for line in [*run.ready, *run.pending]}
        missing = run.shard.lines - len(run.places) - len(known)
        numbers = (n for n in itertools.count(run.shard.first_line) if n not in run.places and n not in known)
        for number in list(itertools.islice(numbers, missing)):
            line = Line(run, number, b"null")
            self._record(line, Fate.UNRUN, Usage(), results.not_run(*line.identity, closing))
        run.copies.clear()
        run.all_read = True
        self._shard_moved(run.key)

    def _give_up_broken(self, run: ShardRun, reason: str) -> None:
        """Send nothing more of a shard; what is in flight is paid for, and is recorded before the shard is dropped."""
        if run.segment is None:
            self._recorder.drop(run, reason)
            return
        for line in [line for line in run.pending if line.timer is not None or line in self._isolation]:
            self._requeue(line)
        run.give_up(reason)
        self._recorder.wake()
        self.fill()

    def _note_sent(self, run: ShardRun) -> None:
        """Say once that others may be sent behind a shard; what its engine refuses goes behind them anyway."""
        if (run.all_read or run.broken is not None) and not run.ready.has_first and not run.sent:
            run.sent = True
            self._report(Sent(run.key, run.shard.epoch))

    async def _progress_loop(self) -> None:
        while True:
            await asyncio.sleep(PROGRESS_INTERVAL_S)
            self._recorder.look_at_room()
            self._report_progress()
            self._recorder.wake()

    def _report_progress(self) -> None:
        for lane in self._lanes:
            self._triage.watch(lane)
        paused = [pause for lane in self._lanes for pause in self._paused(lane)]
        delays = [delay for lane in self._lanes for delay in lane.putting_off()]
        self._report(Moved(self._recorder.progress(), paused, delays))

    def _paused(self, lane: Lane) -> list[Paused]:
        full = self._recorder.full
        return lane.paused() if full is None else [Paused(lane.replica.name, None, full)]

    # Plumbing

    def _check_drained(self) -> None:
        if not any(lane.in_flight for lane in self._lanes):
            self._drained.set()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._background.add(task)
        task.add_done_callback(self._background_ended)
        return task

    def _background_ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            self.fail(error)
