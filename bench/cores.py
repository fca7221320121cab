"""Which core a process runs on, and how much of it the process has used."""

from __future__ import annotations

import os
from pathlib import Path

TICKS_PER_S = os.sysconf("SC_CLK_TCK")

# One core for what is measured, one for everything else. On a machine of one core they share it.
CORES = sorted(os.sched_getaffinity(0))
MEASURED_CORE, OTHER_CORE = CORES[0], CORES[-1]


def pin(pid: int, *cores: int) -> None:
    """Keep a process, with every thread that it has and will have, on these cores; as `taskset -a -p` does."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), cores)


def cpu_s(pid: int) -> float:
    """Return the seconds of processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S
