"""The batches that are being validated or wait for it: one at a time, in the order of creation.

A batch whose input cannot be read now waits ever longer, and says why, while others are validated.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Container
from typing import NamedTuple

from pronghorn.clock import Clock
from pronghorn.control.planner import Planner
from pronghorn.domain.model import Batch, Progress, Tally
from pronghorn.errors import StorageError
from pronghorn.storage.metadata import Metadata

log = logging.getLogger("pronghorn.coordinator")

# An input that cannot be read is read from its beginning each time.
VALIDATION_WAIT_S = 5.0
VALIDATION_WAIT_S_MAX = 300.0


class _Postponed(NamedTuple):
    """A validation that failed for reasons that are not the input's: how often in a row, and until when it waits."""

    times: int
    until: float


class Validations:
    """Validates batches; `ended` is called after each attempt."""

    def __init__(self, planner: Planner, metadata: Metadata, clock: Clock, ended: Callable[[], None]) -> None:
        self._planner = planner
        self._metadata = metadata
        self._clock = clock
        self._ended = ended
        self._running: dict[str, asyncio.Task[None]] = {}
        self._postponed: dict[str, _Postponed] = {}

    def may_start(self, batch_id: str) -> bool:
        """Tell whether a batch's turn has come: each validation takes a core."""
        postponed = self._postponed.get(batch_id)
        return not self._running and (postponed is None or self._clock.monotonic() >= postponed.until)

    def start(self, batch: Batch) -> None:
        """Validate a batch in the background, if its turn has come."""
        if self.may_start(batch.id):
            task = asyncio.create_task(self._validate(batch))
            self._running[batch.id] = task
            task.add_done_callback(lambda _: self._over(batch.id))

    def stop(self, batch_id: str) -> None:
        """Validate a batch no further, if it is being validated."""
        if batch_id in self._running:
            self._running[batch_id].cancel()

    def forget_others(self, batch_ids: Container[str]) -> None:
        """Forget how long batches that have ended would have had to wait."""
        for batch_id in [batch_id for batch_id in self._postponed if batch_id not in batch_ids]:
            del self._postponed[batch_id]

    async def close(self) -> None:
        """Validate nothing further."""
        tasks = list(self._running.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _validate(self, batch: Batch) -> None:
        try:
            await self._planner.validate(batch)
        except StorageError as error:
            log.error("%s cannot be validated now: %s", batch.id, error)
            await self._postpone(batch, str(error))
        except Exception:
            log.exception("%s cannot be validated now", batch.id)
            await self._postpone(batch, "an error of the server itself, which its log describes")
        else:
            self._postponed.pop(batch.id, None)

    async def _postpone(self, batch: Batch, reason: str) -> None:
        times = self._postponed.get(batch.id, _Postponed(0, 0.0)).times + 1
        wait_s = min(VALIDATION_WAIT_S_MAX, VALIDATION_WAIT_S * 2 ** min(times - 1, 10))
        self._postponed[batch.id] = _Postponed(times, self._clock.monotonic() + wait_s)
        since = (batch.progress and batch.progress.stalled_since) or self._clock.now()
        shown = Progress(reason=f"the input cannot be validated now: {reason}", stalled_since=since)
        try:
            await self._metadata.record_progress([(batch.id, Tally(), shown)])
        except StorageError as error:
            log.error("why %s waits cannot be shown: %s", batch.id, error)

    def _over(self, batch_id: str) -> None:
        del self._running[batch_id]
        self._ended()
