"""Ends what has run out and removes what nothing refers to any more.

Whoever stops referring to a blob marks it for removal in the same transaction; here it is removed from storage, and
only then is the mark taken away, so a crash at any point forgets no blob and removes none that is in use.
"""

from __future__ import annotations

import asyncio
import logging

from pronghorn.clock import Clock
from pronghorn.control.orphans import Orphans
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.files import Files
from pronghorn.storage.uploads import Uploads

log = logging.getLogger("pronghorn.maintenance")

# How late an end is noted and room given back; what has run out is refused from that second on.
SWEEP_INTERVAL_S = 60


class Maintenance:
    """The one housekeeper of a server."""

    def __init__(self, files: Files, uploads: Uploads, blobs: Blobs, orphans: Orphans, clock: Clock) -> None:
        self._files = files
        self._uploads = uploads
        self._blobs = blobs
        self._orphans: Orphans | None = orphans
        self._clock = clock

    async def run(self) -> None:
        """Sweep at once and then at intervals; a sweep that fails is logged, and the next one does its work."""
        while True:
            try:
                await self.sweep()
            except Exception:
                log.exception("a sweep failed; the next is in %s s", SWEEP_INTERVAL_S)
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep(self) -> None:
        """End what has run out, then remove every blob that is marked for removal; at first also what is orphaned."""
        now = self._clock.now()
        await self._uploads.expire(now)
        await self._files.forget_expired(now)
        await self._remove_blobs()
        if self._orphans is not None:
            await self._orphans.remove()
            self._orphans = None

    async def _remove_blobs(self) -> None:
        """Remove what is marked; a blob that cannot be removed keeps its mark and holds up no other."""
        refused = 0
        while keys := await self._files.removals(skip=refused):
            removed = [key for key in keys if await self._is_removed(key)]
            await self._files.removed(removed)
            refused += len(keys) - len(removed)

    async def _is_removed(self, key: str) -> bool:
        try:
            await self._blobs.delete(key)
        except Exception:
            log.exception("%s cannot be removed from storage", key)
            return False
        return True
