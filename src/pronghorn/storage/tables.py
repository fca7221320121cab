"""The schema, once: SQLite and PostgreSQL both read it. Migrations bring a database to it; a test compares the two."""

from __future__ import annotations

import enum

from sqlalchemy import (
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    Text,
    UniqueConstraint,
    false,
)

from pronghorn.domain.model import BatchStatus, Closing, Endpoint, ShardState
from pronghorn.domain.uploads import UploadStatus
from pronghorn.domain.webhooks import DeliveryState

# SQLite only counts up an INTEGER PRIMARY KEY; PostgreSQL needs the wider type.
Order = BigInteger().with_variant(Integer, "sqlite")

TALLY_COLUMNS = (
    "completed",
    "failed",
    "unrun",
    "input_tokens",
    "cached_tokens",
    "output_tokens",
    "reasoning_tokens",
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)


def _one_of(column: str, values: type[enum.StrEnum]) -> CheckConstraint:
    allowed = ", ".join(f"'{value.value}'" for value in values)
    return CheckConstraint(f"{column} IN ({allowed})", name=column)


def _count(name: str) -> Column[int]:
    return Column(name, BigInteger, nullable=False, server_default="0")


def _tally() -> list[Column[int]]:
    return [_count(name) for name in TALLY_COLUMNS]


accounts = Table(
    "accounts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("name", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
)

jobs = Table(
    "jobs",
    metadata,
    Column("order", Order, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("weight", Integer, nullable=False, server_default="1"),
    Column("created_at", BigInteger, nullable=False),
    CheckConstraint("weight > 0", name="weight"),
    sqlite_autoincrement=True,
)

files = Table(
    "files",
    metadata,
    Column("order", Order, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, index=True),
    Index(None, "account_id", "purpose", "order"),
    sqlite_autoincrement=True,
)

file_blobs = Table(
    "file_blobs",
    metadata,
    Column("file_id", ForeignKey("files.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("key", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    PrimaryKeyConstraint("file_id", "position"),
    Index(None, "key"),
)

# Blobs that no file names any more: they are removed from storage, then from here, so a crash forgets none.
blob_removals = Table(
    "blob_removals",
    metadata,
    Column("key", Text, primary_key=True),
)

batches = Table(
    "batches",
    metadata,
    Column("order", Order, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("job_id", ForeignKey("jobs.id"), nullable=False),
    Column("endpoint", String(64), nullable=False),
    Column("input_file_id", String(64), nullable=False),
    Column("completion_window", String(32), nullable=False),
    Column("status", String(16), nullable=False),
    Column("closing", String(16)),
    Column("created_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("expires_at", BigInteger),
    Column("metadata", Text),
    Column("model", Text),
    Column("problems", LargeBinary),
    Column("on_invalid", String(8), nullable=False, server_default="fail"),
    Column("retry_of", String(64)),
    Column("output_expires_after_s", BigInteger),
    Column("deduplicate", Boolean(create_constraint=False), nullable=False, server_default=false()),
    _count("copies"),
    Column("idempotency_key", String(256)),
    Column("idempotency_digest", LargeBinary),
    Column("output_file_id", String(64)),
    Column("error_file_id", String(64)),
    _count("total"),
    *_tally(),
    Column("progress", LargeBinary),
    Column("causes", LargeBinary),
    _one_of("status", BatchStatus),
    _one_of("closing", Closing),
    _one_of("endpoint", Endpoint),
    Index(None, "account_id", "order"),
    Index(None, "status"),
    Index(None, "input_file_id"),
    UniqueConstraint("account_id", "idempotency_key"),
    sqlite_autoincrement=True,
)

shards = Table(
    "shards",
    metadata,
    Column("batch_id", ForeignKey("batches.id"), nullable=False),
    Column("position", Integer, nullable=False),
    Column("first_line", BigInteger, nullable=False),
    Column("lines", BigInteger, nullable=False),
    Column("offset", BigInteger, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("state", String(16), nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),
    Column("output_key", Text),
    Column("output_bytes", BigInteger),
    Column("error_key", Text),
    Column("error_bytes", BigInteger),
    *_tally(),
    Column("rejects", LargeBinary),
    Column("copies", LargeBinary),
    Column("causes", LargeBinary),
    PrimaryKeyConstraint("batch_id", "position"),
    _one_of("state", ShardState),
    Index(None, "state", "batch_id", "position"),
)

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("order", Order, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("url", Text, nullable=False),
    Column("event_types", Text, nullable=False),
    Column("secret", Text, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("updated_at", BigInteger, nullable=False),
    Column("old_secret", Text),
    Column("old_secret_until", BigInteger),
    Column("held_until", BigInteger),
    Column("disabled_at", BigInteger),
    Index(None, "account_id", "order"),
    sqlite_autoincrement=True,
)

# An event waits here from the transaction that ends its batch until its receiver has it.
webhook_deliveries = Table(
    "webhook_deliveries",
    metadata,
    Column("order", Order, primary_key=True, autoincrement=True),
    Column("id", String(64), nullable=False, unique=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("endpoint_id", ForeignKey("webhook_endpoints.id"), nullable=False),
    Column("event_id", String(64), nullable=False),
    Column("event_type", String(64), nullable=False),
    Column("event_at", BigInteger, nullable=False),
    Column("batch_id", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("next_attempt_at", BigInteger),
    Column("last_status", Integer),
    Column("last_error", Text),
    Column("delivered_at", BigInteger),
    _one_of("state", DeliveryState),
    Index(None, "endpoint_id", "order"),
    Index(None, "state", "next_attempt_at"),
    sqlite_autoincrement=True,
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String(32), nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("status", String(16), nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("file_expires_after_s", BigInteger),
    Column("file_id", String(64)),
    Column("part_ids_digest", String(64)),
    _one_of("status", UploadStatus),
    Index(None, "status", "expires_at"),
)

# Each row owns the blob under its key until a file or blob_removals does; bytes is NULL while the part streams in.
upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", String(64), primary_key=True),
    Column("upload_id", ForeignKey("uploads.id"), nullable=False, index=True),
    Column("account_id", ForeignKey("accounts.id"), nullable=False),
    Column("key", Text, nullable=False, index=True),
    Column("bytes", BigInteger),
    Column("created_at", BigInteger, nullable=False),
)
