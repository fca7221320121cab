"""Files: listed, found, and really gone once deleted or expired, also after a crash half-way."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import sqlalchemy as sa

from pronghorn.domain.lifecycle import TERMINAL
from pronghorn.domain.model import BlobRef, File
from pronghorn.storage.database import Database
from pronghorn.storage.pages import Page, read_page
from pronghorn.storage.tables import batches, blob_removals, file_blobs, files, upload_parts

# Removals handled in one go; a deleted output may have thousands of parts.
REMOVALS_MAX = 1000


class Files:
    """The files of all accounts."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def add(self, file: File, blobs: Sequence[BlobRef]) -> None:
        """Remember a file whose blobs are already stored."""
        await self._database.write(lambda connection: insert(connection, file, blobs))

    async def find(self, file_id: str, account_id: str) -> File | None:
        """Return a file of this account; another account's is as good as none."""
        query = files.select().where(files.c.id == file_id, files.c.account_id == account_id)
        row = await self._database.read(lambda c: c.execute(query).mappings().first())
        return _file(row) if row else None

    async def blobs(self, file_id: str) -> list[BlobRef]:
        """Return a file's blobs in order."""
        columns = (file_blobs.c.key, file_blobs.c.bytes)
        query = sa.select(*columns).where(file_blobs.c.file_id == file_id).order_by(file_blobs.c.position)
        rows = await self._database.read(lambda c: c.execute(query).all())
        return [BlobRef(key, size) for key, size in rows]

    async def page(
        self, account_id: str, now: int, *, purpose: str | None, limit: int, after: str | None, newest_first: bool
    ) -> Page[File] | None:
        """Return up to `limit` files that live at `now`, after the one with id `after`; None if that is unknown."""
        ours = files.c.account_id == account_id
        query = files.select().where(sa.or_(files.c.expires_at.is_(None), files.c.expires_at > now))
        if purpose is not None:
            query = query.where(files.c.purpose == purpose)
        return await self._database.read(
            lambda c: read_page(c, files, ours, _file, limit=limit, after=after, query=query, newest_first=newest_first)
        )

    async def delete(self, file_id: str, account_id: str) -> bool:
        """Forget a file and mark its blobs for removal; False, and nothing is done, while a batch still reads it."""

        def write(connection: sa.Connection) -> bool:
            if connection.scalar(sa.select(sa.exists().where(_being_read(sa.literal(file_id))))):
                return False
            _forget(connection, files.c.id == file_id, files.c.account_id == account_id)
            return True

        return await self._database.write(write)

    async def forget_expired(self, now: int) -> int:
        """Forget every file whose time is over and that no batch still reads; return how many there were."""
        due = files.c.expires_at <= now, ~sa.exists().where(_being_read(files.c.id))
        return await self._database.write(lambda connection: _forget(connection, *due))

    async def removals(self, skip: int = 0) -> list[str]:
        """Return keys of blobs to remove from storage, up to a bound, in the order of keys after the first `skip`."""
        query = sa.select(blob_removals.c.key).order_by(blob_removals.c.key).offset(skip).limit(REMOVALS_MAX)
        return list(await self._database.read(lambda c: c.scalars(query).all()))

    async def named(self, keys: Sequence[str]) -> set[str]:
        """Return those of the keys under which a blob belongs to something, or waits to be removed."""
        columns = (file_blobs.c.key, upload_parts.c.key, blob_removals.c.key)
        query = sa.union_all(*(sa.select(column).where(column.in_(keys)) for column in columns))
        return set(await self._database.read(lambda c: c.scalars(query).all()))

    async def removed(self, keys: Sequence[str]) -> None:
        """Note that blobs are gone from storage."""
        if not keys:
            return
        statement = blob_removals.delete().where(blob_removals.c.key == sa.bindparam("gone"))
        await self._database.write(lambda c: c.execute(statement, [{"gone": key} for key in keys]))


def insert(connection: sa.Connection, file: File, blobs: Sequence[BlobRef]) -> None:
    """Add a file's rows inside a transaction."""
    connection.execute(files.insert().values(**msgspec.structs.asdict(file)))
    rows = [
        {"file_id": file.id, "position": position, "key": blob.key, "bytes": blob.bytes}
        for position, blob in enumerate(blobs)
    ]
    connection.execute(file_blobs.insert(), rows)


def _being_read(file_id: sa.ColumnElement[str]) -> sa.ColumnElement[bool]:
    ended = [status.value for status in TERMINAL]
    return sa.and_(batches.c.input_file_id == file_id, batches.c.status.not_in(ended))


def _forget(connection: sa.Connection, *which: sa.ColumnElement[bool]) -> int:
    ids = sa.select(files.c.id).where(*which).scalar_subquery()
    keys = sa.select(file_blobs.c.key).where(file_blobs.c.file_id.in_(ids))
    connection.execute(blob_removals.insert().from_select(["key"], keys))
    connection.execute(file_blobs.delete().where(file_blobs.c.file_id.in_(ids)))
    return connection.execute(files.delete().where(*which)).rowcount


def _file(row: sa.RowMapping) -> File:
    return File(**{name: row[name] for name in File.__struct_fields__})
