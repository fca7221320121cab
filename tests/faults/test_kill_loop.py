"""kill -9 of everything, again and again, while clients work: what was acknowledged is there, and every batch ends."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from tests.beds import Bed
from tests.books import ENDED, Client
from tests.processes import COMMAND, POLL_S, ScriptedProcess, Server, configured
from tests.receiver import Receiver

# Lines in flight at once, over both workers: what one kill can waste.
WINDOW = 32
WORKERS = 2
KINDS = ("server", "server", "server", "worker", "worker", "engine", "start")
END_S_MAX = 600.0


class Site:
    """A server and its engine on ports that stay the same, and what has been killed of them."""

    def __init__(self, tmp_path: Path, receiver: Receiver) -> None:
        self._tmp_path = tmp_path
        self.books = tmp_path / "ledger.jsonl"
        self.data_dir = tmp_path / "data"
        self._engine_settings = {"latency_ms": 20, "ledger_path": self.books}
        self._engine = ScriptedProcess(tmp_path / "engine.log", **self._engine_settings)
        self._engine_port = self._engine.base_url.removesuffix("/v1").rsplit(":", 1)[1]
        settings = {"workers": WORKERS, "webhook_allow": [f"127.0.0.1:{receiver.port}"]}
        url = self._engine.base_url
        self._arguments = configured(tmp_path, url, models=["scripted"], window=WINDOW, **settings)
        self.server = Server(self.data_dir, *self._arguments)
        self._arguments += ["--port", self.server.base_url.rsplit(":", 1)[1]]
        self.killed: Counter[str] = Counter()

    def kill(self, kind: str, delay_s: float) -> None:
        """End something as a crash would, and start it again if nobody else does."""
        self.killed[kind] += 1
        match kind:
            case "worker":
                with suppress(ProcessLookupError):
                    os.kill(self.server.worker_pid(), signal.SIGKILL)
            case "engine":
                self._engine.kill()
                self._engine = ScriptedProcess(
                    self._tmp_path / "engine.log", port=self._engine_port, **self._engine_settings
                )
            case "server" | "start":
                self.server.kill()
                self.server.http.close()
                if kind == "start":
                    self._kill_while_it_starts(delay_s)
                self.server = Server(self.data_dir, *self._arguments)

    def restart(self) -> None:
        assert self.server.terminate() == 0
        self.server.http.close()
        self.server = Server(self.data_dir, *self._arguments)

    def close(self) -> None:
        for process in (self.server, self._engine):
            process.__exit__()

    def _kill_while_it_starts(self, delay_s: float) -> None:
        command = [*COMMAND, "serve", "--data-dir", str(self.data_dir), *self._arguments]
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        with suppress(subprocess.TimeoutExpired):
            child.wait(delay_s)
        child.kill()
        child.wait()


@contextmanager
def site_of(tmp_path: Path, receiver: Receiver) -> Iterator[Site]:
    site = Site(tmp_path, receiver)
    try:
        yield site
    finally:
        site.close()


def test_whatever_is_killed_what_was_acknowledged_is_kept(tmp_path: Path, bed: Bed) -> None:
    kills = bed.times(small=4, ci=100, long=1000)
    over = threading.Event()
    with Receiver() as receiver, site_of(tmp_path, receiver) as site:
        endpoint = {"name": "test", "url": receiver.url, "event_types": [f"batch.{status}" for status in ENDED]}
        site.server.http.post("/v1/webhook_endpoints", json=endpoint).raise_for_status()
        job_id = site.server.job_id
        clients = [
            Client(number, bed.seed, site.server.base_url, job_id, over)
            for number in range(bed.times(small=3, ci=4, long=4))
        ]
        for client in clients:
            client.start()
        try:
            for _ in range(kills):
                kind, delay_s = bed.rng.choice(KINDS), bed.rng.uniform(0.0, 1.5)
                if over.wait(delay_s):
                    break
                site.kill(kind, delay_s)
        finally:
            over.set()
            for client in clients:
                client.join()
        check_batches(site, clients)
        check_files(site, clients)
        check_webhooks(clients, receiver)
        wasted, lines = check_waste(site, clients)
        for client in clients:
            client.close()
        site.restart()
        await_nothing_unnamed(site.data_dir)
        assert site.server.terminate() == 0  # and its workers with it, which outlive a server that is killed
    calls = sum((client.calls for client in clients), Counter[str]())
    batches = sum(len(client.runs) for client in clients)
    print(
        f"killed {dict(site.killed)}; {batches} batches, {lines} lines executed, {wasted} calls wasted; {dict(calls)}"
    )
    shutil.rmtree(tmp_path)


def check_batches(site: Site, clients: list[Client]) -> None:
    """Wait until every batch has ended, and compare each with its client's books."""
    found: set[str] = set()
    names: Counter[str] = Counter()
    for batch in listed(site.server, "/v1/batches"):
        owners = [client for client in clients if client.known(batch)]
        assert len(owners) == 1, "there is no batch that nobody has asked for"
        run = owners[0].runs[batch["id"]]
        run.look(site.server.await_batch(batch["id"], timeout_s=END_S_MAX))
        if run.executed is None:
            owners[0].check(run)
        found.add(batch["id"])
        names[batch["metadata"]["name"]] += 1
    for client in clients:
        assert client.runs.keys() <= found, "every batch that was acknowledged is there"
        assert client.once <= names.keys()
    assert set(names.values()) <= {1}, "what was asked for once is done once"


def check_files(site: Site, clients: list[Client]) -> None:
    for client in clients:
        for file_id, stored in client.files.items():
            if file_id not in client.gone:
                assert site.server.content(file_id) == stored.content
        for file_id in client.gone:
            assert site.server.http.get(f"/v1/files/{file_id}").status_code == 404


def check_webhooks(clients: list[Client], receiver: Receiver) -> None:
    ended = {run.id: f"batch.{run.seen['status']}" for client in clients for run in client.runs.values()}
    told: dict[str, str] = {}
    while told.keys() != ended.keys():
        received = receiver.take(timeout_s=120)
        if len(received.body) == int(received.headers["content-length"]):  # else its sender was killed
            event = json.loads(received.body)
            told[event["data"]["id"]] = event["type"]
    assert told == ended


def check_waste(site: Site, clients: list[Client]) -> tuple[int, int]:
    """Return how many calls were wasted, and how many lines were executed."""
    executed = Counter(line.key for client in clients for run in client.runs.values() for line in run.executed or ())
    asked: Counter[str] = Counter(json.loads(entry)["key"] for entry in site.books.read_bytes().splitlines())
    known = {line.key for client in clients for lines in client.asked.values() for line in lines}
    wasted = sum(count - executed[key] for key, count in asked.items() if key in known)
    assert wasted <= WINDOW * site.killed.total()
    return wasted, executed.total()


def listed(server: Server, path: str) -> list[dict[str, Any]]:
    """Return everything that a listing has, page by page."""
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = {"after": found[-1]["id"]} if found else {}
        page = server.http.get(path, params={"limit": 100, **after}).json()
        found += page["data"]
        more = page["has_more"]
    return found


def await_nothing_unnamed(data_dir: Path) -> None:
    """Wait until the disk holds what the database names, and nothing else."""
    deadline = time.monotonic() + 60
    while (found := on_disk(data_dir)) != (named := named_blobs(data_dir)):
        assert named <= found, f"named but not there: {sorted(named - found)[:5]}"
        assert time.monotonic() < deadline, f"there but not named: {sorted(found - named)[:5]}"
        time.sleep(POLL_S)
    assert not list((data_dir / "segments").rglob("*.segment"))


def on_disk(data_dir: Path) -> set[str]:
    blobs = data_dir / "blobs"
    return {str(path.relative_to(blobs)) for path in blobs.rglob("*") if path.is_file()}


def named_blobs(data_dir: Path) -> set[str]:
    database = sqlite3.connect(f"file:{data_dir / 'pronghorn.db'}?mode=ro", uri=True)
    try:
        return {key for (key,) in database.execute("SELECT key FROM file_blobs UNION SELECT key FROM upload_parts")}
    finally:
        database.close()
