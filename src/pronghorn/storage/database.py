"""A database reached from asyncio: transactions are plain functions that run whole on a thread.

SQLite gets one connection for all writes (two that write and checkpoint at once can corrupt its log in the versions
up to 3.51.2) with `synchronous=FULL`, because with NORMAL a power cut loses acknowledged rows. Reads have
connections of their own that can neither write nor checkpoint.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool, StaticPool

from pronghorn.errors import StorageError, StorageFull

Result = TypeVar("Result")

READERS = 4
BUSY_TIMEOUT_S = 30


class Database:
    """Runs transactions on a SQLite file, after bringing its schema up to date."""

    def __init__(self, url: sa.URL) -> None:
        self._write_engine = _engine(url, writes=True)
        self._migrate()
        self._read_engine = _engine(url, writes=False)
        self._writer = ThreadPoolExecutor(1, "database-writer")
        self._readers = ThreadPoolExecutor(READERS, "database-reader")

    async def write(self, transaction: Callable[[sa.Connection], Result]) -> Result:
        """Run `transaction` and commit; when this returns, what it wrote survives a power cut.

        Raises StorageError, or StorageFull, when the database cannot be written now; nothing has changed then.
        """
        return await self._run(self._writer, self._write_engine, transaction)

    async def read(self, query: Callable[[sa.Connection], Result]) -> Result:
        """Run `query` on a snapshot that holds every write that has returned."""
        return await self._run(self._readers, self._read_engine, query)

    async def close(self) -> None:
        """Wait for what runs, then close every connection."""
        await asyncio.to_thread(self._writer.shutdown)
        await asyncio.to_thread(self._readers.shutdown)
        self._read_engine.dispose()
        self._write_engine.dispose()

    async def _run(
        self, threads: ThreadPoolExecutor, engine: sa.Engine, body: Callable[[sa.Connection], Result]
    ) -> Result:
        def transaction() -> Result:
            try:
                with engine.begin() as connection:
                    return body(connection)
            except OperationalError as error:
                kind = StorageFull if "full" in str(error.orig) else StorageError
                raise kind(f"the database refuses: {error.orig}") from error

        return await asyncio.get_running_loop().run_in_executor(threads, transaction)

    def _migrate(self) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
        with self._write_engine.begin() as connection:
            config.attributes["connection"] = connection
            command.upgrade(config, "head")


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
    return ["journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "wal_autocheckpoint=1000"]
