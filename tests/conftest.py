"""What holds for every test: nothing blocks an event loop, and a failed property prints how to repeat it.

And what tests of several folders share: the databases, a receiver of webhooks, and the seed of a bed.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from blockbuster import BlockBuster, blockbuster_ctx

from pronghorn.storage.database import Database
from tests.beds import Bed, Scale
from tests.receiver import Receiver
from tests.storing import OpenDatabase, sqlite_at

# A shared machine may be slow at any moment; what a property takes is not what it tests.
hypothesis.settings.register_profile("pronghorn", deadline=None, print_blob=True)
hypothesis.settings.load_profile("pronghorn")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--scale",
        choices=[scale.value for scale in Scale],
        default=Scale.SMALL.value,
        help="how long the test beds of tests/faults run: small (minutes), ci (half an hour) or long (hours)",
    )
    parser.addoption("--seed", type=int, default=None, help="repeat a run of a test bed that printed this seed")


@pytest.fixture
def bed(request: pytest.FixtureRequest) -> Bed:
    """The scale and the seed of a test bed; the seed is printed, so that a failure can be repeated."""
    bed = Bed(Scale(request.config.getoption("--scale")), request.config.getoption("--seed"))
    print(f"repeat with: --scale {bed.scale} --seed {bed.seed}")
    return bed


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database file that holds the schema and nothing else: to copy it is faster than to migrate each test's."""
    path = tmp_path_factory.mktemp("migrated") / "pronghorn.db"
    asyncio.run(Database(sqlite_at(path)).close())
    return path


@pytest.fixture(params=["sqlite"])
async def open_database(request: pytest.FixtureRequest, tmp_path: Path, migrated: Path) -> AsyncIterator[OpenDatabase]:
    """Opens the same database again and again, as a server that starts again does; at most one is open."""
    urls = {"sqlite": sqlite_at(Path(shutil.copy(migrated, tmp_path)))}
    opened: list[Database] = []

    async def open_it() -> Database:
        while opened:
            await opened.pop().close()
        opened.append(await asyncio.to_thread(Database, urls[request.param]))
        return opened[0]

    yield open_it
    for database in opened:
        await database.close()


@pytest.fixture
async def database(open_database: OpenDatabase) -> Database:
    return await open_database()


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with Receiver() as receiver:
        yield receiver


@pytest.fixture(autouse=True)
def blockbuster() -> Iterator[BlockBuster]:
    """Fail a test in which our own code blocks the event loop."""
    with blockbuster_ctx("pronghorn") as found:
        yield found
