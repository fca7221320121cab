"""The way to a replica: refused lines keep their places for a while, and gauges move the window."""

from __future__ import annotations

import asyncio

from pronghorn.clock import SystemClock
from pronghorn.domain.model import Replica
from pronghorn.engines import scripted
from pronghorn.engines.client import EngineClient
from pronghorn.engines.scripted import ScriptedOptions
from pronghorn.worker.lane import Lane


async def test_a_refused_line_keeps_its_place_until_an_answer_would_have_come() -> None:
    lane = Lane(Replica("http://engine/v1", window=2), EngineClient("http://engine/v1"))
    lane.window.latency_s = 0.01
    lane.hold_place(3600.0)
    assert lane.room(0.0, "a-model") == 1
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, later.set)
    await later.wait()
    assert lane.room(0.0, "a-model") == 2


async def test_a_window_follows_the_gauges_of_its_engine() -> None:
    engine = await scripted.start(ScriptedOptions())
    engine.floor.load.running, engine.floor.load.waiting = 4, 12
    lane = Lane(Replica(engine.base_url), EngineClient(engine.base_url))
    lane.in_flight = 16
    looked = asyncio.Event()
    lane.watching = asyncio.create_task(lane.watch_gauges({}, SystemClock(), looked.set))
    try:
        async with asyncio.timeout(60):
            while lane.window.limit > 12:
                looked.clear()
                await looked.wait()
    finally:
        await lane.close()
        await engine.stop()
    await asyncio.wait({lane.watching})
    assert lane.watching.cancelled()
