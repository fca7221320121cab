"""A planned batch that has not ended, as the coordinator holds it in memory: what is done, what is under way."""

from __future__ import annotations

from dataclasses import dataclass, field

from pronghorn.domain.model import Batch, BlobRef, Job, Progress, ShardKey, Tally
from pronghorn.domain.progress import Pace

# How often a batch's counts are written while it runs.
SHOW_INTERVAL_S = 0.5


@dataclass(slots=True)
class PutAside:
    """A shard that lacks nothing but copies of lines in shards that are not done: it belongs to no worker meanwhile."""

    epoch: int
    missing: set[int]


@dataclass(slots=True)
class HeldBack:
    """A shard that could not be read, until when no worker gets it again."""

    epoch: int
    until: float


@dataclass(slots=True)
class OpenBatch:
    """A batch, its job and its input, what its done shards hold in `done`, and in `live` what others have so far.

    `waiting` tells whether it may have a shard to be claimed, `broken` why a shard of it could not be read last.
    """

    batch: Batch
    job: Job
    blobs: list[BlobRef]
    done: Tally
    unfinished: int
    pace: Pace
    live: dict[ShardKey, Tally] = field(default_factory=dict)
    waiting: bool = True
    aside: dict[ShardKey, PutAside] = field(default_factory=dict)
    held_back: dict[ShardKey, HeldBack] = field(default_factory=dict)
    broken: str | None = None
    shown: tuple[Tally, Progress | None] = (Tally(), None)
    shown_at: float = float("-inf")

    @property
    def tally(self) -> Tally:
        """What is done so far, and never less than what has been shown."""
        return sum(self.live.values(), self.done).at_least(self.batch.tally)

    def note_pace(self, now: float) -> bool:
        """Measure how fast the batch moves; return whether what people see may be brought up to date again."""
        if now - self.shown_at < SHOW_INTERVAL_S:
            return False
        tally = self.tally
        self.pace.note(now, tally.lines, tally.tokens)
        return True

    def news(self, now: float, stamp: int, reason: str | None) -> tuple[str, Tally, Progress] | None:
        """Return what people do not see yet, if anything; `reason` is why the batch does not move, if it does not.

        `now` is monotonic, `stamp` the same moment in Unix seconds.
        """
        tally = self.tally
        progress = self._progress(now, stamp, tally, reason)
        if (tally, progress) == self.shown:
            return None
        self.shown, self.shown_at = (tally, progress), now
        return self.batch.id, tally, progress

    def _progress(self, now: float, stamp: int, tally: Tally, reason: str | None) -> Progress:
        speed = self.pace.speed(self.batch.total - tally.lines)
        since = int(stamp - (now - self.pace.moved_at)) if reason else None
        if speed is None:
            return Progress(reason=reason, stalled_since=since)
        return Progress(
            lines_per_second=round(speed.lines_per_s, 2),
            tokens_per_second=round(speed.tokens_per_s, 1),
            eta_seconds_min=None if speed.eta_s_min is None else round(speed.eta_s_min),
            eta_seconds_max=None if speed.eta_s_max is None else round(speed.eta_s_max),
            reason=reason,
            stalled_since=since,
        )
