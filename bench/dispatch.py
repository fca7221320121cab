"""How fast lines go through the whole pipeline when the engine costs nothing: `python -m bench.dispatch`.

nginx answers every line with the same 600 bytes. One worker has a core of its own; nginx, the server that plans and
commits, and this program share the other. A rate is the difference between a long and a short batch, from creating a
batch to `completed`: start-up does not count, but validation, every fsync and the sorting into the output file do.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from tests.processes import Server

from bench import nginx
from bench.command import main
from bench.cores import MEASURED_CORE, OTHER_CORE, cpu_s, pin
from bench.rows import Row, Scale, Section

CONNECTIONS = (64, 256)


HOW = f"""\
One worker on a core of its own, nginx and everything else on the other; an answer has {nginx.ANSWER_BYTES} bytes.
Lines/s are the difference between a long and a short batch, validation and durable output files included. wrk and the
bare client (asyncio, httptools) have the worker's core for themselves in their turn, at their best of
{" and ".join(map(str, CONNECTIONS))} connections; Pronghorn finds its number by itself."""


class Run(NamedTuple):
    """The steady state between a short and a long batch."""

    lines_per_s: float
    worker_us: float
    server_us: float


class Spent(NamedTuple):
    """What one batch took in all, in seconds."""

    elapsed: float
    worker: float
    server: float


def body(number: int) -> bytes:
    prompt = f"{number:07} " + "x" * 340
    return b'{"model":"%b","messages":[{"role":"user","content":"%b"}],"max_tokens":64}' % (
        nginx.MODEL.encode(),
        prompt.encode(),
    )


def jsonl(lines: int) -> bytes:
    return b"".join(
        b'{"custom_id":"line-%d","method":"POST","url":"/v1/chat/completions","body":%b}\n' % (number, body(number))
        for number in range(lines)
    )


def one_batch(server: Server, lines: int) -> Spent:
    """Run a batch of so many lines; uploading them is not counted."""
    file_id, worker = server.upload(jsonl(lines)), server.worker_pid()
    before = Spent(time.perf_counter(), cpu_s(worker), cpu_s(server.pid))
    batch = server.await_batch(server.create_batch(file_id)["id"], timeout_s=600)
    spent = Spent(
        time.perf_counter() - before.elapsed, cpu_s(worker) - before.worker, cpu_s(server.pid) - before.server
    )
    assert batch["request_counts"] == {"total": lines, "completed": lines, "failed": 0}, batch
    return spent


def one_run(server: Server, short: int, long: int) -> Run:
    """Run a short batch and a long one, and return what a line takes between them; 0 leaves the short one out."""
    first = one_batch(server, short) if short else Spent(0, 0, 0)
    second = one_batch(server, long)
    lines = long - short
    return Run(
        lines / (second.elapsed - first.elapsed),
        (second.worker - first.worker) / lines * 1e6,
        (second.server - first.server) / lines * 1e6,
    )


def start_server(scratch: Path, upstream: str) -> Server:
    """Start a server with one worker, which has the measured core for itself."""
    server = Server(scratch / "data", "--upstream", upstream)
    pin(server.pid, OTHER_CORE)
    pin(server.worker_pid(), MEASURED_CORE)
    return server


def bare(base_url: str, connections: int, requests: int) -> tuple[float, float]:
    """Return the requests/s and the CPU microseconds a request of a bare client on the measured core."""
    command = ["taskset", "-c", str(MEASURED_CORE), sys.executable, "-m", "bench.bare"]
    command += [base_url + "/chat/completions", str(connections), str(requests)]
    said = subprocess.run(command, check=True, input=body(0), stdout=subprocess.PIPE).stdout.split()
    return float(said[0]), float(said[1])


def measure(scale: Scale) -> Section:
    """Compare the pipeline with wrk and with a bare client against the same nginx, taking turns."""
    rounds, seconds = scale.times(smoke=1, quick=3, full=3), scale.times(smoke=1, quick=1, full=3)
    short, long = scale.times(smoke=0, quick=5_000, full=10_000), scale.times(smoke=1_000, quick=45_000, full=110_000)
    requests = scale.times(smoke=2_000, quick=40_000, full=120_000)
    runs: list[Run] = []
    wrks: list[float] = []
    bares: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with nginx.running(scratch) as base_url, start_server(scratch, base_url) as server:
            for _ in range(rounds):
                wrks.append(max(nginx.wrk(base_url, body(0), n, seconds, scratch) for n in CONNECTIONS))
                bares.append(max(bare(base_url, n, requests) for n in CONNECTIONS))
                runs.append(one_run(server, short, long))
    return Section("Dispatch", HOW, rows(runs, wrks, bares))


def rows(runs: list[Run], wrks: list[float], bares: list[tuple[float, float]]) -> list[Row]:
    rates, bare_rates = [run.lines_per_s for run in runs], [rate for rate, _ in bares]
    return [
        Row("Pronghorn, one worker", rates, "lines/s", "bare client", bare_rates, "at least 10,000"),
        Row("wrk, one thread", wrks, "requests/s", "bare client", bare_rates),
        Row("bare client", bare_rates, "requests/s"),
        Row("CPU of the worker", [run.worker_us for run in runs], "us/line", "bare client", [us for _, us in bares]),
        Row("CPU of the server (plan, commit)", [run.server_us for run in runs], "us/line"),
    ]


if __name__ == "__main__":
    main(measure, __doc__)
