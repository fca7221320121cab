"""What server and worker hold in memory at most: `python -m bench.memory`; `--lines 1000000` takes a few minutes.

The scripted engine answers after 50 ms, and 1,000 lines are in flight all the time.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.processes import ScriptedProcess, Server

from bench.command import arguments
from bench.dispatch import body
from bench.nginx import MODEL
from bench.rows import Row, Scale, Section, markdown

WINDOW = 1_000
LATENCY_MS = 50
MIB = 1 << 20
HOW = f"""\
The most that was resident in server and worker together (VmHWM of each) from the start to the end of a batch with
{WINDOW:,} lines in flight. The idle figure is a server that has just started, with its worker."""


def peak_mib(server: Server) -> float:
    return (server.peak_bytes() + peak_bytes(server.worker_pid())) / MIB


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def upload(server: Server, lines: int, scratch: Path) -> str:
    """Upload an input that is never in memory as a whole."""
    path = scratch / "input.jsonl"
    with path.open("wb") as file:
        for number in range(lines):
            file.write(b'{"custom_id":"line-%d","method":"POST","url":"/v1/chat/completions",' % number)
            file.write(b'"body":%b}\n' % body(number))
    with path.open("rb") as file:
        answer = server.http.post("/v1/files", data={"purpose": "batch"}, files={"file": (path.name, file)})
    return str(answer.raise_for_status().json()["id"])


def measure(scale: Scale, lines: int | None = None) -> Section:
    """Run one batch and look at the peaks."""
    lines = lines or scale.times(smoke=2_000, quick=50_000, full=100_000)
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with ScriptedProcess(scratch / "engine.log", models=MODEL, latency_ms=LATENCY_MS) as engine:
            config = scratch / "pronghorn.toml"
            config.write_text(f'[[upstream]]\nurl = "{engine.base_url}"\nwindow = {WINDOW}\n')
            with Server(scratch / "data", "--config", str(config)) as server:
                idle = peak_mib(server)
                batch = server.create_batch(upload(server, lines, scratch))
                batch = server.await_batch(batch["id"], timeout_s=1800)
                assert batch["request_counts"]["completed"] == lines, batch
                peak = peak_mib(server)
    rows = [
        Row(f"{lines:,} lines, {WINDOW:,} in flight", [peak], "MiB", "idle", [idle], "under 300 MiB"),
        Row("idle", [idle], "MiB"),
    ]
    return Section("Memory", HOW, rows)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--lines", type=int)
    options = parser.parse_args()
    print(markdown([measure(options.scale, options.lines)]))


if __name__ == "__main__":
    main()
