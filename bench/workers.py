"""How lines/s grow with workers: `python -m bench.workers`.

As bench.dispatch, but nothing is pinned: workers, server and nginx share all cores, so that on two of them the second
worker gets what the others leave.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.processes import Server

from bench import nginx
from bench.command import main
from bench.cores import CORES, pin
from bench.dispatch import Run, one_run
from bench.rows import Row, Scale, Section

WORKERS = (1, 2)
HOW = f"""\
As in Dispatch, but nothing is pinned: workers, server and nginx share {len(CORES)} cores. nginx and the server take
their part of them from the workers, which is what limits two workers on two cores."""


def run(base_url: str, workers: int, scale: Scale, scratch: Path) -> list[Run]:
    """Measure with so many workers behind a server of their own."""
    config = scratch / f"{workers}.toml"
    config.write_text(f'workers = {workers}\n[[upstream]]\nurl = "{base_url}"\n')
    short, long = scale.times(smoke=0, quick=5_000, full=20_000), scale.times(smoke=1_000, quick=45_000, full=120_000)
    with Server(scratch / f"data-{workers}", "--config", str(config)) as server:
        return [one_run(server, short, long) for _ in range(scale.times(smoke=1, quick=1, full=3))]


def measure(scale: Scale) -> Section:
    """Compare one worker with two."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        with nginx.running(scratch) as base_url:
            pin(nginx.pid(scratch), *CORES)
            rates = {n: [run.lines_per_s for run in run(base_url, n, scale, scratch)] for n in WORKERS}
    one, two = (rates[n] for n in WORKERS)
    rows = [Row("1 worker", one, "lines/s"), Row("2 workers", two, "lines/s", "1 worker", one)]
    return Section("Workers", HOW, rows)


if __name__ == "__main__":
    main(measure, __doc__)
