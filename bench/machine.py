"""On what a benchmark ran: hardware and versions, for the head of its tables."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import time
from pathlib import Path

LIBRARIES = ("uvloop", "httptools", "msgspec", "sqlalchemy")


def description() -> str:
    """Return a paragraph that says when, where and with which versions."""
    libraries = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES)
    return (
        f"{time.strftime('%Y-%m-%d')}, commit {_commit()}: {_processor()}, {len(os.sched_getaffinity(0))} cores, "
        f"{_memory_gib():.0f} GiB of memory, {platform.system()} {platform.release()}, Python "
        f"{platform.python_version()}, {libraries}, {_nginx()}. "
        f"Load before the start {os.getloadavg()[0]:.2f}."
    )


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty"]
    found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    return found.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _memory_gib() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)


def _nginx() -> str:
    program = shutil.which("nginx", path="/usr/sbin:/usr/bin:/usr/local/bin")
    if program is None:
        return "no nginx"
    said = subprocess.run([program, "-v"], capture_output=True, text=True, check=False).stderr
    return said.strip().removeprefix("nginx version: ").replace("/", " ")
