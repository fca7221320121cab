"""Lines that are suspected of killing their engine run alone, and one that takes long holds up no other."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from blockbuster import BlockBuster

from pronghorn.clock import SystemClock
from pronghorn.domain import retry
from pronghorn.domain.doubt import ALONE_DEATHS_MAX, SHARED_DEATHS_MAX
from pronghorn.domain.model import BlobRef, Endpoint, Replica, Shard, ShardKey
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Segments
from pronghorn.worker import isolation, triage
from pronghorn.worker.dispatch import Dispatcher
from pronghorn.worker.lanes import Lanes
from pronghorn.worker.protocol import Assign, Configure, Done, Moved, Report
from pronghorn.worker.shard_run import Line, ShardRun
from tests.faults.test_kill import batch_input
from tests.faults.test_odd_upstreams import OddEngine, Wire, running

WINDOW = 4
LINES = 24
QUIET_S = 0.3
# Turns of the loop in which a connection that was just being made is closed.
TURNS_TO_CLOSE = 5
# How long an engine is gone: less than the time between two canaries.
LOAD_S = 0.2
# How long an engine takes for an answer: long enough for another line to come meanwhile.
BUSY_S = 0.02
# Far beyond the end of the test: nothing here ends by a line's timeout.
LINE_TIMEOUT_S = 600.0


class Reports:
    """What a dispatcher has said of its one shard."""

    def __init__(self) -> None:
        self.durable = 0
        self.done: Done | None = None
        self._news = asyncio.Event()

    def take(self, report: Report) -> None:
        match report:
            case Moved(shards):
                self.durable = max([self.durable, *(shard.tally.lines for shard in shards)])
            case Done():
                self.done = report
        self._news.set()

    async def durable_lines(self, lines: int) -> None:
        async with asyncio.timeout(60):
            while self.durable < lines:
                await self._more()

    async def end(self) -> Done:
        async with asyncio.timeout(60):
            while self.done is None:
                await self._more()
        return self.done

    async def _more(self) -> None:
        self._news.clear()
        await self._news.wait()


@asynccontextmanager
async def dispatching(tmp_path: Path, engine: OddEngine, *, refused_pause_s: float = 60.0) -> AsyncIterator[Reports]:
    """Send a shard to the engine."""
    reports, blobs = Reports(), Blobs(tmp_path / "blobs")
    dispatcher = Dispatcher(
        Configure("", "", 1 << 20, LINE_TIMEOUT_S, refused_pause_s, 60.0, prompt_order=False),
        blobs=blobs,
        segments=Segments(tmp_path / "segments"),
        room=Room(tmp_path),
        clock=SystemClock(),
        rng=random.Random(1),
        report=reports.take,
    )
    content = batch_input(LINES)
    with blobs.writer("input") as writer:
        writer.write(content)
        writer.commit()
    running = asyncio.create_task(dispatcher.run())
    dispatcher.use_replicas([Replica(engine.base_url, window=WINDOW)])
    shard = Shard(ShardKey("batch_1", 0), 1, LINES, 0, len(content), epoch=1)
    blob = BlobRef("input", len(content))
    dispatcher.assign(Assign(shard, [blob], Endpoint.CHAT_COMPLETIONS, "scripted"))
    try:
        yield reports
    finally:
        await dispatcher.stop(0)
        running.cancel()
        await asyncio.wait({running})
        for _ in range(TURNS_TO_CLOSE):
            await asyncio.sleep(0)


class DyingEngine:
    """Dies with all that it has when it has the first lines together, twice, and whenever it has had `slow` for
    `kill_after_s`; it never answers that one. Until it is back it loses whatever it gets."""

    def __init__(self, slow: int, kill_after_s: float | None = None) -> None:
        self._slow = slow
        self._kill_after_s = kill_after_s
        self._has: dict[Wire, int] = {}
        self._back_at = 0.0
        self.deaths = 0

    async def __call__(self, wire: Wire) -> None:
        if asyncio.get_running_loop().time() < self._back_at:
            wire.close()
            return
        number = int(wire.prompt.split()[-1]) if "number" in wire.prompt else -1
        self._has[wire] = number
        if self.deaths < 2 and 0 <= number < WINDOW:
            if set(range(WINDOW)) <= set(self._has.values()):
                self._die()
            return
        if number != self._slow:
            await wire.answer()
            self._has.pop(wire, None)
        elif self._kill_after_s is not None:
            asyncio.get_running_loop().call_later(self._kill_after_s, self._kill, wire)

    def _kill(self, wire: Wire) -> None:
        if wire in self._has:
            self._die()

    def _die(self) -> None:
        self.deaths += 1
        self._back_at = asyncio.get_running_loop().time() + LOAD_S
        for wire in self._has:
            wire.close()
        self._has.clear()


class FrailEngine(DyingEngine):
    """Dies with the first lines together, twice, and once with the first of them that is alone; that one it answers
    the next time, the others of them only two at a time."""

    def __init__(self) -> None:
        super().__init__(slow=LINES)
        self._alone: int | None = None
        self._here: set[int] = set()
        self._two_came = asyncio.Event()

    async def __call__(self, wire: Wire) -> None:
        number = int(wire.prompt.split()[-1]) if "number" in wire.prompt else -1
        is_back = asyncio.get_running_loop().time() >= self._back_at
        if is_back and self.deaths >= 2 and 0 <= number < WINDOW:
            if self._alone is None:
                self._alone = number
                self._has[wire] = number
                self._die()
                return
            if number != self._alone:
                self._here.add(number)
                if len(self._here) > 1:
                    self._two_came.set()
                await self._two_came.wait()
        await super().__call__(wire)


class LoadingEngine:
    """Dies with all that it has when it gets `killer`; then it answers 503 for LOAD_S, as one that loads its model."""

    def __init__(self, killer: int) -> None:
        self._killer = f"number {killer} "
        self._has: set[Wire] = set()
        self._back_at = 0.0
        self.deaths = 0

    async def __call__(self, wire: Wire) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._back_at:
            await wire.answer(503)
        elif self._killer in wire.prompt:
            self.deaths += 1
            self._back_at = loop.time() + LOAD_S
            for lost in (wire, *self._has):
                lost.close()
            self._has.clear()
        else:
            self._has.add(wire)
            await asyncio.sleep(BUSY_S)
            if wire in self._has:
                self._has.remove(wire)
                await wire.answer()


class RefusingEngine:
    """Never answers `lost`: closes its connection, and refuses access to whatever else it has then, once for each.

    No connection is used twice, so that none of the askings is the repetition that costs nothing.
    """

    def __init__(self, lost: int) -> None:
        self._lost = f"number {lost} "
        self._closed = asyncio.Event()
        self._refused: set[str] = set()
        self.asked = 0

    async def __call__(self, wire: Wire) -> None:
        if self._lost in wire.prompt:
            self.asked += 1
            wire.close()
            self._closed.set()
        elif "number" in wire.prompt and wire.prompt not in self._refused:
            self._refused.add(wire.prompt)
            await self._closed.wait()
            await asyncio.sleep(BUSY_S)  # so that the loss is known first
            await wire.answer(401, None, "Connection: close")
        else:
            await wire.answer(200, None, "Connection: close")


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch, blockbuster: BlockBuster) -> None:
    blockbuster.deactivate()  # a worker writes in its loop: a thread would cost more than the write
    for module in (triage, isolation):
        monkeypatch.setattr(module, "QUIET_S_MAX", QUIET_S)


async def test_a_suspect_that_hangs_alone_holds_up_no_other(tmp_path: Path) -> None:
    behave = DyingEngine(slow=1)
    with running(behave) as (engine,):
        async with dispatching(tmp_path, engine) as reports:
            await reports.durable_lines(LINES - 1)
            assert behave.deaths == 2
            assert reports.done is None


@asynccontextmanager
async def lanes_of(*replicas: Replica) -> AsyncIterator[Lanes]:
    config = Configure("", "", 1 << 20, LINE_TIMEOUT_S, 60.0, 60.0, prompt_order=False)
    lanes = Lanes(config, SystemClock(), asyncio.get_running_loop().create_task, lambda: None)
    lanes.use(list(replicas))
    yield lanes
    await lanes.close()


def suspect(segments: Path, number: int, deaths: int = SHARED_DEATHS_MAX, model: str = "here") -> Line:
    order = Assign(Shard(ShardKey("batch_1", 0), 1, 1, 0, 1), [], Endpoint.CHAT_COMPLETIONS, model)
    line = Line(ShardRun(order, Segments(segments), lambda: None, prompt_order=False), number, b'"id"')
    line.deaths = deaths
    return line


async def test_a_suspect_that_no_replica_answers_holds_up_no_other(tmp_path: Path) -> None:
    async with lanes_of(Replica("http://127.0.0.1:9/v1", models=("here",), window=WINDOW)) as lanes:
        suspects = isolation.Isolation(lanes, lambda lane: None)
        for deaths, model in ((3, "gone"), (2, "here"), (4, "gone")):
            suspects.add(suspect(tmp_path, 1, deaths, model))
        apart = suspects.next(0.0)
    assert apart is not None
    assert [line.run.model for line in apart.lines] == ["here"]


@pytest.mark.parametrize(("suspected", "together"), [(1, 1), (9, 1), (16, 4), (100, 10), (1000, 16)])
async def test_many_suspects_run_a_few_at_a_time(tmp_path: Path, suspected: int, together: int) -> None:
    async with lanes_of(Replica("http://127.0.0.1:9/v1", window=16)) as lanes:
        suspects = isolation.Isolation(lanes, lambda lane: None)
        for number in range(suspected):
            suspects.add(suspect(tmp_path, number))
        apart = suspects.next(0.0)
        assert apart is not None
        assert len(apart.lines) == together
        assert not any(line in suspects for line in apart.lines)


async def test_a_suspect_whose_engine_died_again_runs_alone(tmp_path: Path) -> None:
    async with lanes_of(Replica("http://127.0.0.1:9/v1", window=16)) as lanes:
        suspects = isolation.Isolation(lanes, lambda lane: None)
        for number in range(20):
            suspects.add(suspect(tmp_path, number, deaths=SHARED_DEATHS_MAX + (number == 7)))
        apart = suspects.next(0.0)
        assert apart is not None
        assert [line.number for line in apart.lines] == [7]


async def test_lines_run_together_again_once_their_engine_was_seen_to_die_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (triage, isolation):
        monkeypatch.setattr(module, "QUIET_S_MAX", LINE_TIMEOUT_S)  # nothing else ends what is alone
    behave = FrailEngine()
    with running(behave) as (engine,):
        async with dispatching(tmp_path, engine) as reports:
            result = (await reports.end()).result
    assert (result.tally.completed, behave.deaths) == (LINES, 3)


@pytest.mark.parametrize(("suspected", "deaths", "ended"), [(1, 0, 1), (16, SHARED_DEATHS_MAX, 0)])
async def test_only_a_line_that_took_long_alone_is_trusted_again(
    tmp_path: Path, suspected: int, deaths: int, ended: int
) -> None:
    async with lanes_of(Replica("http://127.0.0.1:9/v1", window=16)) as lanes:
        suspects = isolation.Isolation(lanes, lambda lane: None)
        for number in range(suspected):
            suspects.add(suspect(tmp_path, number))
        apart = suspects.next(0.0)
        assert apart is not None
        suspects.end()
        assert {(line.deaths, line.isolations_ended) for line in apart.lines} == {(deaths, ended)}


async def test_a_line_that_kills_an_engine_which_then_loads_for_a_while_kills_it_beside_no_others_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "engine_wait", lambda pauses: (LOAD_S / 4, LOAD_S / 4))
    behave = LoadingEngine(killer=1)
    with running(behave) as (engine,):
        async with dispatching(tmp_path, engine) as reports:
            result = (await reports.end()).result
    assert (result.tally.completed, result.tally.failed) == (LINES - 1, 1)
    assert behave.deaths == SHARED_DEATHS_MAX + ALONE_DEATHS_MAX


async def test_a_line_that_is_lost_while_others_are_refused_access_is_no_suspect(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "backoff", lambda attempt, wait_s_max: (0.0, LOAD_S / 4))
    behave = RefusingEngine(lost=1)
    with running(behave) as (engine,):
        async with dispatching(tmp_path, engine, refused_pause_s=LOAD_S / 4) as reports:
            result = (await reports.end()).result
    assert (result.tally.completed, [cause.code for cause in result.causes]) == (LINES - 1, ["upstream_disconnected"])
    assert behave.asked == retry.ATTEMPTS_MAX


async def test_a_line_that_takes_long_to_kill_its_engine_is_still_found(tmp_path: Path) -> None:
    behave = DyingEngine(slow=1, kill_after_s=1.5 * QUIET_S)
    with running(behave) as (engine,):
        async with dispatching(tmp_path, engine) as reports:
            result = (await reports.end()).result
    assert (result.tally.completed, result.tally.failed) == (LINES - 1, 1)
    assert [cause.code for cause in result.causes] == ["upstream_crash_suspected"]


async def test_an_engine_that_dies_by_itself_gets_its_lines_back(tmp_path: Path) -> None:
    async with lanes_of(Replica("http://127.0.0.1:9/v1", window=16)) as lanes:
        suspects = isolation.Isolation(lanes, lambda lane: None)
        often, twice = suspect(tmp_path, 1, deaths=4), suspect(tmp_path, 2, deaths=2)
        for line in (often, twice):
            assert suspects.suspects(line)
            suspects.add(line)
        assert suspects.acquit() == [twice]
        assert suspects.acquit() == [twice], "a second time it takes no more: deaths are dear"
        assert suspects.suspects(often)
        guilty = suspect(tmp_path, 3)
        guilty.alone_deaths = 3
        assert not suspects.convicts(guilty)
        guilty.alone_deaths = 4
        assert suspects.convicts(guilty)
        assert suspects.suspects(twice), "a line that kills was found: two deaths count again"
