"""A worker that ends is replaced: at once after work, and ever later while none of them does any."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import AsyncIterator

import pytest

from pronghorn.control.crew import CrewMember
from pronghorn.domain.model import ShardKey, ShardResult, Tally
from pronghorn.worker.protocol import Configure, Done, Moved, Order, Ready, Report

STARTS = 4


class Ending:
    """An executor whose workers say this and end; `all_started` is set when there have been enough."""

    def __init__(self, *says: Report) -> None:
        self._says = says
        self._starts = 0
        self.all_started = asyncio.Event()

    async def start(self) -> Ending:
        self._starts += 1
        if self._starts == STARTS:
            self.all_started.set()
        return self

    def send(self, order: Order) -> None:
        pass

    async def reports(self) -> AsyncIterator[Report]:
        for report in self._says:
            yield report

    def hang_up(self) -> None:
        pass

    kill = hang_up

    async def end(self) -> int | None:
        return 1


async def waits(caplog: pytest.LogCaptureFixture, *says: Report) -> list[float]:
    """Return the waits, in seconds, after workers that say this."""
    executor = Ending(*says)
    member = CrewMember(executor, Configure("", "", 1024, 1.0, 1.0, 1.0, prompt_order=True), list, lambda event: None)
    with caplog.at_level(logging.WARNING, "pronghorn.crew"):
        running = asyncio.create_task(member.run())
        await executor.all_started.wait()
        member.stop(0)
        await running
    return [float(found) for found in re.findall(r"another starts in ([\d.]+) s", caplog.text)]


async def test_workers_that_end_without_work_are_replaced_ever_later(caplog: pytest.LogCaptureFixture) -> None:
    assert (await waits(caplog, Ready(), Moved([], [])))[: STARTS - 1] == [0.2, 0.4, 0.8]


async def test_a_worker_that_has_finished_a_shard_is_replaced_at_once(caplog: pytest.LogCaptureFixture) -> None:
    done = Done(ShardKey("batch_1", 0), 1, ShardResult(None, None, Tally(), []))
    assert (await waits(caplog, Ready(), Moved([], []), done))[: STARTS - 1] == [0.1, 0.1, 0.1]
