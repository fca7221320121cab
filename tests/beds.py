"""What the test beds of tests/faults share: how much they do, from which seed, and what they need of the machine."""

from __future__ import annotations

import enum
import os
import platform
import random
import shutil
import sys

import pytest


class Scale(enum.StrEnum):
    """How much a bed does: `small` within `make test`, `ci` by `make faults`, `long` by `make faults SCALE=long`."""

    SMALL = "small"
    CI = "ci"
    LONG = "long"


class Bed:
    """The scale of a run, its seed, and randomness that follows from the seed alone."""

    def __init__(self, scale: Scale, seed: int | None) -> None:
        self.scale = scale
        self.seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
        self.rng = random.Random(self.seed)

    def times(self, *, small: int, ci: int, long: int) -> int:
        """Return how often to do it at this scale."""
        return {Scale.SMALL: small, Scale.CI: ci, Scale.LONG: long}[self.scale]


def require_seccomp() -> None:
    """Stop a test that watches system calls where tests/syscalls.py cannot; in CI that is a failure."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        _cannot_run("it needs Linux on x86-64 or ARM")


def require_root() -> None:
    """Stop a test that needs root where there is none; in CI that is a failure."""
    if os.geteuid() != 0:
        _cannot_run("it needs root")


def require_program(name: str) -> None:
    """Stop a test that needs a program of another package where it is missing; in CI that is a failure."""
    if shutil.which(name) is None:
        _cannot_run(f"it needs {name}: make faults-tools installs it on Debian")


def _cannot_run(why: str) -> None:
    if os.environ.get("CI"):
        pytest.fail(why)
    pytest.skip(why)
