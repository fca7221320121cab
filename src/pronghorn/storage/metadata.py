"""What the system remembers of accounts, jobs, batches and shards; files have a module of their own.

A change of a batch's status and a shard's commit are compare-and-set: an UPDATE names the id and the state it expects
(and, for a shard, the epoch), its row count is checked, and one that finds no such row is refused with `Fenced`. To
release a shard that is no longer held changes nothing. A claim reads and writes in one transaction of the one writer.
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from pronghorn.domain.causes import Cause, merge
from pronghorn.domain.lifecycle import TERMINAL, may_follow, stamp_of
from pronghorn.domain.model import (
    Batch,
    BatchStamps,
    BatchStatus,
    BlobRef,
    Closing,
    Copy,
    Endpoint,
    File,
    Job,
    OnInvalid,
    Parts,
    Progress,
    Reject,
    Shard,
    ShardKey,
    ShardResult,
    ShardState,
    Tally,
    Usage,
)
from pronghorn.domain.planning import Plan
from pronghorn.errors import Fenced, KeyReused, invariant
from pronghorn.limits import KIB, PROBLEMS_OF_LISTED_BATCH_MAX
from pronghorn.storage.database import Database
from pronghorn.storage.tables import accounts, batches, file_blobs, files, jobs, shards
from pronghorn.storage.webhooks import enqueue_event

# Rows that are inserted at once; one of a shard whose every line is a copy has 64 KB.
INSERT_ROWS_MAX = 200
# So much of a batch's problems is read for a listing; that many have 15 KB unless a line names its model at length.
PROBLEMS_OF_LISTED_BATCH_BYTES_MAX = 64 * KIB
_JSON = json.JSONDecoder()


class Page(NamedTuple):
    """Rows of a listing, and whether more follow."""

    batches: list[Batch]
    has_more: bool


class OpenState(NamedTuple):
    """What decides whether a batch that has not ended needs a look."""

    id: str
    account_id: str
    status: BatchStatus
    closing: Closing | None
    expires_at: int | None


class Result(enum.StrEnum):
    """One of the two files that a batch leaves."""

    OUTPUT = "output"
    ERRORS = "error"


class Idempotency(NamedTuple):
    """A client's name for a request, and a digest of the request itself."""

    key: str
    digest: bytes


class Metadata:
    """The system's memory, over one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def close(self) -> None:
        await self._database.close()

    # Accounts and jobs

    async def add_account(self, account_id: str, name: str, now: int) -> None:
        """Create an account unless it is already there."""

        def write(connection: sa.Connection) -> None:
            if connection.scalar(sa.select(accounts.c.id).where(accounts.c.id == account_id)) is None:
                connection.execute(accounts.insert().values(id=account_id, name=name, created_at=now))

        await self._database.write(write)

    async def add_job(self, job: Job) -> None:
        await self._database.write(lambda c: c.execute(jobs.insert().values(**msgspec.structs.asdict(job))))

    async def job(self, job_id: str, account_id: str) -> Job | None:
        """Return a job of this account; another account's is as good as none."""
        query = jobs.select().where(jobs.c.id == job_id, jobs.c.account_id == account_id)
        row = await self._database.read(lambda c: c.execute(query).mappings().first())
        return _job(row) if row else None

    async def jobs(self, account_id: str | None = None) -> list[Job]:
        """Return jobs, oldest first."""
        query = jobs.select().order_by(jobs.c.order)
        if account_id is not None:
            query = query.where(jobs.c.account_id == account_id)
        rows = await self._database.read(lambda c: c.execute(query).mappings().all())
        return [_job(row) for row in rows]

    # Batches

    async def add_batch(self, batch: Batch, idempotency: Idempotency | None = None) -> Batch:
        """Remember a new batch; return it with its place in the order of creation.

        A key that has come before returns the batch made then, as it was at its creation. Raises KeyReused when it
        came with another request.
        """

        def write(connection: sa.Connection) -> Batch:
            if idempotency is not None and (known := _of_request(connection, batch.account_id, idempotency)):
                return known
            statement = batches.insert().values(**_new_batch(batch, idempotency)).returning(batches.c.order)
            return msgspec.structs.replace(batch, order=connection.execute(statement).scalar_one())

        return await self._database.write(write)

    async def batch_of_request(self, account_id: str, idempotency: Idempotency) -> Batch | None:
        """Return the batch that was made under a key, as it was at its creation, or None.

        Raises KeyReused when the key came with another request.
        """
        return await self._database.read(lambda c: _of_request(c, account_id, idempotency))

    async def batch(self, batch_id: str, account_id: str) -> Batch | None:
        """Return a batch of this account; another account's is as good as none."""
        return await self._one_batch(batches.c.id == batch_id, batches.c.account_id == account_id)

    async def list_batches(self, account_id: str, *, limit: int, after: str | None = None) -> Page | None:
        """Return up to `limit` batches, newest first, after the one with id `after`; None if that is unknown.

        Each has the first PROBLEMS_OF_LISTED_BATCH_MAX of its problems.
        """

        def read(connection: sa.Connection) -> Page | None:
            query = _LISTED.where(batches.c.account_id == account_id)
            if after is not None:
                cursor = sa.select(batches.c.order).where(batches.c.id == after, batches.c.account_id == account_id)
                order = connection.scalar(cursor)
                if order is None:
                    return None
                query = query.where(batches.c.order < order)
            rows = connection.execute(query.order_by(batches.c.order.desc()).limit(limit + 1)).mappings().all()
            return Page([_with_first_problems(_batch(row)) for row in rows[:limit]], len(rows) > limit)

        return await self._database.read(read)

    async def open_batches(self) -> list[Batch]:
        """Return every batch that has not ended, oldest first."""
        ended = [status.value for status in TERMINAL]
        query = batches.select().where(batches.c.status.not_in(ended)).order_by(batches.c.order)
        rows = await self._database.read(lambda c: c.execute(query).mappings().all())
        return [_batch(row) for row in rows]

    async def open_states(self) -> list[OpenState]:
        """Return where every batch that has not ended stands, oldest first; thousands are read in a moment."""
        ended = [status.value for status in TERMINAL]
        columns = (batches.c.id, batches.c.account_id, batches.c.status, batches.c.closing, batches.c.expires_at)
        query = sa.select(*columns).where(batches.c.status.not_in(ended)).order_by(batches.c.order)
        rows = await self._database.read(lambda c: c.execute(query).all())
        return [
            OpenState(key, account_id, BatchStatus(status), None if closing is None else Closing(closing), expires_at)
            for key, account_id, status, closing, expires_at in rows
        ]

    async def has_ended(self, batch_id: str) -> bool:
        """Tell whether a batch is over, or never was."""
        query = sa.select(batches.c.status).where(batches.c.id == batch_id)
        status = await self._database.read(lambda c: c.scalar(query))
        return status is None or BatchStatus(status) in TERMINAL

    async def advance(
        self,
        batch: Batch,
        status: BatchStatus,
        now: int,
        *,
        closing: Closing | None = None,
        problems: bytes | None = None,
    ) -> Batch:
        """Move a batch from the status it has in `batch` to `status`, and return it as it is then.

        Raises Fenced when it is no longer in that status.
        """
        values: dict[str, Any] = {}
        if closing is not None:
            values["closing"] = closing.value
        if problems is not None:
            values["problems"] = problems
        await self._database.write(lambda c: _advance(c, batch, status, now, **values))
        moved = await self._one_batch(batches.c.id == batch.id)
        invariant(moved is not None, "a batch that was just moved is there")
        return moved  # type: ignore[return-value]

    async def start_batch(self, batch: Batch, plan: Plan, now: int) -> None:
        """Store a validated batch's shards and move it to in_progress, in one transaction."""

        def write(connection: sa.Connection) -> None:
            known = {"total": plan.lines, "model": plan.model, "copies": plan.originals.copies}
            _advance(connection, batch, BatchStatus.IN_PROGRESS, now, **known)
            rows = (
                {
                    "batch_id": batch.id,
                    "position": position,
                    "state": ShardState.PENDING.value,
                    "rejects": msgspec.json.encode(rejects) if rejects else None,
                    "copies": msgspec.json.encode(copies) if copies else None,
                    **shard._asdict(),
                }
                for position, (shard, rejects, copies) in enumerate(plan.shards_with_unsent())
            )
            while some := list(itertools.islice(rows, INSERT_ROWS_MAX)):
                connection.execute(shards.insert(), some)

        await self._database.write(write)

    async def finish_batch(
        self, batch: Batch, status: BatchStatus, now: int, *, output: File | None, errors: File | None
    ) -> None:
        """End a batch whose every shard is done: its shards' parts become the output and error files.

        `bytes` of the given files is ignored: it is the sum of the parts. A file of no parts is not made.
        """

        def write(connection: sa.Connection) -> None:
            done = connection.execute(_shard_totals(batch.id)).mappings().one()
            invariant(done["unfinished"] == 0, f"every shard of {batch.id} is done before it ends")
            file_ids = {}
            if output is not None and done["output_bytes"]:
                _file_of_parts(connection, output, batch.id, shards.c.output_key, shards.c.output_bytes)
                file_ids["output_file_id"] = output.id
            if errors is not None and done["error_bytes"]:
                _file_of_parts(connection, errors, batch.id, shards.c.error_key, shards.c.error_bytes)
                file_ids["error_file_id"] = errors.id
            tally = {name: done[name] for name in _TALLY_COLUMNS}
            found = msgspec.json.encode(_causes(connection, batch.id))
            _advance(connection, batch, status, now, progress=None, causes=found, **file_ids, **tally)

        await self._database.write(write)

    async def record_progress(self, shown: Sequence[tuple[str, Tally, Progress]]) -> None:
        """Show how far open batches are, how fast they move, and why they do not if they do not."""
        ended = [status.value for status in TERMINAL]

        def write(connection: sa.Connection) -> None:
            for batch_id, tally, progress in shown:
                values = {**_tally_values(tally), "progress": msgspec.json.encode(progress)}
                here = batches.c.id == batch_id, batches.c.status.not_in(ended)
                connection.execute(batches.update().where(*here).values(**values))

        await self._database.write(write)

    # Shards

    async def release_shards(self) -> None:
        """Give back every shard that a worker of an earlier run held."""
        running = shards.c.state == ShardState.RUNNING.value
        statement = shards.update().where(running).values(state=ShardState.PENDING.value)
        await self._database.write(lambda c: c.execute(statement))

    async def release_shard(self, key: ShardKey, epoch: int) -> None:
        """Give back a shard whose worker is gone; the next claim carries a later epoch."""
        statement = shards.update().where(*_held(key, epoch)).values(state=ShardState.PENDING.value)
        await self._database.write(lambda c: c.execute(statement))

    async def claim_shard(self, batch_id: str) -> Shard | None:
        """Take the first waiting shard of a batch under a new epoch, or return None when none waits."""

        def write(connection: sa.Connection) -> Shard | None:
            waiting = shards.c.batch_id == batch_id, shards.c.state == ShardState.PENDING.value
            row = (
                connection.execute(shards.select().where(*waiting).order_by(shards.c.position).limit(1))
                .mappings()
                .first()
            )
            if row is None:
                return None
            shard = msgspec.structs.replace(_shard(row), state=ShardState.RUNNING, epoch=row["epoch"] + 1)
            here = shards.c.batch_id == batch_id, shards.c.position == shard.key.position
            values = {"state": shard.state.value, "epoch": shard.epoch}
            connection.execute(shards.update().where(*here).values(**values))
            return shard

        return await self._database.write(write)

    async def commit_shard(self, key: ShardKey, epoch: int, result: ShardResult) -> None:
        """Accept a finished shard's parts.

        Raises Fenced when the shard is held under another epoch or is already done.
        """
        values = {
            "state": ShardState.DONE.value,
            "output_key": result.output.key if result.output else None,
            "output_bytes": result.output.bytes if result.output else None,
            "error_key": result.errors.key if result.errors else None,
            "error_bytes": result.errors.bytes if result.errors else None,
            "causes": msgspec.json.encode(result.causes) if result.causes else None,
            **_tally_values(result.tally),
        }

        def write(connection: sa.Connection) -> None:
            done = connection.execute(shards.update().where(*_held(key, epoch)).values(**values))
            if done.rowcount != 1:
                raise Fenced(f"shard {key.position} of {key.batch_id} is no longer held under epoch {epoch}")

        await self._database.write(write)

    async def shard_progress(self, batch_id: str) -> tuple[Tally, int]:
        """Return what the batch's done shards hold, and how many shards are not done."""
        row = await self._database.read(lambda c: c.execute(_shard_totals(batch_id)).mappings().one())
        return _tally(row), row["unfinished"]

    async def finished_parts(self, batch_id: str, result: Result) -> list[BlobRef]:
        """Return the parts of one result file from the batch's first shard up to the first that is not done."""
        unfinished = sa.select(sa.func.min(shards.c.position)).where(
            shards.c.batch_id == batch_id, shards.c.state != ShardState.DONE.value
        )
        key, size = shards.c[f"{result}_key"], shards.c[f"{result}_bytes"]

        def read(connection: sa.Connection) -> list[BlobRef]:
            first = connection.scalar(unfinished)
            query = sa.select(key, size).where(shards.c.batch_id == batch_id, key.is_not(None))
            if first is not None:
                query = query.where(shards.c.position < first)
            return [BlobRef(*row) for row in connection.execute(query.order_by(shards.c.position))]

        return await self._database.read(read)

    async def parts_of(self, batch_id: str, positions: Iterable[int]) -> dict[int, Parts]:
        """Return the parts of those among the shards that are done."""
        wanted = sorted(positions)
        done = shards.c.batch_id == batch_id, shards.c.state == ShardState.DONE.value
        names = ("position", "output_key", "output_bytes", "error_key", "error_bytes")
        query = sa.select(*(shards.c[name] for name in names)).where(*done)

        def read(connection: sa.Connection) -> dict[int, Parts]:
            found = {}
            for start in range(0, len(wanted), INSERT_ROWS_MAX):
                some = query.where(shards.c.position.in_(wanted[start : start + INSERT_ROWS_MAX]))
                for position, output_key, output_bytes, error_key, error_bytes in connection.execute(some):
                    output = None if output_key is None else BlobRef(output_key, output_bytes)
                    errors = None if error_key is None else BlobRef(error_key, error_bytes)
                    found[position] = Parts(output, errors)
            return found

        return await self._database.read(read)

    async def _one_batch(self, *where: sa.ColumnElement[bool]) -> Batch | None:
        row = await self._database.read(lambda c: c.execute(batches.select().where(*where)).mappings().first())
        return _batch(row) if row else None


_SET_AT_CREATION = (
    "id",
    "order",
    "account_id",
    "job_id",
    "endpoint",
    "input_file_id",
    "completion_window",
    "expires_at",
    "metadata",
    "on_invalid",
    "retry_of",
    "output_expires_after_s",
    "deduplicate",
)
_TALLY_COLUMNS = (
    "completed",
    "failed",
    "unrun",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
)


_LISTED = sa.select(
    *(column for column in batches.c if column is not batches.c.problems),
    sa.func.substr(batches.c.problems, 1, PROBLEMS_OF_LISTED_BATCH_BYTES_MAX, type_=sa.LargeBinary).label("problems"),
)


def _new_batch(batch: Batch, idempotency: Idempotency | None) -> dict[str, Any]:
    return {
        "id": batch.id,
        "account_id": batch.account_id,
        "job_id": batch.job_id,
        "endpoint": batch.endpoint.value,
        "input_file_id": batch.input_file_id,
        "completion_window": batch.completion_window,
        "status": batch.status.value,
        "created_at": batch.stamps.created_at,
        "expires_at": batch.expires_at,
        "metadata": None if batch.metadata is None else msgspec.json.encode(batch.metadata).decode(),
        "on_invalid": batch.on_invalid.value,
        "retry_of": batch.retry_of,
        "output_expires_after_s": batch.output_expires_after_s,
        "deduplicate": batch.deduplicate,
        "idempotency_key": idempotency and idempotency.key,
        "idempotency_digest": idempotency and idempotency.digest,
    }


def _of_request(connection: sa.Connection, account_id: str, idempotency: Idempotency) -> Batch | None:
    same_key = batches.c.account_id == account_id, batches.c.idempotency_key == idempotency.key
    known = connection.execute(batches.select().where(*same_key)).mappings().first()
    if known is None:
        return None
    if known["idempotency_digest"] != idempotency.digest:
        raise KeyReused("an idempotency key has come with another request")
    return _as_created(_batch(known))


def _as_created(batch: Batch) -> Batch:
    return Batch(
        **{name: getattr(batch, name) for name in _SET_AT_CREATION},
        status=BatchStatus.VALIDATING,
        stamps=BatchStamps(created_at=batch.stamps.created_at),
    )


def _advance(connection: sa.Connection, batch: Batch, status: BatchStatus, now: int, **values: Any) -> None:
    invariant(may_follow(batch.status, status), f"a batch does not go from {batch.status} to {status}")
    expected = batches.c.id == batch.id, batches.c.status == batch.status.value
    values |= {"status": status.value, stamp_of(status): now}
    if batch.status is BatchStatus.VALIDATING:
        values["progress"] = None  # why it could not be validated before
    if connection.execute(batches.update().where(*expected).values(**values)).rowcount != 1:
        raise Fenced(f"{batch.id} is no longer {batch.status}")
    enqueue_event(connection, batch, status, now)


def _held(key: ShardKey, epoch: int) -> tuple[sa.ColumnElement[bool], ...]:
    return (
        shards.c.batch_id == key.batch_id,
        shards.c.position == key.position,
        shards.c.epoch == epoch,
        shards.c.state == ShardState.RUNNING.value,
    )


def _shard_totals(batch_id: str) -> sa.Select[Any]:
    done = ShardState.DONE.value
    unfinished = sa.func.sum(sa.case((shards.c.state == done, 0), else_=1))
    sums = [
        sa.func.coalesce(sa.func.sum(shards.c[name]), 0).label(name)
        for name in (*_TALLY_COLUMNS, "output_bytes", "error_bytes")
    ]
    return sa.select(sa.func.coalesce(unfinished, 0).label("unfinished"), *sums).where(shards.c.batch_id == batch_id)


def _file_of_parts(
    connection: sa.Connection, file: File, batch_id: str, key: sa.Column[Any], size: sa.Column[Any]
) -> None:
    parts = shards.c.batch_id == batch_id, key.is_not(None)
    total = connection.scalar(sa.select(sa.func.sum(size)).where(*parts))
    connection.execute(files.insert().values(**msgspec.structs.asdict(msgspec.structs.replace(file, bytes=total))))
    rows = sa.select(sa.literal(file.id), shards.c.position, key, size).where(*parts)
    connection.execute(file_blobs.insert().from_select(["file_id", "position", "key", "bytes"], rows))


def _tally_values(tally: Tally) -> dict[str, int]:
    counts = {"completed": tally.completed, "failed": tally.failed, "unrun": tally.unrun}
    return counts | msgspec.structs.asdict(tally.usage)


def _tally(row: sa.RowMapping) -> Tally:
    usage = Usage(row["input_tokens"], row["cached_tokens"], row["output_tokens"], row["reasoning_tokens"])
    return Tally(row["completed"], row["failed"], row["unrun"], usage)


def _job(row: sa.RowMapping) -> Job:
    return Job(**{name: row[name] for name in Job.__struct_fields__})


def _shard(row: sa.RowMapping) -> Shard:
    return Shard(
        key=ShardKey(row["batch_id"], row["position"]),
        first_line=row["first_line"],
        lines=row["lines"],
        offset=row["offset"],
        bytes=row["bytes"],
        state=ShardState(row["state"]),
        epoch=row["epoch"],
        rejects=_decoded(row["rejects"], list[Reject]) or [],
        copies=_decoded(row["copies"], list[Copy]) or [],
    )


def _batch(row: sa.RowMapping) -> Batch:
    return Batch(
        id=row["id"],
        order=row["order"],
        account_id=row["account_id"],
        job_id=row["job_id"],
        endpoint=Endpoint(row["endpoint"]),
        input_file_id=row["input_file_id"],
        completion_window=row["completion_window"],
        status=BatchStatus(row["status"]),
        stamps=BatchStamps(**{name: row[name] for name in BatchStamps.__struct_fields__}),
        expires_at=row["expires_at"],
        metadata=None if row["metadata"] is None else msgspec.json.decode(row["metadata"], type=dict[str, str]),
        model=row["model"],
        closing=None if row["closing"] is None else Closing(row["closing"]),
        problems=row["problems"],
        output_file_id=row["output_file_id"],
        error_file_id=row["error_file_id"],
        total=row["total"],
        tally=_tally(row),
        progress=_decoded(row["progress"], Progress),
        causes=_decoded(row["causes"], list[Cause]),
        on_invalid=OnInvalid(row["on_invalid"]),
        retry_of=row["retry_of"],
        output_expires_after_s=row["output_expires_after_s"],
        deduplicate=row["deduplicate"],
        copies=row["copies"],
    )


def _with_first_problems(batch: Batch) -> Batch:
    """Return a batch with the first of its problems, of whose JSON the end may be cut off."""
    if batch.problems is None:
        return batch
    text, end = batch.problems.decode(errors="ignore"), 0
    with contextlib.suppress(ValueError):
        for _ in range(PROBLEMS_OF_LISTED_BATCH_MAX):
            _, end = _JSON.raw_decode(text, end + 1)  # after the opening bracket or a comma
    return msgspec.structs.replace(batch, problems=f"[{text[1:end]}]".encode())


def _decoded(value: bytes | None, kind: Any) -> Any:
    return None if value is None else msgspec.json.decode(value, type=kind)


def _causes(connection: sa.Connection, batch_id: str) -> list[Cause]:
    query = sa.select(shards.c.causes).where(shards.c.batch_id == batch_id, shards.c.causes.is_not(None))
    found = connection.scalars(query.order_by(shards.c.position))
    return merge(cause for causes in found for cause in _decoded(causes, list[Cause]))
