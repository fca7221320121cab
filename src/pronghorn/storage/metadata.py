"""What the system remembers of accounts, jobs, batches and shards; files have a module of their own.

A change of a batch's status and a shard's commit are compare-and-set: an UPDATE names the id and the state it expects
(and, for a shard, the epoch), its row count is checked, and one that finds no such row is refused with `Fenced`. To
release a shard that is no longer held changes nothing. A claim reads and writes in one transaction of the one writer.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from pronghorn.domain.causes import Cause, merge
from pronghorn.domain.lifecycle import TERMINAL, may_follow, stamp_of
from pronghorn.domain.model import (
    Batch,
    BatchStatus,
    BlobRef,
    Closing,
    File,
    Job,
    Parts,
    Progress,
    Shard,
    ShardKey,
    ShardResult,
    ShardState,
    Tally,
)
from pronghorn.domain.planning import Plan
from pronghorn.errors import Fenced, KeyReused, invariant
from pronghorn.limits import KIB
from pronghorn.storage.database import Database
from pronghorn.storage.pages import Page, read_page
from pronghorn.storage.rows import (
    as_created,
    batch_of,
    batch_values,
    decoded,
    job_of,
    shard_of,
    tally_of,
    tally_values,
    with_first_problems,
)
from pronghorn.storage.tables import TALLY_COLUMNS, accounts, batches, file_blobs, files, jobs, shards
from pronghorn.storage.webhooks import enqueue_event

# Rows that are inserted at once; one of a shard whose every line is a copy has 64 KB.
INSERT_ROWS_MAX = 200
# So much of a batch's problems is read for a listing; that many have 15 KB unless a line names its model at length.
PROBLEMS_OF_LISTED_BATCH_BYTES_MAX = 64 * KIB

_NOT_ENDED = batches.c.status.not_in([status.value for status in TERMINAL])


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
        return job_of(row) if row else None

    async def jobs(self, account_id: str) -> list[Job]:
        """Return an account's jobs, oldest first."""
        query = jobs.select().where(jobs.c.account_id == account_id).order_by(jobs.c.order)
        rows = await self._database.read(lambda c: c.execute(query).mappings().all())
        return [job_of(row) for row in rows]

    # Batches

    async def add_batch(self, batch: Batch, idempotency: Idempotency | None = None) -> Batch:
        """Remember a new batch; return it with its place in the order of creation.

        A key that has come before returns the batch made then, as it was at its creation. Raises KeyReused when it
        came with another request.
        """

        def write(connection: sa.Connection) -> Batch:
            if idempotency is not None and (known := _of_request(connection, batch.account_id, idempotency)):
                return known
            statement = batches.insert().values(**batch_values(batch), **_named(idempotency)).returning(batches.c.order)
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

    async def list_batches(self, account_id: str, *, limit: int, after: str | None = None) -> Page[Batch] | None:
        """Return up to `limit` batches, newest first, after the one with id `after`; None if that is unknown.

        Each has the first PROBLEMS_OF_LISTED_BATCH_MAX of its problems.
        """
        ours = batches.c.account_id == account_id
        return await self._database.read(
            lambda c: read_page(c, batches, ours, _listed, limit=limit, after=after, query=_LISTED)
        )

    async def open_batches(self) -> list[Batch]:
        """Return every batch that has not ended, oldest first."""
        query = batches.select().where(_NOT_ENDED).order_by(batches.c.order)
        rows = await self._database.read(lambda c: c.execute(query).mappings().all())
        return [batch_of(row) for row in rows]

    async def open_states(self) -> list[OpenState]:
        """Return where every batch that has not ended stands, oldest first; thousands are read in a moment."""
        columns = (batches.c.id, batches.c.account_id, batches.c.status, batches.c.closing, batches.c.expires_at)
        query = sa.select(*columns).where(_NOT_ENDED).order_by(batches.c.order)
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
            tally = {name: done[name] for name in TALLY_COLUMNS}
            found = msgspec.json.encode(_causes(connection, batch.id))
            _advance(connection, batch, status, now, progress=None, causes=found, **file_ids, **tally)

        await self._database.write(write)

    async def record_progress(self, shown: Sequence[tuple[str, Tally, Progress]]) -> None:
        """Show how far open batches are, how fast they move, and why they do not if they do not."""

        def write(connection: sa.Connection) -> None:
            for batch_id, tally, progress in shown:
                values = {**tally_values(tally), "progress": msgspec.json.encode(progress)}
                connection.execute(batches.update().where(batches.c.id == batch_id, _NOT_ENDED).values(**values))

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
            shard = msgspec.structs.replace(shard_of(row), state=ShardState.RUNNING, epoch=row["epoch"] + 1)
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
            **tally_values(result.tally),
        }

        def write(connection: sa.Connection) -> None:
            done = connection.execute(shards.update().where(*_held(key, epoch)).values(**values))
            if done.rowcount != 1:
                raise Fenced(f"shard {key.position} of {key.batch_id} is no longer held under epoch {epoch}")

        await self._database.write(write)

    async def shard_progress(self, batch_id: str) -> tuple[Tally, int]:
        """Return what the batch's done shards hold, and how many shards are not done."""
        row = await self._database.read(lambda c: c.execute(_shard_totals(batch_id)).mappings().one())
        return tally_of(row), row["unfinished"]

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
        return batch_of(row) if row else None


_LISTED = sa.select(
    *(column for column in batches.c if column is not batches.c.problems),
    sa.func.substr(batches.c.problems, 1, PROBLEMS_OF_LISTED_BATCH_BYTES_MAX, type_=sa.LargeBinary).label("problems"),
)


def _listed(row: sa.RowMapping) -> Batch:
    return with_first_problems(batch_of(row))


def _named(idempotency: Idempotency | None) -> dict[str, Any]:
    if idempotency is None:
        return {}
    return {"idempotency_key": idempotency.key, "idempotency_digest": idempotency.digest}


def _of_request(connection: sa.Connection, account_id: str, idempotency: Idempotency) -> Batch | None:
    same_key = batches.c.account_id == account_id, batches.c.idempotency_key == idempotency.key
    known = connection.execute(batches.select().where(*same_key)).mappings().first()
    if known is None:
        return None
    if known["idempotency_digest"] != idempotency.digest:
        raise KeyReused("an idempotency key has come with another request")
    return as_created(batch_of(known))


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
        for name in (*TALLY_COLUMNS, "output_bytes", "error_bytes")
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


def _causes(connection: sa.Connection, batch_id: str) -> list[Cause]:
    query = sa.select(shards.c.causes).where(shards.c.batch_id == batch_id, shards.c.causes.is_not(None))
    found = connection.scalars(query.order_by(shards.c.position))
    return merge(cause for causes in found for cause in decoded(causes, list[Cause]))
