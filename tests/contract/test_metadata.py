"""What the system remembers, over every database that it can remember it in."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import msgspec
import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from pronghorn.domain.duplicates import Bodies
from pronghorn.domain.lifecycle import TERMINAL
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
    Parts,
    Shard,
    ShardKey,
    ShardResult,
    ShardState,
    Tally,
    Usage,
)
from pronghorn.domain.planning import Plan, PlannedShard
from pronghorn.domain.validation import Problem
from pronghorn.errors import Fenced, InvariantError, StorageError
from pronghorn.storage import tables
from pronghorn.storage.database import Database
from pronghorn.storage.files import Files
from pronghorn.storage.metadata import Metadata
from tests.storing import OpenDatabase, new_batch

OURS, THEIRS = "org-ours", "org-theirs"
S = BatchStatus


@pytest.fixture
async def metadata(database: Database) -> Metadata:
    """A memory with two accounts that have a job each."""
    memory = Metadata(database)
    for account in (OURS, THEIRS):
        await memory.add_account(account, account, 1)
        await memory.add_job(job(account))
    return memory


@pytest.fixture
def files(database: Database) -> Files:
    return Files(database)


def job(account: str = OURS, *, name: str = "default", created_at: int = 1) -> Job:
    return Job(f"job-{account}-{name}", account, name, 1, created_at)


def file(name: str, account: str = OURS, *, size: int = 0) -> File:
    return File(f"file-{name}", account, "batch", f"{name}.jsonl", size, 5, expires_at=None)


def batch(name: str = "1", account: str = OURS, *, created_at: int = 10) -> Batch:
    ids = {"account_id": account, "job_id": job(account).id}
    return new_batch(f"batch_{name}", created_at, **ids, expires_at=created_at + 86_400, metadata={"who": "é"})


def plan(shards: int, lines: int = 1) -> Plan:
    cut = [PlannedShard(1 + position * lines, lines, position * 100, 100) for position in range(shards)]
    return Plan(cut, shards * lines, "m", [])


def result(*, output: int = 0, errors: int = 0, name: str = "part", tally: Tally = Tally(1)) -> ShardResult:  # noqa: B008
    """A shard's parts of so many bytes; none where there are no bytes."""
    return ShardResult(
        BlobRef(f"{name}.output", output) if output else None,
        BlobRef(f"{name}.errors", errors) if errors else None,
        tally,
        [],
    )


async def running(metadata: Metadata, shards: int, name: str = "1") -> Batch:
    """Add a batch that is in progress, with so many shards of one line."""
    await metadata.start_batch(await metadata.add_batch(batch(name)), plan(shards), 11)
    return await found(metadata, f"batch_{name}")


async def found(metadata: Metadata, batch_id: str, account: str = OURS) -> Batch:
    there = await metadata.batch(batch_id, account)
    assert there is not None
    return there


async def claim(metadata: Metadata, batch_id: str = "batch_1") -> Shard:
    shard = await metadata.claim_shard(batch_id)
    assert shard is not None
    return shard


# Accounts and jobs


async def test_an_account_is_added_once(metadata: Metadata, database: Database) -> None:
    await metadata.add_account(OURS, "another name", 99)
    rows = await database.read(lambda c: c.execute(tables.accounts.select().order_by("id")).all())
    assert [tuple(row) for row in rows] == [(OURS, OURS, 1), (THEIRS, THEIRS, 1)]


async def test_jobs_come_oldest_first(metadata: Metadata) -> None:
    earlier, later = job(name="earlier", created_at=3), job(name="later", created_at=9)
    await metadata.add_job(earlier)
    await metadata.add_job(later)
    assert await metadata.jobs(OURS) == [job(), earlier, later]
    assert await metadata.jobs(THEIRS) == [job(THEIRS)]
    assert await metadata.job(later.id, OURS) == later
    assert await metadata.job("job-unheard", OURS) is None


async def test_a_job_has_an_account_and_a_weight(metadata: Metadata) -> None:
    with pytest.raises(sa.exc.IntegrityError):
        await metadata.add_job(job("org-unheard"))
    with pytest.raises(sa.exc.IntegrityError):
        await metadata.add_job(Job("job-x", OURS, "x", 0, 1))


# Files


async def test_a_file_is_an_ordered_list_of_blobs(metadata: Metadata, files: Files) -> None:
    blobs = [BlobRef(key, size) for size, key in enumerate("zaybx")]
    await files.add(file("a", size=10), blobs)
    assert await files.find("file-a", OURS) == file("a", size=10)
    assert await files.blobs("file-a") == blobs
    assert await files.find("file-unheard", OURS) is None
    assert await files.blobs("file-unheard") == []


async def test_a_file_that_could_not_be_remembered_whole_is_not_remembered(metadata: Metadata, files: Files) -> None:
    await files.add(file("a"), [BlobRef("a", 1)])
    with pytest.raises(sa.exc.IntegrityError):
        await files.add(file("a"), [BlobRef("other", 1)])
    assert await files.blobs("file-a") == [BlobRef("a", 1)]


# Batches


async def test_a_batch_comes_back_as_it_was_given(metadata: Metadata) -> None:
    added = await metadata.add_batch(batch())
    assert await found(metadata, "batch_1") == added
    assert added.order > 0
    assert (added.metadata, added.stamps.created_at, added.total, added.tally) == ({"who": "é"}, 10, 0, Tally())
    assert await metadata.batch("batch_unheard", OURS) is None


async def test_order_grows_with_creation_even_inside_a_second(metadata: Metadata) -> None:
    orders = [(await metadata.add_batch(batch(str(number)))).order for number in range(5)]
    assert orders == sorted(set(orders))


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 8])
async def test_pages_hold_each_batch_once_newest_first(metadata: Metadata, limit: int) -> None:
    for number in range(7):
        await metadata.add_batch(batch(str(number)))
        await metadata.add_batch(batch(f"theirs-{number}", THEIRS))
    seen: list[str] = []
    has_more = True
    while has_more:
        page = await metadata.list_batches(OURS, limit=limit, after=seen[-1] if seen else None)
        assert page is not None
        assert 0 < len(page.items) <= limit
        seen += [each.id for each in page.items]
        has_more = page.has_more
    assert seen == [f"batch_{number}" for number in reversed(range(7))]


async def test_a_batch_added_between_pages_disturbs_none(metadata: Metadata) -> None:
    for number in range(3):
        await metadata.add_batch(batch(str(number)))
    first = await metadata.list_batches(OURS, limit=2)
    await metadata.add_batch(batch("new"))
    second = await metadata.list_batches(OURS, limit=2, after="batch_1")
    assert first is not None
    assert second is not None
    assert [each.id for each in (*first.items, *second.items)] == ["batch_2", "batch_1", "batch_0"]


async def test_an_unknown_cursor_and_a_foreign_one_are_alike(metadata: Metadata) -> None:
    await metadata.add_batch(batch("theirs", THEIRS))
    assert await metadata.list_batches(OURS, limit=1, after="batch_unheard") is None
    assert await metadata.list_batches(OURS, limit=1, after="batch_theirs") is None
    assert await metadata.list_batches(OURS, limit=1) == ([], False)


async def test_accounts_do_not_see_each_other_s_rows(metadata: Metadata, files: Files) -> None:
    await files.add(file("theirs", THEIRS), [BlobRef("x", 1)])
    await metadata.add_batch(batch("theirs", THEIRS))
    assert await metadata.job(job(THEIRS).id, OURS) is None
    assert await metadata.jobs(OURS) == [job()]
    assert await files.find("file-theirs", OURS) is None
    assert await metadata.batch("batch_theirs", OURS) is None
    assert await metadata.batch("batch_theirs", THEIRS) is not None


async def test_open_batches_are_those_that_have_not_ended_oldest_first(metadata: Metadata) -> None:
    await running(metadata, 1, "a")
    await metadata.advance(await metadata.add_batch(batch("b")), S.FAILED, 12)
    await metadata.add_batch(batch("c", THEIRS))
    assert [(each.id, each.status) for each in await metadata.open_batches()] == [
        ("batch_a", S.IN_PROGRESS),
        ("batch_c", S.VALIDATING),
    ]
    assert await metadata.open_states() == [
        ("batch_a", OURS, S.IN_PROGRESS, None, 86410),
        ("batch_c", THEIRS, S.VALIDATING, None, 86410),
    ]


# Moving a batch


async def test_each_move_sets_its_stamp_and_clears_none(metadata: Metadata) -> None:
    await running(metadata, 1)
    shard = await claim(metadata)
    await metadata.commit_shard(shard.key, shard.epoch, result())
    closing = await metadata.advance(await found(metadata, "batch_1"), S.FINALIZING, 20)
    await metadata.finish_batch(closing, S.COMPLETED, 30, output=None, errors=None)
    ended = await found(metadata, "batch_1")
    assert ended.status is S.COMPLETED
    assert ended.stamps == BatchStamps(10, in_progress_at=11, finalizing_at=20, completed_at=30)


async def test_a_move_brings_what_it_was_given(metadata: Metadata) -> None:
    failed = await metadata.advance(await metadata.add_batch(batch("a")), S.FAILED, 12, problems=b"[]")
    assert (failed.problems, failed.stamps.failed_at) == (b"[]", 12)
    closed = await metadata.advance(await running(metadata, 1, "b"), S.CANCELLING, 13, closing=Closing.CANCELLED)
    assert (closed.closing, closed.stamps.cancelling_at) == (Closing.CANCELLED, 13)


async def test_a_batch_that_has_moved_since_it_was_read_does_not_move_again(metadata: Metadata) -> None:
    stale = await metadata.add_batch(batch())
    await metadata.advance(stale, S.CANCELLING, 12)
    with pytest.raises(Fenced):
        await metadata.advance(stale, S.FAILED, 13)
    with pytest.raises(Fenced):
        await metadata.start_batch(stale, plan(2), 13)
    there = await found(metadata, "batch_1")
    assert (there.status, there.stamps.failed_at, there.total) == (S.CANCELLING, None, 0)
    assert await metadata.claim_shard("batch_1") is None


async def test_of_two_moves_at_once_one_is_refused(metadata: Metadata) -> None:
    stale = await metadata.add_batch(batch())
    moves = [metadata.advance(stale, S.CANCELLING, 12), metadata.advance(stale, S.FAILED, 12)]
    outcomes = await asyncio.gather(*moves, return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["Batch", "Fenced"]


async def test_a_move_that_is_not_in_the_table_is_a_bug(metadata: Metadata) -> None:
    added = await metadata.add_batch(batch())
    with pytest.raises(InvariantError):
        await metadata.advance(added, S.COMPLETED, 12)


# Shards


async def test_a_started_batch_has_its_shards_in_order(metadata: Metadata) -> None:
    started = await running(metadata, 3)
    assert (started.status, started.total, started.model) == (S.IN_PROGRESS, 3, "m")
    claimed = [await claim(metadata) for _ in range(3)]
    assert claimed == [
        Shard(ShardKey("batch_1", position), position + 1, 1, position * 100, 100, ShardState.RUNNING, 1)
        for position in range(3)
    ]
    assert await metadata.claim_shard("batch_1") is None
    assert await metadata.claim_shard("batch_unheard") is None


async def test_a_started_batch_knows_its_copies(metadata: Metadata) -> None:
    bodies = Bodies()
    for line, body in enumerate((b"a", b"b", b"a", b"b", b"a"), 1):
        bodies.add(line, body)
    asked = await metadata.add_batch(msgspec.structs.replace(batch(), deduplicate=True))
    await metadata.start_batch(asked, plan(3, lines=2)._replace(originals=bodies.originals()), 11)
    started = await found(metadata, "batch_1")
    assert (started.deduplicate, started.copies) == (True, 3)
    assert [(await claim(metadata)).copies for _ in range(3)] == [
        [],
        [Copy(3, 1, 0), Copy(4, 2, 0)],
        [Copy(5, 1, 0)],
    ]


async def test_the_parts_of_done_shards_are_found_by_position(metadata: Metadata) -> None:
    await running(metadata, 1500)
    shards = [await claim(metadata) for _ in range(3)]
    await metadata.commit_shard(shards[0].key, 1, result(output=3))
    await metadata.commit_shard(shards[2].key, 1, result(errors=4))
    assert await metadata.parts_of("batch_1", range(1500)) == {
        0: Parts(BlobRef("part.output", 3), None),
        2: Parts(None, BlobRef("part.errors", 4)),
    }
    assert await metadata.parts_of("batch_1", [1, 1499]) == {}
    assert await metadata.parts_of("batch_unheard", [0]) == {}


async def test_a_batch_may_have_more_shards_than_one_statement_takes(metadata: Metadata) -> None:
    await running(metadata, 5000)
    assert await metadata.shard_progress("batch_1") == (Tally(), 5000)


async def test_a_shard_given_back_is_claimed_again_under_a_later_epoch(metadata: Metadata) -> None:
    await running(metadata, 2)
    first = await claim(metadata)
    await metadata.release_shard(first.key, first.epoch)
    again = await claim(metadata)
    assert (again.key, again.epoch) == (first.key, first.epoch + 1)


async def test_a_stale_epoch_can_neither_commit_nor_give_back(metadata: Metadata) -> None:
    await running(metadata, 1)
    stale = await claim(metadata)
    await metadata.release_shard(stale.key, stale.epoch)
    with pytest.raises(Fenced):
        await metadata.commit_shard(stale.key, stale.epoch, result(output=5))
    current = await claim(metadata)
    with pytest.raises(Fenced):
        await metadata.commit_shard(stale.key, stale.epoch, result(output=5))
    await metadata.release_shard(stale.key, stale.epoch)
    assert await metadata.claim_shard("batch_1") is None
    await metadata.commit_shard(current.key, current.epoch, result(output=5))


async def test_a_done_shard_is_done(metadata: Metadata) -> None:
    await running(metadata, 1)
    shard = await claim(metadata)
    await metadata.commit_shard(shard.key, shard.epoch, result(tally=Tally(1)))
    with pytest.raises(Fenced):
        await metadata.commit_shard(shard.key, shard.epoch, result(tally=Tally(9)))
    await metadata.release_shard(shard.key, shard.epoch)
    await metadata.release_shards()
    assert await metadata.claim_shard("batch_1") is None
    assert await metadata.shard_progress("batch_1") == (Tally(1), 0)


async def test_a_server_that_starts_again_takes_back_what_its_workers_held(metadata: Metadata) -> None:
    await running(metadata, 3)
    done, held = await claim(metadata), await claim(metadata)
    await metadata.commit_shard(done.key, done.epoch, result())
    await metadata.release_shards()
    epochs = {shard.key.position: shard.epoch for shard in (await claim(metadata), await claim(metadata))}
    assert epochs == {held.key.position: 2, 2: 1}


async def test_done_shards_add_up(metadata: Metadata) -> None:
    await running(metadata, 3)
    for position in range(2):
        shard = await claim(metadata)
        tally = Tally(1, 2, 3, Usage(10, 20, 30, 40 + position))
        await metadata.commit_shard(shard.key, shard.epoch, result(tally=tally))
    assert await metadata.shard_progress("batch_1") == (Tally(2, 4, 6, Usage(20, 40, 60, 81)), 1)


# Ends


async def finish(metadata: Metadata, parts: Iterable[ShardResult]) -> Batch:
    """Commit these parts, the last shard first, and end the batch."""
    results = list(parts)
    started = await running(metadata, len(results))
    claimed = [await claim(metadata) for _ in results]
    for shard, part in reversed(list(zip(claimed, results, strict=True))):
        await metadata.commit_shard(shard.key, shard.epoch, part)
    closing = await metadata.advance(started, S.FINALIZING, 20)
    await metadata.finish_batch(closing, S.COMPLETED, 30, output=file("out"), errors=file("err"))
    return await found(metadata, "batch_1")


async def test_the_parts_of_the_shards_in_order_are_the_files(metadata: Metadata, files: Files) -> None:
    ended = await finish(
        metadata,
        [
            result(name="a", output=3, tally=Tally(1)),
            result(name="b", output=4, errors=50, tally=Tally(1, 1, 0, Usage(7))),
            result(name="c", errors=60, tally=Tally(0, 0, 1)),
            result(name="d", output=5, tally=Tally(1)),
        ],
    )
    assert (ended.output_file_id, ended.error_file_id) == ("file-out", "file-err")
    assert ended.tally == Tally(3, 1, 1, Usage(7))
    assert await files.blobs("file-out") == [
        BlobRef("a.output", 3),
        BlobRef("b.output", 4),
        BlobRef("d.output", 5),
    ]
    assert await files.blobs("file-err") == [BlobRef("b.errors", 50), BlobRef("c.errors", 60)]
    assert await files.find("file-out", OURS) == file("out", size=12)
    assert await files.find("file-err", OURS) == file("err", size=110)


@pytest.mark.parametrize(("output", "errors"), [(3, 0), (0, 3)])
async def test_a_file_of_no_parts_is_not_made(metadata: Metadata, files: Files, output: int, errors: int) -> None:
    ended = await finish(metadata, [result(output=output, errors=errors)] * 2)
    assert (ended.output_file_id is not None, ended.error_file_id is not None) == (output > 0, errors > 0)
    assert (await files.find("file-out", OURS) is not None) == (output > 0)
    assert (await files.find("file-err", OURS) is not None) == (errors > 0)


async def test_a_batch_does_not_end_before_its_last_shard(metadata: Metadata) -> None:
    started = await running(metadata, 1)
    closing = await metadata.advance(started, S.FINALIZING, 20)
    with pytest.raises(InvariantError):
        await metadata.finish_batch(closing, S.COMPLETED, 30, output=file("out"), errors=None)
    assert (await found(metadata, "batch_1")).status is S.FINALIZING


async def test_a_batch_that_has_ended_meanwhile_leaves_no_second_file(metadata: Metadata, files: Files) -> None:
    ended = await finish(metadata, [result(output=3)])
    stale = await metadata.batch(ended.id, OURS)
    assert stale is not None
    assert stale.status in TERMINAL
    with pytest.raises(InvariantError):
        await metadata.finish_batch(stale, S.COMPLETED, 31, output=file("again"), errors=None)
    assert await files.find("file-again", OURS) is None


async def test_what_a_batch_holds_survives_reopening(metadata: Metadata, open_database: OpenDatabase) -> None:
    ended = await finish(metadata, [result(output=3)])
    database = await open_database()
    reopened = Metadata(database)
    assert await found(reopened, "batch_1") == ended
    assert await Files(database).blobs("file-out") == [BlobRef("part.output", 3)]
    assert await reopened.jobs(OURS) == [job()]


# The database itself


async def test_migrations_bring_an_empty_database_to_the_schema(database: Database) -> None:
    def differences(connection: sa.Connection) -> list[object]:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        return list(compare_metadata(context, tables.metadata))

    assert await database.read(differences) == []


async def test_migrated_checks_are_those_of_the_schema(database: Database) -> None:
    def checks(connection: sa.Connection) -> set[tuple[str | None, str]]:
        found = sa.inspect(connection).get_multi_check_constraints().values()
        return {(check["name"], check["sqltext"]) for table in found for check in table}

    def migrated_and_expected(connection: sa.Connection) -> tuple[object, object]:
        migrated = checks(connection)
        with sa.create_engine(connection.engine.url.set(database=":memory:")).begin() as fresh:
            tables.metadata.create_all(fresh)
            return migrated, checks(fresh)

    migrated, expected = await database.read(migrated_and_expected)
    assert migrated == expected


@pytest.mark.parametrize(
    ("column", "allowed"),
    [
        (tables.batches.c.status, BatchStatus),
        (tables.batches.c.closing, Closing),
        (tables.batches.c.endpoint, Endpoint),
        (tables.shards.c.state, ShardState),
    ],
    ids=str,
)
async def test_a_column_takes_exactly_the_values_of_its_enum(
    metadata: Metadata,
    database: Database,
    column: sa.Column[str],
    allowed: type[BatchStatus | Closing | Endpoint | ShardState],
) -> None:
    await running(metadata, 1)
    for value in allowed:
        await database.write(lambda c, value=value: c.execute(column.table.update().values({column: value.value})))
    with pytest.raises(sa.exc.IntegrityError):
        await database.write(lambda c: c.execute(column.table.update().values({column: "unheard"})))


async def test_a_transaction_that_fails_leaves_nothing(metadata: Metadata, database: Database) -> None:
    def write_and_fail(connection: sa.Connection) -> None:
        connection.execute(tables.jobs.delete())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await database.write(write_and_fail)
    assert len(await metadata.jobs(OURS)) == 1


async def test_a_read_sees_every_write_that_has_returned(metadata: Metadata) -> None:
    for number in range(20):
        await metadata.add_batch(batch(str(number)))
        pages = await asyncio.gather(*(metadata.list_batches(OURS, limit=1) for _ in range(4)))
        assert {page.items[0].id for page in pages if page} == {f"batch_{number}"}


async def test_sqlite_is_set_up_so_that_a_power_cut_loses_nothing(database: Database) -> None:
    def pragmas(connection: sa.Connection) -> dict[str, object]:
        if connection.dialect.name != "sqlite":
            pytest.skip("SQLite alone has pragmas")
        names = ("journal_mode", "synchronous", "foreign_keys", "query_only", "wal_autocheckpoint")
        return {name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in names}

    full = 2
    writing, reading = await database.write(pragmas), await database.read(pragmas)
    assert (writing["journal_mode"], writing["synchronous"], writing["foreign_keys"]) == ("wal", full, 1)
    assert (reading["journal_mode"], reading["query_only"], reading["wal_autocheckpoint"]) == ("wal", 1, 0)
    with pytest.raises(StorageError, match="readonly"):
        await database.read(lambda c: c.execute(tables.jobs.delete()))


async def test_jobs_of_the_same_second_keep_their_order(metadata: Metadata) -> None:
    names = [f"name-{number}" for number in (5, 3, 9, 1)]
    for name in names:
        await metadata.add_job(job(name=name, created_at=7))
    assert [found.name for found in await metadata.jobs(OURS)] == ["default", *names]


async def test_a_listing_holds_the_first_problems_and_a_single_batch_all(metadata: Metadata) -> None:
    found_problems = [Problem("invalid_type", "é" * 100, None, number)._asdict() for number in range(1, 2001)]
    long = [Problem("model_not_found", "é" * 100_000, None, 1)._asdict()]
    for name, problems in (("many", found_problems), ("few", found_problems[:3]), ("none", []), ("long", long)):
        made = await metadata.add_batch(batch(name))
        await metadata.advance(made, S.FAILED, 11, problems=msgspec.json.encode(problems))
    await metadata.add_batch(batch("sound"))
    page = await metadata.list_batches(OURS, limit=10)
    assert page is not None
    listed = {each.id: each.problems and msgspec.json.decode(each.problems) for each in page.items}
    assert listed == {
        "batch_many": found_problems[:100],
        "batch_few": found_problems[:3],
        "batch_none": [],
        "batch_long": [],
        "batch_sound": None,
    }
    everything = (await found(metadata, "batch_many")).problems
    assert everything is not None
    assert msgspec.json.decode(everything) == found_problems
