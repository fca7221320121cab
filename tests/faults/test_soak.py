"""A long batch: memory stays flat and low while it runs, and after a kill it goes on at once."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import time
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from tests.beds import Bed, Scale
from tests.processes import POLL_S, ScriptedProcess, Server, configured

WINDOW = 1000
MIB = 1 << 20
MEMORY_BYTES_MAX = 300 * MIB
SLOPE_MIB_PER_H_MAX = 5.0
# Caches and the allocator's arenas fill up in the first part of a run.
WARM_UP_SHARE = 1 / 3
BLOCKS = 12
# What the baselines of a short run may differ by for no reason: less than that is no slope that it can see.
RESOLUTION_BYTES = 4 * MIB
FIRST_DISPATCH_S_MAX = 5.0
# So slow that a batch is not over before anybody can kill its server.
ANSWER_S = 0.5


class Sample(NamedTuple):
    """The resident memory of a server and its workers together, at a monotonic time."""

    at: float
    memory: int


def input_lines(lines: int) -> Iterator[bytes]:
    """Yield lines of about a kilobyte, as people write them."""
    text = "Summarise in one sentence what the following says. " * 16
    for number in range(lines):
        body = f'{{"model":"scripted","messages":[{{"role":"user","content":"{text} number {number} "}}]}}'
        yield f'{{"custom_id":"line-{number}","method":"POST","url":"/v1/chat/completions","body":{body}}}\n'.encode()


def start_batch(server: Server, path: Path, lines: int) -> str:
    """Upload so many lines from a file, and start them."""
    with path.open("wb") as file:
        file.writelines(input_lines(lines))
    with path.open("rb") as file:
        answer = server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": ("in.jsonl", file)})
    path.unlink()
    answer.raise_for_status()
    return str(server.create_batch(answer.json()["id"])["id"])


def status_of(pid: int, field: str) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().split(f"{field}:")[1].split()[0]) * 1024


def members(server: Server) -> list[int]:
    return [server.pid, *(pid for pid, command in server.children() if "pronghorn.worker" in command)]


def slope_mib_per_h(samples: list[Sample]) -> float:
    """Return how fast memory grows: the median slope between the baselines of BLOCKS equal parts of the samples.

    A baseline is the least that is resident in its part, so that what comes and goes within a part does not count.
    """
    size = len(samples) // BLOCKS
    blocks = [samples[n * size : (n + 1) * size] for n in range(BLOCKS)]
    lows = [min(block, key=lambda sample: sample.memory) for block in blocks]
    slopes = [(b.memory - a.memory) / (b.at - a.at) for a, b in combinations(lows, 2)]
    return statistics.median(slopes) / MIB * 3600


def test_memory_stays_low_and_flat_through_a_long_batch(tmp_path: Path, bed: Bed) -> None:
    # The long one takes nearly an hour, for growth of a few MiB an hour cannot be told from noise in minutes.
    lines = bed.times(small=3000, ci=100_000, long=1_000_000)
    with (
        ScriptedProcess(tmp_path / "engine.log", latency_ms=bed.times(small=200, ci=400, long=3000)) as engine,
        Server(tmp_path / "data", *configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW)) as server,
    ):
        batch_id = start_batch(server, tmp_path / "input.jsonl", lines)
        samples: list[Sample] = []

        def watched(batch: dict[str, object]) -> bool:
            if batch["status"] == "in_progress":
                memory = sum(status_of(pid, "VmRSS") for pid in members(server))
                samples.append(Sample(time.monotonic(), memory))
            return batch["status"] == "completed"

        batch = server.await_batch(batch_id, watched, timeout_s=6000)
        peak = sum(status_of(pid, "VmHWM") for pid in members(server))
        assert batch["request_counts"]["completed"] == lines
        assert bed.scale is Scale.SMALL or engine.ledger()["max_in_flight"] >= 0.9 * WINDOW
    shutil.rmtree(tmp_path / "data")
    flat = samples[int(len(samples) * WARM_UP_SHARE) :]
    run_h = (flat[-1].at - flat[0].at) / 3600
    slope = slope_mib_per_h(flat) if len(flat) > 2 * BLOCKS else 0.0
    seconds = samples[-1].at - samples[0].at
    print(f"{lines} lines in {seconds:.0f} s: at most {peak // MIB} MiB, slope {slope:.1f} MiB/h")
    assert peak <= MEMORY_BYTES_MAX
    assert slope <= SLOPE_MIB_PER_H_MAX or slope * run_h <= RESOLUTION_BYTES / MIB


def test_a_killed_batch_goes_on_at_once(tmp_path: Path, bed: Bed) -> None:
    lines = bed.times(small=6000, ci=300_000, long=1_000_000)
    books = tmp_path / "ledger.jsonl"
    with ScriptedProcess(tmp_path / "engine.log", latency_ms=ANSWER_S * 1000, ledger_path=books) as engine:
        arguments = configured(tmp_path, engine.base_url, models=["scripted"], window=WINDOW)
        with Server(tmp_path / "data", *arguments) as server:
            batch_id = start_batch(server, tmp_path / "input.jsonl", lines)
            server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > lines / 4, timeout_s=1800)
            server.kill()
        await_quiet(engine)
        since, offset = time.monotonic(), books.stat().st_size
        with Server(tmp_path / "data", *arguments) as server:
            wall_s = first_answer_at(books, offset) - ANSWER_S - since
            cpu_s = sum(cpu_seconds(pid) for pid in members(server))
    shutil.rmtree(tmp_path / "data")
    print(f"{lines} lines: the first is sent {wall_s:.1f} s after a restart, with {cpu_s:.1f} s of processor time")
    # On a machine that is busy otherwise, what was needed is what counts.
    assert min(wall_s, cpu_s) < FIRST_DISPATCH_S_MAX


def await_quiet(engine: ScriptedProcess) -> None:
    """Wait until the engine has noticed that nobody waits for its answers any more."""
    deadline = time.monotonic() + 60
    while engine.ledger()["in_flight"]:
        assert time.monotonic() < deadline
        time.sleep(POLL_S)


def first_answer_at(books: Path, offset: int) -> float:
    """Return when the first line in the ledger beyond `offset` was answered, on the machine's monotonic clock."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with books.open("rb") as file:
            file.seek(offset)
            entry = file.readline()
        if entry.endswith(b"\n"):
            return float(json.loads(entry)["t"])
        time.sleep(POLL_S)
    raise AssertionError("nothing is sent any more")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
