"""Ten thousand batches and files, listed and looked up while a batch runs at full speed."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import sqlalchemy as sa
from tests.faults.test_kill import batch_input
from tests.processes import ScriptedProcess, Server
from tests.storing import sqlite_at

from pronghorn.domain.causes import Cause
from pronghorn.domain.model import DEFAULT_ACCOUNT, Job
from pronghorn.storage import tables
from pronghorn.storage.database import Database
from pronghorn.storage.metadata import Metadata

ROWS = 10_000
PAGE = 100
RETRIEVALS = 500
CREATED_AT = 1_790_000_000
# What an idle machine should do. On a busy one the median shows as much, and single calls may take ten times as long.
PAGE_P99_S, RETRIEVAL_P99_S = 0.050, 0.020
SLACK_OF_MEDIAN, SLACK_OF_P99 = 2, 10


def batch_rows() -> list[dict[str, Any]]:
    """Return ended batches that carry all that a batch can, so that none is quicker to show than a real one."""
    cause = Cause(status_code=400, code="invalid", message="m" * 100, count=5, sample_custom_ids=["line-1"] * 5)
    row = {
        "account_id": DEFAULT_ACCOUNT,
        "job_id": "job-test",
        "endpoint": "/v1/chat/completions",
        "input_file_id": "file-none",
        "completion_window": "24h",
        "status": "completed",
        "created_at": CREATED_AT,
        "in_progress_at": CREATED_AT + 1,
        "finalizing_at": CREATED_AT + 2,
        "completed_at": CREATED_AT + 2,
        "expires_at": CREATED_AT + 86400,
        "metadata": msgspec.json.encode({f"key-{number}": "v" * 20 for number in range(4)}).decode(),
        "model": "scripted",
        "output_file_id": "file-none",
        "error_file_id": "file-none",
        "total": 1000,
        "completed": 985,
        "failed": 15,
        "causes": msgspec.json.encode([cause] * 3),
    }
    return [row | {"id": f"batch_{number:032x}"} for number in range(ROWS)]


def file_rows() -> list[dict[str, Any]]:
    row = {"account_id": DEFAULT_ACCOUNT, "purpose": "batch", "filename": "input.jsonl", "bytes": 1}
    return [row | {"id": f"file-{number:022}", "created_at": CREATED_AT} for number in range(ROWS)]


async def fill(data_dir: Path) -> None:
    """Make the database of a server that has long been in use, in one transaction."""
    database = Database(sqlite_at(data_dir / "pronghorn.db"))
    metadata = Metadata(database)
    await metadata.add_account(DEFAULT_ACCOUNT, "default", CREATED_AT)
    await metadata.add_job(Job("job-test", DEFAULT_ACCOUNT, "test", 1, CREATED_AT))

    def write(connection: sa.Connection) -> None:
        connection.execute(tables.batches.insert(), batch_rows())
        connection.execute(tables.files.insert(), file_rows())

    await database.write(write)
    await metadata.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("listing")
    (folder / "data").mkdir()
    asyncio.run(fill(folder / "data"))
    with (
        ScriptedProcess(folder / "engine.log") as engine,
        Server(folder / "data", "--upstream", engine.base_url) as server,
    ):
        yield server


@pytest.fixture(scope="module", params=["idle", "busy"])
def load(request: pytest.FixtureRequest, server: Server) -> Iterator[str]:
    """Nothing else to do, or a batch that keeps the engine and its worker as busy as they can be."""
    if request.param == "idle":
        yield "idle"
        return
    batch = server.create_batch(server.upload(batch_input(150_000)))
    server.await_batch(batch["id"], lambda batch: batch["request_counts"]["completed"] > 1000)
    yield "busy"
    assert server.batch(batch["id"])["status"] == "in_progress", "it ran all the time"
    server.http.post(f"/v1/batches/{batch['id']}/cancel").raise_for_status()
    server.await_batch(batch["id"])


def timed(server: Server, path: str, query: dict[str, Any], took: list[float]) -> Any:
    start = time.perf_counter()
    answer = server.http.get(path, params=query)
    took.append(time.perf_counter() - start)
    answer.raise_for_status()
    return answer.json()


def check(what: str, took: list[float], p99_s: float) -> None:
    """Print how long calls took and compare that with what an idle machine should do."""
    ordered = sorted(took)
    median, p99 = ordered[len(ordered) // 2], ordered[int(len(ordered) * 0.99)]
    figures = f"median {median * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, most {ordered[-1] * 1e3:.1f} ms"
    print(f"{what}: {len(took)} calls, {figures}")
    assert median < p99_s * SLACK_OF_MEDIAN
    assert p99 < p99_s * SLACK_OF_P99


@pytest.mark.parametrize("kind", ["batches", "files"])
def test_every_one_is_listed_once_and_soon(server: Server, load: str, kind: str) -> None:
    prefix = {"batches": "batch_0000", "files": "file-0000"}[kind]
    seen: list[str] = []
    took: list[float] = []
    page: dict[str, Any] = {"has_more": True}
    while page["has_more"]:
        query = {"limit": PAGE} | ({"after": seen[-1]} if seen else {})
        page = timed(server, f"/v1/{kind}", query, took)
        seen += [item["id"] for item in page["data"]]
    listed = [found for found in seen if found.startswith(prefix)]
    assert len(listed) == len(set(listed)) == ROWS
    assert listed == sorted(listed, reverse=True), "newest first"
    check(f"a page of {PAGE} {kind}, {load}", took, PAGE_P99_S)


def test_one_batch_is_found_soon(server: Server, load: str) -> None:
    took: list[float] = []
    for number in range(RETRIEVALS):
        batch_id = f"batch_{number * 7919 % ROWS:032x}"
        assert timed(server, f"/v1/batches/{batch_id}", {}, took)["id"] == batch_id
    check(f"a batch, {load}", took, RETRIEVAL_P99_S)


def test_the_largest_page_holds_everything(server: Server) -> None:
    """OpenAI's default is one page of up to 10,000 files."""
    page = timed(server, "/v1/files", {"order": "asc"}, [])
    assert [file["id"] for file in page["data"]] == [row["id"] for row in file_rows()]
