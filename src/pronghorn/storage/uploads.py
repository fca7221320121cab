"""Uploads and their parts.

A row of `upload_parts` owns the blob under its key; `bytes` is NULL while it streams in. Completing an upload hands
the blobs to the file, everything else marks them for removal, always in the transaction that changes the status: a
crash leaves no blob without an owner. A part that is still streaming in belongs to its request, which finds at its
end that the upload is over; `drop_interrupted` does so for requests that a crash ended.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from pronghorn.domain.model import BlobRef, File
from pronghorn.domain.uploads import Upload, UploadPart, UploadStatus
from pronghorn.errors import Fenced
from pronghorn.storage import files
from pronghorn.storage.database import Database
from pronghorn.storage.tables import blob_removals, upload_parts, uploads


class Uploads:
    """The uploads of all accounts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, upload: Upload) -> None:
        values = msgspec.structs.asdict(upload) | {"status": upload.status.value}
        await self._database.write(lambda c: c.execute(uploads.insert().values(**values)))

    async def find(self, upload_id: str, account_id: str) -> Upload | None:
        """Return an upload of this account; another account's is as good as none."""
        return await self._database.read(lambda c: _find(c, upload_id, account_id))

    async def find_with_parts(self, upload_id: str, account_id: str) -> tuple[Upload, dict[str, BlobRef]] | None:
        """Return an upload of this account and, by part id, the blobs of its parts that have arrived whole."""
        columns = (upload_parts.c.id, upload_parts.c.key, upload_parts.c.bytes)
        whole = upload_parts.c.upload_id == upload_id, upload_parts.c.bytes.is_not(None)

        def read(connection: sa.Connection) -> tuple[Upload, dict[str, BlobRef]] | None:
            if (upload := _find(connection, upload_id, account_id)) is None:
                return None
            rows = connection.execute(sa.select(*columns).where(*whole))
            return upload, {part_id: BlobRef(key, size) for part_id, key, size in rows}

        return await self._database.read(read)

    async def count_parts(self, upload_id: str) -> int:
        """Return how many parts there are, those that stream in included."""
        query = sa.select(sa.func.count()).where(upload_parts.c.upload_id == upload_id)
        return await self._database.read(lambda c: c.execute(query).scalar_one())

    async def begin_part(self, part: UploadPart, now: int) -> None:
        """Remember a part before its blob is written.

        Raises Fenced when the upload is no longer pending.
        """

        def write(connection: sa.Connection) -> None:
            _require_pending(connection, part.upload_id, now)
            connection.execute(upload_parts.insert().values(**msgspec.structs.asdict(part)))

        await self._database.write(write)

    async def store_part(self, part: UploadPart, size: int, now: int) -> None:
        """Note that a part has arrived whole and its blob is stored.

        Raises Fenced when the upload is no longer pending.
        """

        def write(connection: sa.Connection) -> None:
            _require_pending(connection, part.upload_id, now)
            arriving = upload_parts.c.id == part.id, upload_parts.c.bytes.is_(None)
            if connection.execute(upload_parts.update().where(*arriving).values(bytes=size)).rowcount != 1:
                raise Fenced(f"{part.id} is no longer awaited")

        await self._database.write(write)

    async def drop_part(self, part: UploadPart) -> None:
        """Forget a part and mark what is stored of it for removal."""
        await self._database.write(lambda c: _drop_parts(c, upload_parts.c.id == part.id))

    async def drop_interrupted(self) -> None:
        """Forget every part that was streaming in when an earlier run ended; to be called before the first request."""
        await self._database.write(lambda c: _drop_parts(c, upload_parts.c.bytes.is_(None)))

    async def complete(self, upload: Upload, part_ids: Sequence[str], file: File, blobs: Sequence[BlobRef]) -> Upload:
        """Make the parts, in this order, the file, mark the other parts' blobs for removal; return the upload.

        Raises Fenced when the upload is no longer pending or a part is gone.
        """
        values = {"file_id": file.id, "part_ids_digest": digest(part_ids)}

        def write(connection: sa.Connection) -> Upload:
            completed = _end(connection, upload, UploadStatus.COMPLETED, **values)
            files.insert(connection, file, blobs)
            handed_over = upload_parts.delete().where(upload_parts.c.id == sa.bindparam("part_id"))
            if connection.execute(handed_over, [{"part_id": part_id} for part_id in part_ids]).rowcount != len(blobs):
                raise Fenced(f"a part of {upload.id} is gone")
            _drop_parts(connection, upload_parts.c.upload_id == upload.id, upload_parts.c.bytes.is_not(None))
            return completed

        return await self._database.write(write)

    async def cancel(self, upload: Upload) -> Upload:
        """Give an upload up, mark its parts' blobs for removal, and return it.

        Raises Fenced when it is no longer pending.
        """

        def write(connection: sa.Connection) -> Upload:
            cancelled = _end(connection, upload, UploadStatus.CANCELLED)
            _drop_parts(connection, upload_parts.c.upload_id == upload.id, upload_parts.c.bytes.is_not(None))
            return cancelled

        return await self._database.write(write)

    async def expire(self, now: int) -> int:
        """End every upload whose time is over, mark its parts' blobs for removal, and return how many there were."""
        due = uploads.c.status == UploadStatus.PENDING.value, uploads.c.expires_at <= now

        def write(connection: sa.Connection) -> int:
            late = upload_parts.c.upload_id.in_(sa.select(uploads.c.id).where(*due))
            _drop_parts(connection, late, upload_parts.c.bytes.is_not(None))
            return connection.execute(uploads.update().where(*due).values(status=UploadStatus.EXPIRED.value)).rowcount

        return await self._database.write(write)

    async def forget_ended(self, before: int) -> int:
        """Forget uploads that have ended, whose time was over at `before`; return how many.

        One that has a part still streaming in is forgotten later.
        """
        ended = uploads.c.status != UploadStatus.PENDING.value, uploads.c.expires_at <= before
        no_part = ~sa.exists().where(upload_parts.c.upload_id == uploads.c.id)
        return await self._database.write(lambda c: c.execute(uploads.delete().where(*ended, no_part)).rowcount)


def digest(part_ids: Sequence[str]) -> str:
    """Return what tells one ordered list of parts from another."""
    return hashlib.sha256("\n".join(part_ids).encode()).hexdigest()


def _find(connection: sa.Connection, upload_id: str, account_id: str) -> Upload | None:
    query = uploads.select().where(uploads.c.id == upload_id, uploads.c.account_id == account_id)
    row = connection.execute(query).mappings().first()
    return _upload(row) if row else None


def _require_pending(connection: sa.Connection, upload_id: str, now: int) -> None:
    pending = (
        uploads.c.id == upload_id,
        uploads.c.status == UploadStatus.PENDING.value,
        uploads.c.expires_at > now,
    )
    if connection.scalar(sa.select(uploads.c.id).where(*pending)) is None:
        raise Fenced(f"{upload_id} is no longer pending")


def _end(connection: sa.Connection, upload: Upload, status: UploadStatus, **values: str) -> Upload:
    pending = uploads.c.id == upload.id, uploads.c.status == UploadStatus.PENDING.value
    statement = uploads.update().where(*pending).values(status=status.value, **values)
    if connection.execute(statement).rowcount != 1:
        raise Fenced(f"{upload.id} is no longer pending")
    return msgspec.structs.replace(upload, status=status, **values)


def _drop_parts(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> None:
    keys = sa.select(upload_parts.c.key).where(*which)
    connection.execute(blob_removals.insert().from_select(["key"], keys))
    connection.execute(upload_parts.delete().where(*which))


def _upload(row: sa.RowMapping) -> Upload:
    values: dict[str, Any] = {name: row[name] for name in Upload.__struct_fields__}
    return Upload(**values | {"status": UploadStatus(row["status"])})
