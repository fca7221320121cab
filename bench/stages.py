"""Where the worker's microseconds go, stage by stage: `python -m bench.stages`.

py-spy looks at the worker some hundred times a second while it runs a batch against nginx. A look counts for the
stage of the innermost function of ours that it finds running; the shares are laid over the processor time that the
worker used. Time in fsync is waiting, not work, and is left out. `--functions` lists the functions instead.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from tests.processes import Server

from bench import nginx
from bench.command import arguments
from bench.cores import OTHER_CORE, cpu_s, pin
from bench.dispatch import jsonl, one_batch, start_server
from bench.rows import Row, Scale, Section, markdown

LOOKS_PER_S = 250
LOOP = "event loop: epoll, reading from sockets"
SORT = "sort: outcomes into output files"
OTHER = "other"

# By file, and by function where one file has several stages; the first that matches, from the inside out.
STAGES = {
    "write_parts": SORT,
    "Connection.begin": "send: writing to sockets",
    "SegmentWriter.write": "write: outcomes to the segment",
    "client.py": "send: requests and connections",
    "request.py": "send: requests and connections",
    "connection_pool.py": "send: requests and connections",
    "connection.py": "parse: answers off the wire",
    "shard_run.py": "read: lines of the shard",
    "planning.py": "read: lines of the shard",
    "blobs.py": "read: lines of the shard",
    "retry.py": "judge: what an answer means",
    "gauging.py": "window: how many lines in flight",
    "search.py": "window: how many lines in flight",
    "flow.py": "window: how many lines in flight",
    "lane.py": "window: how many lines in flight",
    "results.py": "record: the outcome's bytes and checksum",
    "segments.py": "record: the outcome's bytes and checksum",
    "recorder.py": "record: the outcome's bytes and checksum",
    "dispatch.py": "dispatch: which line goes where",
    "lanes.py": "dispatch: which line goes where",
    "neighbours.py": "dispatch: which line goes where",
    "order.py": "dispatch: which line goes where",
    "runners.py": LOOP,
}
WAITS = ("sync_file", "_worker")
FRAME = re.compile(r"(?P<function>.*) \((?:.*/)?(?P<file>[^/:]+)(?::\d+)?\)")


class Look(NamedTuple):
    """A stack, outermost function first, and how often it was seen."""

    stack: list[tuple[str, str]]
    times: int


def looks(recorded: str) -> list[Look]:
    """Return the looks of a raw py-spy recording that found work."""
    found = []
    for line in recorded.splitlines():
        stack, times = line.rsplit(" ", 1)
        frames = [(match["function"], match["file"]) for match in map(FRAME.fullmatch, stack.split(";")) if match]
        if frames and frames[-1][0] not in WAITS:
            found.append(Look(frames, int(times)))
    return found


def stage(look: Look) -> str:
    if any(function == "write_parts" for function, _ in look.stack):
        return SORT
    for function, file in reversed(look.stack):
        if (found := STAGES.get(function) or STAGES.get(file)) is not None:
            return found
    return OTHER


def function(look: Look) -> str:
    """Return the innermost function with its caller."""
    return " < ".join(f"{name} ({file})" for name, file in look.stack[:-3:-1])


def record(server: Server, lines: int, seconds: int, scratch: Path) -> tuple[list[Look], float]:
    """Watch the worker while it runs a batch; return what was seen and the microseconds a line took."""
    one_batch(server, lines // 10)
    file_id, worker = server.upload(jsonl(lines)), server.worker_pid()
    output = scratch / "looks.txt"
    command = [str(Path(sys.executable).with_name("py-spy")), "record", "--pid", str(worker), "--format", "raw"]
    command += ["--output", str(output), "--duration", str(seconds), "--rate", str(LOOKS_PER_S), "--nonblocking"]
    before = cpu_s(worker)
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as spy:
        pin(spy.pid, OTHER_CORE)
        server.await_batch(server.create_batch(file_id)["id"], timeout_s=600)
        used_s = cpu_s(worker) - before
        spy.wait()
    return looks(output.read_text()), used_s / lines * 1e6


def measure(scale: Scale, name: object = stage, rows_max: int = 20) -> Section:
    """Return microseconds a line by stage, or by whatever `name` makes of a look."""
    assert callable(name)
    lines = scale.times(smoke=2_000, quick=60_000, full=150_000)
    seconds = scale.times(smoke=2, quick=6, full=15)
    with tempfile.TemporaryDirectory() as directory:
        scratch = Path(directory)
        with nginx.running(scratch) as base_url, start_server(scratch, base_url) as server:
            seen, us_per_line = record(server, lines, seconds, scratch)
    counts: Counter[str] = Counter()
    for look in seen:
        counts[name(look)] += look.times
    per_look = us_per_line / counts.total()
    rows = [Row("all of it", [us_per_line], "us/line")]
    rows += [
        Row(text, [times * per_look], "us/line", "all of it", [us_per_line])
        for text, times in counts.most_common(rows_max)
    ]
    return Section("Where a line's microseconds go", HOW, rows)


HOW = f"""\
The worker's processor time a line against nginx, as in Dispatch, divided by what py-spy saw running at {LOOKS_PER_S}
looks a second; the ratio is a stage's share. Waiting for fsync is no processor time and does not count."""


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--functions", action="store_true", help="list functions instead of stages")
    options = parser.parse_args()
    section = measure(options.scale, function, 40) if options.functions else measure(options.scale)
    print(markdown([section]))


if __name__ == "__main__":
    main()
