"""What the coordinator and a worker say to each other. Every message is a plain value, so any executor can carry it."""

from __future__ import annotations

import msgspec

from pronghorn.domain.model import BlobRef, Closing, Endpoint, Parts, Replica, Shard, ShardKey, ShardResult, Tally
from pronghorn.limits import MIB


class Configure(msgspec.Struct, tag=True, frozen=True):
    """The first message: where a worker finds files and keeps segments, and its bounds."""

    blobs_dir: str
    segments_dir: str
    answer_bytes_max: int
    line_timeout_s: float
    refused_pause_s: float
    model_grace_s: float
    prompt_order: bool


class UseReplicas(msgspec.Struct, tag=True, frozen=True):
    """The engine replicas that lines may go to from now on."""

    replicas: list[Replica]


class Assign(msgspec.Struct, tag=True, frozen=True):
    """Run a shard of the file made of `blobs`. With `closing` set its lines are recorded as not run.

    `originals` are the parts of those shards, by position, that are done and hold originals of the shard's copies.
    """

    shard: Shard
    blobs: list[BlobRef]
    endpoint: Endpoint
    model: str
    closing: Closing | None = None
    originals: dict[int, Parts] = {}


class Close(msgspec.Struct, tag=True, frozen=True):
    """Send no further line of a batch: what is in flight finishes, the rest is recorded as not run."""

    batch_id: str
    closing: Closing


class LeaveRoom(msgspec.Struct, tag=True, frozen=True):
    """Leave room for so many live requests at each replica, by name, until the next such order."""

    live: dict[str, int]


class Stop(msgspec.Struct, tag=True, frozen=True):
    """Send nothing more, record what is in flight for up to `drain_s` seconds, and end."""

    drain_s: float


class Ready(msgspec.Struct, tag=True, frozen=True):
    """The worker takes shards from now on."""


class Sent(msgspec.Struct, tag=True, frozen=True):
    """No line of the shard is left that was never sent, or none can be read: there is room for another shard."""

    key: ShardKey
    epoch: int


class ShardProgress(msgspec.Struct, frozen=True):
    """Durable outcomes of a shard so far."""

    key: ShardKey
    epoch: int
    tally: Tally


class Paused(msgspec.Struct, frozen=True):
    """A replica, by name, that gets no lines for now, or none that name `model`, and why."""

    replica: str
    model: str | None
    reason: str


class Moved(msgspec.Struct, tag=True, frozen=True):
    """What moved since the last report, what is paused, and which replicas put lines off with their last answers."""

    shards: list[ShardProgress]
    paused: list[Paused]
    putting_off: list[Paused] = []

    def after(self, earlier: Moved) -> Moved:
        """Return one report that says what both say."""
        shards = {(shard.key, shard.epoch): shard for shard in (*earlier.shards, *self.shards)}
        return Moved(list(shards.values()), self.paused, self.putting_off)


class Done(msgspec.Struct, tag=True, frozen=True):
    """Every line of the shard has its outcome, and the parts are stored."""

    key: ShardKey
    epoch: int
    result: ShardResult


class Aside(msgspec.Struct, tag=True, frozen=True):
    """Every line of the shard has its durable outcome but copies of lines of other shards; the worker has dropped it.

    It can be finished once the shards at the `missing` positions are done.
    """

    key: ShardKey
    epoch: int
    missing: list[int]


class Broken(msgspec.Struct, tag=True, frozen=True):
    """The shard cannot go on in this worker: its input is gone or the disk refuses; the worker has dropped it."""

    key: ShardKey
    epoch: int
    reason: str


Order = Configure | UseReplicas | Assign | Close | LeaveRoom | Stop
Report = Ready | Sent | Moved | Done | Aside | Broken

# A shard's assignment names every blob of its input file; a file of a million parts still fits.
FRAME_BYTES_MAX = 128 * MIB
