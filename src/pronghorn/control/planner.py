"""Moves batches out of `validating`: into in_progress with a plan, or into failed with every problem."""

from __future__ import annotations

import logging

import msgspec

from pronghorn.checking import InputChecker
from pronghorn.clock import Clock
from pronghorn.domain.model import Batch, BatchStatus
from pronghorn.domain.planning import Plan
from pronghorn.errors import Fenced
from pronghorn.storage.metadata import Metadata

log = logging.getLogger("pronghorn.planner")


class Planner:
    """Validates batches."""

    def __init__(self, metadata: Metadata, checker: InputChecker, clock: Clock) -> None:
        self._metadata = metadata
        self._checker = checker
        self._clock = clock

    async def validate(self, batch: Batch) -> None:
        """Check every line of the batch's input; afterwards it is in_progress or failed, unless it was cancelled."""
        outcome = await self._checker.check(batch)
        now = self._clock.now()
        try:
            if isinstance(outcome, Plan):
                await self._metadata.start_batch(batch, outcome, now)
            else:
                problems = msgspec.json.encode([problem._asdict() for problem in outcome.listed()])
                await self._metadata.advance(batch, BatchStatus.FAILED, now, problems=problems)
        except Fenced:
            log.info("%s ended while it was validated", batch.id)
