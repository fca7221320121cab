"""Death before the nth call with a lasting effect, for every n: nothing acknowledged is lost, nothing runs twice."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import httpx2
import pytest
from tests.beds import Bed
from tests.faults.life import Client, Engine
from tests.processes import Server
from tests.syscalls import Answer, Call, Kill, Watched

# Lives of one server on one data directory; every file and batch of theirs is checked again in the last.
LIVES = 12
AT_ONCE = 2
NEVER = 1 << 30


class Trap:
    """Kills the server, or its workers, before the nth of their calls; counts until then."""

    def __init__(self, data_dir: Path, client: Client, *, worker: bool = False, at: int = NEVER) -> None:
        self._data_dir = data_dir
        self._client = client
        self._worker = worker
        self._server: int | None = None
        self._at = at
        self.server_calls = self.worker_calls = 0
        self.before: Call | None = None

    def set(self, at: int) -> None:
        """Begin to count again."""
        self.server_calls = self.worker_calls = 0
        self._at, self.before = at, None

    def __call__(self, call: Call) -> Answer:
        if self._server is None:
            self._server = call.pid
        if call.path is not None and not call.concerns(self._data_dir):
            return None
        from_worker = call.pid != self._server
        self.worker_calls += from_worker
        self.server_calls += not from_worker
        count = self.worker_calls if from_worker else self.server_calls
        if from_worker is not self._worker or count != self._at:
            return None
        self.before = call
        self._client.killed()
        return Kill()


class Points(NamedTuple):
    """Before which calls to kill: of servers at their first start, of servers later on, of workers."""

    first: Sequence[int]
    later: Sequence[int]
    worker: Sequence[int]


class Toll(NamedTuple):
    """What a series of lives has come to."""

    kills: int
    missed: int
    batches: int
    wasted: int


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("engine"), latency_ms=5) as engine:
        yield engine


class Lives:
    """Lives of servers on one engine, each until it is killed before a certain call."""

    def __init__(self, folder: Path, engine: Engine) -> None:
        self._folder = folder
        self._engine = engine
        self._settings = engine.configured(folder)

    def count_calls(self) -> Points:
        """Return every call that a kill can come before, as two undisturbed lives make them."""
        data_dir, client, lives = self._folder / "undisturbed", Client("undisturbed"), []
        for _ in range(2):
            lives.append(Trap(data_dir, client))
            with Server(data_dir, *self._settings, watched=Watched(lives[-1])) as server:
                client.work(server)
                server.kill()
        counts = lives[0].server_calls, lives[1].server_calls, lives[1].worker_calls
        return Points(*(range(1, count + 1) for count in counts))

    def of_server(self, number: int, points: Sequence[int]) -> Toll:
        """Kill one server after the other on one data directory, then check all that was ever acknowledged."""
        client, data_dir, missed = Client(f"server{number}"), self._folder / f"server{number}", 0
        for point in points:
            missed += not self._one_life(client, data_dir, point)
        with Server(data_dir, *self._settings) as server:
            client.check(server)
            client.work(server)
            client.check(server, again=True)
        return self._toll(client, len(points) - missed, missed)

    def of_workers(self, number: int, points: Sequence[int]) -> Toll:
        """Kill the workers of one server, then check all that was ever acknowledged."""
        client, data_dir, missed = Client(f"worker{number}"), self._folder / f"worker{number}", 0
        trap = Trap(data_dir, client, worker=True)
        with Server(data_dir, *self._settings, watched=Watched(trap)) as server:
            for point in points:
                trap.set(point)
                client.work(server)
                missed += trap.before is None
            trap.set(NEVER)
            client.check(server, again=True)
        return self._toll(client, len(points) - missed, missed)

    def _one_life(self, client: Client, data_dir: Path, point: int) -> bool:
        """Start a server and use it until it is killed; return whether it was killed by the trap."""
        trap = Trap(data_dir, client, at=point)
        try:
            with Server(data_dir, *self._settings, watched=Watched(trap)) as server:
                client.check(server)
                client.work(server)
                server.kill()
        except (RuntimeError, httpx2.TransportError):
            if trap.before is None:
                raise
        return trap.before is not None

    def _toll(self, client: Client, kills: int, missed: int) -> Toll:
        return Toll(kills, missed, client.batches_ended, client.check_calls(self._engine))


def drawn(rng: random.Random, points: Points, wanted: int) -> Points:
    """Return so many of the points in an order of chance, in proportion; of few, one is of a first start."""
    share = wanted / sum(map(len, points))
    some = [rng.sample(kind, max(1, min(len(kind), round(share * len(kind))))) for kind in points]
    return Points(some[0] if wanted > 2 * LIVES else some[0][:1], *some[1:])


def in_lives(first: Sequence[int], later: Sequence[int]) -> list[list[int]]:
    """Divide the points of servers into series, each beginning with a first start."""
    series = [[point] for point in first]
    for place, point in zip(itertools.cycle(range(len(series))), later, strict=False):
        series[place].append(point)
    return series


def test_a_kill_before_any_call_loses_nothing_and_runs_nothing_twice(tmp_path: Path, engine: Engine, bed: Bed) -> None:
    lives = Lives(tmp_path, engine)
    points = lives.count_calls()
    found = sum(map(len, points))
    first, later, worker = drawn(bed.rng, points, bed.times(small=6, ci=300, long=found))
    with ThreadPoolExecutor(AT_ONCE) as threads:
        tolls = [threads.submit(lives.of_server, *one) for one in enumerate(in_lives(first, later))]
        groups = [worker[start : start + LIVES] for start in range(0, len(worker), LIVES)]
        tolls += [threads.submit(lives.of_workers, *one) for one in enumerate(groups)]
        totals = Toll(*map(sum, zip(*(toll.result() for toll in tolls), strict=True)))
    print(f"{found} calls of one life: {totals}")
    assert totals.missed <= 0.2 * (totals.kills + totals.missed)
