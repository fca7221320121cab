"""Makes outcomes durable, many at a time, and finishes the shards that have them all.

What answers of one turn of the event loop have recorded is handed to the operating system in the next, before more is
sent: a kill between the two wastes no call. Groups of that are synced together. A shard whose every line is recorded is
sorted back into input order; one whose copies lack an original is put aside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from pronghorn.domain.model import ShardKey
from pronghorn.errors import StorageError, is_full, is_out_of_files
from pronghorn.limits import MIB
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.room import Room
from pronghorn.storage.segments import Outcome, SegmentWriter
from pronghorn.worker import copies, results
from pronghorn.worker.protocol import Aside, Broken, Done, Report, ShardProgress
from pronghorn.worker.shard_run import ShardRun

# Outcomes that wait for the disk: past this no further line is sent until it has caught up.
UNDURABLE_BYTES_MAX = 32 * MIB
# Outcomes of a shard that is not complete wait for the disk together until there are so many, or for the next report of
# progress, which is what shows that they are durable: every sync costs the disk a turn and the event loop two.
SYNC_BYTES = 4 * MIB

DISK_FULL = "the disk is full: outcomes wait in memory until there is room"


class Recorder:
    """Records outcomes of `runs`, and takes those that end out of them.

    `report_progress` tells how far shards are before one leaves; `caught_up` is called when more may be sent. `full` is
    why there is no room for outcomes, if so.
    """

    def __init__(
        self,
        runs: dict[ShardKey, ShardRun],
        blobs: Blobs,
        room: Room,
        report: Callable[[Report], None],
        report_progress: Callable[[], None],
        caught_up: Callable[[], None],
    ) -> None:
        self.full: str | None = None
        self._runs = runs
        self._blobs = blobs
        self._room = room
        self._report = report
        self._report_progress = report_progress
        self._caught_up = caught_up
        self._dirty = asyncio.Event()
        self._committing = asyncio.Lock()
        self._undurable_bytes = 0
        self._writing = False

    @property
    def behind(self) -> bool:
        """Tell whether nothing more is to be sent until what there is has been written."""
        return self._writing or self.full is not None or self._undurable_bytes > UNDURABLE_BYTES_MAX

    def record(self, run: ShardRun, outcome: Outcome) -> None:
        """Append a line's one outcome."""
        run.record(outcome)
        self._undurable_bytes += len(outcome.result)
        if not self._writing:
            self._writing = True
            asyncio.get_running_loop().call_soon(self._write_and_go_on)

    def wake(self) -> None:
        """Commit soon, whether or not there is much to be synced."""
        self._dirty.set()

    def look_at_room(self) -> None:
        self.full = self._room.shortage()

    def progress(self) -> list[ShardProgress]:
        """Return how far the shards are that have moved since this was asked last."""
        moved = [run for run in self._runs.values() if run.moved]
        for run in moved:
            run.moved = False
        return [ShardProgress(run.key, run.shard.epoch, run.durable) for run in moved]

    def drop(self, run: ShardRun, reason: str) -> None:
        """Let go of a shard that this attempt cannot finish."""
        if self._runs.pop(run.key, None) is not None and run.segment is not None:
            run.segment.close()
        self._report(Broken(run.key, run.shard.epoch, reason))

    async def run(self) -> None:
        """Commit when there is something to, until cancelled; raises OSError when the disk can no longer be trusted."""
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            await self.commit()

    async def commit(self) -> None:
        """Wait for the disk once for all that is written, then finish the shards that have ended.

        What finds no room stays in memory, and nothing more is sent until there is some.
        """
        async with self._committing:
            self._write()
            self._dirty.clear()
            if self.full is None:
                self._undurable_bytes = 0
            groups = [(run, run.segment, run.counter.tally(), run.over) for run in self._runs.values()]
            for run, segment, tally, over in groups:
                if (
                    self._runs.get(run.key) is not run
                    or segment is None
                    or not segment.all_written
                    or (tally == run.durable and not over)
                ):
                    continue
                try:
                    await asyncio.to_thread(segment.sync)
                    run.durable, run.moved = tally, True
                    if over:
                        await self._finish(run, segment)
                except StorageError as error:
                    self.drop(run, str(error))
                except OSError as error:
                    if is_out_of_files(error):
                        self.drop(run, f"its parts cannot be stored now: {error.strerror}")
                    elif is_full(error):
                        self.full = DISK_FULL
                    else:
                        raise
        self._caught_up()

    def _write_and_go_on(self) -> None:
        self._write()
        self._caught_up()

    def _write(self) -> None:
        """Hand what was recorded in this turn of the loop to the operating system: it survives our death now."""
        self._writing = False
        for run in self._runs.values():
            if run.segment is not None:
                try:
                    run.segment.write()
                except OSError:
                    self.full = DISK_FULL
        if self._undurable_bytes > SYNC_BYTES or any(run.over for run in self._runs.values()):
            self._dirty.set()

    async def _finish(self, run: ShardRun, segment: SegmentWriter) -> None:
        if run.broken is not None:
            self._report_progress()
            self.drop(run, run.broken)
            return
        if run.copies:
            await self._fill_in(run, segment)
            return
        result = await results.write_parts(run.shard, run.places, self._blobs)
        segment.close()
        del self._runs[run.key]
        self._report(Done(run.key, run.shard.epoch, result))

    async def _fill_in(self, run: ShardRun, segment: SegmentWriter) -> None:
        """Record the copies, to be synced and finished next; a shard whose originals are not all there is put aside."""
        if missing := copies.missing(run):
            self._report_progress()
            segment.close()
            del self._runs[run.key]
            self._report(Aside(run.key, run.shard.epoch, missing))
            return
        found = copies.outcomes(run, self._blobs)
        while some := await asyncio.to_thread(copies.piece, found):
            for outcome in some:
                run.record_copy(outcome)
            segment.write()
        self._dirty.set()
