"""What tests put into storage and give to what reads it: a database, a clock that is set, a batch."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from pronghorn.domain.model import DEFAULT_ACCOUNT, Batch, BatchStamps, BatchStatus, Endpoint
from pronghorn.storage.database import Database

OpenDatabase = Callable[[], Awaitable[Database]]


class SetClock:
    """A clock that stands still until it is set."""

    def __init__(self, time: int) -> None:
        self.time = time

    def now(self) -> int:
        return self.time

    def wall(self) -> int:
        return self.time

    def monotonic(self) -> float:
        return float(self.time)


def sqlite_at(path: Path) -> sa.URL:
    return sa.URL.create("sqlite", database=str(path))


def new_batch(batch_id: str, created_at: int, **fields: Any) -> Batch:
    """Return a batch as a client asks for it."""
    values: dict[str, Any] = {
        "account_id": DEFAULT_ACCOUNT,
        "job_id": "job-1",
        "endpoint": Endpoint.CHAT_COMPLETIONS,
        "input_file_id": "file-1",
        "completion_window": "unlimited",
        "expires_at": None,
        "metadata": None,
    }
    stamps = BatchStamps(created_at)
    return Batch(id=batch_id, order=0, status=BatchStatus.VALIDATING, stamps=stamps, **values | fields)
