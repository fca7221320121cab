"""Rows of the tables as values of the domain, and back."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import msgspec
import sqlalchemy as sa

from pronghorn.domain.causes import Cause
from pronghorn.domain.model import (
    Batch,
    BatchStamps,
    BatchStatus,
    Closing,
    Copy,
    Endpoint,
    Job,
    OnInvalid,
    Progress,
    Reject,
    Shard,
    ShardKey,
    ShardState,
    Tally,
    Usage,
)
from pronghorn.limits import PROBLEMS_OF_LISTED_BATCH_MAX

_JSON = json.JSONDecoder()
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


def batch_values(batch: Batch) -> dict[str, Any]:
    """Return the columns of a batch that is created now."""
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
    }


def as_created(batch: Batch) -> Batch:
    """Return a batch as it was when it was created, whatever has become of it since."""
    return Batch(
        **{name: getattr(batch, name) for name in _SET_AT_CREATION},
        status=BatchStatus.VALIDATING,
        stamps=BatchStamps(created_at=batch.stamps.created_at),
    )


def tally_values(tally: Tally) -> dict[str, int]:
    counts = {"completed": tally.completed, "failed": tally.failed, "unrun": tally.unrun}
    return counts | msgspec.structs.asdict(tally.usage)


def tally_of(row: sa.RowMapping) -> Tally:
    usage = Usage(row["input_tokens"], row["cached_tokens"], row["output_tokens"], row["reasoning_tokens"])
    return Tally(row["completed"], row["failed"], row["unrun"], usage)


def job_of(row: sa.RowMapping) -> Job:
    return Job(**{name: row[name] for name in Job.__struct_fields__})


def shard_of(row: sa.RowMapping) -> Shard:
    return Shard(
        key=ShardKey(row["batch_id"], row["position"]),
        first_line=row["first_line"],
        lines=row["lines"],
        offset=row["offset"],
        bytes=row["bytes"],
        state=ShardState(row["state"]),
        epoch=row["epoch"],
        rejects=decoded(row["rejects"], list[Reject]) or [],
        copies=decoded(row["copies"], list[Copy]) or [],
    )


def batch_of(row: sa.RowMapping) -> Batch:
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
        tally=tally_of(row),
        progress=decoded(row["progress"], Progress),
        causes=decoded(row["causes"], list[Cause]),
        on_invalid=OnInvalid(row["on_invalid"]),
        retry_of=row["retry_of"],
        output_expires_after_s=row["output_expires_after_s"],
        deduplicate=row["deduplicate"],
        copies=row["copies"],
    )


def with_first_problems(batch: Batch) -> Batch:
    """Return a batch with the first of its problems, of whose JSON the end may be cut off."""
    if batch.problems is None:
        return batch
    text, end = batch.problems.decode(errors="ignore"), 0
    with contextlib.suppress(ValueError):
        for _ in range(PROBLEMS_OF_LISTED_BATCH_MAX):
            _, end = _JSON.raw_decode(text, end + 1)  # after the opening bracket or a comma
    return msgspec.structs.replace(batch, problems=f"[{text[1:end]}]".encode())


def decoded(value: bytes | None, kind: Any) -> Any:
    return None if value is None else msgspec.json.decode(value, type=kind)
