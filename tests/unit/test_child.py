"""A child that an engine runs in is started again until it answers, and none is left of one that is given up."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import psutil
import pytest
import uvloop

from pronghorn.domain.model import Replica
from pronghorn.engines import child
from pronghorn.engines.base import EnginePool
from pronghorn.engines.child import ChildServer
from pronghorn.engines.embedded import EmbeddedEngine
from pronghorn.errors import EngineError


class Options(msgspec.Struct):
    """What `tests.brief_child` does."""

    says: str = "READY"
    stays: bool = False


class Brief(ChildServer):
    """Starts `tests.brief_child`, and says when it is ready for the first time."""

    def __init__(self, options: Options) -> None:
        super().__init__("tests.brief_child", options, Replica("http://nowhere/v1"), engine="brief", model="none")
        self.spawned = asyncio.Event()

    async def _spawn(self) -> asyncio.subprocess.Process:
        process = await super()._spawn()
        self.spawned.set()
        return process


class Troubled(Brief):
    """Starts one that ends as soon as it is ready; some starts fail as the machine's may."""

    def __init__(self) -> None:
        super().__init__(Options())
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


# From before the process is made until after it has ended for having loaded too long.
TURNS = 40
LOOPS = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_is_left_of_a_start_that_is_given_up_at_any_turn(loop: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async def give_up_at_each_turn() -> None:
        for turns in range(TURNS):
            server = Brief(Options(says="", stays=True))
            before = open_ends()
            starting = asyncio.create_task(server.start())
            for _ in range(turns):
                await asyncio.sleep(0)
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            assert open_ends() == before, f"after {turns} turns"

    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(settle())
        monkeypatch.setattr(child, "LOAD_TIMEOUT_S", 0.0)
        runner.run(give_up_at_each_turn())


async def test_an_engine_that_is_given_up_while_it_starts_leaves_none_of_its_processes(tmp_path: Path) -> None:
    before = psutil.Process().children()
    model = tmp_path / "x.gguf"
    model.touch()
    ready, loading = Brief(Options(stays=True)), Brief(Options(says="", stays=True))
    whole = EmbeddedEngine("brief", str(model), lambda _model, _names: [Brief(Options(stays=True))])
    half = EmbeddedEngine("brief", str(model), lambda _model, _names: [ready, loading])
    changed = asyncio.Event()
    engines = EnginePool([whole, half])
    engines.on_change(changed.set)
    starting = asyncio.create_task(engines.start())
    await changed.wait()
    await ready.spawned.wait()
    starting.cancel()
    await asyncio.gather(starting, return_exceptions=True)
    assert psutil.Process().children() == before


async def settle() -> None:
    """Start and stop a child, so that whatever a first one leaves open is there."""
    server = Brief(Options(stays=True))
    await server.start()
    await server.stop()


def open_ends() -> tuple[int, list[psutil.Process]]:
    """Return how many files this process has open, and its children."""
    return psutil.Process().num_fds(), psutil.Process().children()
