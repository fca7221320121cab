"""Reading a batch's input whole: what is wrong with it, what there is to run, and in which shards."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial

from pronghorn.domain.model import Batch
from pronghorn.domain.planning import Census, Plan, Rejection, plan_file
from pronghorn.domain.validation import Problem, Rules
from pronghorn.engines.base import EnginePool
from pronghorn.errors import Damaged, NotStored
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files

MODELS_REMEMBERED = 64


class _Abandoned(Exception):
    """Nobody waits for the plan any more."""


class InputChecker:
    """Plans batches from their input files."""

    def __init__(self, files: Files, blobs: Blobs, engines: EnginePool, *, line_bytes_max: int) -> None:
        self._files = files
        self._blobs = blobs
        self._engines = engines
        self._line_bytes_max = line_bytes_max
        # Batches are planned one at a time, and wait for none of the dry runs that clients may ask for without bound.
        self._planning = ThreadPoolExecutor(1, "planning")

    async def check(self, batch: Batch, census: Census | None = None) -> Plan | Rejection:
        """Check every line of a batch's input; a dry run has a `census`, which is filled with what there is to run."""
        file = await self._files.find(batch.input_file_id, batch.account_id)
        if file is None or file.has_expired(batch.stamps.created_at):  # once the batch is made, the file stays for it
            return _missing(batch)
        if file.purpose != "batch":
            return _wrong_purpose(file.id, file.purpose)
        refs = await self._files.blobs(file.id)
        abandoned = threading.Event()

        def chunks() -> Iterator[bytes]:
            for chunk in self._blobs.read_blocking(refs, 0, file.bytes):
                if abandoned.is_set():
                    raise _Abandoned
                yield chunk

        plan = partial(
            plan_file,
            chunks,
            file.bytes,
            # Nearly every line names the same model; the engines are asked again for others alone.
            Rules(batch.endpoint, lru_cache(MODELS_REMEMBERED)(partial(self._engines.answers, batch.endpoint))),
            line_bytes_max=self._line_bytes_max,
            on_invalid=batch.on_invalid,
            deduplicate=batch.deduplicate,
            census=census,
        )
        try:
            if census is None:
                return await asyncio.get_running_loop().run_in_executor(self._planning, plan)
            return await self._blobs.through_whole_files(plan)
        except NotStored:
            return _missing(batch)
        except Damaged as error:
            return Rejection([Problem("invalid_request", str(error), "file_id", None)], 0)
        finally:
            abandoned.set()  # the thread outlives a cancelled task unless it is told


def _missing(batch: Batch) -> Rejection:
    message = f"Cannot find file {batch.input_file_id}, or organization {batch.account_id} does not have access to it."
    return Rejection([Problem("invalid_request", message, "file_id", None)], 0)


def _wrong_purpose(file_id: str, purpose: str) -> Rejection:
    message = f"File {file_id} has purpose '{purpose}'; a batch needs one with purpose 'batch'."
    return Rejection([Problem("invalid_request", message, "file_id", None)], 0)
