"""The life of files, uploads, batches and shards as a state machine, against the real database and real blobs.

Hypothesis draws the steps, late and stale ones among them: whoever acts may hold what was true long ago.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import tempfile
from collections import Counter
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hypothesis
import msgspec
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from tests.beds import Bed, Scale
from tests.storing import SetClock, new_batch, sqlite_at

from pronghorn.checking import InputChecker
from pronghorn.control.coordinator import Coordinator
from pronghorn.control.finalizer import Finalizer
from pronghorn.control.maintenance import Maintenance
from pronghorn.control.orphans import Orphans
from pronghorn.control.planner import Planner
from pronghorn.domain.lifecycle import TERMINAL, final_status, may_follow
from pronghorn.domain.model import (
    DEFAULT_ACCOUNT,
    Batch,
    BatchStatus,
    BlobRef,
    Closing,
    File,
    Job,
    ShardKey,
    ShardResult,
    Tally,
)
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.domain.uploads import Upload, UploadPart, UploadStatus
from pronghorn.domain.webhooks import EventType, WebhookEndpoint
from pronghorn.engines.base import EnginePool
from pronghorn.errors import Fenced, KeyReused
from pronghorn.executors.local import LocalExecutor
from pronghorn.ids import RandomIds
from pronghorn.storage.blobs import Blobs
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Idempotency, Metadata
from pronghorn.storage.segments import Segments
from pronghorn.storage.uploads import Uploads
from pronghorn.storage.webhooks import Webhooks
from pronghorn.worker.protocol import Configure

START = 1_000_000
STEPS = 50
S = BatchStatus
Value = TypeVar("Value")


@dataclass
class ShardModel:
    lines: int
    state: str = "pending"
    epoch: int = 0
    tally: Tally = field(default_factory=Tally)
    parts: dict[str, str | None] = field(default_factory=dict)


@dataclass
class BatchModel:
    """What a batch must be; `seen` is each state that anybody may still hold in memory."""

    input_file_id: str
    status: BatchStatus
    expires_at: int | None
    seen: list[Batch]
    closing: Closing | None = None
    shards: list[ShardModel] = field(default_factory=list)
    ended: tuple[Any, ...] | None = None

    @property
    def over(self) -> bool:
        return self.status in TERMINAL


@dataclass
class UploadModel:
    upload: Upload
    status: UploadStatus = UploadStatus.PENDING
    whole: dict[str, UploadPart] = field(default_factory=dict)
    arriving: dict[str, UploadPart] = field(default_factory=dict)


class Lifecycle(RuleBasedStateMachine):
    """Every step that the API, the coordinator, workers and housekeeping take, in any order and at any time."""

    template: ClassVar[Path]
    directory: ClassVar[Path]
    reached: ClassVar[Counter[BatchStatus]]

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(dir=self.directory))
        shutil.copy(self.template, self.home / "pronghorn.db")
        self.runner = asyncio.Runner()
        self.clock = SetClock(START)
        self.batches: dict[str, BatchModel] = {}
        self.files: dict[str, list[str]] = {}
        self.expiries: dict[str, int] = {}
        self.keys: dict[str, tuple[bytes, str]] = {}
        self.uploads: dict[str, UploadModel] = {}
        self.claims: list[tuple[ShardKey, int]] = []
        self.names = 0
        self._open()
        self.reader = sqlite3.connect(self.home / "pronghorn.db", isolation_level=None)
        # What may lie on disk although nothing names it, until the next start.
        self.strays: set[str] = set()

    def teardown(self) -> None:
        self.reached.update(model.status for model in self.batches.values())
        self.reader.close()
        self.run(self.database.close())
        self.runner.close()
        shutil.rmtree(self.home)

    def run(self, work: Coroutine[Any, Any, Value]) -> Value:
        return self.runner.run(work)

    @initialize(data=st.data(), lines=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def begin_with_a_batch(self, data: st.DataObject, lines: list[int]) -> None:
        self.upload_file(2, None)
        self.create_batch(data, None, None)
        self.plan_batch(data, lines)

    # Files

    @rule(blobs=st.integers(1, 2), life_s=st.sampled_from([None, 5, 50]))
    def upload_file(self, blobs: int, life_s: int | None) -> None:
        file_id = self.new("file-")
        refs = [self.store(f"files/{file_id}-{n}") for n in range(blobs)]
        expires_at = None if life_s is None else self.clock.time + life_s
        self.run(self.stored.add(self.file(file_id, expires_at), refs))
        self.files[file_id] = [ref.key for ref in refs]
        if expires_at is not None:
            self.expiries[file_id] = expires_at

    @precondition(lambda self: self.files)
    @rule(data=st.data())
    def delete_file(self, data: st.DataObject) -> None:
        file_id = data.draw(st.sampled_from(sorted(self.files)))
        deleted = self.run(self.stored.delete(file_id, DEFAULT_ACCOUNT))
        assert deleted is not self.being_read(file_id)
        if deleted:
            del self.files[file_id]
            self.expiries.pop(file_id, None)

    @rule(seconds=st.integers(0, 30))
    def time_passes(self, seconds: int) -> None:
        self.clock.time += seconds
        self.run(self.maintenance().sweep())
        self.note_ends()

    # Batches

    @precondition(lambda self: self.files)
    @rule(data=st.data(), key=st.sampled_from([None, None, "one", "two"]), window_s=st.sampled_from([None, 20]))
    def create_batch(self, data: st.DataObject, key: str | None, window_s: int | None) -> None:
        file_id = data.draw(st.sampled_from(sorted(self.files)))
        expires_at = None if window_s is None else self.clock.time + window_s
        batch = new_batch(
            self.new("batch_"),
            self.clock.time,
            input_file_id=file_id,
            expires_at=expires_at,
            output_expires_after_s=data.draw(st.sampled_from([None, 10])),
        )
        digest = file_id.encode()
        known = self.keys.get(key) if key else None
        try:
            created = self.run(self.metadata.add_batch(batch, Idempotency(key, digest) if key else None))
        except KeyReused:
            assert known is not None
            assert known[0] != digest
            return
        assert known is None or known == (digest, created.id), "a key starts one batch"
        if known is None:
            self.batches[created.id] = BatchModel(file_id, S.VALIDATING, expires_at, [created])
        if key:
            self.keys[key] = digest, created.id

    @precondition(lambda self: self.seen(S.VALIDATING))
    @rule(data=st.data(), lines=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def plan_batch(self, data: st.DataObject, lines: list[int]) -> None:
        model, batch = self.draw_seen(data, S.VALIDATING)
        shards = [PlannedShard(1 + 3 * n, count, 100 * n, 100) for n, count in enumerate(lines)]
        if self.moves(model, batch, self.metadata.start_batch(batch, Plan(shards, sum(lines), "m"), self.clock.time)):
            model.status = S.IN_PROGRESS
            model.shards = [ShardModel(count) for count in lines]
            self.see(batch.id)

    @precondition(lambda self: self.seen(S.VALIDATING))
    @rule(data=st.data())
    def reject_batch(self, data: st.DataObject) -> None:
        model, batch = self.draw_seen(data, S.VALIDATING)
        self.advance(model, batch, S.FAILED)

    @precondition(lambda self: self.seen(S.VALIDATING, S.IN_PROGRESS))
    @rule(data=st.data())
    def cancel_batch(self, data: st.DataObject) -> None:
        model, batch = self.draw_seen(data, S.VALIDATING, S.IN_PROGRESS)
        self.advance(model, batch, S.CANCELLING, Closing.CANCELLED)

    @precondition(lambda self: self.batches)
    @rule(data=st.data(), wait_s=st.integers(0, 25))
    def expire_batch(self, data: st.DataObject, wait_s: int) -> None:
        self.clock.time += wait_s
        model, batch = self.draw_seen(data, *S)
        due = model.expires_at is not None and self.clock.time >= model.expires_at
        moves = due and batch.closing is None and batch.status in (S.VALIDATING, S.IN_PROGRESS)
        if batch.status in TERMINAL:
            return  # the coordinator does not look at those
        if not moves:
            assert self.run(self.coordinator._expire_if_due(batch)) is batch
        elif self.moves(model, batch, self.coordinator._expire_if_due(batch)):
            model.closing = Closing.EXPIRED
            model.status = S.EXPIRED if batch.status is S.VALIDATING else S.FINALIZING
            self.see(batch.id)

    @precondition(lambda self: any(self.finishable(model) for model in self.batches.values()))
    @rule(data=st.data(), half=st.booleans())
    def finish_batch(self, data: st.DataObject, half: bool) -> None:
        done = [batch_id for batch_id, model in self.batches.items() if self.finishable(model)]
        batch_id = data.draw(st.sampled_from(done))
        model = self.batches[batch_id]
        late = not data.draw(st.integers(0, 3))
        batch = data.draw(st.sampled_from(model.seen)) if late else model.seen[-1]
        if batch.status not in (S.IN_PROGRESS, S.FINALIZING, S.CANCELLING):
            return
        if half and batch.status is S.IN_PROGRESS:
            self.advance(model, batch, S.FINALIZING)
            return
        self.run(self.finalizer.finish(batch))
        if batch.status is model.status:
            model.status = final_status(batch.closing)
            self.see(batch_id)
            self.note_files(model, batch)
            self.strays -= {key for key in self.strays if key.startswith(f"batches/{batch_id}/")}

    # Shards

    @precondition(lambda self: self.batches)
    @rule(data=st.data())
    def claim_shard(self, data: st.DataObject) -> None:
        batch_id = data.draw(st.sampled_from(sorted(self.batches)))
        shards = self.batches[batch_id].shards
        waiting = next((n for n, shard in enumerate(shards) if shard.state == "pending"), None)
        claimed = self.run(self.metadata.claim_shard(batch_id))
        if waiting is None:
            assert claimed is None
            return
        assert claimed is not None
        shards[waiting].state, shards[waiting].epoch = "running", shards[waiting].epoch + 1
        assert (claimed.key.position, claimed.epoch) == (waiting, shards[waiting].epoch)
        self.claims.append((claimed.key, claimed.epoch))

    @precondition(lambda self: self.seen(S.IN_PROGRESS))
    @rule(data=st.data(), shards=st.integers(1, 3))
    def run_shards(self, data: st.DataObject, shards: int) -> None:
        """Do what a worker does on a good day."""
        for _ in range(shards):
            before = len(self.claims)
            self.claim_shard(data)
            if len(self.claims) > before:
                self.commit(data, *self.claims[-1])

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def release_shard(self, data: st.DataObject) -> None:
        key, epoch = data.draw(st.sampled_from(self.claims))
        self.run(self.metadata.release_shard(key, epoch))
        if (shard := self.shard(key)) and (shard.state, shard.epoch) == ("running", epoch):
            shard.state = "pending"

    @precondition(lambda self: self.claims)
    @rule(data=st.data())
    def commit_shard(self, data: st.DataObject) -> None:
        self.commit(data, *data.draw(st.sampled_from(self.claims)))

    def commit(self, data: st.DataObject, key: ShardKey, epoch: int) -> None:
        shard = self.shard(key)
        completed = data.draw(st.integers(0, shard.lines))
        failed = data.draw(st.integers(0, shard.lines - completed))
        tally = Tally(completed, failed, shard.lines - completed - failed)
        stem = f"batches/{key.batch_id}/{key.position}-{epoch}"
        held = (shard.state, shard.epoch) == ("running", epoch)
        if not held and f"{stem}.output" in shard.parts.values():
            return  # it is one worker's, and it has been accepted from it
        output = self.store(f"{stem}.output") if completed else None
        errors = self.store(f"{stem}.errors") if completed < shard.lines else None
        parts = {ref.key for ref in (output, errors) if ref}
        try:
            self.run(self.metadata.commit_shard(key, epoch, ShardResult(output, errors, tally, [])))
        except Fenced:
            assert not held
            self.strays |= parts - self.named()
            return
        assert held, "an older epoch, or a second commit, is refused"
        shard.state, shard.tally = "done", tally
        shard.parts = {"output": output and output.key, "errors": errors and errors.key}
        self.strays -= parts

    # Uploads

    @rule(data=st.data(), more=st.integers(1, 6))
    def use_uploads(self, data: st.DataObject, more: int) -> None:
        steps = [self.begin_upload, *[self.begin_part] * 2, *[self.store_part] * 2, self.complete_upload]
        for _ in range(more):
            step = data.draw(st.sampled_from([*steps, self.cancel_upload])) if self.uploads else self.begin_upload
            step(data)

    def begin_upload(self, _: st.DataObject) -> None:
        upload = Upload(
            self.new("upload_"),
            DEFAULT_ACCOUNT,
            "f",
            "batch",
            "m",
            1,
            UploadStatus.PENDING,
            START,
            self.clock.time + 40,
        )
        self.run(self.parts.add(upload))
        self.uploads[upload.id] = UploadModel(upload)

    def begin_part(self, data: st.DataObject) -> None:
        model = self.uploads[data.draw(st.sampled_from(sorted(self.uploads)))]
        part_id = self.new("part_")
        part = UploadPart(part_id, model.upload.id, DEFAULT_ACCOUNT, f"parts/{part_id}", self.clock.time)
        try:
            self.run(self.parts.begin_part(part, self.clock.time))
        except Fenced:
            assert not self.pending(model)
            return
        assert self.pending(model)
        self.store(part.key)
        model.arriving[part.id] = part

    def store_part(self, data: st.DataObject) -> None:
        arriving = [(model, part) for model in self.uploads.values() for part in model.arriving.values()]
        if not arriving:
            return
        model, part = data.draw(st.sampled_from(arriving))
        del model.arriving[part.id]
        try:
            self.run(self.parts.store_part(part, 1, self.clock.time))
        except Fenced:
            assert not self.pending(model)
            self.run(self.parts.drop_part(part))
            return
        assert self.pending(model)
        model.whole[part.id] = part

    def complete_upload(self, data: st.DataObject) -> None:
        model = self.uploads[data.draw(st.sampled_from(sorted(self.uploads)))]
        if not model.whole:
            return
        chosen = data.draw(st.lists(st.sampled_from(sorted(model.whole)), min_size=1, unique=True))
        refs = [BlobRef(model.whole[part_id].key, 1) for part_id in chosen]
        file_id = self.new("file-")
        try:
            self.run(self.parts.complete(model.upload, chosen, self.file(file_id, None), refs))
        except Fenced:
            assert model.status is not UploadStatus.PENDING
            return
        assert model.status is UploadStatus.PENDING
        model.status, model.whole = UploadStatus.COMPLETED, {}
        self.files[file_id] = [ref.key for ref in refs]

    def cancel_upload(self, data: st.DataObject) -> None:
        model = self.uploads[data.draw(st.sampled_from(sorted(self.uploads)))]
        try:
            self.run(self.parts.cancel(model.upload))
        except Fenced:
            assert model.status is not UploadStatus.PENDING
            return
        assert model.status is UploadStatus.PENDING
        model.status, model.whole = UploadStatus.CANCELLED, {}

    # Crashes

    @rule(after_storing=st.booleans())
    def crash_and_start_again(self, after_storing: bool) -> None:
        if after_storing:  # and before naming it
            self.strays.add(self.store(f"files/{self.new('file-')}").key)
        self.run(self.database.close())
        self._open()
        self.run(self.metadata.release_shards())
        self.run(self.parts.drop_interrupted())
        self.run(self.maintenance(Orphans(self.metadata, self.stored, self.blobs, self.segments)).sweep())
        self.note_ends()
        for model in self.uploads.values():
            model.arriving.clear()
        for model in self.batches.values():
            for shard in model.shards:
                if shard.state == "running":
                    shard.state = "pending"
        # An open batch's refused parts stay until its end.
        over = {batch_id for batch_id, model in self.batches.items() if model.over}
        self.strays = {key for key in self.strays if key.startswith("batches/") and key.split("/")[1] not in over}

    # What must hold after every step

    @invariant()
    def batches_are_as_they_must_be(self) -> None:
        rows = {row[0]: row for row in self.rows("SELECT id, status, closing, * FROM batches")}
        assert rows.keys() == self.batches.keys()
        for batch_id, model in self.batches.items():
            _, status, closing, *_ = rows[batch_id]
            assert (status, closing) == (model.status, model.closing)
            if model.over:
                model.ended = model.ended or rows[batch_id]
                assert rows[batch_id] == model.ended, "terminal states never move"

    @invariant()
    def shards_are_as_they_must_be(self) -> None:
        rows = self.rows("SELECT batch_id, position, state, epoch, lines, completed, failed, unrun FROM shards")
        wanted = [
            (batch_id, n, shard.state, shard.epoch, shard.lines, *msgspec.structs.astuple(shard.tally)[:3])
            for batch_id, model in self.batches.items()
            for n, shard in enumerate(model.shards)
        ]
        assert sorted(rows) == sorted(wanted)

    @invariant()
    def counts_add_up(self) -> None:
        query = "SELECT id, total, completed, failed, unrun FROM batches WHERE status IN ('completed', 'cancelled')"
        for batch_id, total, *counts in self.rows(query):
            shards = self.batches[batch_id].shards
            assert total == sum(counts) == sum(shard.lines for shard in shards), "every line in one commit"
            assert all(shard.state == "done" for shard in shards)

    @invariant()
    def files_are_as_they_must_be(self) -> None:
        rows = self.rows("SELECT file_id, key FROM file_blobs ORDER BY file_id, position")
        found: dict[str, list[str]] = {}
        for file_id, key in rows:
            found.setdefault(file_id, []).append(key)
        assert found == self.files

    @invariant()
    def blobs_are_named_or_marked(self) -> None:
        base = self.home / "blobs"
        on_disk = {str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()}
        marked = {key for (key,) in self.rows("SELECT key FROM blob_removals")}
        named = self.named()
        assert named <= on_disk, "what is named is there"
        assert not named & marked
        assert on_disk - named - marked <= self.strays

    @invariant()
    def every_end_is_told_once(self) -> None:
        told = self.rows("SELECT batch_id, event_type FROM webhook_deliveries")
        ended = [(batch_id, f"batch.{model.status}") for batch_id, model in self.batches.items() if model.over]
        assert sorted(told) == sorted(ended)

    # What the steps share

    def _open(self) -> None:
        database = self.database = Database(sqlite_at(self.home / "pronghorn.db"))
        self.blobs, self.segments = Blobs(self.home / "blobs"), Segments(self.home / "segments")
        self.metadata, self.stored, self.parts = Metadata(database), Files(database), Uploads(database)
        self.webhooks = Webhooks(database)
        ids, engines = RandomIds(), EnginePool([])
        self.finalizer = Finalizer(self.metadata, self.stored, self.blobs, self.segments, self.clock, ids)
        checker = InputChecker(self.stored, self.blobs, engines, line_bytes_max=1024)
        self.coordinator = Coordinator(
            metadata=self.metadata,
            files=self.stored,
            segments=self.segments,
            engines=engines,
            executor=LocalExecutor(),
            planner=Planner(self.metadata, checker, self.clock),
            finalizer=self.finalizer,
            clock=self.clock,
            configure=Configure("", "", 1024, 1.0, 1.0, 1.0, prompt_order=False),
            workers=0,
        )

    def maintenance(self, orphans: Orphans | None = None) -> Maintenance:
        return Maintenance(self.stored, self.parts, self.webhooks, self.blobs, orphans, self.clock)

    def new(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names:04}"

    def file(self, file_id: str, expires_at: int | None) -> File:
        return File(file_id, DEFAULT_ACCOUNT, "batch", "f.jsonl", 1, self.clock.time, expires_at)

    def store(self, key: str) -> BlobRef:
        with self.blobs.writer(key) as writer:
            writer.write(b"x")
            writer.commit()
        return BlobRef(key, 1)

    def shard(self, key: ShardKey) -> ShardModel:
        return self.batches[key.batch_id].shards[key.position]

    def being_read(self, file_id: str) -> bool:
        return any(model.input_file_id == file_id and not model.over for model in self.batches.values())

    def pending(self, model: UploadModel) -> bool:
        return model.status is UploadStatus.PENDING and model.upload.expires_at > self.clock.time

    @staticmethod
    def finishable(model: BatchModel) -> bool:
        running = model.status in (S.IN_PROGRESS, S.FINALIZING, S.CANCELLING)
        return running and all(shard.state == "done" for shard in model.shards)

    def seen(self, *statuses: BatchStatus) -> list[tuple[BatchModel, Batch]]:
        """Return batches as somebody has seen them, however long ago, in one of these statuses."""
        return [(model, batch) for model in self.batches.values() for batch in model.seen if batch.status in statuses]

    def draw_seen(self, data: st.DataObject, *statuses: BatchStatus) -> tuple[BatchModel, Batch]:
        return data.draw(st.sampled_from(self.seen(*statuses)))

    def moves(self, model: BatchModel, batch: Batch, step: Coroutine[Any, Any, Any]) -> bool:
        """Take a step from `batch`; tell whether it was taken, which it must be if and only if that is the state."""
        try:
            self.run(step)
        except Fenced:
            assert model.status is not batch.status
            return False
        assert model.status is batch.status, "a step from a state that has passed is refused"
        return True

    def advance(self, model: BatchModel, batch: Batch, to: BatchStatus, closing: Closing | None = None) -> None:
        assert may_follow(batch.status, to)
        if self.moves(model, batch, self.metadata.advance(batch, to, self.clock.time, closing=closing)):
            model.status, model.closing = to, closing or model.closing
            self.see(batch.id)

    def see(self, batch_id: str) -> None:
        batch = self.run(self.metadata.batch(batch_id, DEFAULT_ACCOUNT))
        assert batch is not None
        self.batches[batch_id].seen.append(batch)

    def note_files(self, model: BatchModel, before: Batch) -> None:
        batch = model.seen[-1]
        for kind, file_id in (("output", batch.output_file_id), ("errors", batch.error_file_id)):
            keys = [key for shard in model.shards if (key := shard.parts.get(kind))]
            assert (file_id is not None) is bool(keys)
            if file_id is not None:
                self.files[file_id] = keys
                if before.output_expires_after_s is not None:
                    self.expiries[file_id] = self.clock.time + before.output_expires_after_s

    def note_ends(self) -> None:
        """Note what a sweep must have ended at this time."""
        for model in self.uploads.values():
            if model.status is UploadStatus.PENDING and model.upload.expires_at <= self.clock.time:
                model.status, model.whole = UploadStatus.EXPIRED, {}
        for file_id, expires_at in list(self.expiries.items()):
            if expires_at <= self.clock.time and not self.being_read(file_id):
                del self.files[file_id], self.expiries[file_id]

    def named(self) -> set[str]:
        """Return the keys that must be on disk."""
        files = {key for keys in self.files.values() for key in keys}
        parts = {p.key for model in self.uploads.values() for p in (*model.whole.values(), *model.arriving.values())}
        shards = {
            key
            for model in self.batches.values()
            for shard in model.shards
            for key in shard.parts.values()
            if key and not model.over
        }
        return files | parts | shards

    def rows(self, query: str) -> list[tuple[Any, ...]]:
        return self.reader.execute(query).fetchall()


async def _prepare(path: Path) -> None:
    database = await asyncio.to_thread(Database, sqlite_at(path))
    metadata = Metadata(database)
    await metadata.add_account(DEFAULT_ACCOUNT, "default", START)
    await metadata.add_job(Job("job-1", DEFAULT_ACCOUNT, "default", 1, START))
    endpoint = WebhookEndpoint(
        "we_1", DEFAULT_ACCOUNT, "n", "https://example.com", tuple(EventType), "whsec_x", START, START
    )
    await Webhooks(database).add_endpoint(endpoint)
    await database.close()


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Lifecycle]]:
    """The machine with a database to copy, and in memory where the system has such files: every step syncs."""
    Lifecycle.reached = Counter()
    Lifecycle.template = tmp_path / "template.db"
    asyncio.run(_prepare(Lifecycle.template))
    monkeypatch.setattr(Database, "_migrate", lambda _: None)  # the copies are up to date
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as directory:
        Lifecycle.directory = Path(directory)
        yield Lifecycle


def test_no_order_of_steps_breaks_what_must_hold(machine: type[Lifecycle], bed: Bed) -> None:
    phases = [hypothesis.Phase.generate]
    if bed.scale is not Scale.SMALL:  # shrinking takes minutes, which a small test has not
        phases.append(hypothesis.Phase.shrink)
    settings = hypothesis.settings(
        phases=phases,
        max_examples=bed.times(small=25, ci=500, long=20_000),
        stateful_step_count=STEPS,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(hypothesis.seed(bed.seed)(machine), settings=settings)
    print({status.value: machine.reached[status] for status in S})
    assert bed.scale is Scale.SMALL or all(machine.reached[status] for status in S)
