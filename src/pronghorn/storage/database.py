"""A database reached from asyncio: transactions are plain functions that run whole on a thread.

SQLite gets one connection for all writes (two that write and checkpoint at once can corrupt its log in the versions
up to 3.51.2) with `synchronous=FULL`, because with NORMAL a power cut loses acknowledged rows. Reads have
connections of their own that can neither write nor checkpoint.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sqlite3
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import DatabaseError, OperationalError
from sqlalchemy.pool import QueuePool, StaticPool

from pronghorn.errors import StorageError, StorageFull
from pronghorn.limits import KIB
from pronghorn.storage import durable

Result = TypeVar("Result")

READERS = 4
CHECKPOINT_PAGES = 1000
LOG_BYTES = CHECKPOINT_PAGES * (4 * KIB + 24)
# SQLite's result codes; the low byte of an extended one is the primary one. The shared memory beside the log is the
# first thing that does not fit on a full disk.
_PRIMARY_CODE = 0xFF
_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_BROKEN = frozenset({sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB})
BUSY_TIMEOUT_S = 30


class Database:
    """Runs transactions on a SQLite file, after bringing its schema up to date.

    Raises what `write` raises when the database cannot be opened now.
    """

    def __init__(self, url: sa.URL) -> None:
        self._write_engine = _engine(url, writes=True)
        try:
            self._migrate()
            self._sync_log()
        except DatabaseError as error:
            raise _refusal(error) from error
        _keep_room_for_log(Path(f"{url.database}-wal"))
        paths = (Path(url.database or ""), Path(f"{url.database}-wal"))
        self._files = {path: identity for path in paths if (identity := _identity(path)) is not None}
        self._read_engine = _engine(url, writes=False)
        self._writer = ThreadPoolExecutor(1, "database-writer")
        self._readers = ThreadPoolExecutor(READERS, "database-reader")

    async def write(self, transaction: Callable[[sa.Connection], Result]) -> Result:
        """Run `transaction` and commit; when this returns, what it wrote survives a power cut.

        Raises StorageError, or StorageFull, when the database cannot be written now; nothing has changed then.
        """

        def kept() -> Result:
            result = self._transact(self._write_engine, transaction)
            self._end_if_gone()
            return result

        return await asyncio.get_running_loop().run_in_executor(self._writer, kept)

    async def read(self, query: Callable[[sa.Connection], Result]) -> Result:
        """Run `query` on a snapshot that holds every write that has returned."""
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._transact, self._read_engine, query)

    async def close(self) -> None:
        """Wait for what runs, then close every connection."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._read_engine.dispose()
        self._write_engine.dispose()

    def _transact(self, engine: sa.Engine, body: Callable[[sa.Connection], Result]) -> Result:
        try:
            with engine.begin() as connection:
                return body(connection)
        except DatabaseError as error:
            raise _refusal(error) from error

    def _end_if_gone(self) -> None:
        """End before anything is acknowledged that only a file without a name holds."""
        for path, identity in self._files.items():
            if _identity(path) != identity:
                durable.end_without(path)

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._write_engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def _sync_log(self) -> None:
        """Wait for the disk: a process that was killed may have written transactions and not synced them.

        A checkpoint syncs the log before it copies it.
        """
        with self._write_engine.connect() as connection:
            connection.connection.execute("PRAGMA wal_checkpoint(PASSIVE)")


def _keep_room_for_log(log: Path) -> None:
    """Take the disk space that SQLite's log grows to anyway, so that a full disk still lets a batch say why it waits.

    A log that is longer than what is in it is what every checkpoint leaves, and SQLite writes over the rest.
    """
    with contextlib.suppress(OSError, AttributeError), log.open("r+b") as file:  # neither everywhere nor on a full disk
        os.posix_fallocate(file.fileno(), 0, LOG_BYTES)


def _refusal(error: DatabaseError) -> Exception:
    """Return what a failed transaction means; a database that can't be trusted any more ends the process."""
    code = getattr(error.orig, "sqlite_errorcode", sqlite3.SQLITE_OK)
    if code in _FULL:
        return StorageFull("the database has no room on its disk")
    if code & _PRIMARY_CODE in _BROKEN:
        durable.end_process(f"the database cannot be used: {error.orig}")
    if isinstance(error, OperationalError):
        return StorageError(f"the database refuses: {error.orig}")
    return error


def _identity(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from all others, None when it cannot be found."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _engine(url: sa.URL, *, writes: bool) -> sa.Engine:
    pool: dict[str, Any] = {"poolclass": StaticPool} if writes else {"poolclass": QueuePool, "pool_size": READERS}
    arguments = {"check_same_thread": False, "timeout": BUSY_TIMEOUT_S}
    engine = sa.create_engine(url, connect_args=arguments, **pool)

    @sa.event.listens_for(engine, "connect")
    def _set_up(connection: Any, _: Any) -> None:
        connection.isolation_level = None
        for pragma in _pragmas(writes):
            connection.execute(f"PRAGMA {pragma}")

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _pragmas(writes: bool) -> list[str]:
    if not writes:
        return ["query_only=ON", "wal_autocheckpoint=0"]
    return ["journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", f"wal_autocheckpoint={CHECKPOINT_PAGES}"]
