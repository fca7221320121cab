"""A disk that refuses the nth call, for every n: a full one is waited for, a broken one ends the process."""

from __future__ import annotations

import errno
import random
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.beds import Bed
from tests.faults.life import Client, Engine
from tests.processes import POLL_S, Server
from tests.syscalls import SYNCS, TAKES_ROOM, WRITES, Answer, Call, Watched

from pronghorn.storage.durable import EXIT_DISK_FAILED

# Waiting for room takes seconds, and no processor; starting servers takes one.
WAIT_AT_ONCE, START_AT_ONCE = 6, 2
# A full disk refuses from one call on; after so many refusals there is room again.
REFUSALS_MAX = 3
SERIES_MAX = 10


class Disk:
    """Refuses some of the calls about a data directory, from the nth on; counts them."""

    def __init__(self, data_dir: Path, kinds: Collection[str], suffix: str = "") -> None:
        self._data_dir = data_dir
        self._kinds = kinds
        self._suffix = suffix
        self._refuse = range(0)
        self._error = 0
        self.calls: Counter[str] = Counter()
        self.refused: list[Call] = []

    def refuse(self, error: int, at: int, times: int = 1) -> None:
        """Begin to count again, and refuse the call number `at` and those after it."""
        self.calls, self.refused = Counter(), []
        self._error, self._refuse = error, range(at, at + times)

    def __call__(self, call: Call) -> Answer:
        if call.name not in self._kinds or not call.concerns(self._data_dir, self._suffix):
            return None
        self.calls[call.name] += 1
        if self.calls.total() not in self._refuse:
            return None
        self.refused.append(call)
        return self._error


class PatientHttp(httpx2.Client):
    """A client that comes again when there was no room."""

    def request(self, *arguments: Any, **named: Any) -> httpx2.Response:
        while (answer := super().request(*arguments, **named)).status_code == 507:
            assert answer.json()["error"]["code"] == "disk_full", answer.text
            time.sleep(POLL_S)
        return answer


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("engine"), latency_ms=5) as engine:
        yield engine


def patient(server: Server) -> Server:
    server.http.close()
    server.http = PatientHttp(base_url=server.base_url, timeout=60)
    return server


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory, engine: Engine) -> Counter[str]:
    """How many calls of each kind there are when two batches live on a server that is there already."""
    folder = tmp_path_factory.mktemp("undisturbed")
    disk, client = Disk(folder / "data", TAKES_ROOM | SYNCS), Client("undisturbed")
    with Server(folder / "data", *engine.configured(folder), watched=Watched(disk)) as server:
        client.work(server)
        disk.refuse(0, 0, 0)
        client.work(server)
    return disk.calls


def run(series: Callable[[int, Sequence[int]], int], points: Sequence[int], at_once: int) -> None:
    """Run series of points side by side, and count how many of them were met."""
    size = min(SERIES_MAX, -(-len(points) // at_once))
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    with ThreadPoolExecutor(at_once) as threads:
        met = sum(threads.map(series, range(len(groups)), groups))
    print(f"{met} of {len(points)} points met")
    assert met >= 0.8 * len(points)


def test_a_disk_that_is_full_from_any_call_on_is_waited_for(
    tmp_path: Path, engine: Engine, bed: Bed, counted: Counter[str]
) -> None:
    settings = engine.configured(tmp_path)
    found = sum(counted[kind] for kind in TAKES_ROOM)
    points = bed.rng.sample(range(1, found + 1), bed.times(small=2, ci=60, long=found))
    seeds = random.Random(bed.seed)

    def series(number: int, points: Sequence[int]) -> int:
        data_dir, met = tmp_path / f"full{number}", 0
        client, disk = Client(f"full{number}"), Disk(data_dir, TAKES_ROOM)
        with Server(data_dir, *settings, watched=Watched(disk)) as started:
            server = patient(started)
            for point in points:
                disk.refuse(errno.ENOSPC, point, seeds.randint(1, REFUSALS_MAX))
                client.work(server)
                met += bool(disk.refused)
            client.check(server, again=True)
            assert server.terminate() == 0
        return met

    run(series, points, WAIT_AT_ONCE)


def test_a_disk_that_fails_at_any_write_or_sync_ends_the_process_and_loses_nothing(
    tmp_path: Path, engine: Engine, bed: Bed, counted: Counter[str]
) -> None:
    settings = engine.configured(tmp_path)
    kinds = SYNCS | WRITES
    found = sum(counted[kind] for kind in kinds)
    points = bed.rng.sample(range(1, found + 1), bed.times(small=2, ci=60, long=found))

    def series(number: int, points: Sequence[int]) -> int:
        data_dir, met = tmp_path / f"broken{number}", 0
        client = Client(f"broken{number}")
        for point in points:
            disk = Disk(data_dir, kinds)
            with Server(data_dir, *settings, watched=Watched(disk)) as server:
                client.check(server)
                disk.refuse(errno.EIO, point)
                try:
                    client.work(server)
                except httpx2.TransportError:
                    assert disk.refused
                ends = any(call.name in SYNCS for call in disk.refused)
                met += bool(disk.refused)
                if ends:
                    assert server.wait() == EXIT_DISK_FAILED
                    assert "pronghorn: the disk has failed: " in server.log()
        with Server(data_dir, *settings) as server:
            client.check(server, again=True)
        return met

    run(series, points, START_AT_ONCE)


def test_a_segment_that_finds_no_room_when_it_is_synced_counts_as_lost(tmp_path: Path, engine: Engine) -> None:
    """Delayed allocation: the write went well, and after the failed sync the kernel takes the pages for clean."""
    data_dir, settings = tmp_path / "data", engine.configured(tmp_path)
    disk, client = Disk(data_dir, SYNCS, ".segment"), Client("delayed")
    disk.refuse(errno.ENOSPC, 1)
    with Server(data_dir, *settings, watched=Watched(disk)) as server:
        with pytest.raises(httpx2.TransportError):
            client.work(server)
        assert server.wait() == EXIT_DISK_FAILED
    assert server.log().count("the disk has failed") == 1, "one line, the worker's"
    with Server(data_dir, *settings) as server:
        client.check(server)
