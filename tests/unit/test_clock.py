"""A wall clock that is set changes no stamp and no deadline."""

from __future__ import annotations

import pytest

from pronghorn.clock import SystemClock

DAY_S = 86_400


class Machine:
    """Two clocks, of which people set one."""

    def __init__(self) -> None:
        self.wall, self.up = 1_000_000.5, 50.0

    def clock(self) -> SystemClock:
        return SystemClock(lambda: self.wall, lambda: self.up)

    def pass_by(self, seconds: float) -> None:
        self.wall += seconds
        self.up += seconds


def test_now_passes_as_time_does() -> None:
    machine = Machine()
    clock = machine.clock()
    assert clock.now() == clock.wall() == 1_000_000
    machine.pass_by(90)
    assert clock.now() == clock.wall() == 1_000_090


@pytest.mark.parametrize("jump_s", [DAY_S, -DAY_S])
def test_a_jump_of_the_wall_clock_is_seen_on_the_wall_alone(jump_s: int) -> None:
    machine = Machine()
    clock = machine.clock()
    machine.wall += jump_s
    machine.pass_by(1)
    assert clock.now() == 1_000_001
    assert clock.wall() == 1_000_001 + jump_s


def test_the_next_start_goes_by_the_wall_clock() -> None:
    machine = Machine()
    machine.wall += DAY_S
    assert machine.clock().now() == 1_000_000 + DAY_S


def test_the_machine_has_clocks() -> None:
    clock = SystemClock()
    assert abs(clock.now() - clock.wall()) <= 1
    assert clock.monotonic() <= clock.monotonic()
