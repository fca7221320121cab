"""A child that an engine runs in is started again until it answers, whatever keeps it from starting."""

from __future__ import annotations

import asyncio
import errno

import msgspec
import pytest

from pronghorn.domain.model import Replica
from pronghorn.engines import child
from pronghorn.engines.child import ChildServer
from pronghorn.errors import EngineError


class Options(msgspec.Struct):
    """This child has none."""


class Troubled(ChildServer):
    """Starts `tests.brief_child`, which ends as soon as it is ready; some starts fail as the machine's may."""

    def __init__(self) -> None:
        super().__init__("tests.brief_child", Options(), Replica("http://nowhere/v1"), engine="brief", model="none")
        self.starts: asyncio.Queue[str] = asyncio.Queue()
        self.failures: list[str] = []

    async def _spawn(self) -> asyncio.subprocess.Process:
        failure = self.failures.pop(0) if self.failures else "none"
        self.starts.put_nowait(failure)
        with pytest.MonkeyPatch.context() as patch:
            if failure == "no fork":
                raise OSError(errno.EAGAIN, "Resource temporarily unavailable")
            if failure == "slow load":
                patch.setattr(child, "LOAD_TIMEOUT_S", 0.0)
            return await super()._spawn()


async def test_a_child_that_cannot_be_started_or_loads_too_long_is_started_again() -> None:
    server = Troubled()
    await server.start()
    server.failures = ["no fork", "slow load"]
    try:
        assert [await server.starts.get() for _ in range(4)] == ["none", "no fork", "slow load", "none"]
    finally:
        await server.stop()


async def test_an_engine_that_loads_too_long_at_the_start_says_so() -> None:
    server = Troubled()
    server.failures = ["slow load"]
    with pytest.raises(EngineError, match="brief has not loaded none in 0 s"):
        await server.start()
