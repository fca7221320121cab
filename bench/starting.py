"""How long things take to start: `python -m bench.starting`."""

from __future__ import annotations

import subprocess
import tempfile
import time
from pathlib import Path

from tests.processes import COMMAND, ScriptedProcess, Server

from bench.command import main
from bench.dispatch import jsonl
from bench.nginx import MODEL
from bench.rows import Row, Scale, Section

# An engine of 3,200 lines/s, so that the batch lasts long enough to be interrupted.
PACE = {"capacity": "slots", "slots": 64, "latency_ms": 20}
LINES = 8_000
HOW = """\
A start lasts until BASE_URL is printed. The interrupted batch was killed (kill -9, server and worker) when a part of it
was done; its figure lasts from starting the server again to the first outcome after that. `pronghorn run` is the whole
command with a file of one line; starting Python and importing the package is most of it."""


def start_s(data_dir: Path, base_url: str) -> float:
    """Return the seconds that a server takes to be ready."""
    begin = time.perf_counter()
    with Server(data_dir, "--upstream", base_url):
        return time.perf_counter() - begin


def recovery_s(data_dir: Path, base_url: str) -> float:
    """Kill a server in the middle of a batch; return the seconds from its next start to the first outcome."""
    with Server(data_dir, "--upstream", base_url) as server:
        batch_id = server.create_batch(server.upload(jsonl(LINES)))["id"]
        done = server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > LINES // 4)
        server.kill()
    begin = time.perf_counter()
    with Server(data_dir, "--upstream", base_url) as server:
        before = done["request_counts"]["completed"]
        server.await_batch(batch_id, lambda batch: batch["request_counts"]["completed"] > before)
        return time.perf_counter() - begin


def run_s(scratch: Path, base_url: str) -> float:
    """Return the seconds that `pronghorn run` takes for one line."""
    source, target = scratch / "one.jsonl", scratch / "out.jsonl"
    source.write_bytes(jsonl(1))
    begin = time.perf_counter()
    command = [*COMMAND, "run", "--input", str(source), "--output", str(target), "--upstream", base_url]
    subprocess.run(command, check=True, capture_output=True)
    assert target.read_bytes().count(b"\n") == 1
    return time.perf_counter() - begin


def measure(scale: Scale) -> Section:
    """Start each of them a few times."""
    rounds = scale.times(smoke=1, quick=2, full=5)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with ScriptedProcess(scratch / "engine.log", models=MODEL, **PACE) as engine:
            url = engine.base_url
            starts = [start_s(scratch / f"new-{n}", url) for n in range(rounds)]
            recoveries = [recovery_s(scratch / f"killed-{n}", url) for n in range(rounds)]
            runs = [run_s(scratch, url) for _ in range(rounds)]
    rows = [
        Row("pronghorn serve, ready", starts, "s"),
        Row("pronghorn serve on an interrupted batch, first outcome", recoveries, "s"),
        Row("pronghorn run, one line, the whole command", runs, "s"),
    ]
    return Section("Starting", HOW, rows)


if __name__ == "__main__":
    main(measure, __doc__)
