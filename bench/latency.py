"""Pronghorn beside an engine that takes its time: `python -m bench.latency`.

The scripted engine runs 64 lines at once, 50 ms each: 1,280 lines/s at most, if 64 are always there. The bare client
knows that number; Pronghorn has to find it.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from tests.processes import ScriptedProcess, Server

from bench.command import main
from bench.dispatch import bare, one_batch
from bench.nginx import MODEL
from bench.rows import Row, Scale, Section

SLOTS = 64
LATENCY_MS = 50
BEST = SLOTS / LATENCY_MS * 1000
HOW = f"""\
The scripted engine runs {SLOTS} lines at once, {LATENCY_MS} ms each, which is {BEST:,.0f} lines/s at most. The bare
client is told {SLOTS}; Pronghorn finds its window by itself, and its figure is the whole batch, validation and output
file included."""


def measure(scale: Scale) -> Section:
    """Let Pronghorn and the bare client take turns at the same engine."""
    rounds, lines = scale.times(smoke=1, quick=2, full=3), scale.times(smoke=1_000, quick=6_000, full=12_000)
    ours, alone = [], []
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        settings = {"models": MODEL, "capacity": "slots", "slots": SLOTS, "latency_ms": LATENCY_MS}
        with (
            ScriptedProcess(scratch / "engine.log", **settings) as engine,
            Server(scratch / "data", "--upstream", engine.base_url) as server,
        ):
            for _ in range(rounds):
                ours.append(lines / one_batch(server, lines).elapsed)
                alone.append(bare(engine.base_url, SLOTS, lines)[0])
    rows = [
        Row("Pronghorn", ours, "lines/s", "bare client", alone, "ratio at least 0.97"),
        Row("bare client", alone, "requests/s", "what the engine can", [BEST]),
    ]
    return Section("Beside an engine of 64 slots", HOW, rows)


if __name__ == "__main__":
    main(measure, __doc__)
