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
from pronghorn.storage.webhooks import Webhooks

log = logging.getLogger("pronghorn.maintenance")

# How late an end is noted and room given back; what has run out is refused from that second on.
SWEEP_INTERVAL_S = 60
# A wall clock that is this far from the time since the start has been set, and is worth a word.
SHIFT_S_MAX = 60
# Uploads and deliveries that have ended are remembered so long: for repeated requests, and for people who look.
HISTORY_S = 30 * 24 * 3600


class Maintenance:
    """The one housekeeper of a server."""

    def __init__(
        self, files: Files, uploads: Uploads, webhooks: Webhooks, blobs: Blobs, orphans: Orphans, clock: Clock
    ) -> None:
        self._files = files
        self._uploads = uploads
        self._webhooks = webhooks
        self._blobs = blobs
        self._orphans: Orphans | None = orphans
        self._clock = clock
        self._shift_s = 0

    async def run(self) -> None:
        """Sweep at once and then at intervals; a sweep that fails is logged, and the next one does its work."""
        while True:
            try:
                await self.sweep()
            except Exception:
                log.exception("a sweep failed; the next is in %s s", SWEEP_INTERVAL_S)
            await asyncio.sleep(SWEEP_INTERVAL_S)

    async def sweep(self) -> None:
        """End what has run out, forget what is history, and remove every blob that is marked; at first also orphans."""
        self._note_set_clock()
        now = self._clock.now()
        await self._uploads.expire(now)
        await self._files.forget_expired(now)
        await self._uploads.forget_ended(now - HISTORY_S)
        await self._webhooks.forget_ended(now - HISTORY_S)
        await self._remove_blobs()
        if self._orphans is not None:
            await self._orphans.remove()
            self._orphans = None

    def _note_set_clock(self) -> None:
        shift_s = self._clock.wall() - self._clock.now()
        if abs(shift_s - self._shift_s) > SHIFT_S_MAX:
            self._shift_s = shift_s
            log.warning(
                "the machine's clock is %+d s from the time since the start; stamps and deadlines go by the latter, "
                "and by the machine's clock again after a restart",
                shift_s,
            )

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
