"""Validates a batch: reads its whole input file, and either plans its shards or fails it with every problem."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from functools import partial

import msgspec

from pronghorn.clock import Clock
from pronghorn.domain.model import Batch, BatchStatus
from pronghorn.domain.planning import Plan, Rejection, plan_file
from pronghorn.domain.validation import Problem, Rules
from pronghorn.engines.base import EnginePool
from pronghorn.errors import Fenced, NotStored
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.metadata import Metadata

log = logging.getLogger("pronghorn.planner")


class _Abandoned(Exception):
    """Nobody waits for the plan any more."""


class Planner:
    """Moves batches out of `validating`."""

    def __init__(
        self, metadata: Metadata, blobs: Blobs, engines: EnginePool, clock: Clock, *, line_bytes_max: int
    ) -> None:
        self._metadata = metadata
        self._blobs = blobs
        self._engines = engines
        self._clock = clock
        self._line_bytes_max = line_bytes_max

    async def validate(self, batch: Batch) -> None:
        """Check every line of the batch's input; afterwards it is in_progress or failed, unless it was cancelled."""
        outcome = await self._plan(batch)
        now = self._clock.now()
        try:
            if isinstance(outcome, Plan):
                await self._metadata.start_batch(batch, outcome, now)
            else:
                await self._metadata.advance(batch, BatchStatus.FAILED, now, problems=_on_the_wire(outcome))
        except Fenced:
            log.info("%s ended while it was validated", batch.id)

    async def _plan(self, batch: Batch) -> Plan | Rejection:
        file = await self._metadata.file(batch.input_file_id, batch.account_id)
        if file is None or file.purpose != "batch":
            return _no_input(batch, wrong_purpose=None if file is None else file.purpose)
        blobs = await self._metadata.file_blobs(file.id)
        rules = Rules(batch.endpoint, partial(self._engines.answers, batch.endpoint))
        abandoned = threading.Event()

        def chunks() -> Iterator[bytes]:
            for chunk in self._blobs.read_blocking(blobs, 0, file.bytes):
                if abandoned.is_set():
                    raise _Abandoned
                yield chunk

        try:
            return await asyncio.to_thread(plan_file, chunks, file.bytes, rules, line_bytes_max=self._line_bytes_max)
        except NotStored:
            return _no_input(batch, wrong_purpose=None)
        finally:
            abandoned.set()  # the thread outlives a cancelled task unless it is told


def _no_input(batch: Batch, *, wrong_purpose: str | None) -> Rejection:
    message = (
        f"Cannot find file {batch.input_file_id}, or organization {batch.account_id} does not have access to it."
        if wrong_purpose is None
        else f"File {batch.input_file_id} has purpose '{wrong_purpose}'; a batch needs one with purpose 'batch'."
    )
    return Rejection([Problem("invalid_request", message, "file_id", None)], 0)


def _on_the_wire(rejection: Rejection) -> bytes:
    problems = [problem._asdict() for problem in rejection.problems]
    if rejection.unlisted:
        message = f"{rejection.unlisted} further problems are not listed."
        problems.append(Problem("too_many_problems", message, None, None)._asdict())
    return msgspec.json.encode(problems)
