"""Whether there is room on the disk, with a reserve for what must still be written when there is none."""

from __future__ import annotations

import os
from pathlib import Path

from pronghorn.errors import StorageFull
from pronghorn.limits import MIB

# Enough for the outcomes of all lines in flight and for the database to say why it waits; and on a small disk, a part
# of it that nobody misses.
RESERVE_BYTES_MAX = 64 * MIB
RESERVE_SHARE = 0.05


class Room:
    """The room on the disk that holds a directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def shortage(self) -> str | None:
        """Say what is short when no more than the reserve is free, or return None."""
        disk = os.statvfs(self._directory)
        reserve = int(min(RESERVE_BYTES_MAX, RESERVE_SHARE * disk.f_blocks * disk.f_frsize))
        free = disk.f_bavail * disk.f_frsize
        if free >= reserve:
            return None
        return (
            f"the disk is full: {free // MIB} MiB are free, and the last {-(-reserve // MIB)} MiB are kept in reserve"
        )

    def require(self) -> None:
        """Raise StorageFull unless there is room."""
        if shortage := self.shortage():
            raise StorageFull(shortage)
