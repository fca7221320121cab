"""Power cuts: whatever a server has acknowledged or shown is there when the machine is back."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx2
import pytest
from tests.beds import Bed
from tests.disks import PowerDisk, power_disk
from tests.faults.life import Client, Engine
from tests.faults.test_kill import batch_input
from tests.processes import Server
from tests.syscalls import SYNCS, Answer, Call, Kill, Watched

CLIENTS = 2
CUTS_OF_A_DISK = 20
AT_ONCE = 3
# A life makes about so many calls with a lasting effect, and then idles.
CALLS = 700


class PowerCut:
    """Cuts a disk's power before the nth call about it, in the middle of whatever runs, or kills the server there."""

    def __init__(self, disk: PowerDisk, clients: Sequence[Client], at: int, *, kill: bool = False) -> None:
        self._disk = disk
        self._clients = clients
        self._at = at
        self._kill = kill
        self._count = 0
        self._server: int | None = None
        self.happened = False

    def __call__(self, call: Call) -> Answer:
        self._server = self._server or call.pid
        self._count += call.path is None or call.concerns(self._disk.path)
        if self._count != self._at or self.happened:
            return None
        self.happened = True
        for client in self._clients:
            client.killed() if self._kill else client.powered_off()
        if not self._kill:
            self._disk.cut()
        with suppress(ProcessLookupError):  # its worker outlives it by a moment
            os.kill(self._server, signal.SIGKILL)
        return Kill()


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    with Engine(tmp_path_factory.mktemp("engine"), latency_ms=100) as engine:
        yield engine


@pytest.fixture
def disk() -> Iterator[PowerDisk]:
    with power_disk() as disk:
        yield disk


class Machine:
    """A server on a disk, and its clients; the power comes and goes."""

    def __init__(self, disk: PowerDisk, settings: Sequence[str], name: str) -> None:
        self._disk = disk
        self._settings = settings
        self._clients = [Client(f"{name}-{number}") for number in range(CLIENTS)]

    def run_until_cut(self, at: int, *, kill: bool = False) -> None:
        """Use the server until its nth call, or until all is done and it idles; then the power goes, or it dies."""
        cut = PowerCut(self._disk, self._clients, at, kill=kill)
        try:
            with self._server(Watched(cut)) as server, ThreadPoolExecutor(CLIENTS) as threads:
                list(threads.map(lambda client: self._use(client, server, cut), self._clients))
        except RuntimeError:  # it went before the server was ready
            assert cut.happened
        if not kill:
            self._disk.cut()
            self._disk.restore()

    def check(self, *, again: bool = False) -> None:
        """Hold the server to everything that any client was told."""
        with self._server() as server:
            for client in self._clients:
                client.check(server, again=again)
            server.terminate()

    def check_calls(self, engine: Engine) -> int:
        return sum(client.check_calls(engine) for client in self._clients)

    def _server(self, watched: Watched | None = None) -> Server:
        return Server(self._disk.path, *self._settings, watched=watched)

    def _use(self, client: Client, server: Server, cut: PowerCut) -> None:
        try:
            client.check(server)
            client.work(server)
        except httpx2.TransportError:
            assert cut.happened


def test_a_power_cut_at_any_moment_loses_nothing_that_was_acknowledged(
    tmp_path: Path, engine: Engine, bed: Bed
) -> None:
    cuts = bed.times(small=2, ci=100, long=1000)
    settings = engine.configured(tmp_path)
    seeds = [(bed.rng.random(), min(CUTS_OF_A_DISK, cuts - start)) for start in range(0, cuts, CUTS_OF_A_DISK)]

    def cut_one_disk(seed: float, cuts: int) -> int:
        rng = random.Random(seed)
        with power_disk() as disk:
            machine = Machine(disk, settings, str(seed))
            for _ in range(cuts):
                if rng.random() < 0.2:
                    machine.run_until_cut(rng.randint(1, CALLS), kill=True)
                machine.run_until_cut(rng.randint(1, CALLS))
            machine.check()
            machine.check(again=True)
            return machine.check_calls(engine)

    with ThreadPoolExecutor(AT_ONCE) as threads:
        repeated = sum(threads.map(cut_one_disk, *zip(*seeds, strict=True)))
    print(f"{cuts} cuts; {repeated} lines asked again that had not counted as done")


def test_what_a_server_shows_after_a_kill_survives_a_power_cut(disk: PowerDisk, tmp_path: Path, engine: Engine) -> None:
    """A killed server may have written a row and not synced it: the next one shows it, so it has to stay."""
    settings, data_dir, content = engine.configured(tmp_path), disk.path, batch_input(3)

    def die_before_syncing_the_row(call: Call) -> Answer:
        return Kill() if call.name in SYNCS and call.concerns(data_dir, ".db-wal") and uploading else None

    uploading = False
    with Server(data_dir, *settings, watched=Watched(die_before_syncing_the_row)) as server:
        uploading = True
        with pytest.raises(httpx2.TransportError):
            server.upload(content)
    with Server(data_dir, *settings) as server:
        (file,) = server.http.get("/v1/files").json()["data"]
        disk.cut()
    disk.restore()
    with Server(data_dir, *settings) as server:
        assert server.content(file["id"]) == content


def test_what_a_worker_finds_after_a_kill_survives_a_power_cut(disk: PowerDisk, tmp_path: Path, engine: Engine) -> None:
    """A killed worker may have written outcomes and not synced them: once the next one counts them, they stay."""
    quick, endless = batch_input(4), batch_input(2, "[[scripted delay_ms=600000]]").replace(b"line-", b"endless-")
    settings, died = engine.configured(tmp_path), False

    def die_before_syncing_outcomes(call: Call) -> Answer:
        nonlocal died
        if died or call.name not in SYNCS or not call.concerns(disk.path, ".segment"):
            return None
        died = True
        return Kill()

    def recorded(batch: dict[str, Any]) -> bool:
        return died and batch["request_counts"]["completed"] == 4 and engine.ledger()["in_flight"] == 2

    before = engine.ledger()["requests"]
    with Server(disk.path, *settings, watched=Watched(die_before_syncing_outcomes)) as server:
        batch_id = server.create_batch(server.upload(quick + endless))["id"]
        server.await_batch(batch_id, recorded)
        disk.cut()
    disk.restore()
    with Server(disk.path, *settings) as server:
        server.await_batch(batch_id, lambda batch: recorded(batch) and engine.ledger()["requests"] >= before + 10)
    assert engine.ledger()["requests"] == before + 10, "the four lines once, the endless ones at each of three starts"
